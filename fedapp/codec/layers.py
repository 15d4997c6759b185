"""What a stage may ask of the whole vector and its layers."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout, Slot
from fedapp.jit import jit

_AT_ONCE = 128  # sums side by side, which is quick and the same everywhere
PER = ("layer", "channel")
"""What may have a scale of its own: an array of the model, or each of its output channels (rows)."""


def require_finite(x: NDArray[Any], layout: Layout) -> None:
    """Raise ValueError on NaN or infinity, naming the layer that holds it if `x` is the whole vector."""
    if np.isfinite(largest(x) if x.dtype == np.float32 else x).all():
        return
    place, slots = int(np.flatnonzero(~np.isfinite(x))[0]), layout.slots if len(x) == layout.size else ()
    at = [slot.name for slot in slots if 0 <= place - slot.offset < size(slot)]
    where = f" in {at[0]}" if at else ""
    raise ValueError(f"update holds NaN or infinite values{where}; training diverged")


def require_whole(x: NDArray[Any], layout: Layout) -> None:
    """Raise TypeError unless `x` is the whole vector, the layers of which the caller needs."""
    if len(x) != layout.size:
        raise TypeError(f"this stage needs the layers, got {len(x)} of {layout.size} values: put it first")


def largest(x: NDArray[np.float32]) -> float:
    """The largest magnitude; NaN if there is one."""
    return float(np.int32(_largest(np.ascontiguousarray(x).view(np.int32))).view(np.float32))


def energy(x: NDArray[np.float32], scale: float = 1.0) -> float:
    """The sum of (x * scale)^2."""
    return float(_energy(np.ascontiguousarray(x), scale))


@jit
def _largest(bits: NDArray[np.int32]) -> Any:
    """Bits of magnitudes are in their order, those of NaN above all."""
    most = np.int32(0)
    for k in range(len(bits)):
        most = max(most, bits[k] & np.int32(0x7FFFFFFF))
    return most


@jit
def _energy(x: NDArray[np.float32], scale: float) -> Any:
    sums = np.zeros(_AT_ONCE)
    whole = len(x) // _AT_ONCE * _AT_ONCE
    for begin in range(0, whole, _AT_ONCE):
        for k in range(_AT_ONCE):
            wide = np.float64(x[begin + k]) * scale
            sums[k] += wide * wide
    for k in range(whole, len(x)):
        sums[0] += (np.float64(x[k]) * scale) ** 2
    return sums.sum()


def size(slot: Slot) -> int:
    """How many values an array of the model has; a 0-d array has one."""
    return prod(slot.shape)


def shapes(layout: Layout) -> list[tuple[int, ...]]:
    """The shapes of all arrays, in order."""
    return [slot.shape for slot in layout.slots]


def runs(layout: Layout, per: str) -> NDArray[np.int64]:
    """Lengths, none 0, of the runs of the vector that share one scale.

    Channels are the rows along an array's first axis; arrays with fewer than two axes are one channel, for
    a scale for every value would cost what it saves.
    """
    lengths = []
    for slot in layout.slots:
        rows = slot.shape[0] if per == "channel" and len(slot.shape) > 1 else 1
        lengths += [size(slot) // rows] * rows if size(slot) else []
    return np.array(lengths, np.int64)
