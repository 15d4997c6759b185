"""Records of ints and bytes, and readers of their fields that trust nothing."""

import numpy as np

from fedapp.errors import DecodeError

Record = dict[str, int | bytes]
"""A message, a reply or a client's state; ints are from 0 to 2**63 - 1."""


def whole(record: Record, name: str, high: int = 2**63 - 1) -> int:
    """An int field in [0, high]; raises DecodeError."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise DecodeError(
            f"secure aggregation: {name} must be a whole number from 0 to {high}, got {value!r:.40}"
        )
    return value


def data(record: Record, name: str, size: int) -> bytes:
    """A bytes field of exactly this size; raises DecodeError."""
    value = record.get(name)
    if not isinstance(value, bytes) or len(value) != size:
        said = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise DecodeError(f"secure aggregation: {name} must be {size} bytes, got {said}")
    return value


def split(value: bytes, size: int) -> list[bytes]:
    """Parts of this size."""
    return [value[start : start + size] for start in range(0, len(value), size)]


def marks(which: list[bool]) -> bytes:
    """One bit each, most significant first."""
    return np.packbits(which).tobytes()


def read_marks(record: Record, name: str, count: int) -> list[bool]:
    """Undo `marks`; raises DecodeError."""
    value = data(record, name, (count + 7) // 8)
    bits: list[bool] = np.unpackbits(np.frombuffer(value, np.uint8)).astype(bool).tolist()
    if any(bits[count:]):
        raise DecodeError(f"secure aggregation: {name} has marks behind its last one")
    return bits[:count]
