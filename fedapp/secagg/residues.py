"""Residues modulo any m on the wire: as many to a word as waste least of its bits."""

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import DecodeError

_WORDS = 1 << 15  # a multiple of 8, so that every block but the last ends on a whole byte


def form(modulus: int) -> tuple[int, int]:
    """Residues a word, and bits a word, of at most 63: (3, 34) for m = 2560, where one alone takes 12."""
    counts = range(1, 63 // (modulus - 1).bit_length() + 1)
    forms = [(count, (modulus**count - 1).bit_length()) for count in counts]
    return min(forms, key=lambda form: (form[1] / form[0], form[0]))


def packed_size(size: int, modulus: int) -> int:
    """Bytes of `size` packed residues."""
    count, bits = form(modulus)
    return (-(-size // count) * bits + 7) // 8


def pack(values: NDArray[np.uint32], modulus: int) -> bytes:
    """Residues (n,) below the modulus -> bytes: words in base m, their bits in a row, zeros at the end."""
    count, bits = form(modulus)
    digits = np.zeros((-(-len(values) // count), count), np.uint64)
    digits.reshape(-1)[: len(values)] = values
    words = digits[:, 0]
    for column in range(1, count):
        words = words * np.uint64(modulus) + digits[:, column]
    parts = []
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS].astype(">u8").view(np.uint8).reshape(-1, 8)
        parts.append(np.packbits(np.unpackbits(part, axis=1)[:, 64 - bits :]).tobytes())
    return b"".join(parts)


def unpack(data: bytes, size: int, modulus: int) -> NDArray[np.uint32]:
    """Undo `pack`: uint32 (size,); raises DecodeError on bytes that it does not make."""
    count, bits = form(modulus)
    if len(data) != packed_size(size, modulus):
        raise DecodeError(f"{len(data)} bytes do not hold {size} residues modulo {modulus}")
    total = -(-size // count)
    if (spare := -total * bits % 8) and data[-1] & ((1 << spare) - 1):
        raise DecodeError("there are bits behind the last residue")
    words = np.empty(total, np.uint64)
    for start in range(0, total, _WORDS):
        some = min(_WORDS, total - start)
        part = np.frombuffer(data, np.uint8, (some * bits + 7) // 8, start * bits // 8)
        wide = np.zeros((some, 64), np.uint8)
        wide[:, 64 - bits :] = np.unpackbits(part, count=some * bits).reshape(some, bits)
        words[start : start + some] = np.packbits(wide, axis=1).view(">u8")[:, 0]
    if total and words.max() >= modulus**count:
        raise DecodeError(f"a residue is not below {modulus}")
    digits = np.empty((total, count), np.uint32)
    for column in reversed(range(count)):
        words, digits[:, column] = np.divmod(words, np.uint64(modulus))
    values = digits.reshape(-1)
    if values[size:].any():
        raise DecodeError("there are residues behind the last one")
    return values[:size]
