"""The parts of a Flower message by name, how many bytes they are, and what a node keeps between messages."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray

from fedapp.vector import arrays_in, record_of

STYPE = "fedapp.packet"
ARRAYS, METRICS, CONFIG, UPDATE = "arrays", "metrics", "config", "update"
WEIGHT, LOSS, DRIFT = "num-examples", "train_loss", "drift"
STREAM = "stream"  # what a node keeps of data that grow
SECAGG, CKKS = "secagg", "ckks"  # what sums are opened with; a node keeps its own part for a round


def size_of(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serializes it: arrays, names, metrics and configuration."""
    return sum(
        _size_of_arrays(name, tuple((key, *_form(array)) for key, array in record.items()))
        if isinstance(record, ArrayRecord)
        else int(recorddict_to_proto(RecordDict({name: record})).ByteSize())
        for name, record in content.items()
    )


def _form(array: Array) -> tuple[str, tuple[int, ...], str, int]:
    return array.dtype, tuple(array.shape), array.stype, len(array.data)


@lru_cache(maxsize=256)
def _size_of_arrays(name: str, forms: tuple[tuple[str, str, tuple[int, ...], str, int], ...]) -> int:
    """What counts is how long the data are, not which: so megabytes are not copied to be measured."""
    arrays = {key: Array(dtype, shape, stype, bytes(size)) for key, dtype, shape, stype, size in forms}
    return int(recorddict_to_proto(RecordDict({name: ArrayRecord(arrays)})).ByteSize())


def load_state(context: Context, key: str) -> Mapping[str, NDArray[Any]]:
    """Arrays that this node kept under `key`; empty at first."""
    return arrays_in(context.state.array_records.get(key, ArrayRecord()))


def store_state(context: Context, key: str, state: Mapping[str, NDArray[Any]]) -> None:
    """Keep these arrays on this node until its next message."""
    context.state[key] = record_of(state)
