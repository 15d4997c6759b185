"""Secret randomness: bytes of the operating system, and what mechanisms draw from them."""

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Secret = Callable[[int], bytes]
"""So many bytes that nobody else can know; `os.urandom` is one."""

SERVER, CLIENT, COHORT, BATCH = range(4)  # uses of a test seed


def source(test_seed: int | None, *use: int) -> Secret:
    """The operating system's bytes; with a test seed a stream that `use` tells apart: nothing is private."""
    return os.urandom if test_seed is None else np.random.default_rng([test_seed, *use]).bytes


def uniform(size: int, secret: Secret) -> NDArray[np.float64]:
    """Float64 (size,) in the open interval (0, 1), on a grid of 2**-53."""
    bits = np.frombuffer(secret(8 * size), "<u8") >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) / 2.0**52


def normal(size: int, secret: Secret) -> NDArray[np.float64]:
    """Float64 (size,): standard Gaussian, by inversion; beyond 8.2 deviations it never goes."""
    values: NDArray[np.float64] = ndtri(uniform(size, secret))
    return values
