"""What the default codec expects of a level: its context, and how often symbols came in each context.

Shared by the coder (`context`) and by the search for the best levels (`trellis`), whose levels are places in
half steps. All arithmetic that a decoder needs is of integers, so both ends agree on any machine.
"""

from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.jit import borrowing, inlined

Whole = Any  # an int, or a NumPy integer: one and the same once compiled
Levels = NDArray[np.int32]
Words = NDArray[np.uint64]
Floats = NDArray[np.float32]
Wide = NDArray[np.float64]
Integers = NDArray[np.int64]

CONTEXTS, SYMBOLS = 46, 16  # half octaves of expected magnitude from 2^-9; 0, 1, ..., 14, and more: an escape
ESCAPE = SYMBOLS - 1
FIRST_RAW = 10  # log2 of the least expectation, in 1/256, whose context has raw bits (`low_bits`)
MOST = 2**30  # the largest magnitude of a level
ONE = 20  # intervals are in 2^-20
LOW, UPPER = np.uint64((1 << 32) - 1), np.uint64(32)  # the halves of an interval
BLOCK = 128  # columns whose magnitudes are coded together, and then their signs
MOST_FACTOR = 1 << 12  # what a row has of what its columns promise, at most
_PATIENCE = 4000  # what has come in a context counts as so many symbols at most
_AT_FIRST, _OF_OLD = 60, 180  # what counts at first; of what earlier layers told, when one begins
_SIGNS_AT_FIRST = 30  # what counts at first of signs and flags, of which not all updates are alike
_OFTEN, _SELDOM = 16, 4096  # symbols after which what has come is learned, at first and at last
_SHARE = 8  # in between, after so small a part of a layer's
SIGNS = 16  # contexts of signs, by the balance of signs that came before
SIGNS_FROM = CONTEXTS, 2 * CONTEXTS  # the first of these: dependent quantizers have twice as many before
FLAGS = 16  # contexts of flags, by octaves of what is expected of a block in all; plain levels have them
FLAGS_FROM = CONTEXTS + SIGNS

# Log2 of the odds that a magnitude goes on, in quarters, in contexts 10 to 25: what updates of two CNNs
# (Fashion-MNIST, SGD, first rounds and late ones) had at 0.01 to 6 bits.
_ODDS = (
    (-16, -13, -11, -8, -5, -2, 0, 3, 6, 8, 10, 12, 14, 17, 19, 21),  # beyond 0
    (-23, -22, -22, -21, -18, -14, -10, -6, -2, 2, 5, 8, 5, 8, 6, 8),  # beyond 1
    (-10, -9, -12, -13, -13, -12, -10, -7, -4, 0, 4, 7, 4, 7, 4, 7),  # beyond 2
    (-6, -6, -6, -6, -5, -7, -8, -7, -4, -1, 3, 6, 3, 6, 3, 6),  # beyond 3
    (-3, -3, -3, -3, -3, -3, -5, -5, -4, -2, 2, 5, 2, 5, 2, 5),  # beyond 4
    (-3, -3, -3, -3, -3, -3, -3, -3, -4, -2, 1, 5, 1, 4, 1, 4),  # beyond 5
    (-2, -2, -2, -2, -2, -2, -2, -2, -2, -2, 1, 3, 1, 3, 1, 3),  # beyond 6 and more
)
# The same under dependent quantization, in contexts 10 to 23 (rounds 1, 2 and 20, at 0.1 to 8 bits).
_ODDS_DEPENDENT = (
    (-21, -20, -19, -17, -15, -13, -9, -5, -1, 1, 4, 6, 8, 10),  # beyond 0, in the even quantizer
    (-24, -17, -12, -7, -1, 2, 5, 8, 10, 12, 13, 15, 17, 18),  # beyond 0, in the odd one
    (-20, -20, -20, -20, -20, -19, -17, -13, -10, -6, -2, 2, 4, 7),  # beyond 1, even
    (-20, -21, -22, -22, -22, -19, -15, -12, -7, -3, 0, 3, 5, 8),  # beyond 1, odd
    (-12, -12, -12, -12, -12, -12, -13, -11, -9, -6, -3, 1, 4, 7),  # beyond 2
    (-7, -7, -7, -7, -7, -7, -8, -7, -6, -5, -3, 0, 3, 6),  # beyond 3 and more
)

# Log2 of the odds that a block is not empty, where less than 1/8 is expected of it in all, then from 1/8,
# 1/4, 1/2, 1, ... on: what updates of the two CNNs had at 0.01 to 3 bits.
_FLAG_ODDS = -5, -3, -2, -1, 0, 1, 2, 4, 5, 6, 7, 8, 8, 8, 8, 8

# Percent of signs that are minus, by the balance of signs before: from minuses alone to as many pluses.
_MINUS = (94, 86, 80, 73, 68, 63, 59, 53)


