"""The default codec: the lowest error that a number of bytes buys, by scalar quantization."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Codec, Layout, Packet, State, context
from fedapp.codec.chain import ErrorFeedback
from fedapp.codec.layers import require_finite, require_whole
from fedapp.codec.target import Target, meet
from fedapp.errors import DecodeError

LAMBDA = 0.09  # squared steps that a bit is worth; best, and flat, from 0.1 to 4 bits per parameter
_HEADER = struct.Struct("<fbb")  # step, then how far the points of level 1 and of levels > 1 move, in 1/256

_FRAME = _HEADER.size + 7  # what a packet holds beside the code: this header, its length, version, dtype, CRC
_COARSEST, _FINEST = 0.9, 2.0**-24  # steps, of the largest magnitude: below, some value is always sent


def default(
    step: float | None = None, rate: float = 1.0, nmse: float | None = None, error_feedback: bool = False
) -> Codec:
    """What `codec=default` is made of."""
    check.flag("codec.error_feedback", error_feedback)
    codec = RateDistortion(step, rate, nmse)
    return ErrorFeedback(codec) if error_feedback else codec


@dataclass(frozen=True)
class RateDistortion:
    """One step for the whole vector, rounding that weighs bits against distance, context-adaptive coding.

    Aims at one of: step, in root mean squares of the vector; else nmse, squared error over squared norm;
    else rate, bits per parameter of the whole packet. Targets are met within 3 % or 32 bytes by a search
    on an estimate with at most three full encodes. The coarsest step is 0.9 of the largest magnitude, since
    error feedback would owe a vector that is never sent for ever; the finest is 2^-24 of it. A target
    beyond these gets the nearer one, and the log names it.

    float32 (n,) <-> uint8 (bytes,), where n is the layout's: the coder looks at its layers (`context`). The
    decoder puts levels of magnitude 1, and larger ones, at the mean of their cells (two bytes).
    Sources: Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian random variables";
    Sullivan and Wiegand 1998, "Rate-distortion optimization for video compression".
    """

    step: float | None = None
    rate: float = 1.0
    nmse: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None:
            check.real("codec.step", self.step, low=1e-6, high=1e6)
        if self.nmse is not None:
            check.real("codec.nmse", self.nmse, low=1e-9, below=1.0)
        check.real("codec.rate", self.rate, above=0.0, high=12.0)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_whole(x, layout)
        require_finite(x, layout)
        largest = float(np.max(np.abs(x), initial=0.0))
        if not largest:
            return Packet(np.zeros(0, np.uint8), _HEADER.pack(0.0, 0, 0)), {}
        finest, coarsest = _FINEST * largest, _COARSEST * largest
        if self.step is not None:
            rms = float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))
            return _code(x, layout, min(max(self.step * rms, finest), coarsest)), {}
        if self.nmse is not None:
            target = Target(
                "codec.nmse", self.nmse, _error_estimate, lambda packet: _nmse(x, packet, layout), falls=False
            )
        else:
            size = self.rate * len(x) / 8
            target = Target(
                "bytes for codec.rate", size, lambda a: len(x) * _bits_estimate(a) / 8 + _FRAME, _size,
                falls=True, tolerance=max(0.01, 10 / size),
            )  # fmt: skip
        return meet(target, x, lambda step: _code(x, layout, step), finest, coarsest), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.uint8 or len(packet.header) != _HEADER.size:
            raise DecodeError("packet does not hold a header and context-coded levels")
        step, one, more = _HEADER.unpack(packet.header)
        if not 0 <= step < np.inf:
            raise DecodeError(f"packet names a quantizer step of {step}")
        if not step:
            if len(packet.body):
                raise DecodeError("packet has levels without a step")
            return np.zeros(layout.size, np.float32)
        levels = context.decode(packet.body.tobytes(), _shapes(layout))
        x: NDArray[np.float32] = _points(levels, np.float32(step), one, more)
        if not np.isfinite(x).all():
            raise DecodeError("packet decodes to values beyond float32")
        return x


def _code(x: NDArray[np.float32], layout: Layout, step: float) -> Packet:
    """One full encode."""
    step32 = max(np.float32(step), np.finfo(np.float32).smallest_subnormal)
    # float32 cannot invert the smallest steps, nor well the largest; a power of two changes no other bit.
    exponent = int(np.frexp(step32)[1])
    exponent = exponent if abs(exponent) > 64 else 0
    unit = np.ldexp(x, -exponent) if exponent else x
    scale = 1 / float(np.ldexp(np.float64(step32), -exponent))
    code, _, beyond = context.encode(unit, scale, _EDGES, _shapes(layout))
    moves = [max(-127, min(127, round(256 * beyond[k] / max(beyond[k + 2], 1)))) for k in (0, 1)]
    return Packet(np.frombuffer(code, np.uint8), _HEADER.pack(step32, *moves))


def _edges(weight: float) -> NDArray[np.float32]:
    """How far above m - 1 level m begins, by ten bits of the state that tells them apart: m = 1, then m > 1.

    Rounding up pays where the squared distance it saves is above `weight` times the bits it costs more;
    with a weight of 0 it goes to the nearest level. The end of counting costs about 0.6 bit, the sign 0.8.
    """
    p = (np.arange(1024) + 0.5) / 1024
    dearer = np.log2((1 - p) / p) + np.array([[1.4], [0.6]])
    edges: NDArray[np.float32] = (0.5 + weight / 2 * np.maximum(dearer, 0)).astype(np.float32).ravel()
    return edges


_EDGES = _edges(LAMBDA)


@njit(cache=True, error_model="numpy", nogil=True)
def _points(levels: NDArray[np.int32], step: np.float32, one: int, more: int) -> NDArray[np.float32]:
    """What each level stands for: an integer times a power of two times the step, the same everywhere."""
    x: NDArray[np.float32] = np.empty(len(levels), np.float32)
    for j in range(len(levels)):
        q = np.int64(levels[j])
        move = one if abs(q) == 1 else more
        x[j] = np.float32(q * 256 + (move if q > 0 else -move if q < 0 else 0)) * np.float32(1 / 256) * step
    return x


def _shapes(layout: Layout) -> list[tuple[int, ...]]:
    return [slot.shape for slot in layout.slots]


def _size(packet: Packet) -> float:
    return len(packet.body) + _FRAME


def _nmse(x: NDArray[np.float32], packet: Packet, layout: Layout) -> float:
    largest = float(np.abs(x).max())  # squares of the smallest and largest float32 are no float64
    wide = x.astype(np.float64) / largest
    error = wide - RateDistortion().decode(packet, layout).astype(np.float64) / largest
    return float(np.dot(error, error) / np.dot(wide, wide))


def _rounded(magnitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """Levels of magnitudes in steps, as one context would round them."""
    edge = 0.62
    for _ in range(3):
        p = np.clip(np.mean(magnitude > edge), 1e-4, 0.5)
        edge = 0.5 + LAMBDA / 2 * (np.log2((1 - p) / p) + 1.4)
    return np.where(magnitude > edge, np.maximum(np.rint(magnitude), 1), 0)


def _bits_estimate(magnitude: NDArray[np.float64]) -> float:
    """Bits per parameter: the entropy of single levels, less what contexts usually save."""
    halvings = max(0.0, np.floor(np.log2(magnitude.mean() / 16)))  # a sample shows no more than its size
    level = np.minimum(_rounded(magnitude / 2**halvings), 1 << 14).astype(np.int64)
    share = np.bincount(level) / len(level)
    zero, share = share[0], share[share > 0]
    bits = float(-np.sum(share * np.log2(share)) + 1 - zero + halvings)
    return bits * (bits + 0.4) / (bits + 0.6)


def _error_estimate(magnitude: NDArray[np.float64]) -> float:
    """Squared error over squared norm."""
    error = magnitude - _rounded(magnitude)
    return float(np.sum(error**2) / np.sum(magnitude**2)) + 1e-15
