"""The Flower ServerApp, and the run around the rounds: from settings to a run folder."""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fedapp import combinations, config
from fedapp.checkpoint import BEGUN, CLIENTS, Checkpoints
from fedapp.client_app import local_app, remote_app
from fedapp.codec.chain import ErrorFeedback
from fedapp.engine.flower import Flower
from fedapp.engine.local import Local, LocalGrid
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.outcome import Took, charged, summary_of
from fedapp.privacy.begun import Begun
from fedapp.report.folder import RunFolder, alone
from fedapp.report.page import write_page
from fedapp.report.progress import Progress
from fedapp.report.summary import Summary, table
from fedapp.report.trace import trace_json
from fedapp.resume import Start, start
from fedapp.rounds import Federation
from fedapp.stages import CLOCK, MOST

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry in its own runtimes: compose the override string, run on the grid given."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # as in client_app: their number changes the last bits
    tree = config.compose(str(context.run_config["overrides"])).copy()
    tree.choices.engine = "flower"  # whatever was chosen, this grid is Flower's
    place = _placed(tree, context.run_id)
    if place is not None:
        from fedapp.deploy.grid import few_requests  # seconds of imports, which a simulation does without

        grid = few_requests(grid)
    with start(tree, Path(tree.run_dir)) as begin:
        if place is not None and place != begin.path:  # a run that goes on is found under both ids
            place.symlink_to(begin.path)
        job = config.job(begin.tree)
        combinations.check_clock(job, simulated=False)
        combinations.check_roster(job, simulated=False)
        job.prepare()
        folder = RunFolder(begin.path, begin.again)
        CLOCK.begin(job.profile)
        run(job, begin.tree, grid, folder, Console(), started, begin)
        folder.clear()


def _served() -> bool:
    """Whether `fedapp server` has started this, whose clients keep on their disks what they go on with."""
    return "FEDAPP_RUNS" in os.environ


def _placed(tree: DictConfig, run_id: int) -> Path | None:
    """On a server with a place for run folders, that is where they are, whatever was asked for.

    There `resume` names an earlier run by its id; one that had written nothing yet begins now, in its place.
    Raises ConfigError where it names anything else.
    """
    if not _served():
        return None
    runs = Path(os.environ["FEDAPP_RUNS"])
    tree.run_dir = str(runs / str(run_id))
    if tree.resume is not None:
        if not str(tree.resume).isdecimal():
            raise ConfigError(
                f"resume={tree.resume} is no run id: on a server, name an earlier run by its id"
            )
        earlier = (runs / str(tree.resume)).resolve()
        begun = (earlier / "config.yaml").exists()
        tree.run_dir, tree.resume = (tree.run_dir, str(earlier)) if begun else (str(earlier), None)
    return runs / str(run_id)


def simulate(
    tree: DictConfig, path: Path, console: Console, started: float, overrides: Iterable[str] = ()
) -> Summary:
    """The run that this process leads: the same app over the engine that was chosen.

    `overrides` are those that made the tree: to a run that goes on they may say nothing new.
    """
    with start(tree, path, overrides) as begin:
        job = config.job(begin.tree)
        local = isinstance(job.engine, Local)
        if (job.choices["engine"] == "local") != local:
            raise ConfigError(f"the run in {begin.path} was started by `flwr run`: resume it in the same way")
        combinations.check_clock(job, simulated=local)
        combinations.check_roster(job, simulated=local)
        with ThreadPoolExecutor(1) as beside:  # each takes seconds, of a core of its own
            prepared = beside.submit(job.prepare)
            counts = _load(job)
            prepared.result()
        folder = RunFolder(begin.path, begin.again)
        CLOCK.begin(job.profile)  # workers, which are forked now, do as this process
        with _grid(job, begin, folder) as grid:
            folder.write_split(counts)
            summary = run(job, begin.tree, grid, folder, console, started, begin)
        folder.clear()
    return summary


def _load(job: Job) -> list[list[int]]:
    """Load what all workers train and test on, before they are forked; returns the split's label counts."""
    if job.evaluate == "server":
        job.task.test_data()
    return cast(list[list[int]], job.task.label_counts().tolist())


def _grid(job: Job, begin: Start, folder: RunFolder) -> AbstractContextManager[Grid]:
    """The grid of the engine that was chosen, with the clients' end of this run on it."""
    if isinstance(job.engine, Flower):
        return job.engine.grid(remote_app(OmegaConf.to_yaml(begin.tree, resolve=True)), job.clients)
    sizes = [len(part) for part in job.task.partitions()]
    lasting = job.checkpointed is not None or begin.state is not None
    file = folder.checkpoint / CLIENTS if lasting else None
    return job.engine.grid(
        local_app(job), sizes, job.at_once, job.fold, file, begin.finished, job.seconds, job.sending
    )


