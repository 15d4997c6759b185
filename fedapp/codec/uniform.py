"""Uniform levels: to the nearest, by layer or channel; at random; with a dither that both ends know."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State, seed
from fedapp.codec.layers import PER, require_finite, require_whole, runs
from fedapp.codec.scale import even_runs, levels_of, over_runs, read_scales, round_up, times
from fedapp.errors import DecodeError


@dataclass(frozen=True)
class Uniform:
    """Rounds to the nearest of 2**bits - 1 levels up to the largest magnitude of each layer or channel.

    float32 (n,) <-> int32 (n,); header: the steps, float32, one for each layer or channel. The error is at
    most half a step. Biased, the more the fewer the bits: takes error feedback.
    Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference: a
    whitepaper" (symmetric uniform quantizer, by layer or channel).
    """

    bits: int = 8
    scale: str = "channel"

    def __post_init__(self) -> None:
        check.whole("codec.bits", self.bits, 2, 16)
        check.choice("codec.scale", self.scale, PER)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_whole(x, layout)
        require_finite(x, layout)
        lengths = runs(layout, self.scale)
        step = round_up(over_runs(np.maximum, np.abs(x.astype(np.float64)), lengths) / self._most)
        level = np.rint(levels_of(x, np.repeat(step, lengths)))
        return Packet(np.copysign(level, x).astype(np.int32), step.astype("<f4").tobytes()), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        _check_levels(packet, layout, self._most)
        lengths = runs(layout, self.scale)
        if len(packet.body) != layout.size:
            raise DecodeError(f"packet holds {len(packet.body)} levels, the model {layout.size} values")
        return times(packet.body, read_scales(packet.header, len(lengths)), lengths)

    @property
    def _most(self) -> int:
        return int(2 ** (self.bits - 1) - 1)


@dataclass(frozen=True)
class Stochastic:
    """Rounds up or down at random, so that the mean is the value: unbiased.

    Each bucket of values has a step of its own, its Euclidean norm / `levels`. float32 (n,) <-> int32 (n,)
    from -levels to levels, most of them small: an entropy coder follows; header: the steps, float32.
    Source: Alistarh et al. 2017, "QSGD: communication-efficient SGD via gradient quantization and encoding",
    section 3.1; Lemma 3.1 bounds the squared error by min(d / levels^2, sqrt(d) / levels) times that of zero.
    """

    levels: int = 16
    bucket: int = 1024

    def __post_init__(self) -> None:
        check.whole("codec.levels", self.levels, 1, 2**20)
        check.whole("codec.bucket", self.bucket, 1, 2**30)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        lengths = even_runs(len(x), self.bucket)
        norm = np.sqrt(over_runs(np.add, np.square(x, dtype=np.float64), lengths))
        step = round_up(norm / self.levels)
        level = np.floor(levels_of(x, np.repeat(step, lengths)) + rng.random(len(x)))
        level = np.minimum(level, self.levels)  # where adding the draw rounded up to the next integer
        return Packet(np.copysign(level, x).astype(np.int32), step.astype("<f4").tobytes()), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        _check_levels(packet, layout, self.levels)
        lengths = even_runs(len(packet.body), self.bucket)
        return times(packet.body, read_scales(packet.header, len(lengths)), lengths)


@dataclass(frozen=True)
class Dither:
    """Adds shared noise of one step before rounding, and takes it off behind: unbiased for any input.

    The error is uniform over a step, of variance step^2 / 12, whatever the input (not noise for privacy: the
    decoder knows it). `step` is relative to the root mean square of the vector. float32 (n,) <-> int32 (n,);
    header: seed and step. A static entropy coder does not know the dither and pays for it at wide steps.
    Source: Roberts 1962, "Picture coding using pseudo-random noise"; Gray and Stockham 1993, "Dithered
    quantizers".
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        check.real("codec.step", self.step, low=1e-3, high=1e6)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        shared = seed.draw(rng)
        square = np.mean(np.square(x, dtype=np.float64)) if len(x) else 0.0
        step = round_up(self.step * np.sqrt(square))
        if not step:
            return Packet(np.zeros(len(x), np.int32), shared + struct.pack("<f", 0.0)), {}
        level = np.rint(x.astype(np.float64) / np.float64(step) + seed.centred(shared, len(x)))
        return Packet(level.astype(np.int32), shared + struct.pack("<f", step)), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.int32 or len(packet.body) > layout.size:
            raise DecodeError("packet does not hold the levels of a quantizer")
        step = read_scales(packet.header[seed.SIZE :], 1)
        dither = seed.centred(packet.header[: seed.SIZE], len(packet.body))
        return times(np.subtract(packet.body, dither, out=dither, dtype=np.float32), step)


def _check_levels(packet: Packet, layout: Layout, most: int) -> None:
    level = packet.body
    if level.dtype != np.int32 or len(level) > layout.size:
        raise DecodeError("packet does not hold the levels of a quantizer")
    if level.max(initial=0) > most or level.min(initial=0) < -most:
        raise DecodeError(f"packet holds levels beyond {most}")
