"""A packet as bytes: version, dtype, checksum, padding; and bytes from outside, which may be anything."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout, Packet
from fedapp.codec.varint import Reader, varint
from fedapp.errors import ConfigError, DecodeError

_VERSION = 5
_PREFIX = struct.Struct("<BBI")  # version, dtype of the body, CRC-32 of all that follows
_LENGTH = struct.Struct("<I")  # of a packet that is padded
_DTYPES = (np.dtype("u1"), np.dtype("<i4"), np.dtype("<f4"))


def pack(packet: Packet, codec: Codec, layout: Layout) -> bytes:
    """One byte string: version, dtype, CRC-32, header with its length, body (little endian).

    The CRC is seeded with the codec's settings and the layout, so that a packet made by another codec or
    for another model is refused, at no byte more.
    """
    kind, head, body = _parts(packet)
    crc = zlib.crc32(body, zlib.crc32(head, _seed(codec, layout)))
    return b"".join((_PREFIX.pack(_VERSION, kind, crc), head, body))


def packed_size(packet: Packet) -> int:
    """How many bytes `pack` makes."""
    _, head, body = _parts(packet)
    return _PREFIX.size + len(head) + body.nbytes


def unpack(data: bytes, codec: Codec, layout: Layout) -> Packet:
    """Undo `pack`; raises DecodeError on anything else. Allocates no more than the bytes received."""
    version, kind, crc = _PREFIX.unpack(Reader(data).take(_PREFIX.size))
    if version != _VERSION:
        raise DecodeError(f"packet has version {version}, this fedapp reads {_VERSION}")
    rest = memoryview(data)[_PREFIX.size :]
    if zlib.crc32(rest, _seed(codec, layout)) != crc:
        raise DecodeError("packet was damaged, or made by another codec or for another model")
    return from_bytes(kind, rest)


def to_bytes(packet: Packet) -> tuple[int, bytes]:
    """The number of the body's type; and the header with its length, then the body (little endian)."""
    kind, head, body = _parts(packet)
    return kind, head + body


def _parts(packet: Packet) -> tuple[int, bytes, memoryview]:
    body = np.ascontiguousarray(packet.body, packet.body.dtype.newbyteorder("<"))
    if body.dtype not in _DTYPES:
        raise TypeError(f"a packet's body is uint8, int32 or float32, got {body.dtype}")
    head = varint(len(packet.header)) + packet.header
    return _DTYPES.index(body.dtype), head, body.reshape(-1).view(np.uint8).data


def from_bytes(kind: int, data: bytes | memoryview) -> Packet:
    """Undo `to_bytes`; raises DecodeError on anything else. Allocates no more than the bytes received."""
    if kind >= len(_DTYPES):
        raise DecodeError(f"packet names body type {kind}, which does not exist")
    reader = Reader(data)
    header = reader.take(reader.varint(len(data)))
    body = reader.left
    if len(body) % _DTYPES[kind].itemsize:
        raise DecodeError("packet's body is not a whole number of values")
    return Packet(np.frombuffer(body, _DTYPES[kind]), header)


def decode_update(data: bytes, codec: Codec, layout: Layout) -> NDArray[np.float32]:
    """Float32 (size,), finite; raises DecodeError on anything else, whatever a codec's stages do."""
    try:
        update = codec.decode(unpack(data, codec, layout), layout)
    except DecodeError:
        raise
    except Exception as error:  # hostile bytes may reach any line of any stage
        raise DecodeError(f"packet cannot be decoded: {error}") from error
    if update.shape != (layout.size,) or update.dtype != np.float32 or not np.isfinite(update).all():
        raise DecodeError(
            f"packet decodes to {update.dtype} {update.shape}, not {layout.size} finite float32"
        )
    return update


def padded(data: bytes, instead: bytes, size: int) -> bytes:
    """The packet behind its length, with zeros up to `size`; where it does not fit, what stands instead."""
    fitting = data if len(data) + _LENGTH.size <= size else instead
    if len(fitting) + _LENGTH.size > size:
        raise ConfigError(
            f"privacy.packet_bytes={size} does not even hold a packet of zeros: "
            f"set {len(fitting) + _LENGTH.size} or more"
        )
    return (_LENGTH.pack(len(fitting)) + fitting).ljust(size, b"\0")


def unpadded(data: bytes, size: int) -> bytes:
    """Undo `padded`; raises DecodeError."""
    if len(data) != size:
        raise DecodeError(f"packets have privacy.packet_bytes={size} bytes, this one {len(data)}")
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    if end > size or any(data[end:]):
        raise DecodeError("the packet is not padded as it says")
    return data[_LENGTH.size : end]


def _seed(codec: Codec, layout: Layout) -> int:
    return zlib.crc32(repr((codec, layout)).encode())
