"""Most values become zero."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State, seed
from fedapp.codec.entropy import decode_symbols, encode_symbols
from fedapp.codec.layers import require_finite
from fedapp.codec.scale import LARGEST
from fedapp.codec.varint import Reader, varint
from fedapp.errors import DecodeError


@dataclass(frozen=True)
class TopK:
    """Keeps the given fraction of the values, those of largest magnitude (at least one).

    float32 (n,) <-> float32 (k,); the header holds k and the entropy-coded mask of their places.
    The places depend on the update, so under differential privacy this comes after the noise.
    Source: Aji and Heafield 2017, "Sparse communication for distributed gradient descent".
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        check.real("codec.fraction", self.fraction, above=0.0, high=1.0)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        kept = largest(x, self.fraction)
        keep = int(kept.sum())
        mask = encode_symbols(kept.astype(np.int32), np.array([len(x) - keep, keep]))
        return Packet(x[kept], varint(keep) + mask), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        reader = Reader(packet.header)
        keep = reader.varint(layout.size)
        mask = decode_symbols(reader.rest(), np.array([layout.size - keep, keep]))
        return put_back(packet.body, mask == 1)


@dataclass(frozen=True)
class RandomMask:
    """Keeps the given fraction of the values at random places (at least one), which a seed tells: no indices.

    float32 (n,) <-> float32 (k,); header: the seed, 4 bytes. `unbiased` scales what is kept by n / k (values
    that leave float32 stop at its largest): then the mean of many is the update, at a variance of
    (n / k - 1) x^2 each. Unscaled, it takes error feedback. Places do not depend on the update, so they tell
    nothing of it.
    Source: Konecny et al. 2016, "Federated learning: strategies for improving communication efficiency",
    section 2 (random mask) and section 3 (subsampling).
    """

    fraction: float = 0.1
    unbiased: bool = True

    def __post_init__(self) -> None:
        check.real("codec.fraction", self.fraction, above=0.0, high=1.0)
        check.flag("codec.unbiased", self.unbiased)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        keep, shared = _count(self.fraction, len(x)), seed.draw(rng)
        kept = x[seed.places(shared, len(x), keep)]
        if self.unbiased and keep:
            kept = np.clip(kept.astype(np.float64) * (len(x) / keep), -LARGEST, LARGEST).astype(np.float32)
        return Packet(kept, shared), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if len(packet.header) != seed.SIZE:
            raise DecodeError("packet does not hold the seed of its mask")
        kept = seed.places(packet.header, layout.size, _count(self.fraction, layout.size))
        return put_back(packet.body, kept)


def largest(x: NDArray[Any], fraction: float) -> NDArray[np.bool_]:
    """Mask of this fraction of the values, those of largest magnitude; of equal ones the first in place."""
    keep, magnitude = _count(fraction, len(x)), np.abs(x)
    if not keep:
        return np.zeros(0, bool)
    least = np.partition(magnitude, len(x) - keep)[len(x) - keep]
    kept: NDArray[np.bool_] = magnitude > least
    kept[np.flatnonzero(magnitude == least)[: keep - int(kept.sum())]] = True
    return kept


def put_back(values: NDArray[Any], kept: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The vector with these values where `kept` says and zeros elsewhere; DecodeError unless they fit."""
    count = np.count_nonzero(kept)
    if values.dtype != np.float32 or len(values) != count:
        raise DecodeError(f"packet does not hold the {count} values that it kept")
    x = np.zeros(len(kept), np.float32)
    x[kept] = values
    return x


def _count(fraction: float, size: int) -> int:
    return min(size, max(1, round(fraction * size)))
