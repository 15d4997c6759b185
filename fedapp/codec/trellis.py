"""Dependent quantization: the levels that cost least together, of two quantizers that take turns.

Values are rounded to places half a step apart: the even quantizer holds the even places, the odd one the
odd places and zero. Which of them a level k belongs to follows from the parities of all levels before it:

    place = 2 k - (sign of k in the odd quantizer);  state <- NEXT[state, parity of k]

Places half a step apart are thus coded at about the price of whole steps: cells are those of a dense packing
in many dimensions. The encoder finds the best path through the states by dynamic programming (Viterbi). Each
survivor expects magnitudes from its own past, as the coder will; bits cost what the coder has learned where a
stretch of values begins, and the column means of rows yet to be decided are the best survivor's. Loops do one
thing for all states, as compilers turn these into vector instructions.

Sources: Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources";
Ungerboeck 1982, "Channel coding with multilevel/phase signals" (the code of 32 states); Schwarz et al. 2021,
"Quantization and entropy coding in the Versatile Video Coding (VVC) standard" (parity drives the states, zero
in both quantizers); Haase et al. 2021, "Dependent scalar quantization for neural network compression".
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.lanes import permutation, select
from fedapp.codec.model import (
    CONTEXTS,
    MOST_FACTOR,
    SIGNS,
    SYMBOLS,
    Floats,
    Levels,
    Whole,
    end_row,
    paces,
)
from fedapp.codec.prices import ROWS, price_around, price_signs, price_symbols
from fedapp.jit import jit, spliced

HALF = 16  # states of each quantizer: those from HALF on are the odd one's

_, _DECAY, _NUDGE = paces(dependent=True)  # the row factor changes at each column
_STATES = 2 * HALF
_CHECKS = 0o45, 0o10  # the code's parity checks, of the low and of the high bit of a place modulo 4
_STRETCH, _AHEAD = 512, 48  # values decided at once, and values seen beyond them
_WAS_ODD, _TO_ZERO = _STATES, 2 * _STATES  # marks of branches: to an odd level; to zero, not the even level
_NEVER = np.float32(1e30)


def _automaton() -> NDArray[np.int64]:
    """The next state by state and parity: a systematic convolutional encoder with feedback.

    Its input is the high bit of a place modulo 4, and its state gives the low one: the quantizer. Level 1 of
    the odd quantizer is place 1, and level 2 is place 3, so there the high bit is the parity's opposite.
    """
    following = np.zeros((_STATES, 2), np.int64)
    for state in range(_STATES):
        low, register = state // HALF, state % HALF
        for parity in (0, 1):
            fed = (_CHECKS[0] >> 1) * low ^ (_CHECKS[1] >> 1) * (parity ^ low)
            after = register ^ fed
            following[state, parity] = after % 2 * HALF + after // 2
    return following


NEXT = _automaton()
# Where each state may come from, by the parity of the level before.
_BY_EVEN, _BY_ODD = (np.argsort(NEXT[:, parity]).astype(np.uint8) for parity in (0, 1))
_even, _odd = permutation(_BY_EVEN), permutation(_BY_ODD)

# Where the search has a number for each state. Of survivors: their cost, last place, sum of places in the
# row (decayed, in 1/4096), balance of signs. Of the value: its context, and what bits of zero and of the
# levels around it cost, by parity. Of branches that leave, by parity: cost and place. Of those that arrive,
# by parity: cost, place, and the sum and balance of where they come from. Then prices, four by four.
_COST, _LEFT, _SUM, _LEAN, _CONTEXT, _ZERO, _EVEN, _ODD, _, _BRANCH, _PLACE, _BRANCH_ODD, _PLACE_ODD = (
    _STATES * row for row in range(13)
)
_FROM_EVEN, _FROM_ODD, _FOURS, _TABLE = (_STATES * row for row in (13, 17, 21, 25))
_ROOM = _TABLE + 2 * (ROWS + 1) * CONTEXTS * 4
_four = permutation(range(4))
_by_fours = permutation(4 * state + k for k in range(4) for state in range(_STATES))


@jit
def stretch(begin: Whole, size: Whole) -> Whole:
    """Where the values of a layer end that are decided at once, from `begin` on."""
    return size if begin + _STRETCH + _AHEAD >= size else begin + _STRETCH


@spliced
def _expect(room: Floats, contexts: Levels, ratio: Any, most: Any) -> None:
    """The context of the value for each survivor."""
    for s in range(_STATES):
        e: Any = min(room[_SUM + s] * ratio, most)
        e += (room[_LEFT + s] - e) * np.float32(2.0**-_NUDGE)
        context = (np.float32(e * e).view(np.int32) >> np.int32(23)) - np.int32(127 - 18)
        contexts[s] = min(max(context, np.int32(0)), np.int32(CONTEXTS - 1))


@spliced
def _branch(room: Floats, odd: Whole, a: Any, even: Whole, other: Whole, signs: Floats, minus: Whole) -> None:
    """The branches from each state of a quantizer: to zero or the even level's place, and to the other."""
    zero_off, other_off = np.float32(a * a), np.float32((a - other) ** 2)
    even_off = np.float32((a - even) ** 2) if even else _NEVER
    even_place, other_place = np.float32(even), np.float32(other)
    for s in range(odd * HALF, odd * HALF + HALF):
        lean = room[_LEAN + s]
        sign = signs[minus, 0]
        for k in range(1, SIGNS):
            sign = select(lean >= np.float32(2 * k / SIGNS - 1), signs[minus, k], sign)
        zero, some = zero_off + room[_ZERO + s], even_off + room[_EVEN + s] + sign
        room[_BRANCH + s] = room[_COST + s] + min(zero, some)
        room[_PLACE + s] = select(zero < some, np.float32(0), even_place)
        room[_BRANCH_ODD + s] = room[_COST + s] + other_off + room[_ODD + s] + sign
        room[_PLACE_ODD + s] = other_place


