"""What the default codec expects of a level: its context, and the adaptive states of its bits.

Shared by the coder (`context`) and by the search for the best levels (`trellis`), whose levels are places in
half steps. All arithmetic that a decoder needs is of integers, so both ends agree on any machine.
"""

from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.jit import jit

Whole = Any  # an int, or a NumPy integer: one and the same once compiled
Levels = NDArray[np.int32]
Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

CONTEXTS, BINS = 48, 16  # half octaves of expected magnitude from 2^-9; adaptive bits of each
UNARY = 14  # magnitudes are counted in so many bits, then escape
PATIENCE = 500  # a state's count stops here: it averages over about so many bits

# Log2 of the odds that a bit is set, in quarters, in contexts 10 to 23, under dependent quantization: what
# updates of a small CNN (Fashion-MNIST, SGD with momentum, rounds 1, 2 and 20) had at 0.1 to 8 bits.
_ODDS = (
    (-21, -20, -19, -17, -15, -13, -9, -5, -1, 1, 4, 6, 8, 10),  # not zero, in the even quantizer
    (-24, -17, -12, -7, -1, 2, 5, 8, 10, 12, 13, 15, 17, 18),  # not zero, in the odd one
    (-20, -20, -20, -20, -20, -19, -17, -13, -10, -6, -2, 2, 4, 7),  # above 1, even
    (-20, -21, -22, -22, -22, -19, -15, -12, -7, -3, 0, 3, 5, 8),  # above 1, odd
    (-12, -12, -12, -12, -12, -12, -13, -11, -9, -6, -3, 1, 4, 7),  # above 2
    (-7, -7, -7, -7, -7, -7, -8, -7, -6, -5, -3, 0, 3, 6),  # above 3 and more
)


def _contexts() -> NDArray[np.uint8]:
    """Context of an expectation e in 1/256: entry e below 4096, then entry 4096 + (e >> 10)."""
    middles = [*range(1, 8192, 2), *range(1024, 4096 * 2048, 2048)]  # in 1/512
    return np.array([min((e * e).bit_length() - 1, CONTEXTS - 1) for e in middles], np.uint8)


def _low_bits(least: int) -> NDArray[np.uint8]:
    """How many low bits a context leaves raw."""
    return np.array([max(0, (context - least) // 2 - 1) for context in range(CONTEXTS)], np.uint8)


def _initial() -> Words:
    """States (probability in 2^-32, count): those of geometric magnitudes, then 16 of signs."""
    states = np.full((CONTEXTS * BINS + 16, 2), (1 << 31, 6), np.uint32)
    for context in range(CONTEXTS):
        mean = isqrt(1 << (context + 32))  # in 2^-25
        for b in range(BINS):
            unit = 1 << (25 + (int(RAW[context]) if b else 0))
            states[context * BINS + b, 0] = min(max((mean << 32) // (mean + unit), 1 << 22), 15 << 28)
    return states.ravel()


def _initial_dependent() -> Words:
    """The same by quantizer, from `_ODDS`: zero goes on an octave by a context, the rest repeats itself."""
    states = np.full((2 * CONTEXTS * BINS + 16, 2), (1 << 31, 30), np.uint32)
    for place in range(2 * CONTEXTS * BINS):
        odd, context, b = place // (CONTEXTS * BINS), place // BINS % CONTEXTS, place % BINS
        row = _ODDS[odd if b == 0 else 2 + odd if b == 1 else min(b + 2, 5)]
        if b:
            quarters = row[max(context, 10) - 10 if context < 24 else 12 + context % 2]
        else:
            end = min(max(context, 10), 23)
            quarters = min(max(row[end - 10] + 2 * (context - end), -48), 40)
        odds = isqrt(isqrt(1 << (64 + quarters)))  # in 2^-16
        states[place, 0] = (odds << 32) // (odds + (1 << 16))
    return states.ravel()


CONTEXT = _contexts()
RAW, RAW_DEPENDENT = _low_bits(18), _low_bits(20)
INITIAL, INITIAL_DEPENDENT = _initial(), _initial_dependent()
_KEEP = np.array([65536 - 131072 // (2 * n + 3) for n in range(PATIENCE + 1)], np.uint16)


@jit
def learn(p: Whole, n: Whole, bit: Whole) -> Whole:
    """Probability that the bit is set, moved towards `bit` (0 or 1) by 1 / (n + 1.5)."""
    keep = np.int64(_KEEP[n])  # multiplied first: states wait for each other
    return (p * keep + ((bit << 32) - bit) * (65536 - keep)) >> 16


@jit
def begin_layer(states: Words, column: Levels, units: NDArray[np.int64], mean: Whole) -> None:
    """Start a layer: old counts weigh less, column means come from the units of the layer before."""
    for i in range(1, len(states), 2):
        states[i] = min(states[i], 30)
    n, width = len(units), len(column)
    if n and width % n == 0:
        average = units.sum() // n + 1
        for c in range(width):
            column[c] = min(units[c // (width // n)] * mean // average + (mean >> 5) + 1, 2047 << 12)
    else:
        column[:] = mean + 1


@jit
def end_row(column: Levels, level: Levels, row: Whole) -> Whole:
    """Column means, in 1/4096, take in a row of levels (up to 2047); returns the row's own mean."""
    rate, total = max(256 // (2 * row + 5), 2), 0  # of 128
    for c in range(len(column)):
        m: Whole = min(abs(np.int64(level[c])), 2047)
        column[c] += (((m << 12) - column[c]) * rate) >> 7
        total += m
    return (total << 12) // len(column)
