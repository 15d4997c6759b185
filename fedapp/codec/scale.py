"""Float32 scales of integer levels: one for each run of the vector, rounded so that nothing overflows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import DecodeError

LARGEST = np.finfo(np.float32).max


def even_runs(count: int, length: int) -> NDArray[np.int64]:
    """Lengths of runs of `length` values each; the last has what is left of `count`."""
    runs = np.full(-(-count // length), length, np.int64)
    runs[-1:] = count - length * (len(runs) - 1)
    return runs


def over_runs(reduce: np.ufunc, x: NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """One value for each run, such as its sum (np.add) or its largest (np.maximum)."""
    reduced: NDArray[np.float64] = reduce.reduceat(x, np.cumsum(lengths) - lengths)
    return reduced


def round_up(scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """The smallest float32 that is no smaller, if finite: levels of a scale rounded down reach further."""
    rounded = np.minimum(scale, LARGEST).astype(np.float32)
    up: NDArray[np.float32] = np.where(rounded < scale, np.nextafter(rounded, LARGEST), rounded)
    return up


def levels_of(x: NDArray[Any], step: NDArray[np.float32]) -> NDArray[np.float64]:
    """|x| in steps, not yet rounded; 0 where the step is 0."""
    each = step.astype(np.float64)
    steps: NDArray[np.float64] = np.divide(np.abs(x), each, out=np.zeros(len(x)), where=each > 0)
    return steps


def times(
    level: NDArray[Any], scale: NDArray[np.float32], lengths: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """level * scale in float32, a scale for each run; what lies beyond float32 becomes its largest value."""
    x = np.repeat(scale, len(level) if lengths is None else lengths)
    with np.errstate(over="ignore"):
        np.multiply(level, x, out=x, dtype=np.float32, casting="same_kind")
    return np.clip(x, -LARGEST, LARGEST, out=x)


def read_scales(data: bytes, count: int) -> NDArray[np.float32]:
    """`count` little-endian float32, finite and not negative; raises DecodeError on anything else."""
    if len(data) != 4 * count:
        raise DecodeError(f"packet holds {len(data)} bytes of scales, {count} scales need {4 * count}")
    scales = np.frombuffer(data, "<f4").astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise DecodeError("packet holds a scale that is negative or not finite")
    return scales
