"""Most values become zero."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State
from fedapp.codec.entropy import decode_symbols, encode_symbols
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
        keep = min(len(x), max(1, round(self.fraction * len(x))))
        # A stable sort, not argpartition: equal magnitudes must fall the same way on every machine.
        kept = np.zeros(len(x), np.int32)
        kept[np.argsort(-np.abs(x), kind="stable")[:keep]] = 1
        mask = encode_symbols(kept, np.array([len(x) - keep, keep]))
        return Packet(x[kept == 1], varint(keep) + mask), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        reader = Reader(packet.header)
        keep = reader.varint(layout.size)
        if packet.body.dtype != np.float32 or len(packet.body) != keep:
            raise DecodeError(f"packet does not hold the {keep} values that it kept")
        mask = decode_symbols(reader.rest(), np.array([layout.size - keep, keep]))
        x = np.zeros(layout.size, np.float32)
        x[mask == 1] = packet.body
        return x
