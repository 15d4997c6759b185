"""Codes of a fixed number of bits, packed; the most significant bit comes first."""

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import DecodeError


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes below 2**bits (n,) -> bytes, the last one filled with zeros."""
    return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :])


def unpack_bits(data: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    """Undo `pack_bits`; raises DecodeError unless `data` is exactly what `count` codes need."""
    spare = -count * bits % 8
    if data.dtype != np.uint8 or len(data) != (count * bits + 7) // 8:
        raise DecodeError(f"packet does not hold {count} codes of {bits} bits")
    if spare and data[-1] & ((1 << spare) - 1):
        raise DecodeError("packet has bits behind its last code")
    split = np.unpackbits(data, count=count * bits).reshape(count, bits)
    codes: NDArray[np.uint8] = np.packbits(split, axis=1).reshape(count) >> np.uint8(8 - bits)
    return codes
