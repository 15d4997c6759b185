"""Levels of one step: how an array becomes their code, and the points that it comes back as."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedapp.codec import context
from fedapp.codec.lanes import select
from fedapp.codec.model import Floats, Levels, Wide
from fedapp.jit import borrowing, jit

LAMBDA = 0.09  # squared steps that a bit is worth; best, and flat, from 0.1 to 4 bits per parameter
TRELLIS_LAMBDA = 0.075  # the same with a trellis; flat from 0.065 to 0.085
_WEIGHT = np.array([4 * TRELLIS_LAMBDA], np.float32)  # in squared half steps


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
        self, x: Floats, scale: float, shapes: context.Shapes, least: float = 0.0, keep: bool = True,
        before: context.Before | None = None,
    ) -> tuple[bytes, Levels, list[int]]:  # fmt: skip
        """Code of x * scale, its levels if they are kept, and how far their points move.

        With `least`, magnitudes are sent from so many steps on, wherever they are. `before`: as in `context`.
        Raises ValueError where x is not finite or beyond 2^30 steps.
        """
        if self.trellis:
            code, levels, _ = context.encode(x, 2 * scale, _WEIGHT, shapes, dependent=True, before=before)
            moves = [128 * move for move in _beyond(x, 2 * scale, levels)]
        else:
            edge = edges(LAMBDA, least, anywhere=least > 0)
            code, levels, beyond = context.encode(x, scale, edge, shapes, keep=keep, before=before)
            moves = [beyond[k] / max(beyond[k + 2], 1) for k in (0, 1)]
        return code, levels, [max(-127, min(127, round(move))) for move in moves]

    def lengths(self, x: Floats, scale: float, shapes: context.Shapes) -> list[float]:
        """Bits of each layer that holds something, in what `encode` makes without a trellis."""
        assert not self.trellis
        return context.lengths(x, scale, edges(LAMBDA), shapes)

    def decode(self, code: bytes, shapes: context.Shapes) -> Levels:
        """Undo `encode`, to levels; raises DecodeError."""
        return context.decode(code, shapes, self.trellis)

    def points(self, levels: Levels, moves: Sequence[int], step: float = 1.0) -> Floats:
        """What levels stand for, float32, in their place; in steps, or times the step."""
        one, two, more = moves if self.trellis else (moves[0], moves[1], moves[1])
        _to_points(levels, 128 if self.trellis else 256, one, two, more, np.float32(step))
        return levels.view(np.float32)


_P = (np.arange(1024) + 0.5) / 1024
_DEARER = np.maximum(np.log2((1 - _P) / _P) + np.array([[1.4], [0.6]]), 0)  # bits, of level m than of m - 1


def edges(weight: float, least: float = 0.0, anywhere: bool = False) -> Floats:
    """How far above m - 1 level m begins, by ten bits of the odds of going on: m = 1, then m > 1.

    Level 1 does not begin below `least`; with `anywhere` it begins there, however rare it is. The last entry
    is what a bit of a block's flag weighs.

    Rounding up pays where the squared distance it saves is above `weight` times the bits it costs more;
    with a weight of 0 it goes to the nearest level. Going no further costs about 0.6 bit, the sign 0.8.
    """
    begin: Floats = (0.5 + weight / 2 * _DEARER).astype(np.float32)
    begin[0] = least if anywhere else np.maximum(begin[0], least)
    return np.append(begin, np.float32(0 if anywhere else weight))


@borrowing
def _to_points(levels: Levels, unit: int, one: int, two: int, more: int, step: np.float32) -> None:
    """Turn levels, in place, into what they stand for, times the step, as the bits of float32.

    `unit`/256 steps apart, a power of two: the same everywhere, and up to 2^24 rounded once at most. The last
    three say how far those of magnitude 1, 2 and above move.
    """
    apart, nowhere = np.float32(unit / 256), np.float32(0)
    first, second, others = np.float32(one / 256), np.float32(two / 256), np.float32(more / 256)
    for j in range(len(levels)):
        q, m = levels[j], abs(levels[j])
        move = select(m == 1, first, select(m == 2, second, select(m == 0, nowhere, others)))
        x = (np.float32(q) * apart + select(q < 0, -move, move)) * step
        levels[j] = np.float32(x).view(np.int32)


@jit
def _beyond(x: Floats, scale: float, places: Levels) -> Wide:
    """How far values lie beyond places of magnitude 1, 2 and above, in the mean."""
    total, count = np.zeros(3), np.zeros(3)
    for j in range(len(places)):
        m = abs(np.int64(places[j]))
        if m:
            kind = 0 if m == 1 else 1 if m == 2 else 2
            total[kind] += abs(np.float64(x[j]) * scale) - m
            count[kind] += 1
    mean: Wide = total / np.maximum(count, 1)
    return mean
