"""Asynchronous rounds: clients train all the time, and the server steps whenever its buffer is full.

    ask     while fewer than `concurrency` clients train: draw one that is free, send it the weights of now
    take    the next answer, whoever it is from: its update, times its staleness factor, into the buffer
    step    once the buffer is full: weights + server learning rate * mean. That ends a round; who still
            trains goes on, and answers in a later one

Nobody is asked twice on the same weights: training again from there would tell the server nothing new, a
client takes part at most once a round, as accountants and ledgers expect, and a client that always fails is
asked no more often than the server steps. Where nobody is left to ask, the buffer steps with what it holds.

The sum is of whole numbers (`fedapp.exact_sum`): which updates are in a buffer decides its bits, and not the
order in which they came.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedapp.cohorts import Cohort
from fedapp.engine.grid import answer, forget, next_replies, now, push
from fedapp.engine.local import LocalGrid
from fedapp.errors import DecodeError
from fedapp.exchange import TRIES, Exchange
from fedapp.fedbuff import FedBuff
from fedapp.job import Job
from fedapp.places import Places
from fedapp.privacy.begun import Begun
from fedapp.public_rng import Use
from fedapp.records import ARRAYS, CONFIG, array_record, as_bytes, config_record, from_bytes
from fedapp.replies import refuse
from fedapp.report.progress import Progress
from fedapp.running_sum import RunningSum, terms_in
from fedapp.stages import AGGREGATE
from fedapp.synchronous import Stepped
from fedapp.wire import Wire


@dataclass(frozen=True)
class Flight:
    """A client at work: the message it was sent, in which round, and when by the grid's clock."""

    asked: Message
    round: int
    sent: float
    tries: int


