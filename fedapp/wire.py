"""The two ends of the wire: what a client sends for its update, and what the server makes of it.

client:  trained - received -> mechanism -> codec.encode -> pack        (`compress`, a Flower client mod)
server:  unpack -> codec.decode -> running sum -> mechanism -> strategy  (`Wire`, a wrapper around a strategy)

Without this pair the app is plain Flower; with the identity codec and no mechanism it is not installed.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from logging import WARNING
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import Mod
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from numpy.typing import NDArray

from fedapp.assignment import WHOLE, Part, Workloads
from fedapp.codec import Codec, encode_known
from fedapp.codec.layers import require_finite
from fedapp.codec.packet import pack, packed_size, padded
from fedapp.fold import Collect, Folded
from fedapp.privacy.mechanism import Mechanism, Numbers
from fedapp.privacy.secret import SERVER, Secret, source
from fedapp.records import (
    ARRAYS,
    LOSS,
    METRICS,
    STYPE,
    UPDATE,
    WEIGHT,
    array_record,
    config_record,
    load_state,
    metric_record,
    store_state,
)
from fedapp.replies import metrics_of, refuse, values_of, weight_of
from fedapp.running_sum import Reader, RunningSum, Tally, terms_in
from fedapp.scaffold import Control, Controls, ForgottenError
from fedapp.strategies import STREAMED, finite, in_dtypes_of, kept_by, restore
from fedapp.vector import (
    Held,
    Reply,
    array_of,
    buffers_of,
    layout_of,
    ravel,
    record_with,
    unravel,
    update_of,
    values,
)

Recall = Callable[[Message, Context], Control]

# --- the client's end --------------------------------------------------------------------------------


def compress(
    codec: Codec,
    rng: np.random.Generator,
    mechanism: Mechanism | None = None,
    secret: Secret = os.urandom,
    recall: Recall | None = None,
    part: Part = WHOLE,
    here: bool = False,
) -> Mod:
    """The client mod: replaces the trained weights in a train reply by the encoded update.

    A mechanism of client-level privacy makes it private first, and nothing else of the reply then leaves the
    client. What codec and mechanism keep stays in `context.state`. Integer buffers go beside the packet,
    unchanged, but never under a mechanism: they count batches. `recall` brings the client's control variate,
    where clients are steered: then news of an update is encoded, not all of it. `part` may ask for less.
    `here`: the same process reads the packet, which then need not be made if the codec knows what it says.
    """

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        received = array_record(message.content)
        try:
            control = recall and recall(message, context)
        except ForgottenError as error:
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, str(error)), reply_to=message)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        trained = array_record(reply.content)
        layout, update = layout_of(received), update_of(received, trained)
        if mechanism is not None:
            config, kept = config_record(message.content), load_state(context, "privacy")
            update, side, kept = mechanism.on_client(update, terms_in(config), kept, secret)
            store_state(context, "privacy", kept)
            reply.content[METRICS] = MetricRecord({WEIGHT: 1, **side})
        else:
            require_finite(update, layout)  # before error feedback could remember it
            update = control.news(update) if control else update
        state = load_state(context, "codec")
        asked = part.thinned(codec)
        encode = partial(encode_known, asked) if here else asked.encode
        packet, state = encode(update, layout, state, rng)
        store_state(context, "codec", state)
        make = partial(pack, packet, codec, layout)
        if mechanism is not None and mechanism.packet_bytes:
            nothing, _ = codec.encode(np.zeros_like(update), layout, {}, rng)
            array = _packed(padded(make(), pack(nothing, codec, layout), mechanism.packet_bytes))
        elif here and packet.known is not None:
            size = packed_size(packet)
            array = Held(_like(size), packet.known, size, make)
        else:
            array = _packed(make())
        if control:
            control.keep(context, array.data)
        sent = {UPDATE: array}
        if mechanism is None:
            sent |= {name: array_of(values(one)) for name, one in buffers_of(trained, layout).items()}
        reply.content[ARRAYS] = record_with(sent)
        return reply

    return mod


def _packed(data: bytes) -> Array:
    """A packet as an array of a message."""
    return Array(*_like(len(data)), data)


def _like(size: int) -> tuple[str, tuple[int, ...], str]:
    """Dtype, shape and serialization type of a packet of so many bytes."""
    return "uint8", (size,), STYPE


# --- the server's end --------------------------------------------------------------------------------


class Wire(Strategy):
    """A Flower strategy behind the wire: decodes what `compress` sent, then lets the strategy step.

    Linear strategies get the mean as one reply, summed as replies arrive: memory does not grow with the
    cohort. Others get every decoded reply. With `codec=None` the weights that came pass as they are. A reply
    that is an error, or does not decode, is counted in `failures` and costs the round nothing else. A step to
    weights that are not finite is `dropped`.

    A mechanism of client-level privacy, which takes a linear strategy, bounds each update, and makes the mean
    of their sum. `uniform` refuses replies that weigh anything but 1: no client then counts more. `bound` is
    the norm that the server cuts an update to (`Reader`).
    """

    def __init__(
        self,
        inner: Strategy,
        codec: Codec | None,
        mechanism: Mechanism | None = None,
        uniform: bool = False,
        controls: Controls | None = None,
        workloads: Workloads | None = None,
        bound: float | None = None,
    ) -> None:
        self.controls, self.workloads = controls, workloads
        self.inner, self.codec, self.mechanism = inner, codec, mechanism
        uniform = uniform or mechanism is not None
        self.reader = None if codec is None else Reader(codec, mechanism, uniform, bound=bound)
        self.streams = codec is not None and type(inner).__name__ in STREAMED
        self.failures, self.dropped = 0, False
        self._uniform, self._least, self._kept = uniform, 0, dict[str, float]()
        self._uses = (WEIGHT, LOSS) if type(inner).__name__ == "QFedAvg" else (WEIGHT,)
        self._weights = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._weights = arrays
        config = ConfigRecord({**config, **self._terms})
        messages = self.inner.configure_train(server_round, arrays, config, grid)
        for told in (self.controls, self.workloads):
            messages = told.tell(list(messages)) if told else messages
        return messages

    def weigh_at_least(self, examples: int) -> None:
        """From here on a client with any examples counts as many in the mean, or more."""
        self._least = examples
        self.reader = self.reader and replace(self.reader, least=examples)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message], collect: Collect | None = None
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One mean or all decoded replies to the strategy; None where nobody trained on anything.

        `collect` brings the sums of replies that come `Folded`: read and added where they were made.
        """
        self.failures, self.dropped = 0, False
        if not self.streams:
            accepted = [one for reply in replies for one in self._read(reply)]
            return self._stepped(server_round, accepted) if accepted else (None, None)
        total, tallies = self._summed(replies, collect)
        exact, sides = total.exact, Counter[str]()
        for tally in tallies:
            sides.update(tally.side)
        if self.mechanism is not None:
            secret = source(self.mechanism.test_seed, SERVER, server_round)
            mean, kept = self.mechanism.on_server(exact.total(), sides, exact.weight, self._kept, secret)
            self._kept = dict(kept)
            if not exact.weight and not mean.any():  # nor noise, which must hide that there is no update
                return None, None
        elif not exact.weight:
            return None, None
        elif self.controls:
            weights = {tally.node: tally.weight for tally in tallies}
            mean = self.controls.mean(server_round, exact.total(), weights)
        else:
            mean = exact.total()
            mean /= exact.weight
            if self.workloads:
                mean *= self.workloads.pace({tally.node: tally.weight for tally in tallies})
        return self._stepped(server_round, [total.reply(mean, self._weights)])

    def _summed(self, replies: Iterable[Message], collect: Collect | None) -> tuple[RunningSum, list[Tally]]:
        """The sum of all replies, and what counts of each beside."""
        assert self.reader is not None
        total, tallies, folded = RunningSum(self._weights), list[Tally](), defaultdict[int, list[Tally]](list)
        for reply in replies:
            if self.controls:
                self.controls.hear(reply)
            with self._at_its_own_cost(reply):
                if isinstance(reply, Folded):
                    folded[reply.slot].append(reply.tally)
                else:
                    tallies.append(total.take(reply, self.reader, self._weights, self._terms))
        for slot, exact in enumerate(collect() if collect else ()):
            if exact is None:
                log(WARNING, "%s replies are lost with the worker that died adding", len(folded[slot]))
                self.failures += len(folded[slot])
                continue
            exact.weight = sum(tally.weight for tally in folded[slot])
            total.exact.merge(exact)
            tallies += folded[slot]
        return total, tallies

    def _read(self, reply: Message) -> list[Message]:
        """The reply with the weights that its client trained; none where it does not count."""
        with self._at_its_own_cost(reply):
            metrics, arrays = metrics_of(reply, self._uses), array_record(reply.content)
            metrics[WEIGHT] = weight = weight_of(metrics, self._uniform, self._least)
            if self.reader is None:
                trained = values_of(arrays, self._weights)
            else:
                layout = layout_of(self._weights)
                update, _ = self.reader.update_in(reply, layout, self._terms)
                metrics[WEIGHT] = weight = self.reader.weight(weight)
                trained = values_of(arrays, buffers_of(self._weights, layout))
                trained |= unravel(ravel(self._weights, layout) + update, layout, self._weights)
            if weight:
                arrays = Reply({name: array_of(trained[name]) for name in self._weights})
                reply.content = RecordDict({ARRAYS: arrays, METRICS: metrics})
                return [reply]
        return []

    @property
    def _terms(self) -> Numbers:
        """What clients are told beside the weights."""
        return {} if self.mechanism is None else self.mechanism.terms(self._kept)

    def step(
        self, server_round: int, mean: NDArray[np.floating[Any]], weights: ArrayRecord
    ) -> ArrayRecord | None:
        """What the strategy makes of these weights, and a mean that somebody else has summed."""
        self._weights = weights
        reply = RunningSum(self._weights).reply(mean.astype(np.float64), self._weights)
        return self._stepped(server_round, [reply])[0]

    def _stepped(
        self, server_round: int, replies: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        before = kept_by(self.inner)
        stepped, means = self.inner.aggregate_train(server_round, replies)
        self.dropped = stepped is not None and not finite(stepped)  # as by a loss of 1e300 under qfedavg
        if self.dropped:
            log(WARNING, "round %s is dropped: its step leads to weights that are not finite", server_round)
            restore(self.inner, before)
            if self.controls:
                self.controls.begin_anew()
            return None, None
        return (None if stepped is None else in_dtypes_of(self._weights, stepped)), means

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's means, and each client's accuracy; None where nobody tested on anything."""
        good = []
        for reply in replies:
            with self._at_its_own_cost(reply):
                metrics = metrics_of(reply, (WEIGHT, "accuracy", "loss"))
                reply.content = RecordDict({METRICS: metrics})
                good += [reply] if metrics[WEIGHT] else []
        means = self.inner.aggregate_evaluate(server_round, good) if good else None
        accuracies = [metric_record(reply.content)["accuracy"] for reply in good]
        return means and MetricRecord({**means, "accuracies": cast(list[float], accuracies)})

    def losses(self, replies: Iterable[Message]) -> dict[int, float]:
        """The loss that each node with any examples says that the model has on them."""
        found = dict[int, float]()
        for reply in replies:
            with self._at_its_own_cost(reply):
                metrics = metrics_of(reply, (WEIGHT, "loss"))
                found |= {reply.metadata.src_node_id: float(metrics["loss"])} if metrics[WEIGHT] else {}  # type: ignore[arg-type]
        return found

    def summary(self) -> None:
        self.inner.summary()

    def state(self) -> dict[str, Any]:
        """What lasts from round to round: the mechanism's numbers, and the arrays that the strategy keeps."""
        return {"mechanism": self._kept, "strategy": kept_by(self.inner)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._kept = dict(state["mechanism"])
        restore(self.inner, state["strategy"])

    @contextmanager
    def _at_its_own_cost(self, reply: Message) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # hostile bytes may reach any line, Flower's and numpy's too
            self.failures += 1
            refuse(reply, error)
