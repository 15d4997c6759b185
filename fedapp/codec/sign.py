"""One bit a value."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State
from fedapp.codec.bits import pack_bits, unpack_bits
from fedapp.codec.layers import PER, require_finite, require_whole, runs
from fedapp.codec.scale import over_runs, read_scales, times


@dataclass(frozen=True)
class Sign:
    """The sign of every value, times the mean magnitude of its layer or of its channel.

    float32 (n,) <-> uint8 (n / 8,), a set bit for a negative value; header: the scales, float32. That scale
    leaves the least squared error of all. Zero counts as positive. Biased: takes error feedback.
    Source: Karimireddy et al. 2019, "Error feedback fixes SignSGD and other gradient compression schemes",
    Algorithm 1 (EF-signSGD), a layer at a time; by channel it is the binary filter of Rastegari et al. 2016,
    "XNOR-Net", section 3.1.
    """

    scale: str = "layer"

    def __post_init__(self) -> None:
        check.choice("codec.scale", self.scale, PER)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_whole(x, layout)
        require_finite(x, layout)
        lengths = runs(layout, self.scale)
        mean = over_runs(np.add, np.abs(x.astype(np.float64)), lengths) / lengths
        return Packet(pack_bits((x < 0).view(np.uint8), 1), mean.astype("<f4").tobytes()), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        lengths = runs(layout, self.scale)
        scales = read_scales(packet.header, len(lengths))
        negative = unpack_bits(packet.body, layout.size, 1).astype(np.int8)
        return times(1 - 2 * negative, scales, lengths)
