"""Dependent quantization: which levels of two interleaved quantizers cost least together.

A value is rounded to an even multiple of half a step, or to an odd one or zero; which of the two is allowed
is a matter of the levels before, by an automaton that both ends run:

    place = 2 k - (sign of k if the state is odd)  half steps;  state <- NEXT[state, k & 1]

So a path through the states sees points twice as dense as its levels say: a packing in many dimensions,
which scalar quantizers lack. The encoder finds the best path by dynamic programming (Viterbi). Every
survivor predicts the magnitudes to come from its own past, as the coder will, and prices bits by the coder's
own adaptive states, as they are when a stretch of values begins.

Sources: Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources";
Ungerboeck 1982, "Channel coding with multilevel/phase signals" (the automaton: parity checks 45 and 10,
octal); Schwarz et al. 2021, "Quantization and entropy coding in the Versatile Video Coding (VVC) standard"
(parity drives the states; zero in both quantizers); Haase et al. 2021, "Dependent scalar quantization for
neural network compression".
"""

from math import isqrt
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

HALF = 16  # states of each quantizer: those from HALF on take odd places
STATES = 2 * HALF
PACE, DECAY, NUDGE = 1, 5, 4  # of the row factor and the left neighbour, see `context`
MOST = 2**29  # the largest magnitude of a level

Whole = Any  # an int, or a NumPy integer: one and the same once compiled
Floats = NDArray[np.float32]

_STRETCH, _AHEAD = 512, 48  # values decided at once, and looked at beyond them
_CONTEXTS, _BINS = 48, 16  # as in `context`
_ROWS = 32  # magnitudes whose prices are in the table
_CHECKS = (0o45, 0o10)
_LOG = -np.log2((np.arange(4096) + 0.5) / 4096).astype(np.float32)
_ONE, _NEVER = np.uint64(1), np.float32(1e30)

_jit = njit(cache=True, error_model="numpy", nogil=True)


def _automaton() -> NDArray[np.int64]:
    """The next state by state and parity of the level: a systematic convolutional encoder with feedback.

    Subsets of places are numbered modulo 4 and kept apart by the code; its low bit is known one step ahead
    and is the quantizer. In the odd quantizer level 1 is place 1 and level 2 is place 3.
    """
    bits = STATES.bit_length() - 1
    following = np.zeros((STATES, 2), np.int64)
    for state in range(STATES):
        odd, register = state // HALF, state % HALF  # the register's other bits
        for parity in (0, 1):
            high = parity ^ odd
            following[state, parity] = register
            for bit in range(1, bits + 1):
                fed = (_CHECKS[0] >> bit & odd) ^ (_CHECKS[1] >> bit & high)
                following[state, parity] ^= fed << (bit - 1)
    return following % 2 * HALF + following // 2


NEXT = _automaton()
# Branches into a state, numbered state + STATES * parity.
_INTO = np.array([[s + STATES * p for p in (0, 1) for s in range(STATES) if NEXT[s, p] == k] for k in range(STATES)])


# Log2 of the odds of a set bit at first, in quarters, in contexts 10 to 23, of steps that a mean update takes.
_ODDS = (
    (-21, -20, -19, -17, -15, -13, -9, -5, -1, 1, 4, 6, 8, 10),  # not zero, even quantizer
    (-24, -17, -12, -7, -1, 2, 5, 8, 10, 12, 13, 15, 17, 18),  # not zero, odd quantizer
    (-20, -20, -20, -20, -20, -19, -17, -13, -10, -6, -2, 2, 4, 7),  # above 1, even
    (-20, -21, -22, -22, -22, -19, -15, -12, -7, -3, 0, 3, 5, 8),  # above 1, odd
    (-12, -12, -12, -12, -12, -12, -13, -11, -9, -6, -3, 1, 4, 7),  # above 2
    (-7, -7, -7, -7, -7, -7, -8, -7, -6, -5, -3, 0, 3, 6),  # above 3 and more
)


