"""Runs that a server's end broke off, taken up again when it is back."""

import logging
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from flwr.common.constant import Status
from flwr.proto.control_pb2 import StopRunRequest
from flwr.supercore.run import Run

from fedapp.deploy.control import Access
from fedapp.deploy.following import of
from fedapp.deploy.starting import experiment, go_on, overrides_of
from fedapp.errors import ConfigError, FedappError
from fedapp.report.folder import alone

_MOST = 3  # times that one experiment is taken up again by itself: what fails each time is left to people
_LOOKED_AT = 1000  # runs, the newest
_FREE_S = 60.0  # for the processes of a server that was killed to be gone
SILENT = "No heartbeat received from the task"  # what Flower says of a process that is gone
_log = logging.getLogger("fedapp.server")


def take_up(at: Access, runs: Path, since: datetime) -> None:
    """Submit a run for each that was broken off; it goes on from its last checkpoint, in the same folder.

    `since`: when this server began. Those who watch the old run are led on to the new one. What cannot be
    taken up is logged.
    """
    try:
        left = list(broken_off(of(at, most=_LOOKED_AT), runs, since))
    except FedappError as error:
        _log.error("what was broken off is not known (%s): fedapp runs list, fedapp runs resume RUN", error)
        return
    for number in left:
        try:
            _wait(runs / str(number))
            _take_up(at, number)
        except FedappError as error:
            _log.error("run %d cannot be taken up again (%s): fedapp runs resume %d", number, error, number)


def broken_off(known: Iterable[Run], runs: Path, since: datetime) -> Iterator[int]:
    """The experiments whose processes a server's end took along; one that ended, or was stopped, is none.

    `known` runs, the newest first. One that had no process yet needs nothing: Flower starts it.
    """
    tried = dict[int, list[Run]]()
    for run in known:
        tried.setdefault(_origin(run), []).append(run)
    for number, (newest, *before) in tried.items():
        ended = (runs / str(number) / "summary.json").exists()
        if not ended and _cut_short(newest, since) and len(before) < _MOST:
            yield number


def _take_up(at: Access, number: int) -> None:
    (first,), known = of(at, number), of(at, most=_LOOKED_AT)
    with at.control() as client:
        new = go_on(client, first)
        _log.warning("run %d goes on as run %d", number, new)
        for run in known:
            if _origin(run) == number and run.status.status != Status.FINISHED:
                client.StopRun(StopRunRequest(run_id=run.run_id))


def _cut_short(run: Run, since: datetime) -> bool:
    """Whether a run had a process that is gone, which Flower notices a minute later."""
    if run.status.status == Status.FINISHED:
        return run.status.details == SILENT
    return run.status.status == Status.RUNNING and datetime.fromisoformat(run.running_at) < since


def _origin(run: Run) -> int:
    """The number of the run that this one's experiment began with."""
    return experiment(run.run_id, overrides_of(run))


def _wait(folder: Path) -> None:
    """Until no process holds the folder; raises ConfigError where one goes on holding it."""
    deadline = time.monotonic() + _FREE_S
    while folder.exists():
        try:
            with alone(folder):
                return
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
