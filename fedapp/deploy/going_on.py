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
_FREE_S = 60.0  # for the processes of a server that was killed to be gone
SILENT = "No heartbeat received from the task"  # what Flower says of a process that is gone
_log = logging.getLogger("fedapp.server")


def take_up(at: Access, runs: Path, since: datetime) -> None:
    """Submit a run for each that was broken off; it goes on from its last checkpoint, in the same folder.

    `since`: when this server began. Those who watch the old run are led on to the new one. What cannot be
    taken up is logged.
    """
    try:
        folders = [*broken_off(runs), *(runs / str(number) for number in unbegun(of(at), runs, since))]
    except FedappError as error:
        _log.error("what was broken off is not known (%s): fedapp runs list, fedapp runs resume RUN", error)
        return
    for folder in folders:
        _take_up(at, folder)


def _take_up(at: Access, folder: Path) -> None:
    try:
        _wait(folder)
        known = of(at)
        first = (
            next((run for run in known if run.run_id == int(folder.name)), None)
            or of(at, int(folder.name))[0]
        )
        with at.control() as client:
            new = go_on(client, first)
            _log.warning("run %s goes on as run %d", folder.name, new)
            for run in known:
                if _origin(run) == first.run_id and run.status.status != Status.FINISHED:
                    client.StopRun(StopRunRequest(run_id=run.run_id))
    except (FedappError, IndexError) as error:
        _log.error(
            "run %s cannot be taken up again (%s): fedapp runs resume %s", folder.name, error, folder.name
        )


def broken_off(runs: Path) -> Iterator[Path]:
    """The folders of runs that began and neither ended nor were stopped: then there would be a summary."""
    for folder in sorted(runs.iterdir()):
        if folder.is_symlink() or not folder.name.isdecimal():
            continue
        begun, ended = (folder / "config.yaml").exists(), (folder / "summary.json").exists()
        later = sum(link.is_symlink() and link.resolve() == folder.resolve() for link in runs.iterdir())
        if begun and not ended and later < _MOST:
            yield folder


def unbegun(known: Iterable[Run], runs: Path, since: datetime) -> Iterator[int]:
    """The experiments whose processes a server's end took along before they had written their settings.

    `known` runs, the newest first, of which those that are `since` then are this server's. A run that had no
    process yet needs nothing: it gets one.
    """
    tried = dict[int, list[Run]]()
    for run in known:
        tried.setdefault(_origin(run), []).append(run)
    for number, (newest, *before) in tried.items():
        begun = (runs / str(number) / "config.yaml").exists()
        if not begun and _cut_short(newest, since) and len(before) < _MOST:
            yield number


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