def _initial() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Low bits that a context leaves raw; states (probability in 2^-32, count), see `context`."""
    raw = [max(0, (context - 20) // 2 - 1) for context in range(_CONTEXTS)]
    states = np.full((2 * _CONTEXTS * _BINS + 16, 2), (1 << 31, 30), np.uint32)
    for q in range(2):
        for context in range(_CONTEXTS):
            for b in range(_BINS):
                odds = _ODDS[q if b == 0 else 2 + q if b == 1 else min(b + 2, 5)]
                beyond = 2 * (min(context - 10, 0) + max(context - 23, 0)) if b == 0 else 0
                at = min(max(context - 10, 0), 13 if b == 0 or context < 24 else 12 + context % 2)
                odd = isqrt(isqrt(1 << (64 + max(-48, min(odds[at] + beyond, 40)))))  # in 2^-16
                states[(q * _CONTEXTS + context) * _BINS + b, 0] = (odd << 32) // (odd + (1 << 16))
    return np.array(raw, np.uint8), states.ravel()


RAW, INITIAL = _initial()
REMEMBER = 30


@_jit
def _price(states: NDArray[np.uint32], weight: Any, stop: Floats, price: Floats) -> None:
    """Weighted bits of magnitudes, all but the sign: by quantizer, magnitude and context."""
    top = np.int64(0xFFFFFFFF)
    contexts, bins = price.shape[2], stop.shape[1]
    for q in range(2):
        for context in range(contexts):
            at = (q * contexts + context) * 2 * bins
            spent = np.float32(0)
            for t in range(bins - 1):
                p = np.int64(states[at + 2 * t])
                stop[q, t, context] = weight * (spent + _LOG[(top - p) >> 20])
                spent += _LOG[p >> 20] + (np.float32(RAW[context]) if t == 0 else np.float32(0))
            stop[q, bins - 1, context] = weight * (spent + np.float32(5))
    for q in range(2):
        for m in range(_ROWS):
            _row(stop, weight, q, m, price[q, m], 0, contexts - 1)


@_jit
def _row(stop: Floats, weight: Any, q: Whole, m: Whole, row: Floats, lowest: Whole, highest: Whole) -> None:
    last = stop.shape[1] - 1
    for context in range(lowest, highest + 1):
        t = ((m - 1) >> RAW[context]) + 1 if m else 0
        row[context] = stop[q, min(t, last), context]
        if t >= last:
            row[context] += weight * np.float32(np.log2(t - last + 1.5))


@_jit
def search(
    x: Floats, scale: Any, weight: Any, levels: NDArray[np.int32], begin: Whole, state: Whole, found: Whole,
    expected: Whole, left: Whole, lean: Whole, column: NDArray[np.int32], states: NDArray[np.uint32],
) -> int:  # fmt: skip
    """Decide places (signed, in half steps) of a layer's values from `begin` on; returns where they end."""
    width, end = len(column), min(len(x), begin + _STRETCH + _AHEAD)
    stop, price = np.empty((2, _BINS, _CONTEXTS), np.float32), np.empty((2, _ROWS, _CONTEXTS), np.float32)
    _price(states, weight, stop, price)
    own = column.copy()
    back = np.empty((end - begin, STATES), np.uint8)  # branch that led here, and whether it jumped to zero
    places = np.empty((end - begin, 4), np.int32)  # by parity and quantizer
    far = np.empty((4, _CONTEXTS), np.float32)
    stays = np.empty(_CONTEXTS, np.float32)
    stay, leap, leaps = np.empty(_CONTEXTS, np.float32), np.empty(_CONTEXTS, np.float32), np.empty(_CONTEXTS, np.uint8)

    cost, sums, lefts = np.full(STATES, _NEVER), np.zeros(STATES, np.float32), np.zeros(STATES, np.float32)
    before = np.zeros(STATES, np.float32)
    square = np.zeros(STATES, np.float32)
    bits = square.view(np.int32)
    context = np.zeros(STATES, np.int32)
    branch, to = np.zeros(2 * STATES, np.float32), np.zeros(2 * STATES, np.float32)
    how = np.arange(2 * STATES).astype(np.uint8)
    cost[state], sums[state], lefts[state] = 0, found, left
    promise = np.float32(expected)
    shrink = np.float32(1 - 2.0**-DECAY)

    c = begin % width
    for j in range(begin, end):
        if c == 0 and j > begin:
            _trace(cost, back, places, levels, begin, j)
            _end_row_float(own, levels[j - width : j], max(256 // (2 * (j // width) + 3), 2))
            promise = np.float32(own.sum() // width + 1)
            sums[:] = promise
            lefts[:] = 0
            lean = 0
        v = np.float64(x[j]) * scale
        a, minus = abs(v), v < 0
        if not a <= 2.0**30:
            return -1
        mean = np.float32(own[c]) * np.float32(1 / 4096)
        ratio, most = mean / promise, mean * np.float32(256)
        for s in range(STATES):
            e = min(sums[s] * ratio, most)
            e += (lefts[s] - e) * np.float32(1 / 16)
            square[s] = e * e
        lowest, highest = np.int32(_CONTEXTS), np.int32(0)
        for s in range(STATES):
            at = (bits[s] >> np.int32(23)) - np.int32(109)
            at = at if at > 0 else np.int32(0)
            at = at if at < _CONTEXTS else np.int32(_CONTEXTS - 1)
            context[s] = at
            lowest = at if at < lowest else lowest
            highest = at if at > highest else highest
        p = np.int64(states[4 * _CONTEXTS * _BINS + ((lean + 4096) >> 9 << 1)])
        dear = weight * _LOG[(p if minus else np.int64(0xFFFFFFFF) - p) >> 20]
        if a > 1:
            lean += ((-4096 if minus else 4096) - lean) >> 3
        nothing = np.float32(a * a)
        for q in range(2):
            m = np.int64((a + q) * 0.5)
            even, odd = m + (m & 1), m + 1 - (m & 1)
            row_even, row_odd, row_zero = price[q, min(even, _ROWS - 1)], price[q, min(odd, _ROWS - 1)], price[q, 0]
            if m + 1 >= _ROWS:
                row_even, row_odd = far[2 * q], far[2 * q + 1]
                _row(stop, weight, q, even, row_even, lowest, highest)
                _row(stop, weight, q, odd, row_odd, lowest, highest)
            even, odd = max(2 * even - q, 0), 2 * odd - q
            places[j - begin, q], places[j - begin, 2 + q] = even, odd
            d_odd = np.float32((a - odd) ** 2) + dear
            d_even = np.float32((a - even) ** 2) + dear if even else _NEVER
            for k in range(lowest, highest + 1):
                zero, some = nothing + row_zero[k], d_even + row_even[k]
                stays[k] = np.float32(0) if zero < some else np.float32(even)
                leaps[k] = np.uint8(64) if zero < some else np.uint8(0)
                stay[k] = zero if zero < some else some
                leap[k] = d_odd + row_odd[k]
            first = q * HALF
            for s in range(HALF):
                u = np.uint64(s + first)
                k = np.uint64(context[u])
                branch[u] = cost[u] + stay[k]
                branch[u + np.uint64(STATES)] = cost[u] + leap[k]
                how[u] = np.uint8(u) | leaps[k]
                to[u] = stays[k]
                to[u + np.uint64(STATES)] = np.float32(odd)
        before[:] = sums
        backs = back[j - begin]
        for k in range(STATES):
            u = np.uint64(k)
            one, two = np.uint64(_INTO[u, 0]), np.uint64(_INTO[u, 1])
            i = one if branch[one] <= branch[two] else two
            cost[u], lefts[u], backs[u] = branch[i], to[i], how[i]
            sums[u] = (before[i & np.uint64(STATES - 1)] + np.float32(4096) * to[i]) * shrink
        promise = (promise + np.float32(own[c])) * shrink
        c = c + 1 if c + 1 < width else 0
    _trace(cost, back, places, levels, begin, end)
    last = end if end == len(x) else begin + _STRETCH
    for j in range(begin, last):
        if x[j] < 0:
            levels[j] = -levels[j]
    return last


@_jit
def _trace(
    cost: Floats, back: NDArray[np.uint8], places: NDArray[np.int32], levels: NDArray[np.int32], begin: Whole, end: Whole
) -> None:
    """Write the magnitudes of the cheapest path so far."""
    k = np.argmin(cost)
    for j in range(end - 1, begin - 1, -1):
        how = np.int64(back[j - begin, k])
        k = how & (STATES - 1)
        levels[j] = 0 if how & 64 else places[j - begin, (how & STATES) // STATES * 2 + k // HALF]


@_jit
def _end_row_float(own: NDArray[np.int32], row: NDArray[np.int32], rate: Whole) -> None:
    for c in range(len(own)):
        own[c] += (((min(abs(np.int64(row[c])), 2047) << 12) - own[c]) * rate) >> 7