@spliced
def _survive(room: Floats, way: Any, keep: Any, back: NDArray[np.uint8], at: Whole) -> None:
    """The cheaper of the two branches into each state."""
    for k in (0, _STATES):
        _even(room, _FROM_EVEN + k, _BRANCH + k)
        _even(room, _FROM_EVEN + 2 * _STATES + k, _SUM + k)
        _odd(room, _FROM_ODD + k, _BRANCH_ODD + k)
        _odd(room, _FROM_ODD + 2 * _STATES + k, _SUM + k)
    for s in range(_STATES):
        e, o = _FROM_EVEN + s, _FROM_ODD + s
        by_odd = room[e] > room[o]
        to: Any = select(by_odd, room[o + _STATES], room[e + _STATES])
        total = select(by_odd, room[o + 2 * _STATES], room[e + 2 * _STATES])
        lean = select(by_odd, room[o + 3 * _STATES], room[e + 3 * _STATES])
        sent = to > np.float32(0)
        room[_COST + s], room[_LEFT + s] = select(by_odd, room[o], room[e]), to
        room[_SUM + s] = (total + np.float32(4096) * to) * keep
        room[_LEAN + s] = lean + (way - lean) * select(sent, np.float32(1 / 8), np.float32(0))
        mark = select(sent, np.uint8(0), np.uint8(_TO_ZERO))
        back[at, s] = mark + select(by_odd, _BY_ODD[s] + np.uint8(_WAS_ODD), _BY_EVEN[s])


