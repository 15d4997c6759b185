"""Three levels: the largest values keep their signs and share one magnitude."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State
from fedapp.codec.layers import require_finite
from fedapp.codec.prune import largest
from fedapp.codec.scale import read_scales, times
from fedapp.errors import DecodeError


@dataclass(frozen=True)
class Ternary:
    """Keeps signs of the given fraction of the values, those of largest magnitude, at their mean magnitude.

    float32 (n,) <-> int32 (n,) of -1, 0, 1; header: the magnitude, float32. An entropy coder behind it codes
    places and signs within some twenty bytes of their entropy; the Golomb code of the paper takes 0.3 % more.
    Biased: takes error feedback. The places depend on the update, so under differential privacy it comes
    after the noise.
    Source: Sattler et al. 2019, "Robust and communication-efficient federated learning from non-i.i.d. data",
    Algorithm 1 (sparse ternary compression).
    """

    fraction: float = 0.01

    def __post_init__(self) -> None:
        check.real("codec.fraction", self.fraction, above=0.0, high=1.0)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        level = np.where(largest(x, self.fraction), np.sign(x), 0).astype(np.int32)
        magnitude = np.mean(np.abs(x[level != 0]), dtype=np.float64) if level.any() else 0.0
        return Packet(level, np.array([magnitude], "<f4").tobytes()), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        level = packet.body
        if level.dtype != np.int32 or level.max(initial=0) > 1 or level.min(initial=0) < -1:
            raise DecodeError("packet does not hold ternary levels")
        return times(level, read_scales(packet.header, 1))
