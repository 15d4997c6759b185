"""Float values become integer levels of one common step."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State
from fedapp.codec.layers import require_finite
from fedapp.errors import DecodeError

_HEADER = struct.Struct("<fbb")  # step, then how far the points of level 1 and of levels >= 2 move, in 1/256
_MOST = 2**30  # levels stay clear of the int32 bound, so that sums of a level and its sign cannot wrap

_AT_ONCE = 2**16  # values, so that what is made on the way is small beside the vector


@dataclass(frozen=True)
class DeadZone:
    """Uniform scalar quantizer with a dead zone around zero, one step for the whole vector.

    level = sign(x) * floor(|x| / step + offset); an offset below 1/2 widens the zero cell, which prunes
    small values by itself. `step` is relative to the root mean square of the vector, but never above its
    largest magnitude: something is always sent, or error feedback would owe an even vector for ever. The
    decoder puts levels of magnitude 1, and those of 2 and more, at the mean of their cells (two bytes).
    float32 (n,) <-> int32 (n,). Source: Sullivan 1996, "Efficient scalar quantization of exponential and
    Laplacian random variables"; the rounding offset as in the H.264 reference quantizer.
    """

    step: float = 1.0
    offset: float = 0.38

    def __post_init__(self) -> None:
        check.real("codec.step", self.step, low=1e-6, high=1e6)
        check.real("codec.offset", self.offset, low=0.0, high=0.5)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        magnitude = np.abs(x.astype(np.float64))
        largest = magnitude.max(initial=0.0)
        step = np.float32(min(self.step * np.sqrt(np.mean(magnitude**2)), largest) if largest else 0.0)
        if not step:
            return Packet(np.zeros(len(x), np.int32), _HEADER.pack(0.0, 0, 0)), {}
        scaled = magnitude / np.float64(step)
        level = np.minimum(np.floor(scaled + self.offset), _MOST)
        moves = [_move(scaled, level, level == 1), _move(scaled, level, level > 1)]
        return Packet(np.copysign(level, x).astype(np.int32), _HEADER.pack(step, *moves)), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        level = packet.body
        if level.dtype != np.int32 or len(packet.header) != _HEADER.size:
            raise DecodeError("packet does not hold the levels of a dead-zone quantizer")
        step, one, more = _HEADER.unpack(packet.header)
        if not 0 <= step < np.inf:
            raise DecodeError(f"packet names a quantizer step of {step}")
        x = np.empty(len(level), np.float32)
        for start in range(0, len(level), _AT_ONCE):
            part = level[start : start + _AT_ONCE]
            magnitude = np.abs(part).astype(np.float32)
            moved = np.where(magnitude == 1, np.float32(one / 256), np.float32(more / 256))
            with np.errstate(over="ignore"):
                points = np.sign(part).astype(np.float32) * (magnitude + moved) * np.float32(step)
            x[start : start + _AT_ONCE] = points
        if not np.isfinite(x).all():
            raise DecodeError("packet decodes to values beyond float32")
        return x


def _move(scaled: NDArray[np.float64], level: NDArray[np.float64], of: NDArray[np.bool_]) -> int:
    """Mean distance of the values in these cells from their level, in 1/256 of a step."""
    return int(np.clip(np.rint(256 * np.mean(scaled[of] - level[of])), -127, 127)) if of.any() else 0
