"""A range coder: an interval of 48 bits that symbols narrow, of which 16 bits leave at a time.

Encoding, `low` is the low end of the interval; decoding, the code above it. `words` takes (with carries yet
to settle) or gives 16 bits an entry, and `at` is the next one. Source: Martin 1979, "Range encoding".
"""

from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.model import LOW, ONE, UPPER, Integers, Whole, Words
from fedapp.jit import inlined, jit

FULL, WORD = 1 << 48, 1 << 32  # the interval at the start; below WORD, 16 bits leave


@inlined
def shift(encoding: bool, low: Whole, span: Whole, at: Whole, words: Words) -> tuple[Whole, Whole, Whole]:
    """Let 16 bits leave, or enter, until the interval is wide again: beyond the end of a code lie zeros."""
    while span < WORD:
        if encoding:
            words[np.uint64(at)] = low >> 32
            low = (low & (WORD - 1)) << 16
        else:
            low = low << 16 | (np.int64(words[at]) if at < len(words) else 0)
        span, at = span << 16, at + 1
    return low, span, at


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
    words = np.frombuffer(code + bytes(6 + len(code) % 2), ">u2").astype(np.uint32)
    return np.array([int(words[0]) << 32 | int(words[1]) << 16 | int(words[2]), FULL, 3]), words


def bits(coder: Integers) -> float:
    """Bits that what was written so far takes."""
    return 16 * int(coder[2]) + log2(FULL / int(coder[1]))


def finish(coder: Integers, words: Words) -> bytes:
    """The fewest bytes that name a number in the interval if zeros follow."""
    low, span, at = (int(v) for v in coder)
    value, spare = 0, 0
    for spare in range(3):  # the interval is never below a word
        unit = 1 << (48 - 8 * spare)
        value = -(-low // unit) * unit
        if value < low + span:
            break
    settled = np.empty(at + 1, np.uint16)
    _settle(words[:at], value, settled)
    return settled.astype(">u2").tobytes()[: 2 * at + spare]


@jit
def _settle(words: Words, low: Whole, out: NDArray[np.uint16]) -> None:
    n, carry = len(words), low >> 48
    out[n] = (low >> 32) & 0xFFFF
    for i in range(n - 1, -1, -1):
        carry += np.int64(words[i])
        out[i] = carry & 0xFFFF
        carry >>= 16


def ended(coder: Integers, code: bytes) -> bool:
    """Whether a decoder has read the code that `finish` wrote, no more and no less."""
    return 0 <= len(code) - 2 * (int(coder[2]) - 3) <= 2
