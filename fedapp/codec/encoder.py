"""Writes the code of a layer (`context`), one block of columns after the other, in loops that do one thing.

Compilers turn such loops into vector instructions. Only the range coder must wait for itself, so its loop is
alone, and is given places in the table of intervals.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.expected import expect, factors_by_four, factors_of
from fedapp.codec.lanes import trailing_zeros
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
from fedapp.jit import borrowing, inlined, jit

Places = NDArray[np.uint16]

ROOM = (15, 2 * BLOCK)  # int32 that the encoder of a layer works in (`layer_encoder`)
_WIDEST = 4 * BLOCK  # words that a block takes at most
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
def _place_small(numbers: Levels, e: Levels, places: Places) -> None:
    """Where symbols lie in the table of their contexts: in most blocks none escapes or has raw bits."""
    for i in range(len(numbers)):
        places[i] = small_context_of(e[i]) * np.int32(SYMBOLS) + numbers[i]


@inlined
def _place(numbers: Levels, odd: Levels, e: Levels, dependent: bool, places: Places, extra: Levels) -> bool:
    """Where symbols lie in the table of their contexts, what more each has to say, and whether one has any.

    Those that are not zero leave low bits, so many; 32 is added for those that escape, which may leave none.
    """
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
    x: Floats, level: Levels, first: Whole, lean: Whole, signs: Levels, leans: Levels, places: Places
) -> tuple[Whole, Whole]:
    """Where signs of levels that are not zero lie in the table, and how many; the balance after them.

    `first` is the first of their contexts; `signs`, of -1 or 0, and `leans` are room. One by one goes only
    what must.
    """
    count = np.uint64(0)
    for begin in range(0, len(level), 64):
        part, left = level[begin : begin + 64], np.uint64(0)
        for i in range(len(part)):
            left |= np.uint64(part[i] > 0) << np.uint64(i)
        while left:
            signs[count] = -np.int32(x[np.uint64(begin) + np.uint64(trailing_zeros(left))] < 0)  # -0.0 is not
            left &= left - np.uint64(1)
            count += np.uint64(1)
    sent = np.int64(count)
    for i in range(sent):
        leans[i] = lean
        lean = lean_after(lean, -np.int64(signs[i]))
    for i in range(sent):
        places[i] = (np.int32(first) + sign_context(leans[i])) * np.int32(SYMBOLS) - signs[i]
    return sent, lean


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

    It works in `room`, of `ROOM`, and in `level`, as long as a row. False: no room in `words`, or, with -1 as
    the coder's place, values that are not finite or too large.
    """
    (pace, decay, nudge), first_sign = paces(dependent), SIGNS_FROM[dependent]

    @(jit if dependent else borrowing)  # a search makes arrays
    def layer(
        updates: Floats, scale: Any, edge: Floats, levels: Levels, column: Levels, units: Integers,
        reached: Integers, weight: Integers, counts: NDArray[np.uint16], intervals: NDArray[np.uint64],
        coder: Integers, words: Words, beyond: Beyond, room: Levels, level: Levels,
    ) -> bool:  # fmt: skip
        width, size = len(column), updates.size
        rules, rule = room[0].view(np.float32), room[1].view(np.float32)  # of contexts, and of values
        magnitude, begins = room[2].view(np.float32), room[10].view(np.float32)
        odd, numbers = room[3], room[4]  # whose turn it is, and the numbers of places there (`_take_turns`)
        near, e = room[5][1:], room[6]  # magnitudes as they count for others, and what they expect
        factors, wide = room[7], room[8:10].view(np.int64)
        places, extra = room[11].view(np.uint16), room[12]  # of symbols and signs; more that they have to say
        sums = room[13][:4].view(np.int64)
        flag = room[14].view(np.uint16)[:1]  # where a flag's symbol lies
        least = np.float32(0)  # where the first level begins at the earliest
        state: Whole = 0
        searched: Whole = 0
        seen: Whole = 0
        since: Whole = 0
        bits = np.int32(0)
        if not dependent:
            least = begin_levels(reached, edge, rules)
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
                        least = begin_levels(reached, edge, rules)
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
                    for i in range(n):
                        some[i] = abs(levels[row, begin + i])
                        near[i + 1] = min(some[i], most)
                    state = _take_turns(some, state, odd, numbers)
                else:
                    good, filled = magnitudes_of(x, scale, least, magnitude)
                    if not good:
                        coder[2] = -1
                        return False
                    total = promise(means)
                    at_flag = np.uint64((FLAGS_FROM + flag_context(total, factor)) * SYMBOLS)
                    flags = intervals[at_flag : at_flag + np.uint64(2)]
                    if filled:
                        bits = round_block(
                            magnitude[:n], means, total, sums[0], sums[1], most, rules, e, rule,
                            begins, some, near[1 : n + 1],
                        )  # fmt: skip
                        filled = bits > 0 and worth_it(magnitude[:n], some, begins, edge[-1], flags)
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
                if pace == 4 and begin >= pace and n % pace == 0:
                    factors_by_four(near[: n + 1], means, decay, sums, factors, wide)
                else:
                    factors_of(near, means, begin, pace, decay, sums, factors)
                of_e = expect(near, means, factors, nudge, e)
                near[0] = near[n]
                said = numbers[:n] if dependent else some
                large = dependent or bits >= ESCAPE or of_e >= 1 << FIRST_RAW
                if large:
                    large = _place(said, odd, e, dependent, places, extra)
                else:
                    _place_small(said, e, places)
                sent, lean = _place_signs(x, some, first_sign, lean, factors, e, places[n:])
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
