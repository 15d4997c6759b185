"""Randomness that both ends share: four bytes in a header stand for any number of draws.

Only the raw stream of PCG64 is used, which numpy promises never to change; the distributions built on it
here are integer arithmetic and exact float32, so both ends draw the same on any machine.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

SIZE = 4
_AT_ONCE = 2**16


def draw(rng: np.random.Generator) -> bytes:
    """A fresh seed, little endian."""
    return int(rng.integers(2**32)).to_bytes(SIZE, "little")


def words(seed: bytes, count: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words."""
    raw: NDArray[np.uint64] = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(count)
    return raw


def centred(seed: bytes, count: int) -> NDArray[np.float32]:
    """`count` values uniform on (-1/2, 1/2), multiples of 2**-25."""
    stream, x = np.random.PCG64(int.from_bytes(seed, "little")), np.empty(count, np.float32)
    for start in range(0, count, _AT_ONCE):
        part = x[start : start + _AT_ONCE]
        part[:] = stream.random_raw(-(-len(part) // 2)).astype("<u8").view("<u4")[: len(part)] >> 8
    x -= np.float32(2**23 - 0.5)
    x *= np.float32(2**-24)
    return x


def signs(seed: bytes, count: int) -> NDArray[np.int8]:
    """`count` values, each -1 or 1."""
    bits = np.unpackbits(words(seed, -(-count // 64)).astype("<u8").view(np.uint8), count=count)
    return 1 - 2 * bits.view(np.int8)


def places(seed: bytes, count: int, kept: int) -> NDArray[np.bool_]:
    """A mask of exactly `kept` of `count` places, every such mask as likely as another."""
    keys, mask = np.empty(count, np.uint64), np.zeros(count, np.bool_)
    if kept:
        for part, some in _keys(seed, count):
            keys[part] = some
        keys.partition(kept - 1)
        last = keys[kept - 1]
        for part, some in _keys(seed, count):  # drawn again: sorting has moved them
            mask[part] = some <= last
    return mask


def _keys(seed: bytes, count: int) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
    """A random word for each place, part by part; their low bits are the place, so no two are the same."""
    stream, low = np.random.PCG64(int.from_bytes(seed, "little")), np.uint64(count.bit_length())
    for start in range(0, count, _AT_ONCE):
        place = np.arange(start, min(start + _AT_ONCE, count), dtype=np.uint64)
        yield slice(start, start + len(place)), stream.random_raw(len(place)) >> low << low | place
