"""Whole steps of a size that is public beforehand, in codes of one length: no packet tells by its size."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State, seed
from fedapp.codec.bits import pack_bits, unpack_bits
from fedapp.codec.layers import require_finite, require_whole
from fedapp.codec.rotate import rotated, rotated_back
from fedapp.errors import DecodeError


@dataclass(frozen=True)
class PublicStep:
    """Rotates, then rounds up or down at random to whole steps of a size that no update moves.

    The step is `step` root mean squares of a vector as long as `norm`, which is the clip norm where there is
    one. float32 (n,) <-> uint8 (bytes,), codes of `bits` bits each, where n is the layout's; header: the
    rotation's seed. So all packets for a model have one size, and nothing of a packet but its codes follows
    from the vector.

    The rotation spreads a vector over all its values, so that codes need not reach far; what lies beyond
    2^(bits - 1) - 1 steps is cut to that. Unbiased where nothing is; the error of a value is below a step,
    its square step^2 / 6 in the mean or less, and that of zeros is 0. Source: Suresh et al. 2017,
    "Distributed mean estimation with limited communication", section 3; there the step follows each vector.
    """

    bits: int = 4
    step: float = 0.6
    norm: float = 1.0

    def __post_init__(self) -> None:
        check.whole("codec.bits", self.bits, 2, 8)
        check.real("codec.step", self.step, low=1e-6, high=1e6)
        check.real("codec.norm", self.norm, above=0.0, high=1e6)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_whole(x, layout)
        require_finite(x, layout)
        turn = seed.draw(rng)
        steps = rotated(x.astype(np.float64), turn) / self._step(layout)
        level = np.clip(np.floor(steps + rng.random(len(x))), -self._most, self._most)
        return Packet(pack_bits((level + self._most).astype(np.uint8), self.bits), turn), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if len(packet.header) != seed.SIZE:
            raise DecodeError("packet does not hold the seed of a rotation")
        codes = unpack_bits(packet.body, layout.size, self.bits)
        if codes.max(initial=0) > 2 * self._most:
            raise DecodeError(f"packet holds levels beyond {self._most}")
        steps = codes.astype(np.float32)
        del codes  # a decoder's memory is bounded
        steps -= np.float32(self._most)
        steps = rotated_back(steps, packet.header)
        steps *= np.float32(self._step(layout))
        return steps

    def _step(self, layout: Layout) -> float:
        return self.step * self.norm / float(np.sqrt(max(1, layout.size)))

    @property
    def _most(self) -> int:
        return int(2 ** (self.bits - 1) - 1)
