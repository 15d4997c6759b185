"""Sessions of secure aggregation for tests: a server, its clients, and what passes between them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedapp.errors import DecodeError
from fedapp.privacy import secret
from fedapp.records import size_of
from fedapp.secagg import Client, Plan, Record, Server, roster

STAGES = ("advertise", "share", "mask", "unmask")
SIGNED = ("advertise", "share", "mask", "confirm", "unmask")
Lie = Callable[[str, int, Record], Record]


def vectors(count: int, size: int, modulus: int, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, modulus, (count, size)).astype(np.uint32)


def held(record: Record, name: str) -> bytes:
    value = record[name]
    assert isinstance(value, bytes)
    return value


def through_flower(record: Record) -> tuple[Record, int]:
    """What arrives of a record in a Flower message, and its bytes there."""
    config = ConfigRecord(dict(record))
    return cast(Record, dict(config)), size_of(RecordDict({"": config}))


@dataclass
class Round:
    """A server and its clients; states pass through ConfigRecords, as they do in Context.state."""

    values: NDArray[np.uint32]
    modulus: int
    plan: Plan = field(default_factory=Plan)
    session: int = 1
    seed: int = 0
    signed: bool = False
    server: Server = field(init=False)
    clients: list[Client] = field(init=False)
    states: dict[int, Record] = field(default_factory=dict)
    seen: dict[str, dict[int, Record]] = field(default_factory=dict)  # replies, as the server saw them
    sent: dict[str, dict[int, Record]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    def __post_init__(self) -> None:
        count, size = self.values.shape
        stream = secret.source(self.seed, self.session)
        given, own = (size, self.modulus), roster.make(count) if self.signed else ()
        everyone = own[0].roster if own else frozenset[bytes]()
        self.server = Server(range(count), *given, self.session, self.plan, stream, everyone)
        self.clients = [Client(*given, self.plan, stream) for _ in range(count)]
        for number, one in enumerate(own):
            self.clients[number] = replace(
                self.clients[number], signing_key=one.signing_key, roster=one.roster
            )

    @property
    def stages(self) -> tuple[str, ...]:
        return SIGNED if self.signed else STAGES

    def answer(self, stage: str, number: int, message: Record) -> Record:
        """One client's stage, in a process that knows only its state."""
        state, _ = through_flower(self.states.get(number, {}))
        more = (self.values[number],) if stage == "mask" else ()
        reply: Record
        reply, self.states[number] = getattr(self.clients[number], stage)(message, state, *more)
        return reply

    def stage(self, stage: str, lost: Iterable[int] = (), lie: Lie | None = None) -> None:
        """One stage to all that are asked; lost replies never come, and lies are caught or believed."""
        self.sent[stage], self.seen[stage] = getattr(self.server, stage)(), {}
        for number, message in self.sent[stage].items():
            if number in set(lost):
                continue
            arrived, size = through_flower(message)
            self.bytes_down += size
            reply = self.answer(stage, number, arrived)
            reply, size = through_flower(lie(stage, number, reply) if lie else reply)
            self.bytes_up += size
            try:
                self.server.take(number, reply)
                self.seen[stage][number] = reply
            except DecodeError:
                assert lie is not None

    def run(self, lost: dict[str, set[int]] | None = None, lie: Lie | None = None) -> NDArray[np.uint32]:
        gone: set[int] = set()
        for stage in self.stages:
            gone |= (lost or {}).get(stage, set())
            self.stage(stage, gone, lie)
        return self.server.total()

    def sum(self, numbers: Iterable[int]) -> NDArray[np.uint32]:
        total: NDArray[np.uint64] = self.values[list(numbers)].sum(0, dtype=np.uint64)
        return (total % np.uint64(self.modulus)).astype(np.uint32)


def reach(
    stage: str, count: int = 6, lost: dict[str, set[int]] | None = None, signed: bool = False
) -> tuple[Round, dict[int, Record]]:
    """A round whose clients are about to answer this stage, and the messages to them."""
    one = Round(vectors(count, 10, 2560), 2560, signed=signed)
    gone: set[int] = set()
    for before in one.stages[: one.stages.index(stage)]:
        gone |= (lost or {}).get(before, set())
        one.stage(before, gone)
    return one, getattr(one.server, stage)()
