"""Versions of the weights on one lattice around the initial model: initial + 2**exponent * integers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout

BOUND = 2**23  # of levels: so far float32 holds them, and halves, which the coder adds
COARSEST = 127  # the exponent of no way at all


@dataclass(frozen=True)
class Version:
    """Weights on the lattice: initial + 2**exponent * levels, levels int32 (size,) below 2**23."""

    number: int
    exponent: int
    levels: NDArray[np.int32]

    def weights(self, initial: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 (size,). The product is exact: one rounding, which fused arithmetic would not change."""
        moved: NDArray[np.float32] = np.ldexp(self.levels.astype(np.float32), self.exponent)
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


def _peak(levels: NDArray[np.int32]) -> int:
    return max(int(levels.max(initial=0)), -int(levels.min(initial=0)))


def _refined(levels: NDArray[np.int32], halvings: int) -> NDArray[np.int32]:
    return levels << min(halvings, 31) if halvings else levels  # beyond the bound all are 0


def _require_exact(reach: int) -> None:
    if reach >= BOUND:
        raise OverflowError(f"levels may reach {BOUND}, where float32 is no longer exact")
