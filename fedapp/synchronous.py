"""One synchronous round: draw a cohort, send it the weights, take its updates, step."""

from collections.abc import Iterator
from dataclasses import dataclass
from logging import WARNING
from typing import NamedTuple, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedapp.assignment import Workloads
from fedapp.ckks import Ckks, CkksSum
from fedapp.cohorts import Cohort
from fedapp.engine.grid import now
from fedapp.engine.local import LocalGrid
from fedapp.errors import FedappError, RoundLost
from fedapp.evaluation import ClientTest
from fedapp.exchange import Exchange
from fedapp.job import Job
from fedapp.places import Places
from fedapp.privacy.begun import Begun
from fedapp.public_rng import Use
from fedapp.report.progress import Progress
from fedapp.secagg.wire import SecureSum
from fedapp.selection import PowerOfChoice
from fedapp.stages import AGGREGATE
from fedapp.vector import layout_of
from fedapp.wire import Wire

_NAMED = 8  # nodes that a line of the log names


class Stepped(NamedTuple):
    """What a round came to: the next weights, and how many clients took part and failed.

    lost: the sum may not be opened, since too few are left; that is nobody's failure.
    """

    arrays: ArrayRecord
    accepted: int
    failed: int
    lost: bool = False


@dataclass
class Synchronous:
    """Rounds that wait for their cohorts. `came`: replies in the round that is under way."""

    job: Job
    wire: Wire
    exchange: Exchange
    places: Places
    begun: Begun
    test: ClientTest

    def __post_init__(self) -> None:
        self._grid = self.exchange.grid
        self.came = self._late = 0  # replies in this round; of an over-selected cohort, those not waited for

    def round(self, number: int, arrays: ArrayRecord, progress: Progress) -> Stepped:
        """Train on these weights; raises FedappError where nobody is left that may sum, or may be drawn."""
        self.came = self._late = 0
        cohort = self._drawn(number, arrays)
        present = cohort or self.places.nodes.values()  # strategies wait for nodes, and keep these
        view = cast(Grid, Cohort(present))
        asked = self.wire.configure_train(number, arrays, ConfigRecord(), view)
        messages = sorted(asked, key=self.places.of) if cohort else []
        self.begun.add(number, [self.places.partitions[node] for node in cohort])  # before anything is sent
        summed = self._summed(number, [message.metadata.dst_node_id for message in messages])
        if summed is None:
            return self._on_updates(number, arrays, messages, progress)
        try:
            return self._on_sum(number, arrays, messages, summed, progress)
        except RoundLost as error:
            log(WARNING, "round %s: %s", number, error)
            return Stepped(arrays, 0, len(messages), lost=True)

    def _drawn(self, number: int, arrays: ArrayRecord) -> list[int]:
        """The nodes that train in a round; where their losses decide, of those drawn the worst."""
        job, nodes = self.job, self.places.nodes
        drawn = [nodes[i] for i in job.cohorts.draw(number, job.clients, self.places.facts) if i in nodes]
        if not isinstance(job.selection, PowerOfChoice):
            return drawn
        losses = self.wire.losses(self.test.told(number, arrays, drawn))
        if not losses:
            raise FedappError(
                f"round {number}: none of {len(drawn)} candidates told its loss; the log says why"
            )
        places = {self.places.partitions[node]: loss for node, loss in losses.items()}
        worst = set(job.selection.worst(places, job.at_once))
        return [node for node in drawn if self.places.partitions[node] in worst]

    def _summed(self, number: int, nodes: list[int]) -> SecureSum | CkksSum | None:
        """How the server comes by the sum of a round where it is to see nothing else."""
        job = self.job
        if job.secure is not None:
            server, rng = job.secure.server(nodes, number), job.public_rng(number, 0, Use.SUM)
            return SecureSum(server, job.secure.terms, rng, self.exchange.ask)
        if not isinstance(job.aggregation, Ckks):
            return None
        holder = self.places.nodes[job.aggregation.key_holder]
        size = layout_of(job.initial).size
        return CkksSum(holder, nodes, size, job.privacy.unit is not None, self.exchange.ask)

    def _on_updates(
        self, number: int, arrays: ArrayRecord, messages: list[Message], progress: Progress
    ) -> Stepped:
        """The step on updates, each of which is added as it comes, where the strategy takes a sum."""
        deadline = self.job.deadline
        until = float("inf") if deadline is None else now(self._grid) + deadline
        replies = self._in_time(number, arrays, messages, until)
        if self.wire.workloads:
            replies = self._timed(replies, self.wire.workloads)
        replies = self._watched(number, replies, progress, len(messages))
        if not self.wire.streams:  # then the order of summation is the order of arrival
            replies = iter(sorted(replies, key=self.places.of))
        collect = self._grid.collect if isinstance(self._grid, LocalGrid) else None
        with AGGREGATE:
            stepped, _ = self.wire.aggregate_train(number, replies, collect)
        accepted = 0 if self.wire.dropped else self.came - self.wire.failures
        due = len(messages) - self._late
        return Stepped(arrays if stepped is None else stepped, accepted, due - accepted)

    @AGGREGATE
    def _on_sum(
        self,
        number: int,
        arrays: ArrayRecord,
        messages: list[Message],
        summed: SecureSum | CkksSum,
        progress: Progress,
    ) -> Stepped:
        """The step on the sum alone; raises RoundLost, or FedappError where nobody was left."""
        told, total = summed.begin(), len(messages)
        messages = [message for message in messages if message.metadata.dst_node_id in told]
        for message in messages:
            message.content = RecordDict({**message.content, **told[message.metadata.dst_node_id]})
        for reply in self._watched(number, self.exchange.send(arrays, messages), progress, len(messages)):
            summed.take(reply)
        mean, count = summed.mean()
        arrays = self.wire.step(number, mean, arrays) or arrays
        accepted = 0 if self.wire.dropped else count  # what came counts only in a sum that was opened
        return Stepped(arrays, accepted, total - accepted)

    def _in_time(
        self, number: int, arrays: ArrayRecord, messages: list[Message], until: float
    ) -> Iterator[Message]:
        """The replies that the round waits for: of an over-selected cohort those that come first."""
        trained = 0
        silent = {message.metadata.dst_node_id for message in messages}
        for came, reply in enumerate(self.exchange.send(arrays, messages, until), 1):
            silent.discard(reply.metadata.src_node_id)
            yield reply
            trained += reply.has_content()
            if self.job.over_selection > 1 and trained == self.job.in_round:
                self._late = len(messages) - came
                return
        if silent and not isinstance(self._grid, LocalGrid):
            said = "round %s: %s of %s nodes did not answer in time; what they still send is dropped: %s"
            named = ", ".join(map(str, sorted(silent)[:_NAMED]))
            log(WARNING, said, number, len(silent), len(messages), named)

    def _watched(
        self, number: int, replies: Iterator[Message], progress: Progress, total: int
    ) -> Iterator[Message]:
        """The replies, which are counted, and shown."""
        progress.reply(number, 0, total)
        for self.came, reply in enumerate(replies, 1):
            progress.reply(number, self.came, total)
            yield reply

    def _timed(self, replies: Iterator[Message], workloads: Workloads) -> Iterator[Message]:
        """The replies; how long each took tells what to ask of its node next."""
        started = now(self._grid)
        for reply in replies:
            workloads.hear(reply, now(self._grid) - started)
            yield reply
        workloads.end(now(self._grid) - started)
