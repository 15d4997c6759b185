"""What the server believes of a reply: bytes from outside are hostile."""

from collections.abc import Mapping
from io import BytesIO
from logging import WARNING
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.supercore import log
from numpy.lib.format import read_array_header_1_0, read_magic
from numpy.typing import NDArray

from fedapp.errors import DecodeError
from fedapp.records import DRIFT, METRICS, STYPE, WEIGHT, brought_by, metric_record
from fedapp.stages import DECODE


def refuse(reply: Message, error: Exception) -> None:
    """Say why a reply does not count."""
    log(WARNING, "reply of node %s refused: %s", reply.metadata.src_node_id, error)


def metrics_of(reply: Message, names: tuple[str, ...]) -> MetricRecord:
    """Those metrics of a reply, no others; raises DecodeError unless each is a finite number from 0 on.

    The weight among them is a whole number of examples.
    """
    if reply.has_error():
        raise DecodeError(reply.error.reason or "the client failed")
    said = metric_record(reply.content)
    metrics = MetricRecord({name: said[name] for name in names})
    weight = metrics[WEIGHT]
    if type(weight) is not int or not 0 <= weight < 2**24:
        raise DecodeError(f"a client weighs from 0 to {2**24 - 1} examples, this one says {weight!r}")
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise DecodeError(f"{name} is not a finite number of at least 0")
    return metrics


def drifted(reply: Message) -> bool:
    """Whether a client says that its data have drifted."""
    metrics = brought_by(reply, METRICS, MetricRecord)
    return metrics is not None and metrics.get(DRIFT) == 1


def weight_of(metrics: MetricRecord, uniform: bool, least: int = 0) -> int:
    """What a client weighs in the mean: 1 where all weigh the same; DecodeError if it says otherwise.

    `least` is the smallest weight of a client that has examples.
    """
    weight = cast(int, metrics[WEIGHT])
    if uniform and weight != 1:
        raise DecodeError(f"under privacy every client weighs 1, this one says {weight}")
    return max(weight, least) if weight else 0


@DECODE
def values_of(arrays: ArrayRecord, like: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """The arrays that came, integers as float64, which a mean makes of them anyway.

    Raises DecodeError unless they are finite and have the names, shapes and dtypes of `like`.
    """
    if list(arrays) != list(like):
        raise DecodeError("the reply does not hold the arrays of this model")
    values = {}
    for name, array in like.items():
        file = BytesIO(arrays[name].data)
        if arrays[name].stype != array.stype or read_magic(file) != (1, 0):
            raise DecodeError(f"{name} is not serialized as numpy does")
        shape, _, dtype = read_array_header_1_0(file)  # first, since loading allocates what this says
        if shape != tuple(array.shape) or dtype != np.dtype(array.dtype):
            raise DecodeError(f"{name} is {dtype} {shape}, the model's {array.dtype} {tuple(array.shape)}")
        value = arrays[name].numpy()
        if not np.isfinite(value).all():
            raise DecodeError(f"{name} is not finite")
        values[name] = value if dtype.kind == "f" else value.astype(np.float64)
    return values


def side_of(reply: Message) -> dict[str, float]:
    """The numbers that a mechanism's other end sent beside the update."""
    metrics = metric_record(reply.content)
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def packet_in(array: Array) -> bytes:
    if array.stype != STYPE:
        raise DecodeError(f"the update has serialization type {array.stype!r}, not {STYPE!r}")
    return bytes(array.data)
