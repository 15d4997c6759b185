"""The rounds, one after the other: who has come, train, test, what each came to. Works on any Flower Grid."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.supercore import log

from fedapp.asynchronous import Asynchronous
from fedapp.budget import Budget
from fedapp.downlink import Coded, Downlink
from fedapp.engine.local import LocalGrid
from fedapp.errors import FedappError
from fedapp.evaluation import ClientTest, Evaluated, ServerTest
from fedapp.exchange import Exchange, Traffic
from fedapp.fedbuff import FedBuff
from fedapp.job import Job
from fedapp.places import Places
from fedapp.privacy.begun import Begun
from fedapp.report.folder import Round
from fedapp.report.progress import Progress
from fedapp.stages import CLOCK, EVALUATE
from fedapp.synchronous import Synchronous
from fedapp.tasks.stream import Stream
from fedapp.vector import arrays_in, layout_of, record_of

LOST = 3  # rounds in a row that end a run if all fail: one may be an accident, three are not, and cost hours


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
        self._failed = 0  # rounds in a row in which all failed
        self._streamed = isinstance(self.job.task, Stream) and self.job.privacy.unit is None
        self._by_clients = ClientTest(self._wire, self._exchange, self.places)
        ends = self.job, self._wire, self._exchange, self.places, self.begun
        self._asynchronous = Asynchronous(*ends) if isinstance(self.job.strategy, FedBuff) else None
        self._way = self._asynchronous or Synchronous(*ends, self._by_clients)
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
            started, before = time.perf_counter(), replace(self.traffic)
            try:
                step = self._way.round(number, self.arrays, progress)
            except BaseException:
                self.accepted += self._way.came  # as their bytes are counted
                raise
            self.arrays, self.accepted = step.arrays, self.accepted + step.accepted
            records, evaluated = self._tested(), Evaluated()
            beside = self._test if number < self.job.rounds and self._test and self._test.beside else None
            if beside:
                beside.begin(self.arrays)
            else:
                evaluated = self._evaluate(number)
            spent, self.finished = self.budget.spent, number
            failed = step.failed > 0 and not step.accepted and not step.lost
            self._failed = self._failed + 1 if failed else 0
            if failed:
                log(WARNING, "round %s is skipped: %s", number, self._why(step.failed))
            record = Round(
                round=number,
                **evaluated._asdict(),
                uplink_bytes=self.traffic.uplink - before.uplink,
                downlink_bytes=self.traffic.downlink - before.downlink,
                epsilon=None if spent is None else spent.epsilon,
                seconds=time.perf_counter() - started,
                replies=step.accepted,
                failures=step.failed,
                stages=CLOCK.end_round(self.grid.workers if isinstance(self.grid, LocalGrid) else None),
                clock=self.clock if self.job.timed else None,
                drift=self.traffic.drifted - before.drifted if self._streamed else None,
            )
            self._untested = record if beside else None
            yield records if beside else [*records, record]
            if self._failed >= min(LOST, self.job.rounds):
                ends = f"the run ends after {self._failed} such rounds in a row: mend that, and resume it"
                raise FedappError(f"round {number}: {self._why(step.failed)}, and {ends}")

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

    def _why(self, clients: int) -> str:
        """What is known of a round in which all of so many failed."""
        early = "" if self.job.deadline is None else f", or deadline={self.job.deadline:g} is early"
        return f"none of {clients} clients returned an update; the log says why{early}"

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

    def _evaluate(self, number: int) -> Evaluated:
        """How well the weights do, on the server's test set or on what clients held out."""
        if self._test is not None:
            with EVALUATE:
                self._test.begin(self.arrays)
                return self._test.end()
        return Evaluated() if self.job.evaluate == "none" else self._by_clients.of_all(number, self.arrays)
