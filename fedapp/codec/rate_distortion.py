"""The default codec: the lowest error that a number of bytes buys, by scalar quantization."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Codec, Layout, Packet, State, context
from fedapp.codec.chain import with_feedback
from fedapp.codec.feedback import AutoFeedback
from fedapp.codec.layers import extent, require_finite, require_whole, size
from fedapp.codec.model import Levels
from fedapp.codec.target import Floats, Target, magnitudes, meet, within
from fedapp.errors import DecodeError
from fedapp.jit import jit

LAMBDA = 0.09  # squared steps that a bit is worth; best, and flat, from 0.1 to 4 bits per parameter
TRELLIS_LAMBDA = 0.075  # the same with a trellis; flat from 0.065 to 0.085
_HEADER = struct.Struct("<fbb")  # step, then how far the points of level 1 and of levels > 1 move, in 1/256
_TRELLIS_HEADER = struct.Struct("<fbbb")  # step, then the same for places 1, 2 and above
_ENCODES = {False: 3, True: 6}  # by trellis: under it noise falls from 0.8 to 0 bits within 20 % of a step
# What estimates are made with, by trellis: how much finer steps, squared steps that a bit is worth, rounds in
# which an edge and its probability settle.
_LIKE = {False: (1.0, LAMBDA, 3), True: (1.6, 0.17, 8)}
_REST = 7  # what a packet holds beside header and code: the header's length, version, dtype, CRC
_LONG = 2**19  # updates from this length on are coded in part first
_EIGHTH, _TOGETHER = 8, 16  # the part: of so many times as many columns, so many in a row
_DEARER = 0.022  # log of what it takes more than its share, 1 to 4 percent: rows learn from fewer columns


def default(
    step: float | None = None, rate: float = 1.0, nmse: float | None = None,
    feedback: bool | Literal["auto"] = False, trellis: bool = False,
) -> Codec:  # fmt: skip
    """What `codec=default` is made of."""
    codec = RateDistortion(step, rate, nmse, trellis)
    return AutoFeedback(codec) if feedback == "auto" else with_feedback(codec, feedback)


@dataclass(frozen=True)
class RateDistortion:
    """One step for the whole vector, rounding that weighs bits against distance, context-adaptive coding.

    Aims at one of: step, in root mean squares of the vector; else nmse, squared error over squared norm;
    else rate, bits per parameter of the whole packet. Targets are met within 3 % or 32 bytes by a search
    on an estimate with at most three full encodes; to a rate, of a long update, one is usual, after two of an
    eighth of it. From the second round on one is usual everywhere, since the state says what the estimate
    missed in the last one (`miss`, float64 (1,)); should that mislead, four are the
    most, and what is no such state is passed over. Under error feedback, where a rate may lie between two
    steps, up to seven more find it. The coarsest step is 0.9 of the largest magnitude, since
    error feedback would owe a vector that is never sent for ever; the finest is 2^-24 of it. A target
    beyond these gets the nearer one, and the log names it.

    trellis: dependent quantization (`trellis`); its quantizers have this step each, and their points together
    lie half a step apart. On updates of a small CNN 0.5 to 1.1 dB better from 0.5 to 4 bits; no better below
    0.5 bit where rows and columns are alike. Encodes 30 times more slowly, up to six times for a target (or
    seven), and under mere noise misses some between 0.3 and 0.8 bits: there zeros beget zeros, or do not.

    float32 (n,) <-> uint8 (bytes,), where n is the layout's: the coder looks at its layers (`context`). The
    decoder puts levels of magnitude 1, and larger ones, at the mean of their cells (two bytes; with a trellis
    three: the first places of each quantizer, and the others).
    Sources: Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian random variables";
    Sullivan and Wiegand 1998, "Rate-distortion optimization for video compression".
    """

    step: float | None = None
    rate: float = 1.0
    nmse: float | None = None
    trellis: bool = False

    def __post_init__(self) -> None:
        if self.step is not None:
            check.real("codec.step", self.step, low=1e-6, high=1e6)
        if self.nmse is not None:
            check.real("codec.nmse", self.nmse, low=1e-9, below=1.0)
        check.real("codec.rate", self.rate, above=0.0, high=12.0)
        check.flag("codec.trellis", self.trellis)

    def __repr__(self) -> str:
        """As ever where there is no trellis: it seeds the CRC, and packets made before it shall be read."""
        trellis = ", trellis=True" if self.trellis else ""
        return f"RateDistortion(step={self.step!r}, rate={self.rate!r}, nmse={self.nmse!r}{trellis})"

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        return self._encode(x, layout, state, knowing=False)

    def encode_known(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        return self._encode(x, layout, state, knowing=True)

    def _encode(self, x: NDArray[Any], layout: Layout, state: State, knowing: bool) -> tuple[Packet, State]:
        code = partial(self._code, x, layout, knowing or self.nmse is not None)
        require_whole(x, layout)
        most, energy = extent(x)
        if not np.isfinite(most):
            require_finite(x, layout)
        if not most:
            known = np.zeros(len(x), np.float32) if knowing else None
            return Packet(np.zeros(0, np.uint8), bytes(self._header.size), known), {}
        if self.step is not None:
            rms = float(np.sqrt(energy / len(x)))
            return code(within(self.step * rms, most)), {}
        if self.nmse is not None:
            target = Target(
                "codec.nmse", self.nmse, lambda a, count: _error(a, count, *_LIKE[self.trellis]),
                lambda packet: self._nmse(x, packet, layout), falls=False,
                encodes=_ENCODES[self.trellis],
            )  # fmt: skip
        else:
            goal, frame = self.rate * len(x) / 8, self._header.size + _REST
            target = Target(
                "bytes for codec.rate", goal,
                lambda a, count: len(x) * _bits(a, count, *_LIKE[self.trellis]) / 8 + frame,
                lambda packet: len(packet.body) + frame, falls=True, tolerance=max(0.01, 10 / goal),
                encodes=_ENCODES[self.trellis],
            )  # fmt: skip
        to_rate = self.nmse is None and not self.trellis
        packet, miss = meet(
            target, x, most, code, _remembered(state), code if to_rate else None,
            _pilot(x, layout) if to_rate and len(x) >= _LONG else None,
        )  # fmt: skip
        return packet, {"miss": np.array([miss])}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.uint8 or len(packet.header) != self._header.size:
            raise DecodeError("packet does not hold a header and context-coded levels")
        step, *moves = self._header.unpack(packet.header)
        if not 0 <= step < np.inf:
            raise DecodeError(f"packet names a quantizer step of {step}")
        if not step:
            if len(packet.body):
                raise DecodeError("packet has levels without a step")
            return np.zeros(layout.size, np.float32)
        levels = context.decode(packet.body.tobytes(), shapes(layout), self.trellis)
        points = self._points(levels, step, moves)
        if points is None:
            raise DecodeError("packet decodes to values beyond float32")
        return points

    @property
    def _header(self) -> struct.Struct:
        return _TRELLIS_HEADER if self.trellis else _HEADER

    def _code(
        self, x: NDArray[np.float32], layout: Layout, knowing: bool, step: float, least: float = 0.0
    ) -> Packet:
        """One full encode; magnitudes below so many steps are not sent."""
        step32 = max(np.float32(step), np.finfo(np.float32).smallest_subnormal)
        # float32 cannot invert the smallest steps, nor well the largest; a power of two changes no other bit.
        exponent = int(np.frexp(step32)[1])
        exponent = exponent if abs(exponent) > 64 else 0
        unit = np.ldexp(x, -exponent) if exponent else x
        scale = 1 / float(np.ldexp(np.float64(step32), -exponent))
        if self.trellis:
            code, levels, _ = context.encode(unit, 2 * scale, _WEIGHT, shapes(layout), dependent=True)
            moves = [128 * move for move in _beyond(unit, 2 * scale, levels)]
        else:
            edge = edges(LAMBDA, least)
            code, levels, beyond = context.encode(unit, scale, edge, shapes(layout), keep=knowing)
            moves = [256 * beyond[k] / max(beyond[k + 2], 1) for k in (0, 1)]
        rounded = [max(-127, min(127, round(move))) for move in moves]
        known = self._points(levels, step32, rounded) if knowing else None
        return Packet(np.frombuffer(code, np.uint8), self._header.pack(step32, *rounded), known)

    def _points(self, levels: Levels, step: Any, moves: Sequence[int]) -> NDArray[np.float32] | None:
        """What levels stand for, in their place; None where that is beyond float32."""
        one, two, more = moves if self.trellis else (moves[0], moves[1], moves[1])
        finite = _to_points(levels, np.float32(step), 128 if self.trellis else 256, one, two, more)
        return levels.view(np.float32) if finite else None

    def _nmse(self, x: NDArray[np.float32], packet: Packet, layout: Layout) -> float:
        error = x - (self.decode(packet, layout) if packet.known is None else packet.known)
        scale = 1 / extent(x)[0]  # the smallest float32 have no squares in float64
        return extent(error, scale)[1] / extent(x, scale)[1]


def edges(weight: float, least: float = 0.0) -> NDArray[np.float32]:
    """How far above m - 1 level m begins, by ten bits of the state that tells them apart: m = 1, then m > 1.

    Level 1 does not begin below `least`.

    Rounding up pays where the squared distance it saves is above `weight` times the bits it costs more;
    with a weight of 0 it goes to the nearest level. The end of counting costs about 0.6 bit, the sign 0.8.
    """
    p = (np.arange(1024) + 0.5) / 1024
    dearer = np.log2((1 - p) / p) + np.array([[1.4], [0.6]])
    begin: NDArray[np.float32] = (0.5 + weight / 2 * np.maximum(dearer, 0)).astype(np.float32)
    begin[0] = np.maximum(begin[0], least)
    return begin.ravel()


_WEIGHT = np.array([4 * TRELLIS_LAMBDA], np.float32)  # in squared half steps


@jit
def _to_points(levels: NDArray[np.int32], step: np.float32, unit: int, one: int, two: int, more: int) -> bool:
    """Turn levels, in place, into what they stand for, as the bits of float32; False unless all are finite.

    `unit`/256 steps apart: an integer, times a power of two, times the step; the same everywhere. The last
    three say how far those of magnitude 1, 2 and above move.
    """
    largest = np.int32(0)
    for j in range(len(levels)):
        q = np.int64(levels[j])
        move = one if abs(q) == 1 else two if abs(q) == 2 else more
        x = np.float32(q * unit + (move if q > 0 else -move if q < 0 else 0)) * np.float32(1 / 256) * step
        levels[j] = np.float32(x).view(np.int32)
        largest = max(largest, np.float32(abs(x)).view(np.int32))
    return bool(largest < np.float32(np.inf).view(np.int32))


@jit
def _beyond(x: NDArray[np.float32], scale: float, places: NDArray[np.int32]) -> NDArray[np.float64]:
    """How far values lie beyond places of magnitude 1, 2 and above, in the mean."""
    total, count = np.zeros(3), np.zeros(3)
    for j in range(len(places)):
        m = abs(np.int64(places[j]))
        if m:
            kind = 0 if m == 1 else 1 if m == 2 else 2
            total[kind] += abs(np.float64(x[j]) * scale) - m
            count[kind] += 1
    mean: NDArray[np.float64] = total / np.maximum(count, 1)
    return mean


def shapes(layout: Layout) -> list[tuple[int, ...]]:
    return [slot.shape for slot in layout.slots]


def _pilot(x: NDArray[np.float32], layout: Layout) -> Callable[[float], float]:
    """What says how far the estimate is off at a step: log of bits taken over estimated ones, in a part of x.

    The part is an eighth of the columns: each is learned over all rows, and neighbours stay together.
    """
    parts = [_columns(x[slot.offset : slot.offset + size(slot)], slot.shape) for slot in layout.slots]
    part, grids = np.concatenate([one.ravel() for one in parts]), [one.shape for one in parts]
    magnitude, count = magnitudes(part, 0.0)

    def miss(step: float) -> float:
        code, _, _ = context.encode(part, 1 / step, edges(LAMBDA), grids, keep=False)
        estimate = len(part) * _bits(magnitude / step, count, *_LIKE[False])
        return float(np.log(8 * max(len(code), 1) / estimate)) - _DEARER

    return miss


def _columns(x: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Some columns in a row of each so many, if the layer is wide; else all."""
    rows = shape[0] if len(shape) > 1 else 1
    grid = x.reshape(rows, len(x) // max(rows, 1))
    taken = np.arange(grid.shape[1]) // _TOGETHER % _EIGHTH == _EIGHTH // 2
    return grid[:, taken] if len(taken) >= 4 * _TOGETHER * _EIGHTH else grid


def _remembered(state: State) -> float | None:
    """What the estimate missed in the last update; None where the state says nothing of the kind."""
    miss = np.asarray(state.get("miss"))
    return float(miss[0]) if miss.shape == (1,) and miss.dtype == np.float64 and abs(miss[0]) < 0.8 else None


@jit
def _least_sent(magnitude: Floats, count: Floats, weight: float, rounds: int) -> float:
    """Where level 1 begins, in steps, as one context would round."""
    edge, total = 0.62, count.sum()
    for _ in range(rounds):
        above = 0.0
        for i in range(len(magnitude)):
            above += count[i] if magnitude[i] > edge else 0.0
        p = min(max(above / total, 1e-4), 0.5)
        edge = 0.5 + weight / 2 * (np.log2((1 - p) / p) + 1.4)
    return edge


@jit
def _level(magnitude: float, edge: float) -> float:
    """What a magnitude, in steps, is rounded to."""
    return max(np.rint(magnitude), 1.0) if magnitude > edge else 0.0


@jit
def _bits(magnitude: Floats, count: Floats, finer: float, weight: float, rounds: int) -> float:
    """Bits per parameter: the entropy of single levels, less what contexts usually save.

    Magnitudes, in steps, rise, but for the last. Compiled: a search for a step asks dozens of times.
    """
    total = count.sum()
    mean = finer * (count * magnitude).sum() / total
    # Magnitudes and how many are known too coarsely to tell large levels apart.
    halvings = max(0.0, np.floor(np.log2(mean / 16)))
    scaled = magnitude * (finer / 2**halvings)
    edge = _least_sent(scaled, count, weight, rounds)
    logs = zero = same = 0.0  # sum of n log n over levels, and how many values have level 0, and this one
    level = 0.0
    for i in range(len(scaled)):
        now = min(_level(scaled[i], edge), 2.0**14)
        if now == 0.0:
            zero += count[i]
            continue
        if now != level:
            logs += same * np.log2(max(same, 1.0))
            level, same = now, 0.0
        same += count[i]
    logs += same * np.log2(max(same, 1.0)) + zero * np.log2(max(zero, 1.0))
    bits: float = np.log2(total) - logs / total + 1 - zero / total + halvings
    return bits * (bits + 0.4) / (bits + 0.6)


@jit
def _error(magnitude: Floats, count: Floats, finer: float, weight: float, rounds: int) -> float:
    """Squared error over squared norm; that of large levels is any from 0 to 1/4."""
    scaled = magnitude * finer
    edge = _least_sent(scaled, count, weight, rounds)
    error = norm = 0.0
    for i in range(len(scaled)):
        error += count[i] * (1 / 12 if scaled[i] > 64 else (scaled[i] - _level(scaled[i], edge)) ** 2)
        norm += count[i] * scaled[i] ** 2
    return error / norm + 1e-15
