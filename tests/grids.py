"""Grids for tests, and whole runs on them."""

import io
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from rich.console import Console

from fedapp import config
from fedapp.client_app import local_app
from fedapp.engine.local import Local, LocalGrid
from fedapp.job import Job
from fedapp.report.folder import Round
from fedapp.report.progress import Progress
from fedapp.rounds import Federation


class Elsewhere(Grid):
    """A grid of other nodes: ids of its own, in no order, in this process; it answers one message a pull."""

    def __init__(self, app: ClientApp, ids: list[int]) -> None:
        LocalGrid(app, [1], workers=0)  # sets the identity that messages are made with
        self._app, self._waiting = app, list[Message]()
        self._contexts = {
            node: Context(1, node, {"partition-id": i, "num-partitions": len(ids)}, RecordDict(), {})
            for i, node in enumerate(ids)
        }

    def get_node_ids(self) -> Iterable[int]:
        return reversed(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        for message in pushed:
            message.metadata.__dict__["_message_id"] = os.urandom(8).hex()
        self._waiting += pushed
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message = self._waiting.pop()
        return [self._app(message, self._contexts[message.metadata.dst_node_id])]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError


class Forgetful(Elsewhere):
    """A grid the nodes of which start anew before every third message."""

    pulled = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulled += 1
        if self.pulled % 3 == 0:
            self._contexts[self._waiting[-1].metadata.dst_node_id].state = RecordDict()
        return super().pull_messages(message_ids)


def local(job: Job) -> Local:
    """The local engine of a job that has no other."""
    assert isinstance(job.engine, Local)
    return job.engine


def rounds_on(job: Job, grid: Grid) -> tuple[Federation, list[Round]]:
    """All rounds of a job, told to nobody."""
    federation = Federation(job, grid)
    return federation, all_of(federation)


def all_of(federation: Federation) -> list[Round]:
    """The rounds that are left, told to nobody."""
    quiet = Progress(Console(file=io.StringIO()), federation.job.rounds)
    return [record for records in federation.run(quiet) for record in records]


def rounds_here(job: Job, app: Any = None, fold: bool = True) -> tuple[Federation, list[Round]]:
    """The same on the local engine; where `fold`, workers add up what they can, as in a run."""
    job.prepare()
    sizes, app = [len(part) for part in job.task.partitions()], app or local_app(job)
    fold_of = job.fold if fold else None
    with local(job).grid(app, sizes, job.at_once, fold_of, seconds=job.seconds, sending=job.sending) as grid:
        return rounds_on(job, grid)


def bits(arrays: ArrayRecord) -> bytes:
    """All values of a model."""
    return b"".join(array.data for array in arrays.values())


@cache
def model_of(overrides: str) -> bytes:
    """The model that a run of these settings on the local engine ends with."""
    return bits(rounds_here(config.job(config.compose(overrides)))[0].arrays)