def _reached(odds: tuple[tuple[int, ...], ...]) -> Integers:
    """Probabilities (CONTEXTS, SYMBOLS) in 2^-30 that a magnitude reaches each symbol.

    Beyond the table the odds of leaving zero change by half an octave a context, the rest repeats itself.
    """
    reached, known = np.full((CONTEXTS, SYMBOLS), 1 << 30, np.int64), len(odds[0])
    for context in range(CONTEXTS):
        near = min(max(context, 10), 9 + known)
        place = (near if context < 10 + known else 8 + known + context % 2) - 10
        for symbol in range(1, SYMBOLS):
            quarters = odds[min(symbol, len(odds)) - 1][place]
            if symbol == 1:
                quarters = min(max(odds[0][near - 10] + 2 * (context - near), -48), 40)
            ratio = isqrt(isqrt(1 << (64 + quarters)))  # in 2^-16
            before = int(reached[context, symbol - 1])
            reached[context, symbol] = before * ratio // (ratio + (1 << 16))
    return reached


def _initial() -> tuple[Integers, Integers]:
    """`_reached` of the plain quantizer, signs and flags; `_reached` of the even one and the odd one, signs.

    A sign is symbol 0 or, below zero, symbol 1. A flag is symbol 0 where the block is empty, else symbol 1.
    """
    even, odd = (_ODDS_DEPENDENT[side::2][:2] + _ODDS_DEPENDENT[4:] for side in (0, 1))
    signs = np.zeros((SIGNS, SYMBOLS), np.int64)
    for context, percent in enumerate((*_MINUS, *(100 - percent for percent in reversed(_MINUS)))):
        signs[context, :2] = 1 << 30, (percent << 30) // 100
    flags = np.zeros((FLAGS, SYMBOLS), np.int64)
    for context, odds in enumerate(_FLAG_ODDS):
        flags[context, :2] = 1 << 30, round(2**30 / (1 + 2.0**-odds))
    plain, dependent = (_reached(_ODDS), signs, flags), (_reached(even), _reached(odd), signs)
    return np.concatenate(plain), np.concatenate(dependent)


_INITIAL = _initial()


class Model:
    """What was learned: the arrays that compiled code reads and changes.

    reached: probability in 2^-30 that a magnitude, a sign or a flag reaches a symbol, (contexts, SYMBOLS);
    weight: how many symbols that counts as. counts: symbols that came since it was learned, in two rows, so
    that counting does not wait for itself. intervals: of each symbol its share in the upper half and its
    begin in the lower one, both in 2^-20; symbol 0 ends at the top, so that a decoder finds it by one
    comparison.
    """

    def __init__(self, dependent: bool) -> None:
        self.reached = _INITIAL[dependent].copy()
        contexts = len(self.reached)
        self.weight = np.full(contexts, _AT_FIRST, np.int64)
        self.weight[SIGNS_FROM[dependent] :] = _SIGNS_AT_FIRST
        self.counts = np.zeros((2, contexts * SYMBOLS), np.uint16)
        self.intervals = np.zeros(contexts * SYMBOLS, np.uint64)
        _divide_all(self.reached, self.intervals)

    def begin_layer(self) -> None:
        """What earlier layers told weighs less."""
        np.minimum(self.weight, _OF_OLD, out=self.weight)

    @property
    def arrays(self) -> tuple[Integers, Integers, NDArray[np.uint16], NDArray[np.uint64]]:
        """In the order in which `learn` and the coder take them."""
        return self.reached, self.weight, self.counts, self.intervals


