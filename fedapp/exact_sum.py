"""A weighted sum whose bits do not depend on the order of its terms."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import DecodeError


class ExactSum:
    """Weighted sum of vectors that is the same in any order of arrival.

    Fixed point in two int64 limbs, 2**-14 and 2**-60 a unit, because integer addition commutes and float
    addition does not. A float32 times a whole weight below 2**24 is exact in float64; what is below 2**-60
    is rounded off. Holds 2**16 terms of magnitude below 2**32 each.
    """

    _COARSE, _FINE, _MOST = 2.0**14, 2.0**60, 2.0**32

    def __init__(self, size: int) -> None:
        self._coarse, self._fine = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.weight = 0

    def add(self, x: NDArray[Any], weight: int) -> None:
        """Add `weight * x`; raises DecodeError on values that no honest client sends."""
        term = x.astype(np.float64) * weight
        if not (np.abs(term) < self._MOST).all():
            raise DecodeError(f"values times their weight must stay below {self._MOST:g}")
        coarse = np.rint(term * self._COARSE)
        self._coarse += coarse.astype(np.int64)
        self._fine += np.rint((term - coarse / self._COARSE) * self._FINE).astype(np.int64)
        self.weight += weight

    def total(self) -> NDArray[np.float64]:
        """The weighted sum."""
        return self._coarse / self._COARSE + self._fine / self._FINE
