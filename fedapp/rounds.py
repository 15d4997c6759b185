"""The rounds: draw a cohort, send the weights, take the updates, step, test. Works on any Flower Grid."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from logging import WARNING
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedapp.ckks import Ckks, CkksSum
from fedapp.client_app import load
from fedapp.downlink import Coded, Downlink
from fedapp.engine.grid import stream
from fedapp.engine.local import LocalGrid
from fedapp.errors import DataError, FedappError
from fedapp.fold import Folded
from fedapp.job import Job
from fedapp.privacy.accounting import Spent
from fedapp.privacy.begun import Begun
from fedapp.records import ARRAYS, CONFIG, METRICS, size_of
from fedapp.report.folder import Round
from fedapp.report.progress import Progress
from fedapp.secagg import Server
from fedapp.secagg.wire import SecureSum
from fedapp.stages import AGGREGATE, CLOCK, ENCODE, EVALUATE, TRANSFER
from fedapp.vector import arrays_in, layout_of, record_of


class Cohort:
    """What a strategy sees of the grid when it samples: the clients of this round, and no others."""

    def __init__(self, nodes: list[int]) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes


@dataclass
class Traffic:
    """Bytes that crossed the wire: the serialized content of each message and each reply."""

    uplink: int = 0
    downlink: int = 0

    def exchange(self, grid: Grid, messages: list[Message], timeout: float) -> Iterator[Message]:
        """Send the messages, yield the replies, count both."""
        sizes = {id(m.content): 0 for m in messages}  # a broadcast's one content is measured once
        with TRANSFER:
            for message in messages:
                sizes[id(message.content)] = sizes[id(message.content)] or size_of(message.content)
                self.downlink += sizes[id(message.content)]
        for reply in stream(grid, messages, timeout):
            if reply.has_content():
                with TRANSFER:
                    self.uplink += reply.size if isinstance(reply, Folded) else size_of(reply.content)
            yield reply


@dataclass
class Federation:
    """A job on a grid, and what it has reached: weights after the last whole round, bytes, participations."""

    job: Job
    grid: Grid
    arrays: ArrayRecord = field(init=False)
    traffic: Traffic = field(default_factory=Traffic)
    messages: int = 0
    accepted: int = 0
    finished: int = 0
    begun: Begun = field(default_factory=Begun)

    def __post_init__(self) -> None:
        self.arrays = self.job.initial
        self.parameters = layout_of(self.arrays).size
        self._wire = self.job.wire()
        coded = self.job.downlink
        self._downlink = Downlink(coded, self.arrays) if isinstance(coded, Coded) else None
        self._partitions = partitions(self.grid, self.job.clients, self.job.round_timeout)
        self._test = self.job.task.test_data() if self.job.evaluate == "server" else None
        # Workers that are forked after this process has touched CUDA could not.
        self._aside = isinstance(self.grid, LocalGrid) and self.job.torch_device.type == "cuda"
        if self.job.evaluate == "server" and self._test is None:
            raise DataError(
                "evaluate=server needs a test set and the task has none: set evaluate=clients or none"
            )

    def state(self) -> dict[str, Any]:
        """All that the next round depends on, for a checkpoint; by partition, since a node's id is random."""
        return {
            "finished": self.finished,
            "weights": arrays_in(self.arrays),
            "wire": self._wire.state(),
            "controls": self._wire.controls and self._wire.controls.state(self._partitions),
            "downlink": self._downlink and self._downlink.state(self._partitions, self.arrays),
            "counts": [self.traffic.uplink, self.traffic.downlink, self.messages, self.accepted],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; nodes that are not simulated here begin with nothing."""
        self.finished, self.arrays = state["finished"], record_of(state["weights"])
        self._wire.restore(state["wire"])
        local = isinstance(self.grid, LocalGrid)
        nodes = {partition: node for node, partition in self._partitions.items()} if local else {}
        if self._wire.controls is not None:
            self._wire.controls.restore(state["controls"], nodes)
        if self._downlink is not None:
            self._downlink.restore(state["downlink"], nodes, self.arrays)
        self.traffic.uplink, self.traffic.downlink, self.messages, self.accepted = state["counts"]

    def run(self, progress: Progress) -> Iterator[Round]:
        """The rounds that are left, one record each. Raises FedappError when a cohort returned no update.

        Stops before a round that would pass the budget: rounds that a crash made it repeat have cost some.
        """
        for number in range(self.finished + 1, self.job.rounds + 1):
            if self.spent_out:
                return
            CLOCK.begin_round(number)
            started, before, accepted = time.perf_counter(), replace(self.traffic), self.accepted
            sent = self._train(number, progress)
            accuracy, loss = self._evaluate(number)
            spent, self.finished = self.spent, number
            yield Round(
                round=number,
                accuracy=accuracy,
                loss=loss,
                uplink_bytes=self.traffic.uplink - before.uplink,
                downlink_bytes=self.traffic.downlink - before.downlink,
                epsilon=None if spent is None else spent.epsilon,
                seconds=time.perf_counter() - started,
                replies=self.accepted - accepted,
                failures=sent - (self.accepted - accepted),
                stages=CLOCK.end_round(self.grid.workers if isinstance(self.grid, LocalGrid) else None),
            )
            if sent and self.accepted == accepted:
                raise FedappError(
                    f"round {number}: none of {sent} clients returned an update; the log says why"
                )

    @property
    def spent(self) -> Spent | None:
        """The budget of all rounds so far; where clients spend by themselves, of who did most often."""
        if self.job.note:  # a test seed
            return None
        return self.job.spent(self.begun.rounds, max(self.begun.took_part.values(), default=0))

    @property
    def repeated(self) -> int:
        """Private rounds that were begun and not finished, which are charged all the same."""
        private = self.job.privacy.unit is not None and not self.job.note
        return self.begun.rounds - self.finished if private else 0

    @property
    def spent_out(self) -> bool:
        """Whether one more round would pass the budget; noise is set for all of a run that nothing stops."""
        budget: float | None = getattr(self.job.privacy, "epsilon", None)
        as_planned = not self.repeated and not self.begun.moved
        if as_planned or self.job.note or budget is None or self.finished == self.job.rounds:
            return False
        # Of cohorts that are drawn in secret, all cost the same.
        cohort = self.job.draw(self.finished + 1, len(self._partitions))
        most = max((self.begun.took_part + Counter(cohort)).values(), default=0)
        would = self.job.spent(self.begun.rounds + 1, most)
        return would is not None and would.epsilon > budget

    def _train(self, number: int, progress: Progress) -> int:
        """One round of training; returns how many clients were asked."""
        nodes = sorted(self._partitions, key=self._partitions.__getitem__)  # a node's id is random
        cohort = [nodes[i] for i in self.job.draw(number, len(nodes))]
        view = cast(Grid, Cohort(cohort or nodes))  # strategies wait for nodes, and keep what they configure
        asked = self._wire.configure_train(number, self.arrays, ConfigRecord(), view)
        messages = sorted(asked, key=self._partition) if cohort else []
        self.begun.add(number, [self._partitions[node] for node in cohort])  # before anything is sent
        summed = self._summed(number, [message.metadata.dst_node_id for message in messages])
        if summed is not None:
            self._train_on_sums(number, messages, summed, progress)
            return len(messages)
        replies = self._watched(self._exchange(messages), progress, len(messages))
        if not self._wire.streams:  # then the order of summation is the order of arrival
            replies = iter(sorted(replies, key=self._partition))
        collect = self.grid.collect if isinstance(self.grid, LocalGrid) else None
        with AGGREGATE:
            arrays, _ = self._wire.aggregate_train(number, replies, collect)
        self.accepted -= self._wire.failures
        self.arrays = self.arrays if arrays is None else arrays
        return len(messages)

    def _summed(self, number: int, nodes: list[int]) -> SecureSum | CkksSum | None:
        """How the server comes by the sum of a round where it is to see nothing else."""
        job = self.job
        if job.terms is not None:
            server = Server(nodes, job.terms.kept, job.terms.modulus, number, job.dropouts)
            return SecureSum(server, job.terms, job.public_rng(number, 0, use=3), self._ask)
        if not isinstance(job.aggregation, Ckks):
            return None
        holder = next(node for node, held in self._partitions.items() if held == job.aggregation.key_holder)
        return CkksSum(holder, nodes, self.parameters, job.privacy.unit is not None, self._ask)

    @AGGREGATE
    def _train_on_sums(
        self, number: int, messages: list[Message], summed: SecureSum | CkksSum, progress: Progress
    ) -> None:
        """One round of training on the sum alone; raises FedappError where that is lost."""
        told = summed.begin()
        messages = [message for message in messages if message.metadata.dst_node_id in told]
        for message in messages:
            message.content = RecordDict({**message.content, **told[message.metadata.dst_node_id]})
        before = self.accepted
        for reply in self._watched(self._exchange(messages), progress, len(messages)):
            summed.take(reply)
        self.accepted = before  # what came counts only in a sum that was opened
        mean, count = summed.mean()
        self.arrays = self._wire.step(number, mean) or self.arrays
        self.accepted += count

    def _ask(self, messages: list[Message]) -> Iterator[Message]:
        """Send messages as they are, yield the replies."""
        return self.traffic.exchange(self.grid, messages, self.job.round_timeout)

    def _exchange(self, messages: list[Message]) -> Iterator[Message]:
        """Send the weights, yield the replies; a node that cannot decode is sent others, at most twice."""
        self.messages += len(messages)
        if self._downlink is not None:
            with ENCODE:
                messages = self._downlink.send(self.arrays, messages)
        for tries_left in (2, 1, 0):
            others = []
            for reply in self._ask(messages):
                other = None if self._downlink is None else self._downlink.again(reply)
                if other is not None and tries_left:
                    others.append(other)
                else:
                    yield reply
            if not (messages := others):
                return

    def _watched(self, replies: Iterator[Message], progress: Progress, total: int) -> Iterator[Message]:
        progress.reply(0, total)
        for done, reply in enumerate(replies, 1):
            self.accepted += 1
            progress.reply(done, total)
            yield reply

    def _partition(self, message: Message) -> int:
        """The partition that a message goes to or comes from."""
        ends = message.metadata.dst_node_id, message.metadata.src_node_id
        return next(self._partitions[node] for node in ends if node in self._partitions)

    @EVALUATE
    def _evaluate(self, number: int) -> tuple[float | None, float | None]:
        """Accuracy and loss of the weights, on the server's test set or on the clients' own data."""
        if self._test is not None and self._aside:
            return self._tested_aside(number)
        if self._test is not None:
            load(self.job, self.arrays)
            metrics = self.job.task.evaluate(self.job.model, self._test)
            return metrics["accuracy"], metrics["loss"]
        if self.job.evaluate == "none":
            return None, None
        view = cast(Grid, Cohort(list(self._partitions)))
        messages = list(self._wire.configure_evaluate(number, self.arrays, ConfigRecord(), view))
        replies = sorted(self._exchange(messages), key=self._partition)
        means = self._wire.aggregate_evaluate(number, replies)
        return (float(means["accuracy"]), float(means["loss"])) if means else (None, None)  # type: ignore[arg-type]

    def _tested_aside(self, number: int) -> tuple[float, float]:
        """The same on the server's test set by a worker, and by another where that one dies."""
        for _ in range(2):
            message = Message(RecordDict({ARRAYS: self.arrays}), next(iter(self._partitions)), "query.test")
            for reply in stream(self.grid, [message], self.job.round_timeout):
                if reply.has_content():
                    metrics = reply.content.metric_records[METRICS]
                    return float(metrics["accuracy"]), float(metrics["loss"])  # type: ignore[arg-type]
        raise FedappError(f"round {number}: the model could not be tested; the log says why")


def partitions(grid: Grid, clients: int, timeout: float) -> dict[int, int]:
    """Which partition each node holds; waits until so many nodes are there, then asks them.

    Nodes beyond `clients` are left out: noise and cohorts are set for so many.
    """
    if isinstance(grid, LocalGrid):
        return grid.partitions
    deadline, seen = time.monotonic() + timeout, -1
    while len(nodes := sorted(grid.get_node_ids())) < clients:
        if time.monotonic() > deadline:
            raise FedappError(
                f"{len(nodes)} of clients={clients} nodes came within round_timeout={timeout:g} s: "
                f"start more nodes, or set clients={max(1, len(nodes))}"
            )
        if len(nodes) != seen:  # at the first look, and at each arrival
            seen = len(nodes)
            log(WARNING, "waiting up to %g s for nodes: %s of clients=%s are there", timeout, seen, clients)
        time.sleep(0.2)
    asked = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    found: dict[int, int] = {}
    for reply in stream(grid, asked, timeout):
        config = reply.content.config_records.get(CONFIG) if reply.has_content() else None
        said = None if config is None else config.get("partition-id")
        if isinstance(said, int):  # of any other answer, as of none: it brings its own data
            found[reply.metadata.src_node_id] = said
    own = sorted(node for node in nodes if found.get(node, -1) < 0)  # they bring their own data
    taken = [p for p in found.values() if p >= 0]
    if len(set(taken)) < len(taken):
        raise FedappError(
            f"two nodes hold the same partition ({sorted(taken)}): give each its own partition-id"
        )
    if taken and max(taken) >= clients:
        raise FedappError(
            f"a node holds partition {max(taken)}, and clients={clients} hold 0 to {clients - 1}: "
            f"set clients={max(taken) + 1}, or start fewer nodes"
        )
    free = (p for p in range(len(nodes)) if p not in taken)
    held = {node: next(free) if node in own else found[node] for node in nodes}
    if len(held) > clients:
        log(WARNING, "%s nodes are there, and clients=%s of them take part", len(held), clients)
    return {node: partition for node, partition in held.items() if partition < clients}
