"""A version of the weights as bytes: the way to it from a version that its reader holds.

The bytes: format, CRC-32 of the weights that come out, exponent, both versions' numbers, and the way's levels
in context-adaptive code, without loss.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fedapp.codec import Layout
from fedapp.codec import context as coder
from fedapp.codec.layers import shapes
from fedapp.codec.model import Floats
from fedapp.codec.quantizer import edges
from fedapp.codec.varint import Reader, varint
from fedapp.errors import DecodeError
from fedapp.lattice import COARSEST, FINEST, Version

STYPE = "fedapp.version"
_FORMAT, _NEWEST = 5, 2**31
_HEADER = struct.Struct("<BIh")  # format, CRC-32, exponent
_NEAREST = edges(0.0)


class VersionPacket(NamedTuple):
    """What a message says of a version: the checksum of its weights, and the way to it from another."""

    crc: int
    exponent: int
    based_on: int
    number: int
    code: bytes

    def to_array(self) -> Array:
        """As it travels."""
        numbers = varint(self.based_on) + varint(self.number)
        data = _HEADER.pack(_FORMAT, self.crc, self.exponent) + numbers + self.code
        return Array("uint8", (len(data),), STYPE, data)

    @classmethod
    def read(cls, array: Array) -> "VersionPacket":
        """Undo `to_array`; raises DecodeError. The code may still be anything."""
        if array.stype != STYPE:
            raise DecodeError(f"the weights have serialization type {array.stype!r}, not {STYPE!r}")
        reader = Reader(array.data)
        form, crc, exponent = _HEADER.unpack(reader.take(_HEADER.size))
        if form != _FORMAT:
            raise DecodeError(f"the weights have format {form}, this fedapp reads {_FORMAT}")
        if not FINEST <= exponent <= COARSEST:
            raise DecodeError(f"the weights name a step of 2^{exponent}")
        based_on, number = reader.varint(_NEWEST), reader.varint(_NEWEST)
        return cls(crc, exponent, based_on, number, reader.rest())

    def onto(self, base: Version, layout: Layout) -> Version:
        """The version that comes out; raises DecodeError."""
        try:
            return base.plus(self.number, self.exponent, levels_of(self.code, layout))
        except OverflowError as error:
            raise DecodeError(f"the weights cannot be decoded: {error}") from error


def code_of(levels: NDArray[np.int16 | np.int32], layout: Layout) -> bytes:
    """Levels (size,), coded without loss."""
    return coder.encode(levels.astype(np.float32), 1.0, _NEAREST, shapes(layout))[0]


def levels_of(code: bytes, layout: Layout) -> NDArray[np.int32]:
    """Undo `code_of`; raises DecodeError."""
    return coder.decode(code, shapes(layout))


def crc_of(weights: Floats) -> int:
    """The checksum of weights (size,)."""
    return zlib.crc32(weights.astype("<f4", copy=False).data)
