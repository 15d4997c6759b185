"""How much each client is asked to do: all of it, or what it can do before a deadline.

server:  seconds of earlier rounds -> the part that fits into the deadline -> the train message
client:  that part of its steps -> the update scaled to all of them -> codec at that part of its rate
server:  mean of these, times the mean part

Clients that do less would pull less, and the model would go where fast clients want it. So an update counts
as far as all of its client's steps would have gone, and the mean is as long as that of what was really done:
Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated optimization"
(FedNova), with the steps of a client's whole work as the unit, so that without slow clients it is FedAvg.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, MetricRecord

from fedapp import check
from fedapp.codec import Codec
from fedapp.codec.chain import ErrorFeedback
from fedapp.codec.rate_distortion import RateDistortion
from fedapp.records import CONFIG, METRICS, brought_by, record_in, told_each

SECONDS = "seconds"  # what a client says that its training took


def _check_shares(of: "Part | Deadline", called: str) -> None:
    for field in fields(of):
        check.real(f"{called}{field.name}", getattr(of, field.name), above=0.0, high=1.0)


@dataclass(frozen=True)
class Part:
    """What a client is asked for, as shares in (0, 1] of what its own settings say.

    work: of its epochs' examples. batch: of its batch size. rate: of `codec.rate`.
    """

    work: float = 1.0
    batch: float = 1.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(self, "the assigned ")

    @property
    def steps(self) -> float:
        """Of all steps of the whole work, how many these are, about."""
        return min(1.0, self.work / self.batch)

    def thinned(self, codec: Codec) -> Codec:
        """The codec at this share of its rate; one that aims at no rate as it is. It decodes the same."""
        if isinstance(codec, ErrorFeedback):
            return replace(codec, codec=self.thinned(codec.codec))
        if isinstance(codec, RateDistortion) and codec.step is None and codec.nmse is None:
            return replace(codec, rate=codec.rate * self.rate)
        return codec


WHOLE = Part()


def part_in(message: Message) -> Part:
    """What a train message asks for; raises ConfigError for shares that are none."""
    told: Mapping[str, Any] = record_in(message.content, CONFIG, ConfigRecord) or {}
    return Part(**{field.name: told[field.name] for field in fields(Part) if field.name in told})


@dataclass(frozen=True)
class Whole:
    """All clients are asked for all of their work."""


class Took(NamedTuple):
    """Seconds that all of a client's work would take, and sending its update at the full rate."""

    work: float
    send: float


@dataclass(frozen=True)
class Deadline:
    """As much as fits: work and rate shrink for those clients to which `margin` of the deadline is too short.

    Training leaves sending the time that it needs, and the other way round, up to half of the time each. A
    client that nobody has timed does `first` of the work. No share is less than `least`. Batches shrink
    to the share `batch` at most, before there are fewer steps.
    """

    margin: float = 0.9
    first: float = 0.1
    least: float = 0.02
    batch: float = 1.0

    def __post_init__(self) -> None:
        _check_shares(self, "assignment.")

    def part(self, took: Took | None, deadline: float) -> Part:
        """What to ask of a client that took so long."""
        if took is None:
            return self._with_batch(self.first, 1.0)
        time = self.margin * deadline
        training = min(took.work, max(time / 2, time - took.send))
        sending = min(took.send, time - training)
        return self._with_batch(self._share(training, took.work), self._share(sending, took.send))

    def _share(self, has: float, needs: float) -> float:
        return max(self.least, has / needs) if has < needs else 1.0

    def _with_batch(self, work: float, rate: float) -> Part:
        return Part(work, max(work, self.batch), rate)


class Workloads:
    """What the server knows of its nodes' speeds, and what it asks of each in this round."""

    def __init__(self, rule: Deadline, deadline: float) -> None:
        self._rule, self._deadline = rule, deadline
        self._took = dict[int, Took]()  # by node
        self._asked = dict[int, Part]()
        self._silent = set[int]()

    def tell(self, messages: list[Message]) -> list[Message]:
        """The messages, each of which says what its node is to do; those that say the same share it."""
        nodes = [message.metadata.dst_node_id for message in messages]
        self._asked = {node: self._rule.part(self._took.get(node), self._deadline) for node in nodes}
        self._silent = set(nodes)
        return told_each(messages, lambda node: vars(self._asked[node]))

    def hear(self, reply: Message, elapsed: float) -> None:
        """A reply is there, so many seconds after its message was sent.

        What of them the client says was training counts as that, the rest as sending. One that does not say,
        as its policy may have it, trained all the time.
        """
        node = reply.metadata.src_node_id
        self._silent.discard(node)
        metrics = brought_by(reply, METRICS, MetricRecord)
        if metrics is None or node not in self._asked:
            return
        said, part = metrics.get(SECONDS), self._asked[node]
        work = min(said, elapsed) if isinstance(said, float) and said >= 0 else elapsed
        self._took[node] = Took(work / part.work, (elapsed - work) / part.rate)

    def end(self, elapsed: float) -> None:
        """Nobody waits any longer. Who missed the deadline is asked for less than half of both next time."""
        for node in self._silent if elapsed >= self._deadline else ():
            part = self._asked[node]
            self._took[node] = Took(self._deadline / part.work, self._deadline / part.rate)

    def pace(self, weights: Mapping[int, int]) -> float:
        """The mean part of their steps that nodes of these weights did."""
        done = sum(weight * self._asked[node].steps for node, weight in weights.items())
        return done / sum(weights.values())

    def state(self, partitions: Mapping[int, int]) -> list[list[float]]:
        """All that the next round depends on, by partition."""
        return [[partitions[node], *took] for node, took in self._took.items() if node in partitions]

    def restore(self, state: list[list[float]], nodes: Mapping[int, int]) -> None:
        """Go on from what `state` returned; `nodes` by partition, without those to be timed anew."""
        self._took = {nodes[int(p)]: Took(work, send) for p, work, send in state if p in nodes}
