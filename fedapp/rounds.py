"""The rounds: draw a cohort, send the weights, take the updates, step, test. Works on any Flower Grid."""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from logging import WARNING
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedapp.assignment import Workloads
from fedapp.asynchronous import Asynchronous
from fedapp.budget import Budget
from fedapp.ckks import Ckks, CkksSum
from fedapp.cohorts import Cohort
from fedapp.downlink import Coded, Downlink
from fedapp.engine.grid import now
from fedapp.engine.local import LocalGrid
from fedapp.errors import FedappError, RoundLost
from fedapp.evaluation import Evaluated, ServerTest, over_clients
from fedapp.exchange import Exchange, Traffic
from fedapp.fedbuff import FedBuff
from fedapp.job import Job
from fedapp.places import Places
from fedapp.privacy.begun import Begun
from fedapp.public_rng import Use
from fedapp.report.folder import Round
from fedapp.report.progress import Progress
from fedapp.secagg.wire import SecureSum
from fedapp.selection import PowerOfChoice
from fedapp.stages import AGGREGATE, CLOCK, EVALUATE
from fedapp.tasks.stream import Stream
from fedapp.vector import arrays_in, layout_of, record_of

LOST = 3  # rounds in a row that end a run if all fail: one may be an accident, three are not, and cost hours
_NAMED = 8  # nodes that a line of the log names


