"""The nodes of a run: which partition each holds, and what it tells."""

import time
from collections.abc import Iterable, Mapping
from logging import WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedapp.engine.grid import stream
from fedapp.engine.local import LocalGrid
from fedapp.errors import FedappError
from fedapp.facts import ASKS, Facts, read, simulated
from fedapp.job import Job
from fedapp.records import CONFIG, ROUND, brought_by, config_record
from fedapp.replies import refuse
from fedapp.selection import Tags
from fedapp.tasks.folders import ImageFolder
from fedapp.tasks.quality import COUNTS, of_data
from fedapp.tasks.stream import reader_of
from fedapp.tasks.tables import Csv

OWN = -1
"""What a node that brings its own data says for a partition."""


def question(at: int) -> RecordDict:
    """What a node is asked before round `at`. It goes on from what it kept of the rounds before that one."""
    return RecordDict({CONFIG: ConfigRecord({ROUND: at})})


def partitions(grid: Grid, job: Job, at: int) -> dict[int, int]:
    """Which partition each node holds; waits until as many nodes are there as a run begins with, asks them.

    `at` is the round that the run begins with. Nodes beyond `clients` are left out: noise and cohorts are
    set for so many.
    """
    if isinstance(grid, LocalGrid):
        return grid.partitions
    clients, nodes = job.clients, _there(grid, job)
    asked = [Message(question(at), node, MessageType.QUERY) for node in nodes]
    replies = stream(grid, asked, job.round_timeout)
    found = {reply.metadata.src_node_id: held_by(reply) for reply in replies}
    told = [p for p in found.values() if p >= 0]
    taken = set(told)
    if len(taken) < len(told):
        raise FedappError(
            f"two nodes hold the same partition ({sorted(told)}): give each its own partition-id"
        )
    if taken and max(taken) >= clients:
        raise FedappError(
            f"a node holds partition {max(taken)}, and clients={clients} hold 0 to {clients - 1}: "
            f"set clients={max(taken) + 1}, or start fewer nodes"
        )
    free = (p for p in range(max(clients, len(nodes))) if p not in taken)
    held = {node: next(free) if found.get(node, OWN) < 0 else found[node] for node in nodes}
    if len(held) > clients:
        log(WARNING, "%s nodes are there, and clients=%s of them take part", len(held), clients)
    return {node: partition for node, partition in held.items() if partition < clients}


def _there(grid: Grid, job: Job) -> list[int]:
    """The nodes that a run begins with; waits for them, and raises FedappError where they do not come."""
    timeout, wanted = job.round_timeout, job.begin_with or job.clients
    key = "clients" if job.begin_with is None else "begin_with"
    deadline, seen = time.monotonic() + timeout, -1
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline:
            raise FedappError(
                f"{len(nodes)} of {key}={wanted} nodes came within round_timeout={timeout:g} s: "
                f"start more nodes, or set {key}={max(1, len(nodes))}"
            )
        if len(nodes) != seen:  # at the first look, and at each arrival
            seen = len(nodes)
            log(WARNING, "waiting up to %g s for nodes: %s of %s=%s are there", timeout, seen, key, wanted)
        time.sleep(0.2)
    return nodes


def held_by(reply: Message) -> int:
    """The partition that a node says it holds; of any other answer: it brings its own data."""
    config = brought_by(reply, CONFIG, ConfigRecord)
    said = None if config is None else config.get("partition-id")
    return said if isinstance(said, int) else OWN


def facts(grid: Grid, job: Job, partitions: Mapping[int, int], at: int) -> dict[int, Facts]:
    """What each node tells, before round `at`, of what the run's selection asks."""
    asked, classes = job.selection.asks, job.task.classes
    if not asked:
        return {}
    if isinstance(grid, LocalGrid):
        sizes = [len(part) for part in job.task.partitions()]
        given = job.selection.given if isinstance(job.selection, Tags) else ()
        here = simulated(sizes, lambda: job.task.label_counts().tolist(), job.speed, asked, given)
        return {node: here[partition] for node, partition in partitions.items()}
    replies = stream(grid, facts_questions(job, partitions, at), job.round_timeout)
    return {reply.metadata.src_node_id: facts_in(reply, classes) for reply in replies}


def facts_questions(job: Job, nodes: Iterable[int], at: int) -> list[Message]:
    """What nodes are asked of themselves before round `at`."""
    content = question(at)
    config_record(content)[ASKS] = list(job.selection.asks)
    return [Message(content, node, f"{MessageType.QUERY}.facts") for node in nodes]


def facts_in(reply: Message, classes: int) -> Facts:
    """What a node told; nothing where its answer is none of ours."""
    try:
        return read(config_record(reply.content), classes)
    except Exception as error:  # hostile bytes may reach any line
        refuse(reply, error)
        return Facts()


def checks(grid: Grid, job: Job, nodes: Iterable[int], at: int) -> list[dict[str, int]]:
    """What each client tells of its data's quality before round `at`; simulated ones, unasked, all.

    Nothing under privacy, of nodes whose policy lets nothing out, and of data that come with a task. These
    messages are not among the bytes of rounds.
    """
    if isinstance(grid, LocalGrid):
        task = _checked(job)
        parts = ({"partition-id": i, "num-partitions": job.clients} for i in grid.partitions.values())
        return [dict(of_data(job.task.client_data(p), task.labels).counts) for p in parts] if task else []
    replies = stream(grid, check_questions(job, nodes, at), job.round_timeout)
    return [counts for reply in replies if (counts := counts_in(reply))]


def check_questions(job: Job, nodes: Iterable[int], at: int) -> list[Message]:
    """What nodes are asked of their data's quality before round `at`; nothing where none is to tell."""
    if _checked(job) is None:
        return []
    return [Message(question(at), node, f"{MessageType.QUERY}.check") for node in nodes]


def counts_in(reply: Message) -> dict[str, int]:
    """What a node told of its data's quality; nothing where its answer is none of ours."""
    told = brought_by(reply, CONFIG, ConfigRecord)
    said = dict(told or ConfigRecord())
    return {name: n for name in COUNTS if isinstance(n := said.get(name), int) and 0 <= n < 2**53}


def _checked(job: Job) -> Csv | ImageFolder | None:
    """The task whose data a check is of, if there is one that may tell."""
    task = reader_of(job.task)
    return task if job.privacy.unit is None and isinstance(task, (Csv, ImageFolder)) else None
