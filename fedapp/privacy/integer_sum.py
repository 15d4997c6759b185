"""Sums of whole numbers under noise that clients share: how far they reach, how they are read."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec.rotate import width
from fedapp.errors import DecodeError, FedappError

WRAPS = 1e-6  # the chance at most that any coordinate of a round's sum leaves the modulus


def honest_of(cohort: int, tolerated: float) -> int:
    """How many clients add noise that nobody knows, where a share of them may drop out or collude."""
    return min(cohort, max(1, math.floor((1 - tolerated) * cohort + 1e-9)))


def reach(norm: float, variance: float, size: int, chance: float = WRAPS) -> float:
    """What no value of a rotated sum with noise exceeds, but with this chance; rounding comes on top.

    Behind random signs a value of a rotated vector is sub-Gaussian with proxy norm^2 / width; a discrete
    Gaussian with its variance (Canonne et al. 2020, section 2). `norm` and `variance` are those of the sum.
    """
    return math.sqrt(2 * math.log(2 * size / chance) * (norm**2 / width(size) + variance))


def lifted(
    total: NDArray[np.integer[Any]], size: int, bits: int, replies: int, honest: int, cohort: int
) -> NDArray[np.int64]:
    """The sum of so many replies, int64 (size,), from integers (size,) modulo 2^bits.

    Raises FedappError where fewer replied than carry the noise, or more than were asked; DecodeError on
    another shape or type.
    """
    if not honest <= replies <= cohort:
        raise FedappError(
            f"{replies} of {cohort} clients replied, and the noise takes at least {honest}: "
            f"the round is lost; a larger privacy.tolerated, with more noise from each, allows for fewer"
        )
    if total.shape != (size,) or total.dtype.kind not in "iu":
        raise DecodeError(f"the sum is {total.dtype} {total.shape}, not whole numbers ({size},)")
    half = 1 << bits - 1
    whole: NDArray[np.int64] = (total.astype(np.int64) + half & 2 * half - 1) - half
    return whole
