"""`fedapp runs`: what runs on a server, what it says, how it ends or goes on; run folders, brought here."""

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import httpx
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, StopRunRequest, StreamLogsRequest
from flwr.supercore.run import Run

from fedapp.deploy.control import Access, access, arguments
from fedapp.deploy.starting import experiment, go_on, overrides_of
from fedapp.errors import FedappError

_PATIENCE = 120.0  # seconds that a server may be away while its run is watched
_SHOWN = 20  # runs of a list


def main(given: Sequence[str]) -> None:
    """List, watch, fetch or stop runs. Raises FedappError."""
    options = _parser().parse_args(given)
    at = access(options)
    if options.command == "list":
        _list(at)
    elif options.command == "stop":
        print(f"run {options.run} {_stop(at, options.run)}")
    elif options.command == "resume":
        with at.control() as client:
            number = go_on(client, of(at, options.run)[0])
        print(f"run {number} goes on with it", file=sys.stderr)
        watch(at, number, options.into)
    elif options.command == "fetch":
        fetch(at, options.run, options.into)
    else:
        watch(at, options.run, options.into)


def _stop(at: Access, number: int) -> str:
    """Stop a run; returns what to say of it, which may have ended by itself."""
    with at.control() as client:
        try:
            if client.StopRun(StopRunRequest(run_id=number)).success:
                return "is stopped"
        except FedappError:
            (run,) = of(at, number)  # raises where there is none
            if run.status.status != Status.FINISHED:
                raise
            return f"was over already: {run.status.sub_status}"
    return "was over already"


def watch(at: Access, number: int, into: Path | None) -> None:
    """Print what a run says until it ends, then bring its folder. Ctrl-C ends the watching, not the run.

    Raises FedappError where the run failed, was stopped, or cannot be reached any more.
    """
    try:
        run = _followed(at, number)
    except KeyboardInterrupt:
        print(
            f"\nrun {number} goes on: `fedapp runs watch {number}` shows it again, "
            f"`fedapp runs stop {number}` ends it",
            file=sys.stderr,
        )
        raise
    if run.status.sub_status != SubStatus.COMPLETED:
        raise FedappError(f"run {number} {run.status.sub_status}: {run.status.details or 'its log says why'}")
    fetch(at, number, into)


def fetch(at: Access, number: int, into: Path | None) -> None:
    """Bring the folder that a run leaves; into runs/<number>, if not said otherwise."""
    into = into or Path("runs") / str(number)
    if into.exists() and any(into.iterdir()):
        raise FedappError(f"{into} is not empty: name another folder with --into")
    at.fetch(number, into)
    print(f"Run folder: {into}")


def of(at: Access, number: int | None = None, most: int = _SHOWN) -> list[Run]:
    """The runs of a server, the newest first, or the one asked for. Raises FedappError."""
    request = ListRunsRequest(run_id=number) if number is not None else ListRunsRequest(limit=most)
    with at.control() as client:
        found = [run_from_proto(one) for one in client.ListRuns(request).run_dict.values()]
    return sorted(found, key=lambda run: run.pending_at, reverse=True)


def _followed(at: Access, number: int) -> Run:
    """Print a run's log as it grows; returns what is known of the run when it is over."""
    after, lost = 0.0, None
    while True:
        try:
            with at.control() as client:
                for said in client.StreamLogs(StreamLogsRequest(run_id=number, after_timestamp=after)):
                    print(said.log_output, end="", flush=True)
                    after = max(after, said.latest_timestamp)
            run = of(at, number)[0]
            lost = None
            if run.status.status == Status.FINISHED:
                if run.status.sub_status == SubStatus.COMPLETED or (later := _later(at, run)) is None:
                    return run
                print(f"run {later.run_id} goes on with it", file=sys.stderr)
                number, after = later.run_id, 0.0
        except (FedappError, httpx.TransportError) as error:  # the second in the midst of an answer
            lost = lost or time.monotonic()
            if time.monotonic() > lost + _PATIENCE:
                raise FedappError(f"run {number} cannot be followed any more: {error}") from error
        time.sleep(0.2 if lost is None else 2.0)


def _later(at: Access, run: Run) -> Run | None:
    """The newest run that goes on with this one's experiment; None if this one is it."""
    own = experiment(run.run_id, overrides_of(run))
    newest = next((one for one in of(at) if experiment(one.run_id, overrides_of(one)) == own), run)
    return None if newest.run_id == run.run_id else newest


def _list(at: Access) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "status", "begun", "took", "settings")
    for run in of(at):
        table.add_row(
            str(run.run_id),
            run.status.sub_status or run.status.status,
            run.running_at[:19].replace("T", " ") or "-",
            _took(run),
            overrides_of(run),
        )
    Console().print(table if table.row_count else "no runs yet: `fedapp submit` starts one")


def _took(run: Run) -> str:
    if not run.running_at:
        return "-"
    begun = datetime.fromisoformat(run.running_at)
    ended = datetime.fromisoformat(run.finished_at) if run.finished_at else datetime.now(begun.tzinfo)
    return f"{(ended - begun).total_seconds():.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedapp runs", description="Follow what runs on a server.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in {
        "list": f"the last {_SHOWN} runs",
        "watch": "print what a run says until it ends, then bring its folder",
        "fetch": "bring the folder of a run",
        "stop": "end a run",
        "resume": "go on with a run that was stopped or failed, from its last checkpoint",
    }.items():
        command = commands.add_parser(name, help=does, description=does)
        if name != "list":
            command.add_argument("run", type=int, metavar="RUN", help="its number")
        if name in ("watch", "fetch", "resume"):
            command.add_argument("--into", type=Path, metavar="DIR", help="the folder to make (runs/RUN)")
        arguments(command)
    return parser
