"""What the default codec will take, and lose, at a step: estimated from magnitudes alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.model import Floats, Wide
from fedapp.jit import inlined, jit

_SAMPLE = 2**17  # values that are looked at, about, where there are twice as many
_NO_WHOLE = (5**0.5 - 1) / 2  # beyond a whole stride: rows are of any length, and each column is to be seen


@dataclass(frozen=True)
class Like:
    """What an encoder is like.

    finer: how many of its steps seem to be one. weight: what a bit is worth, in squared steps. rounds: in
    which an edge and its probability settle.
    """

    finer: float
    weight: float
    rounds: int


class Magnitudes:
    """Magnitudes of float32 (n,), within 2^-9 of themselves, and how many values have each.

    `most`, the largest, is added: a sample may lack it.
    """

    def __init__(self, x: Floats, most: float) -> None:
        stride = len(x) // _SAMPLE + _NO_WHOLE if len(x) >= 2 * _SAMPLE else 1.0
        count = _count(np.ascontiguousarray(x).view(np.int32), stride)
        kind = np.flatnonzero(count > 0)  # of booleans: six times as fast as of numbers
        middle = (kind.astype(np.int32) << 15 | 1 << 14).view(np.float32)
        self._magnitude = np.append(middle, most).astype(np.float64)
        self._count = np.append(count[kind], 1.0)
        self._from = np.append(count[kind][::-1].cumsum()[::-1], 0).astype(np.float64)
        self._mean = float((self._count * self._magnitude).sum() / self._count.sum())
        self._length = len(x)

    def above(self, magnitude: float) -> float:
        """How many values are as large as this."""
        if len(self._magnitude) == 1:
            return float(self._length)
        found = np.interp(magnitude, self._magnitude[:-1], self._from[:-1])  # the last, `most`, may lie below
        return float(found * self._length / self._from[0])

    def bits(self, step: float, like: Like) -> float:
        """Of all values together."""
        if not self._length:  # of products, mostly: a search asks dozens of times
            return 0.0
        known = self._magnitude, self._count, self._from, self._mean
        return self._length * _bits(*known, step, like.finer, like.weight, like.rounds)

    def error(self, step: float, like: Like) -> float:
        """Squared error over squared norm; none of no values."""
        counts = self._count, self._from
        return self._length and _error(self._magnitude, *counts, step, like.finer, like.weight, like.rounds)

    def unsent(self, step: float, like: Like) -> float:
        """What share of the values has level 0."""
        edge = _least_sent(self._magnitude, self._from, step, like.finer, like.weight, like.rounds)
        below = self._magnitude / step * like.finer <= edge
        return float(self._count[below].sum() / self._count.sum())


@jit
def _count(bits: NDArray[np.int32], stride: float) -> NDArray[np.int64]:
    """How many of every stride-th float32 have these leading bits, but for their sign."""
    count = np.zeros(1 << 16 if len(bits) else 0, np.int64)
    for k in range(int((len(bits) - 1) / stride) + 1):
        i = np.uint64(k * stride)
        count[np.uint64(bits[i] & np.int32(0x7FFFFFFF)) >> np.uint64(15)] += 1
    return count


@inlined
def _beyond(magnitude: Wide, step: float, finer: float, edge: float) -> int:
    """Which magnitude is the first above an edge in steps. They rise, but for the last, which is left out."""
    first, end = 0, len(magnitude) - 1
    while first < end:
        middle = (first + end) >> 1
        if magnitude[middle] / step * finer > edge:
            end = middle
        else:
            first = middle + 1
    return first


@inlined
def _least_sent(
    magnitude: Wide, count_from: Wide, step: float, finer: float, weight: float, rounds: int
) -> float:
    """Where level 1 begins, in steps, as one context would round.

    count_from: how many values are of one magnitude and of those after it.
    """
    edge, most, total = 0.62, magnitude[-1] / step * finer, count_from[0] + 1
    for _ in range(rounds):
        above = count_from[_beyond(magnitude, step, finer, edge)] + (1 if most > edge else 0)
        p = min(max(above / total, 1e-4), 0.5)
        edge = 0.5 + weight / 2 * (np.log2((1 - p) / p) + 1.4)
    return edge


@jit
def _level(magnitude: float, edge: float) -> float:
    """What a magnitude, in steps, is rounded to."""
    return max(np.rint(magnitude), 1.0) if magnitude > edge else 0.0


@jit
def _bits(
    magnitude: Wide, count: Wide, count_from: Wide, mean: float, step: float, finer: float, weight: float,
    rounds: int,
) -> float:  # fmt: skip
    """Bits per parameter: the entropy of single levels, less what contexts usually save.

    Compiled: a search for a step asks dozens of times.
    """
    # Magnitudes and how many are known too coarsely to tell large levels apart.
    halvings = max(0.0, np.floor(np.log2(finer * mean / step / 16)))
    finer /= 2**halvings
    edge = _least_sent(magnitude, count_from, step, finer, weight, rounds)
    first = _beyond(magnitude, step, finer, edge)
    total = count_from[0] + 1
    zero = total - count_from[first] - 1  # but for the last
    logs = same = 0.0  # sum of n log n over levels, and how many values have this one
    level = 0.0
    for i in range(first, len(magnitude)):
        now = min(_level(magnitude[i] / step * finer, edge), 2.0**14)
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
def _error(
    magnitude: Wide, count: Wide, count_from: Wide, step: float, finer: float, weight: float, rounds: int
) -> float:
    """Squared error over squared norm; that of large levels is any from 0 to 1/4."""
    scaled = magnitude / step * finer
    edge = _least_sent(magnitude, count_from, step, finer, weight, rounds)
    error = norm = 0.0
    for i in range(len(scaled)):
        error += count[i] * (1 / 12 if scaled[i] > 64 else (scaled[i] - _level(scaled[i], edge)) ** 2)
        norm += count[i] * scaled[i] ** 2
    return error / norm + 1e-15
