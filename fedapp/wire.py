"""The two ends of the wire: what a client sends for its update, and what the server makes of it.

client:  trained - received -> mechanism -> codec.encode -> pack        (`compress`, a Flower client mod)
server:  unpack -> codec.decode -> running sum -> mechanism -> strategy  (`Wire`, a wrapper around a strategy)

Without this pair the app is plain Flower; with the identity codec and no mechanism it is not installed.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from logging import WARNING
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from numpy.lib.format import read_array_header_1_0, read_magic
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout, Slot
from fedapp.codec.packet import decode_update, pack, padded, unpadded
from fedapp.errors import DecodeError
from fedapp.exact_sum import ExactSum
from fedapp.privacy.mechanism import Mechanism, Numbers
from fedapp.privacy.secret import SERVER, Secret, source

STYPE = "fedapp.packet"
ARRAYS, METRICS, CONFIG, UPDATE = "arrays", "metrics", "config", "update"
WEIGHT, LOSS = "num-examples", "train_loss"


# --- weights <-> one flat vector ---------------------------------------------------------------------


def layout_of(arrays: ArrayRecord) -> Layout:
    """The floating-point arrays of a model, in order; integer buffers are no part of an update."""
    slots, offset = [], 0
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating):
            slots.append(Slot(name, tuple(array.shape), offset))
            offset += int(np.prod(array.shape, dtype=np.int64))
    return Layout(tuple(slots), offset)


def ravel(arrays: ArrayRecord, layout: Layout) -> NDArray[np.float32]:
    """Float32 (size,): the arrays of the layout, end to end."""
    flat = np.empty(layout.size, np.float32)
    for slot in layout.slots:
        values = arrays[slot.name].numpy()
        if values.shape != slot.shape:
            raise DecodeError(f"{slot.name} has shape {values.shape}, the model {slot.shape}")
        flat[slot.offset : slot.offset + values.size] = values.reshape(-1)
    return flat


def arrays_in(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The arrays of a record by name, in order."""
    return {name: array.numpy() for name, array in record.items()}


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """The record that these arrays make."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def unravel(flat: NDArray[Any], layout: Layout, like: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The arrays back from the vector, each in the dtype that it has in `like`."""
    return {
        slot.name: flat[slot.offset : slot.offset + int(np.prod(slot.shape, dtype=np.int64))]
        .reshape(slot.shape)
        .astype(like[slot.name].dtype)
        for slot in layout.slots
    }


# --- the client's end --------------------------------------------------------------------------------


def compress(
    codec: Codec, rng: np.random.Generator, mechanism: Mechanism | None = None, secret: Secret = os.urandom
) -> Mod:
    """The client mod: replaces the trained weights in a train reply by the encoded update.

    A mechanism of client-level privacy makes it private first, and nothing else of the reply then leaves the
    client. What codec and mechanism keep stays in `context.state`. Integer buffers go beside the packet,
    unchanged, but never under a mechanism: they count batches.
    """

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        received = message.content.array_records[ARRAYS]
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        trained = reply.content.array_records[ARRAYS]
        layout, update = layout_of(received), update_of(received, trained)
        if mechanism is not None:
            config, kept = message.content.config_records[CONFIG], load_state(context, "privacy")
            terms = {name: value for name, value in config.items() if isinstance(value, float)}
            update, side, kept = mechanism.on_client(update, terms, kept, secret)
            store_state(context, "privacy", kept)
            reply.content[METRICS] = MetricRecord({WEIGHT: 1, **side})
        else:
            require_finite(update)  # before error feedback could remember it
        state = load_state(context, "codec")
        packet, state = codec.encode(update, layout, state, rng)
        store_state(context, "codec", state)
        data = pack(packet, codec, layout)
        if mechanism is not None and mechanism.packet_bytes:
            nothing, _ = codec.encode(np.zeros_like(update), layout, {}, rng)
            data = padded(data, pack(nothing, codec, layout), mechanism.packet_bytes)
        sent = {UPDATE: Array("uint8", (len(data),), STYPE, data)}
        if mechanism is None:
            floats = {slot.name for slot in layout.slots}
            sent |= {name: array for name, array in trained.items() if name not in floats}
        reply.content[ARRAYS] = ArrayRecord(sent)
        return reply

    return mod


def update_of(received: ArrayRecord, trained: ArrayRecord) -> NDArray[np.float32]:
    """Trained minus received, float32 (size,)."""
    layout = layout_of(received)
    with np.errstate(invalid="ignore"):  # of infinities: the caller looks at what comes out
        return ravel(trained, layout) - ravel(received, layout)


def require_finite(update: NDArray[np.float32]) -> None:
    """Raises ValueError where training went astray."""
    if not np.isfinite(update).all():
        raise ValueError("the trained weights are not finite; training diverged")