@spliced
def search(
    x: Floats, scale: Any, weight: Any, levels: Levels, begin: Whole, decided: Whole, state: Whole,
    found: Whole, expected: Whole, left: Whole, lean: Whole, column: Levels, intervals: NDArray[np.uint64],
) -> bool:  # fmt: skip
    """Decide places of values x * scale (half steps) of a layer, from `begin` to `decided`.

    `weight`: what a bit costs, in squared half steps. `found`, `expected`, `left` and `lean` are the coder's,
    `column` the means for the row of `begin`, `intervals` what was learned. Places beyond are changed too,
    but not decided. False where a value is not finite or beyond 2^30.
    """
    width, end = len(column), min(len(x), decided + _AHEAD)
    stop, signs = np.empty((2, SYMBOLS, CONTEXTS), np.float32), np.empty((2, SIGNS), np.float32)
    priced = np.zeros((2, ROWS + 1), np.bool_)
    price_symbols(intervals, weight, stop)
    price_signs(intervals, weight, signs)
    back = np.empty((end - begin, _STATES), np.uint8)  # the state before each, _WAS_ODD, _TO_ZERO
    places = np.empty((end - begin, 4), np.int32)  # by parity and quantizer
    mean_of = column.copy()
    room = np.empty(_ROOM, np.float32)
    room[:_CONTEXT] = 0  # finite for all states: next to what is not, nothing is dearer
    contexts = room.view(np.int32)[_CONTEXT : _CONTEXT + _STATES]
    cost, sums, lefts, leans = (
        room[_COST : _COST + _STATES], room[_SUM : _SUM + _STATES], room[_LEFT : _LEFT + _STATES],
        room[_LEAN : _LEAN + _STATES],
    )  # fmt: skip
    cost[:] = _NEVER
    cost[state], sums[state], lefts[state], leans[state] = 0, found, left, lean / 4096
    promise, keep = np.float32(expected), np.float32(1 - 2.0**-_DECAY)
    c: Whole = begin % width
    for j in range(begin, end):
        if c == 0 and j > begin:
            _trace(cost, back, places, levels, begin, max(begin, j - width), j)
            end_row(mean_of, levels[j - width : j], j // width - 1)
            promise = np.float32(mean_of.sum() // width + 1)
            sums[:] = promise
            lefts[:] = 0
            leans[:] = 0
        v = np.float64(x[j]) * scale
        a, minus = abs(v), np.int64(v < 0)
        if not a < 2.0**30 - 4:
            return False

        mean = np.float32(mean_of[c]) * np.float32(1 / 4096)
        ratio, most = mean / promise, mean * np.float32(MOST_FACTOR)
        _expect(room, contexts, ratio, most)
        for odd in range(2):
            m: Whole = np.int64((a + odd) * 0.5)
            row = min(m, ROWS)
            first = _TABLE + (odd * (ROWS + 1) + row) * CONTEXTS * 4
            if not priced[odd, row]:
                price_around(m, stop[odd], weight, contexts, room[first : first + CONTEXTS * 4])
                priced[odd, row] = row < ROWS
            even, other = max(2 * (m + (m & 1)) - odd, 0), 2 * (m + 1 - (m & 1)) - odd
            places[j - begin, odd], places[j - begin, 2 + odd] = even, other
            for s in range(odd * HALF, odd * HALF + HALF):
                _four(room, _FOURS + 4 * s, first + 4 * np.int64(contexts[s]))
        _by_fours(room, _ZERO, _FOURS)
        for odd in range(2):
            _branch(room, odd, a, places[j - begin, odd], places[j - begin, 2 + odd], signs, minus)
        _survive(room, np.float32(1 - 2 * minus), keep, back, j - begin)
        promise = (promise + np.float32(mean_of[c])) * keep
        c = c + 1 if c + 1 < width else 0

    _trace(cost, back, places, levels, begin, begin, end)
    for j in range(begin, decided):
        if x[j] < 0:
            levels[j] = -levels[j]
    return True


@jit
def _trace(
    cost: Floats, back: NDArray[np.uint8], places: Levels, levels: Levels, begin: Whole, first: Whole,
    end: Whole,
) -> None:  # fmt: skip
    """Write magnitudes, from `first` on, of the cheapest path to `end` of those that come from `begin`."""
    state = np.argmin(cost)
    for j in range(end - 1, first - 1, -1):
        branch = np.int64(back[j - begin, state])
        state, parity = branch % _STATES, branch // _WAS_ODD % 2
        levels[j] = 0 if branch >= _TO_ZERO else places[j - begin, 2 * parity + state // HALF]
