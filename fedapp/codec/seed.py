"""Randomness that both ends share: four bytes in a header stand for any number of draws.

Only the raw stream of PCG64 is used, which numpy promises never to change; the distributions built on it
here are integer arithmetic and exact float32, so both ends draw the same on any machine.
"""

import numpy as np
from numpy.typing import NDArray

SIZE = 4


def draw(rng: np.random.Generator) -> bytes:
    """A fresh seed, little endian."""
    return int(rng.integers(2**32)).to_bytes(SIZE, "little")


def words(seed: bytes, count: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words."""
    raw: NDArray[np.uint64] = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(count)
    return raw


def centred(seed: bytes, count: int) -> NDArray[np.float32]:
    """`count` values uniform on (-1/2, 1/2), multiples of 2**-25."""
    half = words(seed, -(-count // 2)).astype("<u8").view("<u4")[:count] >> np.uint32(8)
    return (half.astype(np.float32) - np.float32(2**23 - 0.5)) * np.float32(2**-24)


def signs(seed: bytes, count: int) -> NDArray[np.float32]:
    """`count` values, each -1 or 1."""
    bits = np.unpackbits(words(seed, -(-count // 64)).astype("<u8").view(np.uint8), count=count)
    return np.float32(1) - np.float32(2) * bits


def places(seed: bytes, count: int, kept: int) -> NDArray[np.bool_]:
    """A mask of exactly `kept` of `count` places, every such mask as likely as another."""
    low = np.uint64(count.bit_length())
    keys = words(seed, count) >> low << low | np.arange(count, dtype=np.uint64)  # all different: no ties
    mask: NDArray[np.bool_] = (
        keys <= np.partition(keys, kept - 1)[kept - 1] if kept else np.zeros(count, bool)
    )
    return mask
