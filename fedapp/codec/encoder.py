"""Writes the code of a layer (`context`), one block of columns after the other, in loops that do one thing.

Compilers turn such loops into vector instructions. Only the range coder must wait for itself, so its loop is
alone, and is given places in the table of intervals.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.model import (
    BLOCK,
    CONTEXTS,
    ESCAPE,
    FIRST_RAW,
    FLAGS_FROM,
    SIGNS_FROM,
    SYMBOLS,
    Floats,
    Integers,
    Levels,
    Whole,
    Words,
    after_empty,
    block,
    context_of,
    due,
    end_row,
    flag_context,
    lean_after,
    learn,
    low_bits,
    most_nearby,
    paces,
    promise,
    row_factor,
    sign_context,
    small_context_of,
)
from fedapp.codec.range_coder import WORD, narrow, raw_bits, shift
from fedapp.codec.rounding import Beyond, add_beyond, begin_levels, magnitudes_of, round_block, worth_it
from fedapp.codec.trellis import HALF, NEXT, search, stretch
from fedapp.jit import inlined, jit

Places = NDArray[np.uint16]

_MUCH = 1 << 27  # in 1/256: in the last context still, and within an int32
_WIDEST = 8 * BLOCK  # words that a block takes at most
_MANY = 64  # rows from which on every fourth tells where points lie


def _symbol_writer(large: bool) -> Callable[..., None]:
    """What writes symbols: `large` where some have more to say of their numbers (`extra`, of `_place`)."""

    @inlined
    def write(
        numbers: Levels, extra: Levels, places: Places, counts: NDArray[np.uint16],
        intervals: NDArray[np.uint64], coder: Integers, words: Words,
    ) -> None:  # fmt: skip
        low, span, at = coder[0], coder[1], coder[2]
        for i in range(len(places)):
            k = np.uint64(places[i])
            low, span = narrow(True, intervals[k], low, span)
            counts[np.uint64(i) & np.uint64(1), k] += np.uint16(1)
            if span < WORD:
                low, span, at = shift(True, low, span, at, words)
            if large and extra[i]:
                raw, rest, size = np.int64(extra[i]) & 31, np.int64(numbers[i]) - 1, 0
                beyond = (rest >> raw) + 2 - ESCAPE
                if beyond > 0:  # an escape: how many bits, then the bits
                    while beyond >> size:
                        size += 1
                    _, low, span, at = raw_bits(True, size, 5, low, span, at, words)
                    _, low, span, at = raw_bits(True, beyond, size, low, span, at, words)
                span >>= raw
                low += (rest & ((1 << raw) - 1)) * span
                if span < WORD:
                    low, span, at = shift(True, low, span, at, words)
        coder[0], coder[1], coder[2] = low, span, at

    return write


_write, _write_large = _symbol_writer(False), _symbol_writer(True)


@inlined
def _sign(x: Floats, some: Levels, level: Levels) -> None:
    """Magnitudes with the signs of values."""
    for i in range(len(x)):
        level[i] = -some[i] if x[i] < 0 else some[i]


@inlined
def _expect(
    near: Levels, column: Levels, begin: Whole, pace: Whole, decay: Whole, nudge: Whole, sums: Integers,
    factors: Levels, e: Levels,
) -> None:  # fmt: skip
    """Expected magnitudes of a block, in 1/256; `near` has the magnitude left of each, and one more."""
    found, expected, n, i = sums[0], sums[1], len(column), 0
    while i < n:
        stop = min(n, i + min(pace, max(1, begin + i)))
        factor, more = np.int32(row_factor(found, expected)), np.int64(0)
        if stop == i + 4:  # unrolled by hand: compilers do not see that most are
            one = np.uint64(i)
            two, three, four = one + np.uint64(1), one + np.uint64(2), one + np.uint64(3)
            factors[one] = factors[two] = factors[three] = factors[four] = factor
            more += near[two] + near[three] + near[four] + near[one + np.uint64(4)]
            expected += column[one] + column[two] + column[three] + column[four]
        else:
            for j in range(i, stop):
                factors[j] = factor
                more += near[j + 1]
                expected += column[j]
        found += more << 12
        found -= found >> decay
        expected -= expected >> decay
        i = stop
    sums[0], sums[1] = found, expected
    for j in range(n):
        product: Whole = np.int64(column[j]) * np.int64(factors[j])
        mean = np.int32(min(product >> 16, _MUCH))
        e[j] = mean + (((near[j] << np.int32(8)) - mean) >> np.int32(nudge))


@inlined
def _place(numbers: Levels, odd: Levels, e: Levels, dependent: bool, places: Places, extra: Levels) -> bool:
    """Where symbols lie in the table of their contexts, what more each has to say, and whether one has any.

    Those that are not zero leave low bits, so many; 32 is added for those that escape, which may leave none.
    """
    if not dependent:
        many = np.int32(0)  # at least the largest, and 16 where any may have raw bits
        for i in range(len(numbers)):
            many |= numbers[i] | (e[i] >> np.int32(FIRST_RAW)) << np.int32(4)
        if many < np.int32(ESCAPE):  # as in most blocks
            for i in range(len(numbers)):
                places[i] = small_context_of(e[i]) * np.int32(SYMBOLS) + numbers[i]
            return False
    large = np.int32(0)
    for i in range(len(numbers)):
        context = context_of(e[i])
        raw = low_bits(context, dependent)
        symbol = ((numbers[i] - np.int32(1)) >> raw) + np.int32(1)
        escapes = np.int32(symbol >= np.int32(ESCAPE))
        extra[i] = (raw + (escapes << np.int32(5))) * np.int32(numbers[i] > np.int32(0))
        large |= extra[i]
        if dependent:
            context += odd[i] * np.int32(CONTEXTS)
        places[i] = context * np.int32(SYMBOLS) + min(symbol, np.int32(ESCAPE))
    return bool(large > 0)


@inlined
def _place_signs(
    x: Floats, level: Levels, first: Whole, lean: Whole, some: Levels, places: Places
) -> tuple[Whole, Whole]:
    """Where signs of levels that are not zero lie in the table, and how many; the balance after them.

    `first` is the first of their contexts, `some` is room.
    """
    count = 0
    for i in range(len(level)):
        some[np.uint64(count)] = x[i] < 0
        count += level[i] > 0
    for i in range(count):
        minus = np.int64(some[i])
        places[i] = (first + sign_context(lean)) * SYMBOLS + minus
        lean = lean_after(lean, minus)
    return count, lean


@inlined
def _take_turns(level: Levels, state: Whole, odd: Levels, numbers: Levels) -> Whole:
    """Whose turn each place is, and its number there; the state after them."""
    for i in range(len(level)):
        odd[i] = state // HALF
        numbers[i] = (level[i] + odd[i]) >> np.int32(1)
        state = NEXT[np.uint64(state), np.uint64(numbers[i] & np.int32(1))]
    return state


def layer_encoder(dependent: bool) -> Callable[..., bool]:
    """The encoder of one layer; with `dependent` quantizers levels are places (`trellis`).

    False: no room in `words`, or, with -1 as the coder's place, values that are not finite or too large.
    """
    (pace, decay, nudge), first_sign = paces(dependent), SIGNS_FROM[dependent]

    @jit
    def layer(
        updates: Floats, scale: Any, edge: Floats, levels: Levels, column: Levels, units: Integers,
        reached: Integers, weight: Integers, counts: NDArray[np.uint16], intervals: NDArray[np.uint64],
        coder: Integers, words: Words, beyond: Beyond,
    ) -> bool:  # fmt: skip
        width, size = len(column), updates.size
        begins, mores = np.empty(CONTEXTS, np.float32), np.empty(CONTEXTS, np.float32)
        magnitude, work = np.empty(BLOCK, np.float32), np.empty((3, BLOCK), np.float32)
        odd = np.empty(BLOCK, np.int32)  # whose turn it is, and the numbers of places there (`_take_turns`)
        numbers = np.empty(BLOCK, np.int32)
        near, e = np.empty(BLOCK + 1, np.int32), np.empty(BLOCK, np.int32)  # for others; what they expect
        room, places = np.empty(BLOCK + 1, np.int32), np.empty(2 * BLOCK, np.uint16)
        extra = np.empty(2 * BLOCK, np.int32)
        level, sums = np.empty(width, np.int32), np.empty(2, np.int64)  # a row's, without signs
        flag = np.empty(1, np.uint16)  # where a flag's symbol lies
        least = np.float32(0)  # where the first level begins at the earliest
        state: Whole = 0
        searched: Whole = 0
        seen: Whole = 0
        since: Whole = 0
        if not dependent:
            least = begin_levels(reached, edge, begins, mores)
        for row in range(len(units)):
            promised = column.sum() // width + 1
            sums[:] = promised  # what came in this row, and what its columns promise
            near[0] = 0
            lean: Whole = 0
            begin: Whole = 0
            while begin < width:
                if coder[2] + _WIDEST > len(words):
                    return False
                if since >= due(seen):
                    learn(reached, weight, counts, intervals)
                    seen, since = seen + since, 0
                    if not dependent:
                        least = begin_levels(reached, edge, begins, mores)
                end = min(width, begin + block(row, begin))
                if dependent:
                    at = row * width + begin
                    if at == searched:
                        searched = stretch(at, size)
                        if not search(
                            updates.reshape(-1), scale, edge[0], levels.reshape(-1), at, searched, state,
                            sums[0], sums[1], near[0], lean, column, intervals,
                        ):  # fmt: skip
                            coder[2] = -1
                            return False
                    end = min(end, begin + searched - at)
                n, x, means, some = end - begin, updates[row, begin:end], column[begin:end], level[begin:end]
                factor = row_factor(sums[0], sums[1])
                most = most_nearby(promised, factor)
                if dependent:
                    some[:] = np.abs(levels[row, begin:end])
                    state = _take_turns(some, state, odd, numbers)
                else:
                    good, filled = magnitudes_of(x, scale, least, magnitude)
                    if not good:
                        coder[2] = -1
                        return False
                    total = promise(means)
                    at_flag = np.uint64((FLAGS_FROM + flag_context(total, factor)) * SYMBOLS)
                    flags = intervals[at_flag : at_flag + np.uint64(2)]
                    filled = filled and round_block(
                        magnitude[:n], means, total, sums[0], sums[1], np.float32(most), begins, mores, work,
                        some,
                    )  # fmt: skip
                    filled = filled and worth_it(magnitude[:n], some, work[0], edge[-1], flags)
                    flag[0] = at_flag + np.uint64(filled)
                    _write(some, extra, flag, counts, intervals, coder, words)  # the first two are not read
                    if not filled:
                        sums[0], sums[1] = after_empty(total, n, sums[0], sums[1])
                        some[:] = near[0] = 0
                        if levels.size:
                            levels[row, begin:end] = 0
                        begin = end
                        since += 1
                        continue
                    if row % 4 == 0 or len(units) < _MANY:
                        add_beyond(magnitude[:n], some, beyond)
                for i in range(n):
                    near[i + 1] = min(some[i], most)
                _expect(near[: n + 1], means, begin, pace, decay, nudge, sums, room, e)
                near[0] = near[n]
                said = numbers[:n] if dependent else some
                large = _place(said, odd, e, dependent, places, extra)
                sent, lean = _place_signs(x, some, first_sign, lean, room, places[n:])
                if large:
                    extra[n : n + sent] = 0
                    _write_large(said, extra, places[: n + sent], counts, intervals, coder, words)
                else:
                    _write(said, extra, places[: n + sent], counts, intervals, coder, words)
                if levels.size and not dependent:
                    _sign(x, some, levels[row, begin:end])
                begin = end
                since += n
            units[row] = end_row(column, level, row)
        learn(reached, weight, counts, intervals)
        return True

    return layer
