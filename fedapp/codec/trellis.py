"""Dependent quantization: the levels that cost least together, of two quantizers that take turns.

Values are rounded to places half a step apart: the even quantizer holds the even places, the odd one the
odd places and zero. Which of them a level k belongs to follows from the parities of all levels before it:

    place = 2 k - (sign of k in the odd quantizer);  state <- NEXT[state, parity of k]

Places half a step apart are thus coded at about the price of whole steps: cells are those of a dense packing
in many dimensions. The encoder finds the best path through the states by dynamic programming (Viterbi). Each
survivor expects magnitudes from its own past, as the coder will; bits cost what the coder has learned where a
stretch of values begins, and the column means of rows yet to be decided are the best survivor's.

Sources: Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources";
Ungerboeck 1982, "Channel coding with multilevel/phase signals" (the code of 32 states); Schwarz et al. 2021,
"Quantization and entropy coding in the Versatile Video Coding (VVC) standard" (parity drives the states, zero
in both quantizers); Haase et al. 2021, "Dependent scalar quantization for neural network compression".
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.model import (
    CONTEXTS,
    ESCAPE,
    MOST_FACTOR,
    ONE,
    SIGNS,
    SIGNS_FROM,
    SYMBOLS,
    UPPER,
    Floats,
    Levels,
    Whole,
    end_row,
    low_bits,
    paces,
)
from fedapp.jit import jit

HALF = 16  # states of each quantizer: those from HALF on are the odd one's

_, _DECAY, _NUDGE = paces(dependent=True)  # the row factor changes at each column
_STATES = 2 * HALF
_CHECKS = 0o45, 0o10  # the code's parity checks, of the low and of the high bit of a place modulo 4
_STRETCH, _AHEAD = 512, 48  # values decided at once, and values seen beyond them
_ROWS = 32  # magnitudes whose prices are in the table
_ZERO = 64  # marks a branch that goes to zero, wherever its even level lies
_NEVER = np.float32(1e30)
_FIRST_SIGN = SIGNS_FROM[True]
_BITS = -np.log2(np.maximum(np.arange(4096) + 0.5, 1) / 4096).astype(
    np.float32
)  # by twelve bits of a probability


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
# The two branches into each state; branch = state it comes from + _STATES * parity.
_INTO = np.argsort(NEXT.T.ravel(), kind="stable").reshape(_STATES, 2)


@jit
def stretch(begin: Whole, size: Whole) -> Whole:
    """Where the values of a layer end that are decided at once, from `begin` on."""
    return size if begin + _STRETCH + _AHEAD >= size else begin + _STRETCH


@jit
def _price(intervals: NDArray[np.uint64], weight: Any, stop: Floats, price: Floats) -> None:
    """Weighted bits of magnitudes without signs: `stop` by quantizer, symbol and context, and `price` by
    quantizer, magnitude and context."""
    for odd in range(2):
        for context in range(CONTEXTS):
            first, raw = (odd * CONTEXTS + context) * SYMBOLS, low_bits(context, True)
            for symbol in range(SYMBOLS):
                share = np.int64(intervals[first + symbol] >> UPPER)
                bits = _BITS[share >> (ONE - 12)] + np.float32(raw if symbol else 0)
                stop[odd, symbol, context] = weight * (bits + np.float32(5 if symbol == ESCAPE else 0))
        for m in range(_ROWS):
            _row(stop, weight, odd, m, 0, CONTEXTS - 1, price[odd, m])


@jit
def _row(stop: Floats, weight: Any, odd: Whole, m: Whole, lowest: Whole, highest: Whole, row: Floats) -> None:
    """Prices of one magnitude in contexts from lowest to highest."""
    for context in range(lowest, highest + 1):
        symbol = ((m - 1) >> low_bits(context, True)) + 1 if m else 0
        row[context] = stop[odd, min(symbol, ESCAPE), context]
        if symbol >= ESCAPE:
            row[context] += weight * np.float32(np.log2(symbol - ESCAPE + 1.5))


@jit
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
    stop = np.empty((2, SYMBOLS, CONTEXTS), np.float32)
    price = np.empty((2, _ROWS, CONTEXTS), np.float32)
    far = np.empty((2, CONTEXTS), np.float32)  # two rows of the table, for magnitudes beyond it
    _price(intervals, weight, stop, price)
    back = np.empty((end - begin, _STATES), np.uint8)  # the branch into each state, and _ZERO
    places = np.empty((end - begin, 4), np.int32)  # by parity and quantizer
    mean_of = column.copy()

    # Survivors: their cost, sum of places in the row (decayed, in 1/4096), last place, balance of signs, and
    # what its sign costs; context of the value.
    cost = np.full(_STATES, _NEVER)
    sums, lefts = np.zeros(_STATES, np.float32), np.zeros(_STATES, np.float32)
    leans, dear = np.zeros(_STATES, np.float32), np.zeros(_STATES, np.float32)
    context = np.zeros(_STATES, np.int32)
    square = np.zeros(_STATES, np.float32)
    exponent = square.view(np.int32)
    cost[state], sums[state], lefts[state], leans[state] = 0, found, left, lean / 4096
    # Branches: their cost and place.
    branch, to = np.zeros(2 * _STATES, np.float32), np.zeros(2 * _STATES, np.float32)
    sums_before, leans_before = np.zeros(_STATES, np.float32), np.zeros(_STATES, np.float32)
    signs = np.zeros((2, SIGNS + 1), np.float32)
    for b in range(SIGNS):
        first = (_FIRST_SIGN + b) * SYMBOLS
        for minus in range(2):
            signs[minus, b] = weight * _BITS[np.int64(intervals[first + minus] >> UPPER) >> (ONE - 12)]
    signs[:, SIGNS] = signs[:, SIGNS - 1]  # a balance of 1 is met by rounding only
    promise, keep = np.float32(expected), np.float32(1 - 2.0**-_DECAY)
    c: Whole = begin % width
    for j in range(begin, end):
        if c == 0 and j > begin:
            _trace(cost, back, places, levels, begin, j)
            end_row(mean_of, levels[j - width : j], j // width - 1)
            promise = np.float32(mean_of.sum() // width + 1)
            sums[:] = promise
            lefts[:] = 0
            leans[:] = 0
        v = np.float64(x[j]) * scale
        a, minus = abs(v), v < 0
        if not a < 2.0**30 - 4:
            return False

        mean = np.float32(mean_of[c]) * np.float32(1 / 4096)
        ratio, most = mean / promise, mean * np.float32(MOST_FACTOR)
        for s in range(_STATES):
            e: Any = min(sums[s] * ratio, most)
            e += (lefts[s] - e) * np.float32(2.0**-_NUDGE)
            square[s] = e * e
        lowest, highest = np.int32(CONTEXTS), np.int32(0)
        for s in range(_STATES):
            k = (exponent[s] >> np.int32(23)) - np.int32(127 - 18)
            k = k if k > 0 else np.int32(0)
            k = k if k < CONTEXTS else np.int32(CONTEXTS - 1)
            context[s] = k
            lowest = k if k < lowest else lowest
            highest = k if k > highest else highest

        way = np.float32(-1 if minus else 1)
        for s in range(_STATES):
            dear[s] = signs[np.int32(minus), np.int32((leans[s] + np.float32(1)) * np.float32(8))]
        for odd in range(2):
            m: Whole = np.int64((a + odd) * 0.5)
            m_even, m_odd = m + (m & 1), m + 1 - (m & 1)  # the two levels around the value, by parity
            of_even, of_odd = price[odd, min(m_even, _ROWS - 1)], price[odd, min(m_odd, _ROWS - 1)]
            of_zero = price[odd, 0]
            if m + 1 >= _ROWS:
                of_even, of_odd = far[0], far[1]
                _row(stop, weight, odd, m_even, lowest, highest, of_even)
                _row(stop, weight, odd, m_odd, lowest, highest, of_odd)
            even, other = max(2 * m_even - odd, 0), 2 * m_odd - odd
            places[j - begin, odd], places[j - begin, 2 + odd] = even, other
            zero_off = np.float32(a * a)
            even_off = np.float32((a - even) ** 2) if even else _NEVER
            odd_off = np.float32((a - other) ** 2)
            for s in range(odd * HALF, odd * HALF + HALF):
                u = np.uint64(s)
                i, k = np.uint64(s + _STATES), np.uint64(context[u])
                zero, some = zero_off + of_zero[k], even_off + of_even[k] + dear[u]
                jumps = zero < some
                branch[u] = cost[u] + (zero if jumps else some)
                to[u] = np.float32(0) if jumps else np.float32(even)
                branch[i], to[i] = cost[u] + odd_off + of_odd[k] + dear[u], np.float32(other)
        sums_before[:] = sums
        leans_before[:] = leans
        into = back[j - begin]
        for s in range(_STATES):
            u = np.uint64(s)
            one, two = np.uint64(_INTO[u, 0]), np.uint64(_INTO[u, 1])
            # Looked up, not jumped to: which is cheaper no processor foretells.
            i = np.uint64(_INTO[u, np.uint64(branch[one] > branch[two])])
            was = i & np.uint64(_STATES - 1)
            cost[u], lefts[u], into[u] = branch[i], to[i], np.uint8(i)
            sums[u], leans[u] = sums_before[was], leans_before[was]
        for s in range(_STATES):
            sent = lefts[s] > 0
            sums[s] = (sums[s] + np.float32(4096) * lefts[s]) * keep
            leans[s] += (way - leans[s]) * (np.float32(1 / 8) if sent else np.float32(0))
            into[s] += np.uint8(0) if sent else np.uint8(_ZERO)
        promise = (promise + np.float32(mean_of[c])) * keep
        c = c + 1 if c + 1 < width else 0

    _trace(cost, back, places, levels, begin, end)
    for j in range(begin, decided):
        if x[j] < 0:
            levels[j] = -levels[j]
    return True


@jit
def _trace(
    cost: Floats, back: NDArray[np.uint8], places: Levels, levels: Levels, begin: Whole, end: Whole
) -> None:
    """Write the magnitudes on the cheapest path to `end`."""
    state = np.argmin(cost)
    for j in range(end - 1, begin - 1, -1):
        branch = np.int64(back[j - begin, state])
        state, parity = branch % _STATES, branch // _STATES % 2
        levels[j] = 0 if branch >= _ZERO else places[j - begin, 2 * parity + state // HALF]