@dataclass
class Federation:
    """A job on a grid, and what it has reached: weights after the last whole round, bytes, participations.

    `finished`: of a run that goes on, the last round that it will be restored to.
    """

    job: Job
    grid: Grid
    arrays: ArrayRecord = field(init=False)
    accepted: int = 0
    finished: int = 0
    begun: Begun = field(default_factory=Begun)

    def __post_init__(self) -> None:
        self.budget = Budget(self.job, self.begun)
        self.arrays = self.job.initial
        self.parameters = layout_of(self.arrays).size
        self._wire = self.job.wire()
        coded = self.job.downlink
        self._downlink = Downlink(coded, self.arrays) if isinstance(coded, Coded) else None
        self._exchange = Exchange(self.grid, self._downlink, self.job.round_timeout)
        self.places = Places(self.job, self.grid, self.finished + 1)
        self._weigh()
        self._late, self._lost = 0, False
        self._failed = 0  # rounds in a row in which all failed
        self._streamed = isinstance(self.job.task, Stream) and self.job.privacy.unit is None
        self._asynchronous: Asynchronous | None = None
        if isinstance(self.job.strategy, FedBuff):
            self._asynchronous = Asynchronous(self.job, self._wire, self._exchange, self.places, self.begun)
        self._test = ServerTest(self.job, self.grid) if self.job.evaluate == "server" else None
        self._untested: Round | None = None  # the record of a round whose test goes on

    @property
    def traffic(self) -> Traffic:
        """What crossed the wire so far."""
        return self._exchange.traffic

    @property
    def messages(self) -> int:
        """How many times weights were sent."""
        return self._exchange.messages

    def state(self) -> dict[str, Any]:
        """All that the next round depends on, for a checkpoint; by partition, since a node's id is random."""
        held = self.places.held
        return {
            "finished": self.finished,
            "weights": arrays_in(self.arrays),
            "wire": self._wire.state(),
            "workloads": self._wire.workloads and self._wire.workloads.state(held),
            "controls": self._wire.controls and self._wire.controls.state(held),
            "downlink": self._downlink and self._downlink.state(held, self.arrays),
            "asynchronous": self._asynchronous and self._asynchronous.state(),
            "clock": self.clock,
            "failed": self._failed,
            "untested": self._untested and asdict(self._untested),
            "counts": [self.traffic.uplink, self.traffic.downlink, self.messages, self.accepted],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; nodes that are not simulated here begin with nothing."""
        self.finished, self.arrays = state["finished"], record_of(state["weights"])
        self._wire.restore(state["wire"])
        local = isinstance(self.grid, LocalGrid)
        nodes = self.places.nodes if local else {}
        if self._wire.workloads is not None:
            self._wire.workloads.restore(state["workloads"], nodes)
        if self._wire.controls is not None:
            self._wire.controls.restore(state["controls"], nodes)
        if self._downlink is not None:
            self._downlink.restore(state["downlink"], nodes, self.arrays)
        if isinstance(self.grid, LocalGrid) and self.grid.timeline is not None:
            self.grid.timeline.now = state["clock"]
        if self._asynchronous is not None:
            self._asynchronous.restore(state["asynchronous"])
        self._failed = state["failed"]
        self._untested = Round(**state["untested"]) if state["untested"] else None
        self.traffic.uplink, self.traffic.downlink, self._exchange.messages, self.accepted = state["counts"]

    def run(self, progress: Progress) -> Iterator[list[Round]]:
        """The rounds that are left; after each, the records that are whole by then, in their order.

        A test by the server may go on beside the next round, and the record then comes with that one's; after
        the last round there is none that waits, unless the run was broken off (`rest`).

        A round that produced no update is recorded with no replies. The weights then stay, but where noise on
        the sum must hide that it is one of nobody (privacy=central_gaussian), and the round costs what others
        do, as was written down before it began.
        Raises FedappError where whole cohorts failed in `LOST` rounds in a row, or in all of a shorter run;
        one that is resumed then ends at the first round that fails again. A sum that may not be opened, since
        too few are left, is lost, and ends nothing.
        Stops before a round that would pass the budget: rounds that a crash made it repeat have cost some.
        """
        if self._untested is not None and self._test is not None:
            self._test.begin(self.arrays)  # of the run that goes on here
        for number in range(self.finished + 1, self.job.rounds + 1):
            self._welcome(number)
            if self.budget.ends(self.finished):
                yield self._tested()
                return
            CLOCK.begin_round(number)
            started, before, accepted = time.perf_counter(), replace(self.traffic), self.accepted
            answers = self._train(number, progress)
            records, evaluated = self._tested(), Evaluated()
            beside = self._test if number < self.job.rounds and self._test and self._test.beside else None
            if beside:
                beside.begin(self.arrays)
            else:
                evaluated = self._evaluate(number)
            spent, self.finished = self.budget.spent, number
            replies = self.accepted - accepted
            failed = answers > 0 and not replies and not self._lost
            self._failed = self._failed + 1 if failed else 0
            if failed:
                log(WARNING, "round %s is skipped: %s", number, self._why(answers))
            record = Round(
                round=number,
                **evaluated._asdict(),
                uplink_bytes=self.traffic.uplink - before.uplink,
                downlink_bytes=self.traffic.downlink - before.downlink,
                epsilon=None if spent is None else spent.epsilon,
                seconds=time.perf_counter() - started,
                replies=replies,
                failures=answers - replies,
                stages=CLOCK.end_round(self.grid.workers if isinstance(self.grid, LocalGrid) else None),
                clock=self.clock if self.job.timed else None,
                drift=self.traffic.drifted - before.drifted if self._streamed else None,
            )
            self._untested = record if beside else None
            yield records if beside else [*records, record]
            if self._failed >= min(LOST, self.job.rounds):
                ends = f"the run ends after {self._failed} such rounds in a row: mend that, and resume it"
                raise FedappError(f"round {number}: {self._why(answers)}, and {ends}")

    def _tested(self) -> list[Round]:
        """The record that waits for its test, if one does."""
        if self._untested is None or self._test is None:
            return []
        with EVALUATE:
            record = replace(self._untested, **self._test.end()._asdict())
        self._untested = None
        return [record]

    def rest(self) -> list[Round]:
        """The record that waits, tested by this process: after an interruption no worker is relied on."""
        if self._untested is None or self._test is None:
            return []
        return [replace(self._untested, **self._test.rest()._asdict())]

    @property
    def recorded(self) -> int:
        """The last round whose record is whole."""
        return self.finished - (self._untested is not None)

    def _why(self, answers: int) -> str:
        """What is known of a round in which all failed."""
        early = "" if self.job.deadline is None else f", or deadline={self.job.deadline:g} is early"
        return f"none of {answers} clients returned an update; the log says why{early}"

    @property
    def clock(self) -> float | None:
        """Simulated seconds since the run began; None where time is not simulated."""
        timeline = self.grid.timeline if isinstance(self.grid, LocalGrid) else None
        return None if timeline is None else timeline.now

    def _welcome(self, number: int) -> None:
        """Let the nodes that have come since the round before take part."""
        taken = self.places.look(number)
        for partition, left, own in taken:
            if own:
                self.begun.join(partition)
            if left is not None and self._wire.controls is not None:
                self._wire.controls.leave(left)
            if left is not None and self._downlink is not None:
                self._downlink.leave(left)
        if taken:
            self._weigh()

    def _weigh(self) -> None:
        least = self.job.selection.least_weight(self.places.facts, self.job.at_once)
        self._wire.weigh_at_least(least)

    def _train(self, number: int, progress: Progress) -> int:
        """One round of training; returns how many answers were due, those that failed among them."""
        if self._asynchronous is not None:
            step = self._asynchronous.round(number, self.arrays, progress)
            self.arrays = step.arrays
            self.accepted += step.accepted
            return step.accepted + step.failed
        cohort = self._drawn(number)
        present = cohort or self.places.nodes.values()  # strategies wait for nodes, and keep these
        view = cast(Grid, Cohort(present))
        asked = self._wire.configure_train(number, self.arrays, ConfigRecord(), view)
        messages = sorted(asked, key=self._partition) if cohort else []
        self.begun.add(number, [self.places.partitions[node] for node in cohort])  # before anything is sent
        summed = self._summed(number, [message.metadata.dst_node_id for message in messages])
        if summed is not None:
            try:
                self._train_on_sums(number, messages, summed, progress)
                self._lost = False
            except RoundLost as error:
                self._lost = True
                log(WARNING, "round %s: %s", number, error)
            return len(messages)
        before = self.accepted
        until = now(self.grid) + (float("inf") if self.job.deadline is None else self.job.deadline)
        in_time = self._in_time(number, messages, until)
        if self._wire.workloads:
            in_time = self._timed(in_time, self._wire.workloads)
        replies = self._watched(number, in_time, progress, len(messages))
        if not self._wire.streams:  # then the order of summation is the order of arrival
            replies = iter(sorted(replies, key=self._partition))
        collect = self.grid.collect if isinstance(self.grid, LocalGrid) else None
        with AGGREGATE:
            arrays, _ = self._wire.aggregate_train(number, replies, collect)
        self.accepted = before if self._wire.dropped else self.accepted - self._wire.failures
        self.arrays = self.arrays if arrays is None else arrays
        return len(messages) - self._late

    def _drawn(self, number: int) -> list[int]:
        """The nodes that train in a round; where their losses decide, of those drawn the worst."""
        job, nodes = self.job, self.places.nodes
        drawn = [nodes[i] for i in job.cohorts.draw(number, job.clients, self.places.facts) if i in nodes]
        if not isinstance(job.selection, PowerOfChoice):
            return drawn
        losses = self._wire.losses(self._tests(number, drawn))
        if not losses:
            raise FedappError(
                f"round {number}: none of {len(drawn)} candidates told its loss; the log says why"
            )
        places = {self.places.partitions[node]: loss for node, loss in losses.items()}
        worst = set(job.selection.worst(places, job.at_once))
        return [node for node in drawn if self.places.partitions[node] in worst]

    def _timed(self, replies: Iterator[Message], workloads: Workloads) -> Iterator[Message]:
        """The replies; how long each took tells what to ask of its node next."""
        started = now(self.grid)
        for reply in replies:
            workloads.hear(reply, now(self.grid) - started)
            yield reply
        workloads.end(now(self.grid) - started)

    def _summed(self, number: int, nodes: list[int]) -> SecureSum | CkksSum | None:
        """How the server comes by the sum of a round where it is to see nothing else."""
        job = self.job
        if job.secure is not None:
            server, rng = job.secure.server(nodes, number), job.public_rng(number, 0, Use.SUM)
            return SecureSum(server, job.secure.terms, rng, self._exchange.ask)
        if not isinstance(job.aggregation, Ckks):
            return None
        holder = self.places.nodes[job.aggregation.key_holder]
        return CkksSum(holder, nodes, self.parameters, job.privacy.unit is not None, self._exchange.ask)

    @AGGREGATE
    def _train_on_sums(
        self, number: int, messages: list[Message], summed: SecureSum | CkksSum, progress: Progress
    ) -> None:
        """One round of training on the sum alone; raises RoundLost, or FedappError where nobody was left."""
        told = summed.begin()
        messages = [message for message in messages if message.metadata.dst_node_id in told]
        for message in messages:
            message.content = RecordDict({**message.content, **told[message.metadata.dst_node_id]})
        before, replies = self.accepted, self._exchange.send(self.arrays, messages)
        for reply in self._watched(number, replies, progress, len(messages)):
            summed.take(reply)
        self.accepted = before  # what came counts only in a sum that was opened
        mean, count = summed.mean()
        self.arrays = self._wire.step(number, mean, self.arrays) or self.arrays
        self.accepted += 0 if self._wire.dropped else count

    def _in_time(self, number: int, messages: list[Message], until: float) -> Iterator[Message]:
        """The replies that the round waits for: of an over-selected cohort those that come first."""
        trained, self._late = 0, 0
        silent = {message.metadata.dst_node_id for message in messages}
        for came, reply in enumerate(self._exchange.send(self.arrays, messages, until), 1):
            silent.discard(reply.metadata.src_node_id)
            yield reply
            trained += reply.has_content()
            if self.job.over_selection > 1 and trained == self.job.in_round:
                self._late = len(messages) - came
                return
        if silent and not isinstance(self.grid, LocalGrid):
            said = "round %s: %s of %s nodes did not answer in time; what they still send is dropped: %s"
            named = ", ".join(map(str, sorted(silent)[:_NAMED]))
            log(WARNING, said, number, len(silent), len(messages), named)

    def _watched(
        self, number: int, replies: Iterator[Message], progress: Progress, total: int
    ) -> Iterator[Message]:
        progress.reply(number, 0, total)
        for done, reply in enumerate(replies, 1):
            self.accepted += 1
            progress.reply(number, done, total)
            yield reply

    def _partition(self, message: Message) -> int:
        """The partition that a message goes to or comes from."""
        ends = message.metadata.dst_node_id, message.metadata.src_node_id
        return next(self.places.partitions[node] for node in ends if node in self.places.partitions)

    @EVALUATE
    def _evaluate(self, number: int) -> Evaluated:
        """How well the weights do, on the server's test set or on what clients held out."""
        if self._test is not None:
            self._test.begin(self.arrays)
            return self._test.end()
        if self.job.evaluate == "none":
            return Evaluated()
        means = self._wire.aggregate_evaluate(number, self._tests(number, self.places.nodes.values()))
        return over_clients(means) if means else Evaluated()

    @EVALUATE
    def _tests(self, number: int, nodes: Collection[int]) -> list[Message]:
        """What these nodes say of the weights, each on its own data, in order of their partitions."""
        view = cast(Grid, Cohort(nodes))
        messages = list(self._wire.configure_evaluate(number, self.arrays, ConfigRecord(), view))
        return sorted(self._exchange.send(self.arrays, messages), key=self._partition)
