"""A range coder: an interval of 62 bits that symbols narrow, of which 32 bits leave at a time.

Encoding, `low` is the low end of the interval; decoding, the code above it. `words` takes (with carries yet
to settle) or gives 32 bits an entry, and `at` is the next one. When bits leave is what a processor cannot
foresee, and a wrong guess takes as long as several symbols: so they leave seldom.
Source: Martin 1979, "Range encoding".
"""

from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.model import LOW, ONE, UPPER, Integers, Whole, Words
from fedapp.jit import borrowing, inlined

FULL, WORD = 1 << 62, 1 << 30  # the interval at the start; below WORD, 32 bits leave


@inlined
def shift(encoding: bool, low: Whole, span: Whole, at: Whole, words: Words) -> tuple[Whole, Whole, Whole]:
    """Let 32 bits leave, or enter, and so widen the interval: beyond the end of a code lie zeros."""
    if encoding:
        words[np.uint64(at)] = low >> 30
        low = (low & (WORD - 1)) << 32
    else:
        low = low << 32 | (np.int64(words[at]) if at < len(words) else 0)
    return low, span << 32, at + 1


@inlined
def narrow(encoding: bool, interval: Any, low: Whole, span: Whole) -> tuple[Whole, Whole]:
    """Take an interval of a model's table (`model.Model.intervals`) of what there is."""
    unit = span >> ONE
    below = np.int64(interval & LOW) * unit
    return low + below if encoding else low - below, np.int64(interval >> UPPER) * unit


@inlined
def raw_bits(
    encoding: bool, v: Whole, n: Whole, low: Whole, span: Whole, at: Whole, words: Words
) -> tuple[Whole, Whole, Whole, Whole]:
    """The n low bits of v as they are."""
    for b in range(n - 1, -1, -1):
        span >>= 1
        bit = (v >> b) & 1 if encoding else np.int64(low >= span)
        low += bit * span if encoding else -bit * span
        if not encoding:
            v = v << 1 | bit
        if span < WORD:
            low, span, at = shift(encoding, low, span, at, words)
    return v, low, span, at


def begin(code: bytes) -> tuple[Integers, Words]:
    """The coder (low, span, at) that reads a code, and its words; one that writes begins at (0, FULL, 0)."""
    # The first 62 bits, then 32 at a time.
    words = np.frombuffer(code + bytes(8 + -len(code) % 4), ">u4").astype(np.uint64)
    low, two, thirty = int(words[0]) << 30 | int(words[1]) >> 2, np.uint64(2), np.uint64(30)
    return np.array([low, FULL, 0]), words[1:-1] << thirty & np.uint64(WORD * 4 - 1) | words[2:] >> two


def bits(coder: Integers) -> float:
    """Bits that what was written so far takes."""
    return 32 * int(coder[2]) + log2(FULL / int(coder[1]))


def finish(coder: Integers, words: Words) -> bytes:
    """The fewest bytes that name a number in the interval if zeros follow."""
    low, span, at = (int(v) for v in coder)
    value, spare = 0, 0
    for spare in range(5):  # the interval is never below a word
        unit = 1 << (62 - 8 * spare)
        value = -(-low // unit) * unit
        if value < low + span:
            break
    settled = np.empty(at + 1, np.uint32)
    _settle(words[:at], value, settled)
    return settled.astype(">u4").tobytes()[: 4 * at + spare]


@borrowing
def _settle(words: Words, low: Whole, out: NDArray[np.uint32]) -> None:
    n, carry = len(words), low >> 62
    out[n] = (low >> 30) & 0xFFFFFFFF
    for i in range(n - 1, -1, -1):
        carry += np.int64(words[i])
        out[i] = carry & 0xFFFFFFFF
        carry >>= 32


def ended(coder: Integers, code: bytes) -> bool:
    """Whether a decoder has come to the end of a code that `finish` wrote, within its last word."""
    return 0 <= len(code) - 4 * int(coder[2]) <= 4
