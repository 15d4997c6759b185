"""The sum of a round's updates: each reply is read and added by itself, at the server or where it arose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout
from fedapp.codec.packet import decode_update, unpadded
from fedapp.exact_sum import ExactSum
from fedapp.privacy.mechanism import Mechanism, Numbers
from fedapp.records import ARRAYS, METRICS, UPDATE, WEIGHT, array_record
from fedapp.replies import drifted, metrics_of, packet_in, side_of, values_of, weight_of
from fedapp.stages import DECODE
from fedapp.vector import Held, buffers_of, held, layout_of, ravel, record_with, unravel, values


@dataclass(frozen=True)
class Reader:
    """What a reply that `wire.compress` made says, by public settings alone.

    `uniform` refuses replies that weigh anything but 1: no client then counts more. `least` is the
    smallest weight of a client that has examples. `bound` makes an update no longer than that (2-norm), and
    then all weigh the same, whatever they say: what one client moves is bounded (Sun et al. 2019, "Can you
    really backdoor federated learning?").
    """

    codec: Codec
    mechanism: Mechanism | None = None
    uniform: bool = False
    least: int = 0
    bound: float | None = None

    def weight(self, said: int) -> int:
        """What a client counts that says it weighs so much."""
        return said if self.bound is None else min(said, 1)

    @DECODE
    def update_in(
        self, reply: Message, layout: Layout, terms: Numbers
    ) -> tuple[NDArray[np.float32], Numbers]:
        """The update in the packet, bounded by the mechanism, and the numbers beside it."""
        update = self._decoded(array_record(reply.content).pop(UPDATE), layout)
        if self.mechanism is None:
            return self._bounded(update), {}
        return self.mechanism.on_reply(update, side_of(reply), terms)

    def _decoded(self, array: Array, layout: Layout) -> NDArray[np.float32]:
        if isinstance(array, Held):  # made by this process, which need not decode it
            return array.value
        data = packet_in(array)
        if self.mechanism is not None and self.mechanism.packet_bytes:
            data = unpadded(data, self.mechanism.packet_bytes)
        return decode_update(data, self.codec, layout)

    def _bounded(self, update: NDArray[np.float32]) -> NDArray[np.float32]:
        """The update, shortened to the bound where it is longer."""
        if self.bound is None:
            return update
        norm = float(np.linalg.norm(update.astype(np.float64)))
        return update if norm <= self.bound else update * np.float32(self.bound / norm)


@dataclass(frozen=True)
class Tally:
    """What counts of a reply beside its update: whose it is, its weight, and what its mechanism says."""

    node: int
    weight: int
    side: Numbers
    drift: bool = False


class RunningSum:
    """The weighted sum of updates of weights like these; memory is one model, however many are added."""

    def __init__(self, weights: ArrayRecord, exact: ExactSum | None = None) -> None:
        self.layout = layout_of(weights)
        self.buffers = buffers_of(weights, self.layout)
        sizes = (np.prod(array.shape, dtype=np.int64) for array in self.buffers.values())
        self.size = self.layout.size + int(sum(sizes))
        self.exact = exact or ExactSum(self.size)

    def take(
        self, reply: Message, read: Reader, received: ArrayRecord, terms: Numbers, factor: float = 1.0
    ) -> Tally:
        """Add a reply to these received weights, its update times `factor`; whole, or DecodeError and not."""
        weight = read.weight(weight_of(metrics_of(reply, (WEIGHT,)), read.uniform, read.least))
        update, side = read.update_in(reply, self.layout, terms)
        trained = values_of(array_record(reply.content), self.buffers)
        if trained:
            moved = [trained[name] - values(received[name]) for name in self.buffers]
            update = np.concatenate([update, *(one.reshape(-1) for one in moved)])
        self.exact.add(update if factor == 1.0 else update * update.dtype.type(factor), weight)
        return Tally(reply.metadata.src_node_id, weight, side, drifted(reply))

    def reply(self, mean: NDArray[np.float64], weights: ArrayRecord) -> Message:
        """A reply as of one client that trained the mean of all: weights, buffers, total weight."""
        trained = ravel(weights, self.layout) + mean[: self.layout.size]
        made: dict[str, NDArray[Any]] = unravel(trained, self.layout, weights)
        offset = self.layout.size
        for name, like in self.buffers.items():
            size = int(np.prod(like.shape, dtype=np.int64))
            made[name] = values(weights[name]) + mean[offset : offset + size].reshape(like.shape)
            offset += size
        metrics = MetricRecord({WEIGHT: max(1, self.exact.weight)})
        arrays = record_with({name: held(made[name]) for name in weights})
        content = RecordDict({ARRAYS: arrays, METRICS: metrics})
        return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)


def terms_in(config: Mapping[str, Any]) -> Numbers:
    """What a mechanism tells its clients in a round."""
    return {name: value for name, value in config.items() if isinstance(value, float)}