@inlined
def due(seen: Whole) -> Whole:
    """After how many symbols more to learn, when so many of a layer have come."""
    return min(_OFTEN + seen // _SHARE, _SELDOM)


@borrowing
def learn(
    reached: Integers, weight: Integers, counts: NDArray[np.uint16], intervals: NDArray[np.uint64]
) -> None:
    """Take in the symbols that came since the last time, in each context."""
    for context in range(len(weight)):
        begin, came = context * SYMBOLS, np.int32(0)
        for k in range(begin, begin + SYMBOLS):
            came += np.int32(counts[0, k]) + np.int32(counts[1, k])
        if came:
            total = weight[context] + np.int64(came)
            one, above = (1 << 30) // total, np.int64(0)
            for symbol in range(SYMBOLS - 1, 0, -1):
                k = begin + symbol
                above += np.int64(counts[0, k]) + np.int64(counts[1, k])
                known = reached[context, symbol] * weight[context] + (above << 30)
                reached[context, symbol] = (known * one) >> 30
            counts[:, begin : begin + SYMBOLS] = 0
            weight[context] = min(total, _PATIENCE)
            _divide(reached, intervals, context)


@borrowing
def _divide(reached: Integers, intervals: NDArray[np.uint64], context: Whole) -> None:
    """The intervals of a context: no symbol without one."""
    below: Whole = 0
    for symbol in range(SYMBOLS - 1, -1, -1):
        top: Whole = 1 << ONE
        if symbol:
            top = ((reached[context, symbol] * ((1 << ONE) - SYMBOLS)) >> 30) + SYMBOLS - symbol
        intervals[context * SYMBOLS + symbol] = np.uint64(top - below) << UPPER | np.uint64(below)
        below = top


@borrowing
def _divide_all(reached: Integers, intervals: NDArray[np.uint64]) -> None:
    for context in range(len(reached)):
        _divide(reached, intervals, context)


@inlined
def promise(column: Levels) -> Whole:
    """What the columns of a block promise in all, in 1/4096: below 2^30."""
    total = np.int32(0)
    for i in range(len(column)):
        total = np.int32(total + column[i])
    return np.int64(total)


@inlined
def flag_context(promised: Whole, factor: Whole) -> Whole:
    """Which context of flags a block is in whose columns promise so much, in a row with this factor."""
    eighths = min((promised * factor) >> 21, (1 << FLAGS) // 2 - 1)
    return (np.float32(2 * eighths + 1).view(np.int32) >> np.int32(23)) - np.int32(127)


@inlined
def after_empty(promised: Whole, n: Whole, found: Whole, expected: Whole) -> tuple[Whole, Whole]:
    """What a row found and expected, after an empty block of n columns.

    As after 128 of them one by one seven eighths are forgotten, and what is expected comes near 64 times
    their mean. So it is after fewer, of which a layer has a few in its first row, and where a row ends.
    """
    return found >> 3, expected + (((promised << 6) // n * 7) >> 3) - ((expected * 7) >> 3)


@inlined
def sign_context(lean: Whole) -> Whole:
    """Which context of signs a balance is in: from -4096, of minuses, to 4096."""
    return (lean + np.int32(4096)) >> np.int32(9)


@inlined
def lean_after(lean: Whole, minus: Whole) -> Whole:
    """The balance of signs after another one."""
    return (lean + (511 - 1023 * minus)) - (lean >> 3)  # below 4096, where contexts end


def paces(dependent: bool) -> tuple[int, int, int]:
    """Columns after which a row factor changes, how fast it forgets (2^-n), and what the left neighbour
    weighs in an expectation (2^-n)."""
    return (1, 5, 5) if dependent else (4, 4, 4)


@inlined
def block(row: Whole, begin: Whole) -> Whole:
    """How many columns are coded together, or are empty: fewer at first, where little is known."""
    return BLOCK if row else min(max(begin, 16), BLOCK)


@inlined
def row_factor(found: Whole, expected: Whole) -> Whole:
    """What a row has of what its columns promise, in 1/4096."""
    return min(np.int64(np.uint64(found << 12) // np.uint64(expected)), MOST_FACTOR << 12)


@inlined
def most_nearby(promised: Whole, factor: Whole) -> Whole:
    """What a magnitude counts for its neighbours at most, in a block of a row that is promised so much.

    8, and 64 times what the row has in the mean: one outlier does not make its row an active one. `promised`:
    the mean of its columns, in 1/4096.
    """
    return np.int32(min(8 + ((promised * factor) >> 18), 1 << 20))


def _contexts() -> NDArray[np.uint8]:
    """Context of an expectation e below 4096, then of e >> 10, at the middle of its range."""
    middles = [*range(1, 8192, 2), *range(1025, 4096 * 2048, 2048)]  # in 1/512
    return np.array([(e * e).bit_length() - 1 for e in middles], np.uint8)


_CONTEXT = _contexts()


@inlined
def context_in(e: Whole) -> Whole:
    """The context of an expected magnitude in 1/256."""
    return np.int64(_CONTEXT[np.uint64(e if e < 4096 else 4096 + min(e >> 10, 4095))])


@inlined
def context_of(e: Whole) -> Whole:
    """`context_in` of an int32, for many at once: by the exponent of a square, which float32 rounds alike."""
    e = min(e, np.int32((4096 << 10) - 1))
    return small_context_of(e if e < np.int32(4096) else (e | np.int32(1023)) - np.int32(511))


@inlined
def small_context_of(e: Whole) -> Whole:
    """`context_of` an expectation below 4096."""
    root = np.float32(np.int32(2) * e + np.int32(1))
    return (np.float32(root * root).view(np.int32) >> np.int32(23)) - np.int32(127)


@inlined
def low_bits(context: Whole, dependent: bool) -> Whole:
    """How many low bits a context leaves as they are."""
    return max((context >> np.int32(1)) - np.int32(11 if dependent else 10), np.int32(0))


@borrowing
def begin_columns(column: Levels, units: Integers, mean: Whole) -> None:
    """Column means of a new layer come from the units of the layer before."""
    n, width = len(units), len(column)
    if n and width % n == 0:
        average = units.sum() // n + 1
        for c in range(width):
            column[c] = min(units[c // (width // n)] * mean // average + (mean >> 5) + 1, 2047 << 12)
    else:
        column[:] = mean + 1


@borrowing
def end_row(column: Levels, level: Levels, row: Whole) -> Whole:
    """Column means, in 1/4096, take in a row of levels (up to 2047); returns the row's own mean."""
    rate, total = np.int32(max(256 // (2 * row + 5), 2)), np.int64(0)  # of 128: products are below 2^29
    for c in range(len(column)):
        m = min(abs(level[c]), np.int32(2047))
        column[c] += np.int32(np.int32((m << np.int32(12)) - column[c]) * rate) >> np.int32(7)
        total += np.int64(m)
    return (total << 12) // len(column)
