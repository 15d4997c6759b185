"""What the coder expects of the magnitudes of a block, when these are known: the encoder's side of it.

Loops do one thing, as compilers turn such into vector instructions. Numba computes with 64 bits: where int32
is said of what comes out, here and in `rounding`, twice as many values are computed at once.
"""

from typing import Any

import numpy as np

from fedapp.codec.model import MOST_FACTOR, Integers, Levels, Whole, row_factor
from fedapp.jit import inlined

_MUCH = 1 << 27  # in 1/256: in the last context still, and within an int32
_LOWER = np.int64((1 << 32) - 1)


@inlined
def factors_of(
    near: Levels, column: Levels, begin: Whole, pace: Whole, decay: Whole, sums: Integers, factors: Levels
) -> None:
    """The row factor of each column of a block."""
    found, expected, n, i = sums[0], sums[1], len(column), 0
    while i < n:
        stop = min(n, i + min(pace, max(1, begin + i)))
        factor, more = np.int32(row_factor(found, expected)), np.int64(0)
        for j in range(i, stop):
            factors[j] = factor
            more += near[j + 1]
            expected += column[j]
        found += more << 12
        found -= found >> decay
        expected -= expected >> decay
        i = stop
    sums[0], sums[1] = found, expected


@inlined
def factors_by_four(
    near: Levels, column: Levels, decay: Whole, sums: Integers, factors: Levels, room: Integers
) -> None:
    """The same where it changes every fourth column, as in most blocks: half as many instructions.

    Pairs of int32 are summed, and written, as int64, and all are divided at once. Quotients of such whole
    numbers, below 2^53 in all they come to, are cut off to the same ones in float64.
    """
    n, found, expected = len(column), sums[0], sums[1]
    of_near, of_column = room[0], room[1]
    nears, columns, pairs = near[1:].view(np.int64), column.view(np.int64), factors[:n].view(np.int64)
    for j in range(n // 2):
        of_near[j] = (nears[j] & _LOWER) + (nears[j] >> 32)
        of_column[j] = (columns[j] & _LOWER) + (columns[j] >> 32)
    for i in range(n // 4):
        k: Any = np.uint64(2 * i)
        came, was = of_near[k] + of_near[k + np.uint64(1)], of_column[k] + of_column[k + np.uint64(1)]
        of_near[np.uint64(i)], of_column[np.uint64(i)] = found << 12, expected
        found += came << 12
        found -= found >> decay
        expected += was
        expected -= expected >> decay
    for i in range(n // 4):
        ratio = np.float64(of_near[i]) / np.float64(of_column[i])
        factor = np.int64(min(ratio, np.float64(MOST_FACTOR << 12)))
        pairs[2 * i] = pairs[2 * i + 1] = factor | factor << 32
    sums[0], sums[1] = found, expected


@inlined
def expect(near: Levels, column: Levels, factors: Levels, nudge: Whole, e: Levels) -> Any:
    """Expected magnitudes of a block, in 1/256; `near` has the magnitude left of each, and one more.
    Returns all their bits.
    """
    bits = np.int32(0)
    for j in range(len(column)):
        product: Whole = np.int64(column[j]) * np.int64(factors[j])
        mean = np.int32(min(product >> 16, _MUCH))
        e[j] = mean + (np.int32((near[j] << np.int32(8)) - mean) >> np.int32(nudge))
        bits = np.int32(bits | e[j])
    return bits