def load_state(context: Context, key: str) -> Mapping[str, NDArray[Any]]:
    """Arrays that this node kept under `key`; empty at first."""
    return arrays_in(context.state.array_records.get(key, ArrayRecord()))


def store_state(context: Context, key: str, state: Mapping[str, NDArray[Any]]) -> None:
    """Keep these arrays on this node until its next message."""
    context.state[key] = record_of(state)


# --- the server's end --------------------------------------------------------------------------------


STREAMED = frozenset({"FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedProx"})
"""Flower's linear strategies: the mean of the updates is all that they need of a round."""


LASTING = ("momentum_vector", "m_t", "v_t")
"""What Flower's strategies keep from round to round: one array for each of the weights."""


class Wire(Strategy):
    """A Flower strategy behind the wire: decodes what `compress` sent, then lets the strategy step.

    Linear strategies get the mean as one reply, summed as replies arrive: memory does not grow with the
    cohort. Others get every decoded reply. With `codec=None` the weights that came pass as they are. A reply
    that is an error, or does not decode, is counted in `failures` and costs the round nothing else.

    A mechanism of client-level privacy, which takes a linear strategy, bounds each update, and makes the mean
    of their sum. `uniform` refuses replies that weigh anything but 1: no client then counts more.
    """

    def __init__(
        self,
        inner: Strategy,
        codec: Codec | None,
        mechanism: Mechanism | None = None,
        uniform: bool = False,
    ) -> None:
        self.inner, self.codec, self.mechanism = inner, codec, mechanism
        self.streams = codec is not None and type(inner).__name__ in STREAMED
        self._uniform, self._kept = uniform or mechanism is not None, dict[str, float]()
        self.failures = 0
        self._uses = (WEIGHT, LOSS) if type(inner).__name__ == "QFedAvg" else (WEIGHT,)
        self._weights = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._weights = arrays
        terms = {} if self.mechanism is None else self.mechanism.terms(self._kept)
        return self.inner.configure_train(server_round, arrays, ConfigRecord({**config, **terms}), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One mean or all decoded replies to the strategy; None where nobody trained on anything."""
        self.failures = 0
        mean, accepted, sides = _Mean(self._weights), [], Counter[str]()
        for reply in replies:
            with self._at_its_own_cost(reply):
                metrics, arrays = metrics_of(reply, self._uses), reply.content.array_records[ARRAYS]
                weight = weight_of(metrics, self._uniform)
                if self.codec is None:
                    values = values_of(arrays, self._weights)
                else:
                    update, side = self._update_in(reply, self.codec, mean.layout)
                    values = values_of(arrays, mean.buffers)
                    if self.streams:
                        mean.add(update, values, weight)
                        sides.update(side)
                        continue
                    values |= unravel(ravel(self._weights, mean.layout) + update, mean.layout, self._weights)
                if weight:
                    reply.content = RecordDict({ARRAYS: _record(values, self._weights), METRICS: metrics})
                    accepted.append(reply)
        if self.mechanism is not None:
            secret = source(self.mechanism.test_seed, SERVER, server_round)
            made, kept = self.mechanism.on_server(mean.total(), sides, mean.weight, self._kept, secret)
            self._kept, accepted = dict(kept), [mean.reply(made)]
        elif mean.weight:
            accepted = [mean.reply(mean.total() / mean.weight)]
        if not accepted:
            return None, None
        return self._stepped(server_round, accepted)

    def _update_in(self, reply: Message, codec: Codec, layout: Layout) -> tuple[NDArray[np.float32], Numbers]:
        """The update that a reply's packet holds, bounded by the mechanism, and the numbers beside it."""
        data = _packet_in(reply.content.array_records[ARRAYS].pop(UPDATE))
        if self.mechanism is None:
            return decode_update(data, codec, layout), {}
        if self.mechanism.packet_bytes:
            data = unpadded(data, self.mechanism.packet_bytes)
        return self.mechanism.on_reply(decode_update(data, codec, layout), _side_of(reply), self._kept)

    def step(self, server_round: int, mean: NDArray[np.floating[Any]]) -> ArrayRecord | None:
        """What the strategy makes of a mean that somebody else has summed."""
        return self._stepped(server_round, [_Mean(self._weights).reply(mean.astype(np.float64))])[0]

    def _stepped(
        self, server_round: int, replies: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        stepped, means = self.inner.aggregate_train(server_round, replies)
        return (None if stepped is None else _in_dtypes_of(self._weights, stepped)), means

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's mean of accuracy and loss; None where nobody tested on anything."""
        good = []
        for reply in replies:
            with self._at_its_own_cost(reply):
                metrics = metrics_of(reply, (WEIGHT, "accuracy", "loss"))
                reply.content = RecordDict({METRICS: metrics})
                good += [reply] if metrics[WEIGHT] else []
        return self.inner.aggregate_evaluate(server_round, good) if good else None

    def summary(self) -> None:
        self.inner.summary()

    def state(self) -> dict[str, Any]:
        """What lasts from round to round: the mechanism's numbers, and the arrays that the strategy keeps."""
        kept = {name: getattr(self.inner, name, None) for name in LASTING}
        weights = getattr(self.inner, "current_arrays", None)  # FedAvgM's own; the others set it each round
        if isinstance(weights, ArrayRecord):
            kept["current_arrays"] = arrays_in(weights)
        return {
            "mechanism": self._kept,
            "strategy": {name: value for name, value in kept.items() if value is not None},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._kept = dict(state["mechanism"])
        for name, value in state["strategy"].items():
            setattr(self.inner, name, record_of(value) if name == "current_arrays" else value)

    @contextmanager
    def _at_its_own_cost(self, reply: Message) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # hostile bytes may reach any line, Flower's and numpy's too
            self.failures += 1
            refuse(reply, error)


def refuse(reply: Message, error: Exception) -> None:
    """Say why a reply does not count."""
    log(WARNING, "reply of node %s refused: %s", reply.metadata.src_node_id, error)


class _Mean:
    """The running sum of decoded replies, and the one reply that carries their mean to a linear strategy."""

    def __init__(self, weights: ArrayRecord) -> None:
        self.layout = layout_of(weights)
        floats = {slot.name for slot in self.layout.slots}
        self.buffers = {name: array for name, array in weights.items() if name not in floats}
        self._weights = weights
        self._received = self._flat(
            ravel(weights, self.layout), {n: a.numpy() for n, a in self.buffers.items()}
        )
        self._sum = ExactSum(len(self._received))

    @property
    def weight(self) -> int:
        return self._sum.weight

    def add(self, update: NDArray[np.float32], buffers: Mapping[str, NDArray[Any]], weight: int) -> None:
        """Add an update, with what its buffers changed behind it: a reply counts as a whole or not at all."""
        x = self._flat(update, buffers)
        x[self.layout.size :] -= self._received[self.layout.size :]
        self._sum.add(x, weight)

    def total(self) -> NDArray[np.float64]:
        """The weighted sum of updates, and of what buffers changed behind it."""
        return self._sum.total()

    def reply(self, mean: NDArray[np.float64]) -> Message:
        """A reply as of one client that trained the mean of all: weights, buffers, total weight."""
        flat = self._received + mean
        values, offset = unravel(flat, self.layout, self._weights), self.layout.size
        for name, like in self.buffers.items():
            size = int(np.prod(like.shape, dtype=np.int64))
            values[name] = flat[offset : offset + size].reshape(like.shape)
            offset += size
        metrics = MetricRecord({WEIGHT: max(1, self.weight)})
        content = RecordDict({ARRAYS: _record(values, self._weights), METRICS: metrics})
        return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)

    def _flat(self, floats: NDArray[np.float32], buffers: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([floats, *(values.reshape(-1) for values in buffers.values())])


def metrics_of(reply: Message, names: tuple[str, ...]) -> MetricRecord:
    """Those metrics of a reply, no others; raises DecodeError unless each is a finite number from 0 on.

    The weight among them is a whole number of examples.
    """
    if reply.has_error():
        raise DecodeError(reply.error.reason or "the client failed")
    metrics = MetricRecord({name: reply.content.metric_records[METRICS][name] for name in names})
    weight = metrics[WEIGHT]
    if type(weight) is not int or not 0 <= weight < 2**24:
        raise DecodeError(f"a client weighs from 0 to {2**24 - 1} examples, this one says {weight!r}")
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise DecodeError(f"{name} is not a finite number of at least 0")
    return metrics


def weight_of(metrics: MetricRecord, uniform: bool) -> int:
    """What a client weighs in the mean: 1 where all weigh the same; DecodeError if it says otherwise."""
    weight = cast(int, metrics[WEIGHT])
    if uniform and weight != 1:
        raise DecodeError(f"under privacy every client weighs 1, this one says {weight}")
    return weight


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


def _side_of(reply: Message) -> dict[str, float]:
    """The numbers that a mechanism's other end sent beside the update."""
    metrics = reply.content.metric_records[METRICS]
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def _packet_in(array: Array) -> bytes:
    if array.stype != STYPE:
        raise DecodeError(f"the update has serialization type {array.stype!r}, not {STYPE!r}")
    return bytes(array.data)


def _record(values: Mapping[str, NDArray[Any]], like: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values[name])) for name in like})


def _in_dtypes_of(weights: ArrayRecord, arrays: ArrayRecord) -> ArrayRecord:
    """Flower's means turn integer buffers into float64; the next model wants integers again."""
    out = ArrayRecord()
    for name, array in arrays.items():
        if array.dtype == weights[name].dtype:
            out[name] = array
        else:
            values, dtype = array.numpy(), np.dtype(weights[name].dtype)
            out[name] = Array(np.asarray(np.rint(values) if dtype.kind in "iub" else values).astype(dtype))
    return out
