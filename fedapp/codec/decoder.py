"""Reads the code of a layer (`context`)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.model import (
    BLOCK,
    CONTEXTS,
    ESCAPE,
    FLAGS_FROM,
    LOW,
    MOST,
    ONE,
    SIGNS_FROM,
    SYMBOLS,
    Integers,
    Levels,
    Whole,
    Words,
    after_empty,
    block,
    context_in,
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
)
from fedapp.codec.range_coder import WORD, narrow, raw_bits, shift
from fedapp.codec.trellis import HALF, NEXT, stretch
from fedapp.jit import inlined, jit


@inlined
def _binary(
    context: Whole, intervals: NDArray[np.uint64], counts: NDArray[np.uint16], low: Whole, span: Whole
) -> tuple[Whole, Whole, Whole]:
    """A symbol that is 0 or 1. The caller is to see that `low` is within `span` then: else it is neither."""
    k = np.uint64(context * SYMBOLS)
    one = np.int64(low < np.int64(intervals[k] & LOW) * (span >> ONE))
    k += np.uint64(one)
    counts[k] += np.uint16(1)
    low, span = narrow(False, intervals[k], low, span)
    return one, low, span


def layer_decoder(dependent: bool) -> Callable[..., bool]:
    """The decoder of one layer, of `layer_encoder`; False where no encoder made it."""
    pace, decay, nudge = paces(dependent)
    largest, first_sign = MOST // 2 if dependent else MOST, SIGNS_FROM[dependent]

    @jit
    def layer(
        levels: Levels, column: Levels, units: Integers, reached: Integers, weight: Integers,
        counts: NDArray[np.uint16], intervals: NDArray[np.uint64], coder: Integers, words: Words,
    ) -> bool:  # fmt: skip
        low, span, at = coder[0], coder[1], coder[2]
        width, size = len(column), levels.size
        sent = np.empty(BLOCK, np.int32)
        state: Whole = 0
        searched: Whole = 0
        seen: Whole = 0
        since: Whole = 0
        for row in range(len(units)):
            level = levels[row]
            promised = column.sum() // width + 1
            found, expected = promised, promised
            lean: Whole = 0
            left: Whole = 0
            begin: Whole = 0
            while begin < width:
                if since >= due(seen):
                    learn(reached, weight, counts, intervals)
                    seen, since = seen + since, 0
                end = min(width, begin + block(row, begin))
                factor = row_factor(found, expected)
                if dependent:
                    if row * width + begin == searched:
                        searched = stretch(searched, size)
                    end = min(end, searched - row * width)
                else:
                    total = promise(column[begin:end])
                    flag = FLAGS_FROM + flag_context(total, factor)
                    filled, low, span = _binary(flag, intervals, counts[0], low, span)
                    if not 0 <= low < span:
                        return False
                    if span < WORD:
                        low, span, at = shift(False, low, span, at, words)
                    if not filled:
                        found, expected = after_empty(total, end - begin, found, expected)
                        level[begin:end] = 0
                        left, begin = 0, end
                        since += 1
                        continue
                most = most_nearby(promised, factor)
                count, turn = 0, begin + min(pace, max(1, begin))  # where the row factor changes
                for c in range(begin, end):
                    if c == turn:
                        found -= found >> decay
                        expected -= expected >> decay
                        factor, turn = row_factor(found, expected), c + min(pace, max(1, c))
                    u = np.uint64(c)
                    mean = np.int64(column[u])
                    e = (mean * factor) >> 16
                    e += ((left << 8) - e) >> nudge
                    context = context_in(e)
                    odd = state // HALF if dependent else 0
                    k = np.uint64((context + odd * CONTEXTS) * SYMBOLS)
                    unit = span >> ONE
                    m: Whole = 0
                    if low >= np.int64(intervals[k] & LOW) * unit:
                        low, span = narrow(False, intervals[k], low, span)
                        counts[u & np.uint64(1), k] += np.uint16(1)
                        if span < WORD:
                            if low >= span:
                                return False
                            low, span, at = shift(False, low, span, at, words)
                        level[u] = 0
                        left = 0
                    else:
                        symbol: Whole = 1
                        k += np.uint64(1)
                        while low < np.int64(intervals[k] & LOW) * unit and symbol < ESCAPE:
                            symbol += 1
                            k += np.uint64(1)
                        low, span = narrow(False, intervals[k], low, span)
                        counts[u & np.uint64(1), k] += np.uint16(1)
                        if span < WORD:
                            low, span, at = shift(False, low, span, at, words)
                        if symbol == ESCAPE:
                            bits: Whole = 0
                            rest: Whole = 0
                            bits, low, span, at = raw_bits(False, 0, 5, low, span, at, words)
                            rest, low, span, at = raw_bits(False, 0, bits, low, span, at, words)
                            if rest >> max(bits - 1, 0) != 1:
                                return False
                            symbol = rest + ESCAPE - 1
                        m = symbol
                        raw = np.int64(low_bits(context, dependent))
                        if raw:
                            span >>= raw
                            rest = min(low // span, (1 << raw) - 1)
                            low -= rest * span
                            m = ((symbol - 1) << raw | rest) + 1
                            if span < WORD:
                                low, span, at = shift(False, low, span, at, words)
                        if not 0 < m <= largest:
                            return False
                        far = 2 * m - odd if dependent else m
                        level[u] = far
                        left = np.int64(min(far, most))
                        found += left << 12
                        sent[np.uint64(count)] = c
                        count += 1
                    if dependent:
                        state = NEXT[np.uint64(state), np.uint64(m & 1)]
                    expected += mean
                if not dependent and not count:
                    return False  # an encoder would have flagged it as empty
                found -= found >> decay
                expected -= expected >> decay
                for i in range(count):
                    sign = first_sign + sign_context(lean)
                    minus, low, span = _binary(
                        sign, intervals, counts[np.uint64(i) & np.uint64(1)], low, span
                    )
                    if span < WORD:
                        if not 0 <= low < span:
                            return False
                        low, span, at = shift(False, low, span, at, words)
                    lean = lean_after(lean, minus)
                    u = np.uint64(sent[np.uint64(i)])
                    level[u] *= np.int32(1 - 2 * minus)
                if not 0 <= low < span:
                    return False  # intervals do not fill their space: no encoder points at the rest
                since += end - begin
                begin = end
            units[row] = end_row(column, level, row)
        learn(reached, weight, counts, intervals)
        coder[0], coder[1], coder[2] = low, span, at
        return True

    return layer
