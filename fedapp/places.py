"""Which node holds which partition: at the start of a run, and from each of its rounds on.

A node that comes later takes a partition that has no node now: one that nobody has held yet, or the one that
it tells, as a participant does that comes back under another key. Between rounds it is asked, and its answer
looked for; no round waits for that, nor for what it then counts of its data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import NamedTuple

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from flwr.supercore import log

from fedapp.engine.grid import answer, push
from fedapp.engine.local import LocalGrid
from fedapp.errors import FedappError
from fedapp.facts import Facts
from fedapp.job import Job
from fedapp.nodes import (
    check_questions,
    checks,
    counts_in,
    facts,
    facts_in,
    facts_questions,
    held_by,
    partitions,
    question,
)
from fedapp.replies import refuse


class Taken(NamedTuple):
    """A partition that another node holds from now on; `left` held it before, None: nobody did.

    own: the node brings its own data, which may have had another place in this run.
    """

    partition: int
    left: int | None
    own: bool


@dataclass
class Late:
    """What a node that came later has told: the partition that it holds, and what selection asks."""

    holds: int | None = None
    facts: Facts | None = None


class Places:
    """The nodes of a run, and where each of them is.

    nodes: by partition, in this order, since a node's id is random. partitions: by node; with those that have
    left, for what they were asked may end after that. facts: by partition, nothing where there is no node.
    checks: what each node has told of its data's quality, nobody's name in it.
    """

    def __init__(self, job: Job, grid: Grid, first: int) -> None:
        """Waits for the nodes, and asks them before round `first`, with which this run begins, or goes on.

        Raises FedappError where they are too few, or do not fit.
        """
        self._job, self._grid = job, grid
        self.partitions = partitions(grid, job, first)
        self.nodes = dict(sorted((held, node) for node, held in self.partitions.items()))
        told = facts(grid, job, self.partitions, first)
        at = map(self.nodes.get, range(job.clients))
        self.facts = [Facts() if node is None else told.get(node, Facts()) for node in at]
        self.checks = checks(grid, job, self.nodes.values(), first)
        self._late, self._open = dict[int, Late](), dict[str, Message]()  # by node; questions, by message id
        self._unchecked = dict[str, Message]()  # as well, to nodes that have joined

    @property
    def held(self) -> Mapping[int, int]:
        """The partition of each node that holds one now."""
        return {node: partition for partition, node in self.nodes.items()}

    def of(self, message: Message) -> int:
        """The partition that a message goes to or comes from."""
        ends = message.metadata.dst_node_id, message.metadata.src_node_id
        return next(self.partitions[node] for node in ends if node in self.partitions)

    def look(self, number: int) -> list[Taken]:
        """Seat the nodes that have come: one request where all are there, two or three where some are not."""
        if isinstance(self._grid, LocalGrid):
            return []
        here = set(self._grid.get_node_ids())
        empty = {place for place in range(self._job.clients) if self.nodes.get(place) not in here}
        self.hear_checks()
        if not empty:
            return []
        self._late = {node: late for node, late in self._late.items() if node in here}
        self._ask(number, sorted(here - self._late.keys() - set(self.nodes.values())))
        self._hear(empty)
        taken = [self._seat(number, place, node) for place, node in self._fitting(empty)]
        self.nodes = dict(sorted(self.nodes.items()))
        return taken

    def _ask(self, number: int, nodes: list[int]) -> None:
        """Ask nodes what they hold, once while they stay, and for facts where the run's selection does."""
        asked = [Message(question(number), node, MessageType.QUERY) for node in nodes]
        if self._job.selection.asks:
            asked += facts_questions(self._job, nodes, number)
        self._open |= self._pushed(asked)
        self._late |= {node: Late(facts=None if self._job.selection.asks else Facts()) for node in nodes}

    def _pushed(self, asked: list[Message]) -> dict[str, Message]:
        """Ask what is answered some rounds later; returns the questions by their ids."""
        for message in asked:
            message.metadata.ttl = self._job.round_timeout
        return push(self._grid, asked) if asked else {}

    def hear_checks(self) -> None:
        """Take what nodes that have joined have counted by now."""
        for reply in self._grid.pull_messages(self._unchecked.keys()) if self._unchecked else ():
            asked = self._unchecked.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None and (counts := counts_in(answer(asked, reply))):
                self.checks.append(counts)

    def _hear(self, empty: set[int]) -> None:
        """Take the answers that are there. Who sends an error, as another fedapp does, stands by."""
        for reply in self._grid.pull_messages(self._open.keys()) if self._open else ():
            asked = self._open.pop(reply.metadata.reply_to_message_id, None)
            late = None if asked is None else self._late.get(asked.metadata.dst_node_id)
            if asked is None or late is None:
                continue
            reply = answer(asked, reply)
            if asked.metadata.message_type != MessageType.QUERY:
                late.facts = facts_in(reply, self._job.task.classes)
            elif reply.has_error():
                refuse(reply, FedappError(reply.error.reason))
            else:
                late.holds = held_by(reply)
                if late.holds not in empty and late.holds >= 0:
                    said = "node %s stands by: partition %s has a node, or is none of clients=%s"
                    log(WARNING, said, asked.metadata.dst_node_id, late.holds, self._job.clients)

    def _fitting(self, empty: set[int]) -> list[tuple[int, int]]:
        """Which late node takes which empty place: the one it tells, or the first that nobody has held."""
        found, own = dict[int, int](), list[int]()
        for node, late in sorted(self._late.items()):
            if late.holds is None or late.facts is None:
                continue
            if late.holds in empty:
                found.setdefault(late.holds, node)
            elif late.holds < 0:
                own.append(node)
        fresh = sorted(empty - self.nodes.keys() - found.keys())
        return sorted((found | dict(zip(fresh, own, strict=False))).items())

    def _seat(self, number: int, place: int, node: int) -> Taken:
        late, left = self._late.pop(node), self.nodes.get(place)
        self.nodes[place] = node
        self.partitions[node] = place
        self.facts[place] = late.facts or Facts()
        as_new = "joins" if left is None else f"takes over from node {left}, which has left,"
        log(WARNING, "round %s: node %s %s with partition %s", number, node, as_new, place)
        # Not before: who stands by need not tell.
        self._unchecked |= self._pushed(check_questions(self._job, [node], number))
        return Taken(place, left, own=late.holds is not None and late.holds < 0)
