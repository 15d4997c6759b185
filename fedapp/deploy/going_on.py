"""Runs that a server's end broke off, taken up again when it is back."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.common.constant import Status
from flwr.proto.control_pb2 import StopRunRequest

from fedapp.deploy.control import Access
from fedapp.deploy.following import of
from fedapp.deploy.starting import experiment, go_on, overrides_of
from fedapp.errors import ConfigError, FedappError
from fedapp.report.folder import alone

_MOST = 3  # times that one experiment is taken up again by itself: what fails each time is left to people
_FREE_S = 60.0  # for the processes of a server that was killed to be gone
_log = logging.getLogger("fedapp.server")


def take_up(at: Access, runs: Path) -> None:
    """Submit a run for each that was broken off; it goes on from its last checkpoint, in the same folder.

    Those who watch the old run are led on to the new one. What cannot be taken up is logged.
    """
    for folder in broken_off(runs):
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
                    own = experiment(run.run_id, overrides_of(run)) == first.run_id
                    if own and run.status.status != Status.FINISHED:
                        client.StopRun(StopRunRequest(run_id=run.run_id))
        except (FedappError, IndexError) as error:
            _log.error(
                "run %s cannot be taken up again (%s): fedapp runs resume %s",
                *(folder.name, error, folder.name),
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


def _wait(folder: Path) -> None:
    """Until no process holds the folder; raises ConfigError where one goes on holding it."""
    deadline = time.monotonic() + _FREE_S
    while True:
        try:
            with alone(folder):
                return
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
