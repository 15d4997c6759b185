"""Versions of the weights on one lattice around the initial model: initial + 2**exponent * integers.

And what of a difference goes onto it, at so many bits a value.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import log

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout
from fedapp.codec import context as coder
from fedapp.codec.layers import shapes
from fedapp.codec.model import Floats
from fedapp.codec.pilot import Layers, eighth
from fedapp.codec.quantizer import LAMBDA, edges

BOUND = 2**23  # of levels: so far float32 holds them, and halves, which the coder adds
COARSEST, FINEST = 127, -140  # exponents: that of no way at all, and the least
_NEAR = 0.02  # of the rate
_ANYWAY, _SLOPE = 0.6, 0.45  # so many steps are not sent in any case; how log bytes fall by steps, at first
_LONG = 2**19  # values from which on a search goes by a part of them
_FURTHEST = 29  # powers of two that a step may lie below the largest magnitude: the coder takes 2^30 steps


@dataclass(frozen=True)
class Version:
    """Weights on the lattice: initial + 2**exponent * levels, levels int32 (size,) below 2**23."""

    number: int
    exponent: int
    levels: NDArray[np.int32]

    def weights(self, initial: Floats) -> Floats:
        """Float32 (size,). The product is exact: one rounding, which fused arithmetic would not change."""
        moved: Floats = np.ldexp(self.levels.astype(np.float32), self.exponent)
        return initial + moved

    def plus(self, number: int, exponent: int, levels: NDArray[np.int32]) -> "Version":
        """The version so many steps of 2**exponent away. Raises OverflowError at the bound of levels."""
        finer = min(exponent, self.exponent)
        mine, more = self.exponent - finer, exponent - finer
        _require_exact((_peak(self.levels) << mine) + (_peak(levels) << more))
        return Version(number, finer, _refined(self.levels, mine) + _refined(levels, more))

    def minus(self, other: "Version") -> tuple[int, NDArray[np.int32]]:
        """The way from `other`, which `plus` will go: an exponent, as coarse as can be, and levels.

        Raises OverflowError where it would.
        """
        finer = min(self.exponent, other.exponent)
        mine, theirs = self.exponent - finer, other.exponent - finer
        _require_exact((_peak(self.levels) << mine) + 2 * (_peak(other.levels) << theirs))
        way = _refined(self.levels, mine) - _refined(other.levels, theirs)
        bits = int(np.bitwise_or.reduce(way))
        spare = (bits & -bits).bit_length() - 1 if bits else 0
        return finer + spare, way >> spare


def first(layout: Layout) -> Version:
    """Version 0: the initial model itself."""
    return Version(0, COARSEST, np.zeros(layout.size, np.int32))


def short(levels: NDArray[np.int32]) -> NDArray[np.int16 | np.int32]:
    """The same levels in half the memory, where they fit."""
    half = levels.astype(np.int16)
    return half if np.array_equal(half, levels) else levels


def _peak(levels: NDArray[np.int32]) -> int:
    return max(int(levels.max(initial=0)), -int(levels.min(initial=0)))


def _refined(levels: NDArray[np.int32], halvings: int) -> NDArray[np.int32]:
    return levels << min(halvings, 31) if halvings else levels  # beyond the bound all are 0


def _require_exact(reach: int) -> None:
    if reach >= BOUND:
        raise OverflowError(f"levels may reach {BOUND}, where float32 is no longer exact")


def quantized(
    x: Floats, layout: Layout, rate: float, begin: int, finest: int, share: float | None = None
) -> tuple[int, NDArray[np.int32], bytes, float | None]:
    """Exponent, levels and code of x that take about so many bits a value.

    Exponents are tried from `begin` on. Where x is long, an eighth of its columns tells, and again if it
    misled; then all of x. `share`: what an eighth takes of all bytes, if an earlier x has told; returned is
    what this one tells, if it does.
    """
    goal, whole = rate * len(x) / 8, Layers(x, shapes(layout))
    finest = max(finest, peak_exponent(x) - _FURTHEST)
    exponent = min(max(begin, finest), max(peak_exponent(x), finest))
    if len(x) > _LONG:
        part, _ = eighth(whole)
        share = share or len(part.values) / len(x)
        for _ in range(2):
            exponent, least, told, _levels = _searched(part, share * goal, exponent, finest)
            code, levels = _coded(whole, exponent, least)
            share = len(told) / max(1, len(code))
            if 2 / 3 < len(code) / goal < 3 / 2 and levels.any():  # else the eighth is not like the rest
                return exponent, levels, code, share
    exponent, _, code, levels = _searched(whole, goal, exponent, finest)
    return exponent, levels, code, None


def _searched(
    part: Layers, goal: float, exponent: int, finest: int
) -> tuple[int, float, bytes, NDArray[np.int32]]:
    """Exponent, least magnitude in steps, code of about so many bytes, levels, tried from `exponent` on.

    The coarsest step that takes as much, then a dearer bit: it makes up for steps that are powers of two.
    """
    coarsest = max(peak_exponent(part.values), finest)
    coded = lru_cache(2)(partial(_coded, part))  # one step up and back again is one try
    code, levels = coded(exponent)
    while len(code) > goal and exponent < coarsest:
        exponent += 1
        code, levels = coded(exponent)
    while len(code) < goal and exponent > finest:
        exponent -= 1
        code, levels = coded(exponent)
    # Log bytes fall about linearly with the least magnitude that is sent: the next try is where a line ends.
    best, most = (code, 0.0, levels), max(2.0 ** (peak_exponent(part.values) - exponent), 2.0)
    low, high, least, slope = (_ANYWAY, _over(code, goal)), None, 0.0, _SLOPE
    for _ in range(6):
        if low[1] <= 0 or abs(len(best[0]) - goal) <= _NEAR * goal:  # each try codes all of it
            break
        if high is not None:
            slope = (low[1] - high[1]) / (high[0] - low[0])
        least = min(low[0] + low[1] / slope, most)
        code, levels = coded(exponent, least)
        if abs(len(code) - goal) < abs(len(best[0]) - goal) and levels.any():
            best = code, least, levels
        over = _over(code, goal)
        if over > 0:
            low = least, over
        else:
            high = least, over
    return exponent, best[1], best[0], best[2]


def _over(code: bytes, goal: float) -> float:
    """Log of the bytes over those that were asked for."""
    return log(max(1, len(code)) / goal)


def _coded(part: Layers, exponent: int, least: float = 0.0) -> tuple[bytes, NDArray[np.int32]]:
    """Code and levels at a step of 2**exponent, where nothing below so many steps is sent."""
    scaled = np.ldexp(part.values, -exponent)
    code, levels, _ = coder.encode(scaled, 1.0, edges(LAMBDA, least), part.shapes)
    return code, levels


def peak_exponent(x: Floats) -> int:
    """Of the largest power of two that no magnitude of x is below."""
    return int(np.frexp(np.maximum(x.max(initial=0), -x.min(initial=0)))[1]) - 1
