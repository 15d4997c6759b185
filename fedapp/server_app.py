"""The Flower ServerApp, and the run around the rounds: from settings to a run folder."""

import logging
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fedapp import __version__, config
from fedapp.client_app import client_app
from fedapp.errors import FedappError
from fedapp.job import Job
from fedapp.report.folder import Round, RunFolder
from fedapp.report.page import write_page
from fedapp.report.progress import Progress
from fedapp.report.summary import Summary, table
from fedapp.rounds import Federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry in its own runtimes: compose the override string, run on the grid given."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # as in client_app: their number changes the last bits
    tree = config.compose(str(context.run_config["overrides"]))
    tree.choices.engine = "flower"  # whatever was chosen, this grid is Flower's
    job = config.job(tree)
    job.prepare()
    run(job, tree, grid, RunFolder(Path(tree.run_dir)), Console(), started)


def simulate(tree: DictConfig, path: Path, console: Console, started: float) -> Summary:
    """The embedded run: the same app over the local engine, forked workers for clients."""
    job = config.job(tree)
    sizes = [len(part) for part in job.task.partitions()]  # loads the data, for all workers, before the fork
    job.prepare()
    folder = RunFolder(path)
    with job.engine.grid(client_app(lambda _: job), sizes, job.in_round, job.fold) as grid:
        return run(job, tree, grid, folder, console, started)


def run(
    job: Job, tree: DictConfig, grid: Grid, folder: RunFolder, console: Console, started: float
) -> Summary:
    """Run all rounds, leave the run folder, print the summary. Ctrl-C keeps what was measured.

    `started` is when the program started, by `time.perf_counter`.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)  # of a streamed round it would count one reply
    folder.write_config(OmegaConf.to_yaml(tree, resolve=True))
    if job.choices["engine"] == "local":
        folder.write_split(job.task.label_counts().tolist())
    federation = Federation(job, grid)
    failure: BaseException | None = None
    for said in (job.said, getattr(job.task, "anonymity_cost", None)):
        if said:
            console.print(str(said), soft_wrap=True, markup=False, highlight=False)
    startup = time.perf_counter() - started
    try:
        with Progress(console, job.rounds) as progress:
            for record in federation.run(progress):
                folder.append(record)
                progress.round(record)
    except (KeyboardInterrupt, FedappError) as error:
        failure = error
    summary = _summary(job, federation, folder.rounds(), startup, started, failure)
    folder.write_summary(summary)
    folder.write_model(federation.arrays.to_torch_state_dict())
    write_page(folder.path)
    console.print(table(summary, folder.path))
    console.print(f"Run folder: {folder.path}", soft_wrap=True)
    if failure is not None:
        raise failure
    return summary


def _summary(
    job: Job,
    federation: Federation,
    records: list[Round],
    startup: float,
    started: float,
    failure: BaseException | None,
) -> Summary:
    traffic, parameters, spent = federation.traffic, federation.parameters, federation.spent
    float32_up = 4 * parameters * federation.accepted
    uncompressed = float32_up + 4 * parameters * federation.messages
    sent = traffic.uplink + traffic.downlink
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return Summary(
        task=str(job.choices["task"]),
        codec=job.coded_by,
        privacy=str(job.choices["privacy"]),
        engine=str(job.choices["engine"]),
        clients=job.clients,
        cohort=job.in_round,
        rounds=len(records),
        accuracy=records[-1].accuracy if records else None,
        loss=records[-1].loss if records else None,
        uplink_bytes=traffic.uplink,
        downlink_bytes=traffic.downlink,
        uplink_bits_per_parameter=8 * traffic.uplink / (parameters * federation.accepted)
        if federation.accepted
        else None,
        uncompressed_bytes=uncompressed,
        compression_ratio=uncompressed / sent if sent else None,
        uplink_ratio=float32_up / traffic.uplink if traffic.uplink else None,
        parameters=parameters,
        epsilon=None if spent is None else spent.epsilon,
        delta=job.privacy.delta,
        accountant=None if spent is None else spent.accountant,
        privacy_unit=job.privacy.unit,
        privacy_against=job.privacy.against,
        startup_s=startup,
        seconds_per_round=sum(r.seconds for r in records) / len(records) if records else None,
        wall_s=time.perf_counter() - started,
        peak_rss_mb=max(own, workers) / 1e3,
        seed=job.seed,
        versions={
            "fedapp": __version__,
            **{name: version(name) for name in ("flwr", "torch", "opacus", "numpy")},
        },
        interrupted=failure is not None,
        coding=job.said,
        note=job.note,
    )
