"""What a stage may ask of the whole vector and its layers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout, Slot

PER = ("layer", "channel")
"""What may have a scale of its own: an array of the model, or each of its output channels (rows)."""


def require_finite(x: NDArray[Any], layout: Layout) -> None:
    """Raise ValueError on NaN or infinity, naming the layer that holds it if `x` is the whole vector."""
    if np.isfinite(x).all():
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
    """The largest magnitude, NaN if there is one; without a copy of the vector, which may be long."""
    return float(np.maximum(np.max(x, initial=0.0), -np.min(x, initial=0.0)))


def size(slot: Slot) -> int:
    """How many values an array of the model has; a 0-d array has one."""
    return int(np.prod(slot.shape, dtype=np.int64))


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
