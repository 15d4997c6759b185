"""The parts of a Flower message by name, how many bytes they are, and what a node keeps between messages."""

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, Context, RecordDict
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray

from fedapp.vector import arrays_in, record_of

STYPE = "fedapp.packet"
ARRAYS, METRICS, CONFIG, UPDATE = "arrays", "metrics", "config", "update"
WEIGHT, LOSS = "num-examples", "train_loss"


def size_of(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serializes it: arrays, names, metrics and configuration."""
    return int(recorddict_to_proto(content).ByteSize())


def load_state(context: Context, key: str) -> Mapping[str, NDArray[Any]]:
    """Arrays that this node kept under `key`; empty at first."""
    return arrays_in(context.state.array_records.get(key, ArrayRecord()))


def store_state(context: Context, key: str, state: Mapping[str, NDArray[Any]]) -> None:
    """Keep these arrays on this node until its next message."""
    context.state[key] = record_of(state)
