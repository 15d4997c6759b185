"""A weighted sum whose bits do not depend on the order of its terms."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import DecodeError
from fedapp.jit import inlined, jit

COARSE, FINE, MOST = 2.0**14, 2.0**60, 2.0**32
_ROUND = 1.5 * 2.0**52  # a number below 2**51, added to it, becomes whole, and is then in the low bits
_ZERO = np.float64(_ROUND).view(np.int64)
_PART = 512  # values


class ExactSum:
    """Weighted sum of vectors that is the same in any order of arrival, and in any grouping.

    Fixed point in two int64 limbs, 2**-14 and 2**-60 a unit, because integer addition commutes and float
    addition does not. A float32 times a whole weight below 2**24 is exact in float64; what is below 2**-60
    is rounded off. Holds 2**16 terms of magnitude below 2**32 each.

    `limbs`, int64 (2, size), is memory that the caller gives, zeros at first.
    """

    def __init__(self, size: int, limbs: NDArray[np.int64] | None = None) -> None:
        self._limbs = np.zeros((2, size), np.int64) if limbs is None else limbs
        self.weight = 0

    def add(self, x: NDArray[Any], weight: int) -> None:
        """Add `weight * x`, all or nothing; raises DecodeError on values that no honest client sends."""
        if not _add(x, float(weight), *self._limbs):
            raise DecodeError(f"values times their weight must stay below {MOST:g}")
        self.weight += weight

    def merge(self, other: "ExactSum") -> None:
        """Add all that another sum of the same size holds."""
        self._limbs += other._limbs
        self.weight += other.weight

    def total(self) -> NDArray[np.float64]:
        """The weighted sum."""
        out = np.empty(self._limbs.shape[1])
        _total(self._limbs[0], self._limbs[1], out)
        return out


@jit
def _add(x: Any, weight: float, coarse: Any, fine: Any) -> bool:
    """A part at a time is looked at and added, while at hand; False, and nothing is added, if one is bad.

    Most of a part's time is that of the sum's memory, which a part of zeros does not touch.
    """
    for begin in range(0, len(x), _PART):
        end = min(begin + _PART, len(x))
        if not _allowed(x[begin:end], weight):
            _take(x[:begin], -weight, coarse, fine)  # what went in comes out: rounding knows no sign
            return False
        if _some(x[begin:end]):
            _take(x[begin:end], weight, coarse[begin:end], fine[begin:end])
    return True


@inlined
def _allowed(x: Any, weight: float) -> bool:
    allowed: Any = True
    for i in range(len(x)):
        allowed &= abs(np.float64(x[i]) * weight) < MOST
    return bool(allowed)


@inlined
def _some(x: Any) -> bool:
    some: Any = False
    for i in range(len(x)):
        some |= x[i] != 0
    return bool(some)


@inlined
def _take(x: Any, weight: float, coarse: Any, fine: Any) -> None:
    for i in range(len(x)):
        term = np.float64(x[i]) * weight
        whole = term * COARSE + _ROUND
        rest = (term - (whole - _ROUND) / COARSE) * FINE + _ROUND
        coarse[i] += np.float64(whole).view(np.int64) - _ZERO
        fine[i] += np.float64(rest).view(np.int64) - _ZERO


@jit
def _total(coarse: Any, fine: Any, out: Any) -> None:
    for i in range(len(out)):
        out[i] = coarse[i] / COARSE + fine[i] / FINE
