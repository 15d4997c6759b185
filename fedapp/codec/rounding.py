"""To which levels the encoder of the default codec rounds: where distance and bits cost least together.

Source: Sullivan and Wiegand 1998, "Rate-distortion optimization for video compression".
"""

from typing import Any

import numpy as np

from fedapp.codec.model import CONTEXTS, MOST, ONE, UPPER, Floats, Integers, Levels, Whole, low_bits
from fedapp.jit import inlined

_SELDOM = np.float32(0.02 * 2**ONE)  # empty blocks: then nobody asks whether one had better be empty

Beyond = Integers  # how far values lie beyond levels of 1, and above, in 1/256 steps; how many each


@inlined
def begin_levels(reached: Integers, edge: Floats, begins: Floats, mores: Floats) -> Any:
    """Where level 1 begins in each context; and what is added to larger magnitudes before they are cut off.
    Returns where it begins at the earliest.

    `edge` says by ten bits of what was learned how far above m - 1 level m begins: 1024 entries for m = 1,
    then for m > 1. Without a preference integers come through as they are, up to 2^23.
    """
    for context in range(CONTEXTS):
        one, two, three = reached[context, 1], reached[context, 2], reached[context, 3]
        begins[context] = edge[min(one >> 20, 1023)]
        more = edge[1024 + min((three << 10) // max(two, 1), 1023)]
        mores[context] = np.float32(1) - more if low_bits(context, False) == 0 else np.float32(0.5)
    return begins.min()


@inlined
def magnitudes_of(x: Floats, scale: Any, begin: Any, magnitude: Floats) -> tuple[bool, bool]:
    """Those of x * scale. Whether all are finite and within the largest level; if any reaches `begin`."""
    good, some = True, False
    for i in range(len(x)):
        a = abs(x[i] * scale)
        magnitude[i] = a
        good &= a <= np.float32(MOST)
        some |= a >= begin
    return good, some


@inlined
def _half_octave(e: Any) -> Whole:
    """About the context of an expected magnitude."""
    c = (np.float32(e * e).view(np.int32) >> np.int32(23)) - np.int32(127 - 18)
    return min(max(c, np.int32(0)), np.int32(CONTEXTS - 1))


@inlined
def round_block(
    magnitude: Floats, column: Levels, promised: Whole, found: Whole, expected: Whole, most: Any,
    begins: Floats, mores: Floats, work: Floats, level: Levels,
) -> bool:  # fmt: skip
    """Levels, without signs, of a block of a row, of which so much was found and expected before it.
    Returns whether any is not zero.

    What the encoder alone decides need not wait for what the decoder will know: each value is rounded as in
    the context to expect of it without its left neighbour, but with what the block itself has in the row
    factor. `most` of a magnitude counts for others; `work` is room for three blocks.
    """
    n, came, some = len(magnitude), np.int64(0), np.int32(0)
    unit = np.float32(1 / 4096)
    usual = _half_octave(np.float32(promised // n) * (np.float32(found) / np.float32(expected) * unit))
    for i in range(n):
        m = np.int32(min(magnitude[i], most) + mores[usual])
        came += m * np.int32(magnitude[i] >= begins[usual])
    factor = np.float32(2 * found + (came << 12)) / np.float32(2 * expected + promised) * unit
    begin, more, context = work[0], work[1], work[2].view(np.int32)
    for i in range(n):
        context[i] = _half_octave(np.float32(column[i]) * factor)
    for i in range(n):
        c = np.uint64(context[i])
        begin[i], more[i] = begins[c], mores[c]
    for i in range(n):
        m = max(np.int32(magnitude[i] + more[i]), np.int32(1))
        level[i] = m * np.int32(magnitude[i] >= begin[i])
        some |= level[i]
    return bool(some > 0)


@inlined
def worth_it(magnitude: Floats, level: Levels, begin: Floats, weight: Any, flags: Any) -> bool:
    """Whether the levels of a block save more distance than they, and its flag, cost in bits.

    `flags`: intervals of the flag of an empty block, and of any other. Most of what a level costs is in where
    it begins. What the flag costs more than that of an empty block are odds, up to 4 bits: else what has
    become rare becomes rarer still. Where that is much few levels are in a block, and the zeros beside a lone
    one cost log2(e).
    """
    none, some = np.float32(flags[0] >> UPPER), np.float32(flags[1] >> UPPER)
    if weight == 0 or none < _SELDOM:
        return True
    saved = np.int64(0)  # in 1/256
    for i in range(len(magnitude)):
        a, q = min(magnitude[i], np.float32(1024)), np.float32(min(level[i], np.int32(1024)))
        gain = q * (a + a - q) - (begin[i] + begin[i] - np.float32(1))
        saved += np.int32(gain * np.float32(256)) * (q > 0)
    return bool(saved >= 256 * weight * (min(np.log2(none / some), 4.0) + 1.44))


@inlined
def add_beyond(magnitude: Floats, level: Levels, beyond: Beyond) -> None:
    """Take in how far the magnitudes of a block lie beyond their levels."""
    ones, more, of_ones, of_more = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for i in range(len(magnitude)):
        off = np.int32((magnitude[i] - np.float32(level[i])) * np.float32(256))
        one, above = np.int32(level[i] == 1), np.int32(level[i] > 1)
        ones, more, of_ones, of_more = ones + one, more + above, of_ones + off * one, of_more + off * above
    beyond[0] += of_ones
    beyond[1] += of_more
    beyond[2] += ones
    beyond[3] += more