def run(
    job: Job,
    tree: DictConfig,
    grid: Grid,
    folder: RunFolder,
    console: Console,
    started: float,
    begin: Start | None = None,
) -> Summary:
    """Run all rounds, leave the run folder, print the summary. Whatever ends it, what was measured is kept.

    `started` is when the program started, by `time.perf_counter`; `begin`, where a stopped one goes on.
    """
    with alone(folder.path):
        return _run(job, tree, grid, folder, console, started, begin or Start(tree, folder.path))


def _run(
    job: Job, tree: DictConfig, grid: Grid, folder: RunFolder, console: Console, started: float, begin: Start
) -> Summary:
    logging.getLogger("flwr").setLevel(logging.WARNING)  # of a streamed round it would count one reply
    settings = OmegaConf.to_yaml(tree, resolve=True)
    folder.write_config(settings)
    begun = Begun(folder.checkpoint / BEGUN if job.privacy.unit else None)
    federation = Federation(job, grid, finished=begin.finished, begun=begun)
    before = _restored(federation, folder, begin)
    failure: BaseException | None = None
    for said in _told(federation, begin):
        console.print(said, soft_wrap=True, markup=False, highlight=False)
    folder.write_checks(federation.places.checks)
    checkpoints = Checkpoints(folder.checkpoint, job.checkpointed)
    startup = time.perf_counter() - started
    try:
        with Progress(console, job.rounds, sum(r.uplink_bytes for r in folder.rounds())) as progress:
            for records in federation.run(progress):
                due = checkpoints.due
                for record in records:
                    folder.append(record, lasting=due)
                    progress.round(record)
                if due:
                    took = asdict(before.plus(startup, started))
                    state = {"config": settings, "took": took, "federation": federation.state()}
                    checkpoints.save(federation.finished, state, grid)
        federation.places.hear_checks()
    except BaseException as error:  # by which Flower ends a run that is stopped depends on who hears it first
        failure = error
        for record in federation.rest():
            folder.append(record)
    summary = summary_of(federation, folder.rounds(), before.plus(startup, started), failure is not None)
    folder.write_checks(federation.places.checks)  # with those of nodes that came later
    folder.write_summary(summary)
    folder.write_model(federation.arrays.to_torch_state_dict())
    if job.profile:
        workers = grid.workers if isinstance(grid, LocalGrid) else 0
        folder.write_trace(trace_json(CLOCK.spans, CLOCK.left_out, started, workers))
        if CLOCK.left_out:
            console.print(
                f"trace.json holds the first {MOST} events; {CLOCK.left_out} later ones are left out"
            )
    write_page(folder.path)
    console.print(table(summary, folder.path))
    console.print(f"Run folder: {folder.path}", soft_wrap=True)
    if failure is not None:
        raise failure
    return summary


def _restored(federation: Federation, folder: RunFolder, begin: Start) -> Took:
    """Bring a run that goes on back to its last checkpoint; returns what it had taken by then."""
    job, grid, state = federation.job, federation.grid, begin.state
    if not begin.again:
        return Took()
    if job.privacy.unit is not None and federation.begun.rounds < len(folder.rounds()):
        raise ConfigError(
            f"{folder.checkpoint / BEGUN} lacks rounds that were finished, so their cost is unknown: "
            "restore the file, or begin a new run"
        )
    if state is not None:
        federation.restore(state["federation"])
        if isinstance(grid, LocalGrid) and grid.remembering != state["clients"]:
            raise ConfigError(
                f"{folder.checkpoint / CLIENTS} holds {grid.remembering} states of {state['clients']}: "
                "restore the file, or begin a new run"
            )
    if job.privacy.unit is not None and not isinstance(grid, LocalGrid):
        federation.begun.anew(job.clients)
    folder.cut(federation.recorded)
    return Took() if state is None else Took(**state["took"])


def _told(federation: Federation, begin: Start) -> Iterator[str]:
    """What there is to say before the rounds."""
    job, repeated = federation.job, federation.budget.repeated(federation.finished)
    yield from begin.said
    yield from (str(said) for said in (job.said, getattr(job.task, "anonymity_cost", None)) if said)
    if repeated:
        yield charged(repeated)
    if (
        begin.state is not None
        and isinstance(job.codec, ErrorFeedback)
        and not isinstance(federation.grid, LocalGrid)
        and not _served()
    ):
        yield "Nodes begin anew: what error feedback kept back on them is lost"
