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
def begin_levels(reached: Integers, edge: Floats, rules: Floats) -> Any:
    """Where level 1 begins in each context, and what is added to larger magnitudes before they are cut off:
    by turns, so that both are looked up at once. Returns where it begins at the earliest.

    `edge` says by ten bits of what was learned how far above m - 1 level m begins: 1024 entries for m = 1,
    then for m > 1. Without a preference integers come through as they are, up to 2^23.
    """
    least: Any = np.float32(np.inf)
    for context in range(CONTEXTS):
        one, two, three = reached[context, 1], reached[context, 2], reached[context, 3]
        begin = edge[min(one >> 20, 1023)]
        more = edge[1024 + min((three << 10) // max(two, 1), 1023)]
        rules[2 * context] = begin
        rules[2 * context + 1] = np.float32(1) - more if low_bits(context, False) == 0 else np.float32(0.5)
        least = min(least, begin)
    return least


@inlined
def magnitudes_of(x: Floats, scale: Any, begin: Any, magnitude: Floats) -> tuple[bool, bool]:
    """Those of x * scale. Whether all are finite and within the largest level; if any reaches `begin`."""
    largest, bits = np.int32(0), magnitude.view(np.int32)  # as integers in the same order, NaN above all
    for i in range(len(x)):
        magnitude[i] = abs(x[i] * scale)
        largest = max(largest, bits[i])
    good = largest <= np.float32(MOST).view(np.int32)
    return bool(good), bool(largest >= np.float32(begin).view(np.int32))


@inlined
def _half_octave(e: Any) -> Whole:
    """About the context of an expected magnitude."""
    c = np.int32((np.float32(e * e).view(np.int32) >> np.int32(23)) - np.int32(127 - 18))
    return min(max(c, np.int32(0)), np.int32(CONTEXTS - 1))


@inlined
def round_block(
    magnitude: Floats, column: Levels, promised: Whole, found: Whole, expected: Whole, most: Any,
    rules: Floats, contexts: Levels, rule: Floats, begins: Floats, level: Levels, near: Levels,
) -> Any:  # fmt: skip
    """Levels, without signs, of a block of a row, of which so much was found and expected before it; and
    `near`, what they count for others, `most` at most. Returns all bits of the levels.

    What the encoder alone decides need not wait for what the decoder will know: each value is rounded as in
    the context to expect of it without its left neighbour, but with what the block itself has in the row
    factor. `rules` are of `begin_levels`; where level 1 begins for each value goes to `begins`. `rule` and
    `contexts` are room.
    """
    n, came, bits = len(magnitude), np.int32(0), np.int32(0)
    unit = np.float32(1 / 4096)
    usual = _half_octave(np.float32(promised // n) * (np.float32(found) / np.float32(expected) * unit))
    for i in range(n):
        m = np.int32(min(magnitude[i], np.float32(most)) + rules[2 * usual + 1])
        came = np.int32(came + m * np.int32(magnitude[i] >= rules[2 * usual]))
    factor = np.float32(2 * found + (np.int64(came) << 12)) / np.float32(2 * expected + promised) * unit
    table, both = rules.view(np.int64), rule.view(np.int64)
    for i in range(n):
        contexts[i] = _half_octave(np.float32(column[i]) * factor)
    for i in range(n):
        both[i] = table[np.uint64(contexts[i])]
    for i in range(n):
        begin, more = rule[2 * i], rule[2 * i + 1]
        begins[i] = begin
        m = max(np.int32(magnitude[i] + more), np.int32(1))
        level[i] = m * np.int32(magnitude[i] >= begin)
        near[i] = min(level[i], most)
        bits = np.int32(bits | level[i])
    return bits


@inlined
def worth_it(magnitude: Floats, level: Levels, begins: Floats, weight: Any, flags: Any) -> bool:
    """Whether the levels of a block save more distance than they, and its flag, cost in bits.

    `flags`: intervals of the flag of an empty block, and of any other. Most of what a level costs is in where
    it begins. What the flag costs more than that of an empty block are odds, up to 4 bits: else what has
    become rare becomes rarer still. Where that is much few levels are in a block, and the zeros beside a lone
    one cost log2(e).
    """
    none, some = np.float32(flags[0] >> UPPER), np.float32(flags[1] >> UPPER)
    if weight == 0 or none < _SELDOM:
        return True
    saved = np.int32(0)  # in 1/256
    for i in range(len(magnitude)):
        a, q = min(magnitude[i], np.float32(64)), np.float32(min(level[i], np.int32(64)))
        gain = q * (a + a - q) - (begins[i] + begins[i] - np.float32(1))
        saved = np.int32(saved + np.int32(gain * np.float32(256)) * np.int32(q > 0))
    return bool(saved >= 256 * weight * (min(np.log2(none / some), 4.0) + 1.44))


@inlined
def add_beyond(magnitude: Floats, level: Levels, beyond: Beyond) -> None:
    """Take in how far the magnitudes of a block lie beyond their levels."""
    ones, more, of_ones, of_more = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for i in range(len(magnitude)):
        off = np.int32((magnitude[i] - np.float32(level[i])) * np.float32(256))
        one, above = np.int32(level[i] == 1), np.int32(level[i] > 1)
        ones, more = np.int32(ones + one), np.int32(more + above)
        of_ones, of_more = np.int32(of_ones + off * one), np.int32(of_more + off * above)
    beyond[0] += of_ones
    beyond[1] += of_more
    beyond[2] += ones
    beyond[3] += more