@dataclass
class Asynchronous:
    """The clients at work, from round to round. `came`: updates in the round that is under way."""

    job: Job
    wire: Wire
    exchange: Exchange
    places: Places
    begun: Begun
    _flights: dict[str, Flight] = field(default_factory=dict)  # by message id, as they were sent
    _training: set[int] = field(default_factory=set)  # the nodes of these
    _arrived: deque[Message] = field(default_factory=deque)  # what came with the last answer of a round

    def __post_init__(self) -> None:
        self._strategy, self._grid = cast(FedBuff, self.job.strategy), self.exchange.grid
        self.came = 0

    def round(self, number: int, arrays: ArrayRecord, progress: Progress) -> Stepped:
        """Take answers until the buffer is full, and step."""
        buffer, size = RunningSum(arrays), self._strategy.buffer
        asked, failed, self.came = set[int](), 0, 0
        drawn = self._drawn(number, asked)
        self.begun.add(number, drawn)  # before anything is sent
        progress.reply(number, 0, size)
        while self.came < size:
            failed += self._send(number, arrays, drawn)
            asked.update(drawn)
            if self._flights:
                flight, reply = self._next()
                if reply is not None and self.exchange.undecoded(reply) and flight.tries < TRIES:
                    failed += self._send(number, arrays, [self.places.of(flight.asked)], flight.tries + 1)
                elif reply is not None and self._taken(buffer, number, flight, reply):
                    self.came += 1
                else:
                    failed += 1
            elif not drawn:  # all were asked on these weights
                break
            progress.reply(number, self.came, size)
            drawn = [] if self.came == size else self._drawn(number, asked)  # the next ones get new weights
            if drawn:
                self.begun.more(drawn)
        if buffer.exact.weight:
            with AGGREGATE:
                mean = self._strategy.server_learning_rate * buffer.exact.total() / buffer.exact.weight
                arrays = self.wire.step(number, mean, arrays) or arrays
        self.exchange.messages += len(asked)
        accepted = 0 if buffer.exact.weight and self.wire.dropped else self.came
        return Stepped(arrays, accepted, failed + self.came - accepted)

    def _drawn(self, number: int, asked: set[int]) -> list[int]:
        """Partitions to be asked next, by the seed: as many as may train, of those free and not yet asked."""
        wanted = self.job.at_once - len(self._training)
        if wanted <= 0:
            return []
        busy = set(map(self.places.partitions.__getitem__, self._training))
        free = sorted(self.places.nodes.keys() - busy - asked)
        rng = self.job.public_rng(number, len(asked), Use.FREE)
        return sorted(int(i) for i in rng.permutation(free)[:wanted])

    def _send(self, number: int, arrays: ArrayRecord, partitions: list[int], tries: int = 0) -> int:
        """Send the weights of now to the clients of these partitions; returns how many the grid refused."""
        if not partitions:
            return 0
        view = cast(Grid, Cohort([self.places.nodes[partition] for partition in partitions]))
        asked = self.wire.configure_train(number, arrays, ConfigRecord(), view)
        messages = sorted(asked, key=self.places.of)
        coded = self.exchange.coded(arrays, messages)
        return self._push(list(self.exchange.traffic.sent(coded)), number, tries)

    def _push(self, messages: list[Message], number: int, tries: int) -> int:
        sent, pushed = now(self._grid), push(self._grid, messages)
        for name, message in pushed.items():
            self._flights[name] = Flight(message, number, sent, tries)
            self._training.add(message.metadata.dst_node_id)
        return len(messages) - len(pushed)

    def _next(self) -> tuple[Flight, Message | None]:
        """The flight that ends next, and its reply; None where the client's time was over before one came."""
        while True:
            while self._arrived:
                reply = self._arrived.popleft()
                if reply.metadata.reply_to_message_id in self._flights:
                    flight = self._ended(reply.metadata.reply_to_message_id)
                    return flight, answer(flight.asked, reply)
            first, timeout = next(iter(self._flights)), self.job.round_timeout
            until = self._flights[first].sent + timeout
            came = next_replies(self._grid, self._flights.keys(), time.monotonic() + timeout, until)
            if not came:
                forget(self._grid, [first])
                return self._ended(first), None
            self.exchange.traffic.came(came)
            self._arrived.extend(came)

    def _ended(self, name: str) -> Flight:
        flight = self._flights.pop(name)
        self._training.discard(flight.asked.metadata.dst_node_id)
        return flight

    @AGGREGATE
    def _taken(self, buffer: RunningSum, number: int, flight: Flight, reply: Message) -> bool:
        """Whether an answer has gone into the buffer; one that is an error or too old costs itself only."""
        content, staleness = flight.asked.content, number - flight.round
        assert self.wire.reader is not None
        try:
            most = self._strategy.max_staleness
            if most is not None and staleness > most:
                raise DecodeError(f"its weights are {staleness} steps old, and strategy.max_staleness={most}")
            received, terms = array_record(content), terms_in(config_record(content))
            buffer.take(reply, self.wire.reader, received, terms, self._strategy.factor(staleness))
            return True
        except Exception as error:  # hostile bytes may reach any line
            refuse(reply, error)
            return False

    def state(self) -> dict[str, Any]:
        """Who trains at the end of a round, and on what: that will be computed again, to the same bits."""
        records = {id(f.asked.content[ARRAYS]): f.asked.content[ARRAYS] for f in self._flights.values()}
        order = {key: index for index, key in enumerate(records)}
        return {
            "arrays": [
                np.frombuffer(as_bytes(RecordDict({ARRAYS: record})), np.uint8) for record in records.values()
            ],
            "flights": [
                {
                    "partition": self.places.of(flight.asked),
                    "round": flight.round,
                    "sent": flight.sent,
                    "tries": flight.tries,
                    "arrays": order[id(flight.asked.content[ARRAYS])],
                    "config": dict(config_record(flight.asked.content)),
                }
                for flight in self._flights.values()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Send again what was on its way, at the times when it was sent, where time is simulated.

        Elsewhere, and under privacy, where it would be charged twice, it is lost, and clients are drawn anew.
        """
        timeline = self._grid.timeline if isinstance(self._grid, LocalGrid) else None
        if timeline is None or self.job.privacy.unit is not None:
            return
        present = timeline.now
        records = [array_record(from_bytes(data.tobytes())) for data in state["arrays"]]
        for flight in state["flights"]:
            timeline.now = flight["sent"]
            config = ConfigRecord(flight["config"])
            content = RecordDict({ARRAYS: records[flight["arrays"]], CONFIG: config})
            message = Message(content, self.places.nodes[flight["partition"]], MessageType.TRAIN)
            self._push([message], flight["round"], flight["tries"])
        timeline.now = present
