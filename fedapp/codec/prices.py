"""What bits of levels cost a search for the best ones (`trellis`), by what was learned of symbols so far."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.model import (
    CONTEXTS,
    ESCAPE,
    ONE,
    SIGNS,
    SIGNS_FROM,
    SYMBOLS,
    UPPER,
    Floats,
    Levels,
    Whole,
    low_bits,
)
from fedapp.jit import jit

ROWS = 32  # magnitudes whose prices are kept, with those of the next ones; another row is for any other

_FIRST_SIGN = SIGNS_FROM[True]
# Bits by twelve bits of a probability.
_BITS = -np.log2(np.maximum(np.arange(4096) + 0.5, 1) / 4096).astype(np.float32)


@jit
def price_symbols(intervals: NDArray[np.uint64], weight: Any, stop: Floats) -> None:
    """Weighted bits of symbols of magnitudes: `stop` by quantizer, symbol and context."""
    for odd in range(2):
        for context in range(CONTEXTS):
            first, raw = (odd * CONTEXTS + context) * SYMBOLS, low_bits(context, True)
            for symbol in range(SYMBOLS):
                bits = _bits(intervals, first + symbol) + np.float32(raw if symbol else 0)
                stop[odd, symbol, context] = weight * (bits + np.float32(5 if symbol == ESCAPE else 0))


@jit
def price_signs(intervals: NDArray[np.uint64], weight: Any, signs: Floats) -> None:
    """Weighted bits of plus, and of minus, by context."""
    for minus in range(2):
        for context in range(SIGNS):
            signs[minus, context] = weight * _bits(intervals, (_FIRST_SIGN + context) * SYMBOLS + minus)


@jit
def price_around(m: Whole, stop: Floats, weight: Any, contexts: Levels, table: Floats) -> None:
    """Weighted bits of magnitudes 0, m and m + 1, of these the even one first, but for signs.

    Four places a context, the last of them free: of all contexts, or where m is large of these at least.
    """
    lowest, highest = (0, CONTEXTS - 1) if m < ROWS else (contexts.min(), contexts.max())
    for context in range(lowest, highest + 1):
        for k, level in enumerate((0, m + (m & 1), m + 1 - (m & 1))):
            symbol = ((level - 1) >> low_bits(context, True)) + 1 if level else 0
            bits = stop[min(symbol, ESCAPE), context]
            if symbol >= ESCAPE:
                bits += weight * np.float32(np.log2(symbol - ESCAPE + 1.5))
            table[4 * context + k] = bits


@jit
def _bits(intervals: NDArray[np.uint64], symbol: Whole) -> Any:
    return _BITS[np.int64(intervals[symbol] >> UPPER) >> (ONE - 12)]
