"""The parts of a Flower message by name, how many bytes they are, and what a node keeps between messages."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from numpy.typing import NDArray

from fedapp.errors import DecodeError
from fedapp.vector import arrays_in, record_of, record_with, size_in

STYPE = "fedapp.packet"
ARRAYS, METRICS, CONFIG, UPDATE = "arrays", "metrics", "config", "update"
ROUND = "server-round"  # of a message's configuration
WEIGHT, LOSS, DRIFT = "num-examples", "train_loss", "drift"
STREAM = "stream"  # what a node keeps of data that grow
SECAGG, CKKS = "secagg", "ckks"  # what sums are opened with; a node keeps its own part for a round

_WORDS = 2**16  # in the names of arrays, of which sizes are remembered: names may come from anybody
_PROTO = type(recorddict_to_proto(RecordDict()))

Kind = TypeVar("Kind", ArrayRecord, ConfigRecord, MetricRecord)


def record_in(content: RecordDict, name: str, kind: type[Kind]) -> Kind | None:
    """The record of this name and kind; None where there is none.

    Flower's `content.array_records.get(name)` and the like say the same; but they copy all records of a kind
    at each look, and of a small model's round that is a tenth.
    """
    found = content.get(name)
    return found if isinstance(found, kind) else None


def brought_by(message: Message, name: str, kind: type[Kind]) -> Kind | None:
    """The record of this name and kind in a message that may be an error; None where there is none."""
    return record_in(message.content, name, kind) if message.has_content() else None


def array_record(content: RecordDict, name: str = ARRAYS) -> ArrayRecord:
    """The arrays of this name; raises DecodeError where there are none."""
    return _there(record_in(content, name, ArrayRecord), name)


def config_record(content: RecordDict, name: str = CONFIG) -> ConfigRecord:
    """The configuration of this name; raises DecodeError where there is none."""
    return _there(record_in(content, name, ConfigRecord), name)


def metric_record(content: RecordDict, name: str = METRICS) -> MetricRecord:
    """The metrics of this name; raises DecodeError where there are none."""
    return _there(record_in(content, name, MetricRecord), name)


def _there(found: Kind | None, name: str) -> Kind:
    if found is None:
        raise DecodeError(f"a message lacks its record {name!r}")
    return found


def round_of(message: Message) -> int:
    """Which round a message belongs to."""
    return int(str(config_record(message.content)[ROUND]))


def told_each(messages: list[Message], what: Callable[[int], Mapping[str, int | float]]) -> list[Message]:
    """The messages, each of whose configurations says what its node is told; the same is one content."""
    contents: dict[tuple[object, ...], RecordDict] = {}
    for message in messages:
        told = what(message.metadata.dst_node_id)
        key = id(message.content), *told.items()
        if key not in contents:
            config = ConfigRecord({**config_record(message.content), **told})
            contents[key] = RecordDict({**message.content, CONFIG: config})
        message.content = contents[key]
    return messages


def as_bytes(content: RecordDict) -> bytes:
    """A content as Flower serializes it."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def from_bytes(data: bytes) -> RecordDict:
    """The content that `as_bytes` wrote."""
    return recorddict_from_proto(_PROTO.FromString(data))


def size_of(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serializes it: arrays, names, metrics and configuration."""
    total = 0
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            forms = tuple((key, *_form(array)) for key, array in record.items())
            words = len(name) + sum(map(len, record))
            words += sum(len(a.dtype) + len(a.shape) + len(a.stype) for a in record.values())
            total += (_size_of_arrays if words < _WORDS else _size_of_arrays.__wrapped__)(name, forms)
        else:
            total += int(recorddict_to_proto(RecordDict({name: record})).ByteSize())
    return total


def _form(array: Array) -> tuple[str, tuple[int, ...], str, int]:
    return array.dtype, tuple(array.shape), array.stype, size_in(array)


@lru_cache(maxsize=256)
def _size_of_arrays(name: str, forms: tuple[tuple[str, str, tuple[int, ...], str, int], ...]) -> int:
    """What counts is how long the data are, not which: so megabytes are not copied to be measured."""
    arrays = {key: Array(dtype, shape, stype, bytes(size)) for key, dtype, shape, stype, size in forms}
    return int(recorddict_to_proto(RecordDict({name: record_with(arrays)})).ByteSize())


def load_state(context: Context, key: str) -> Mapping[str, NDArray[Any]]:
    """Arrays that this node kept under `key`; empty at first."""
    kept = record_in(context.state, key, ArrayRecord)
    return {} if kept is None else arrays_in(kept)


def store_state(context: Context, key: str, state: Mapping[str, NDArray[Any]]) -> None:
    """Keep these arrays on this node until its next message."""
    context.state[key] = record_of(state)
