"""Levels of one step: how an array becomes their code, and the points that it comes back as."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import context
from fedapp.codec.model import Levels
from fedapp.jit import jit

LAMBDA = 0.09  # squared steps that a bit is worth; best, and flat, from 0.1 to 4 bits per parameter
TRELLIS_LAMBDA = 0.075  # the same with a trellis; flat from 0.065 to 0.085
_WEIGHT = np.array([4 * TRELLIS_LAMBDA], np.float32)  # in squared half steps

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Quantizer:
    """Scalar quantization to whole steps, or with a trellis to half ones; levels are coded in contexts.

    Points of levels of magnitude 1, and of larger ones, lie at the mean of their cells; with a trellis those
    of the first places of each quantizer, and of the others. How far they move takes a byte each.
    """

    trellis: bool

    @property
    def moves(self) -> int:
        """How many kinds of points move."""
        return 3 if self.trellis else 2

    def encode(
        self, x: Floats, scale: float, shapes: context.Shapes, least: float = 0.0, keep: bool = True
    ) -> tuple[bytes, Levels, list[int]]:
        """Code of x * scale, its levels if they are kept, and how far their points move.

        Magnitudes below `least` steps become 0. Raises ValueError where x is not finite or beyond 2^30 steps.
        """
        if self.trellis:
            code, levels, _ = context.encode(x, 2 * scale, _WEIGHT, shapes, dependent=True)
            moves = [128 * move for move in _beyond(x, 2 * scale, levels)]
        else:
            code, levels, beyond = context.encode(x, scale, edges(LAMBDA, least), shapes, keep=keep)
            moves = [256 * beyond[k] / max(beyond[k + 2], 1) for k in (0, 1)]
        return code, levels, [max(-127, min(127, round(move))) for move in moves]

    def decode(self, code: bytes, shapes: context.Shapes) -> Levels:
        """Undo `encode`, to levels; raises DecodeError."""
        return context.decode(code, shapes, self.trellis)

    def points(self, levels: Levels, moves: Sequence[int], step: Any = 1.0) -> Floats | None:
        """What levels stand for, float32, in their place; None where that is beyond float32."""
        one, two, more = moves if self.trellis else (moves[0], moves[1], moves[1])
        finite = _to_points(levels, np.float32(step), 128 if self.trellis else 256, one, two, more)
        return levels.view(np.float32) if finite else None


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
