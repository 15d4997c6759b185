"""Rounds where models train on a GPU; on a CPU the same tests show that they test what they say."""

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from grids import bits, local, rounds_here
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import chi2

from fedapp import config, server_app
from fedapp.client_app import local_app
from fedapp.dp_step import DpStep
from fedapp.engine.local import LocalGrid
from fedapp.evaluation import ServerTest
from fedapp.job import Job
from fedapp.models import Cnn, Resnet18, SmallCnn
from fedapp.privacy.example import ExamplePrivacy
from fedapp.privacy.secret import source
from fedapp.report.folder import Round
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.tasks import Data, Score
from fedapp.tasks.images import Digits
from fedapp.tasks.partition import Iid
from fedapp.training import DpSgd, Sgd, Trainer
from fedapp.vector import layout_of, ravel

GPU = torch.cuda.is_available()  # does not initialize CUDA: see fedapp/__init__.py
SETTINGS = {
    "none": "privacy=none",
    "plain": "privacy=none codec=identity strategy=fedadam",
    "example": "privacy=example privacy.test_seed=1 trainer.steps=3",
    "central": "privacy=central_gaussian privacy.test_seed=1",
    "sums": "privacy=distributed_example privacy.test_seed=1 cohort=null",
}


on_cuda = pytest.param("cuda", marks=pytest.mark.skipif(not GPU, reason="needs CUDA"))
everywhere = pytest.mark.parametrize("device", ["cpu", on_cuda], indirect=True)  # others are slow on a CPU


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), on_cuda])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where models train. On a CPU, too, a worker tests the server's model."""
    begin, name = ServerTest.__init__, str(request.param)

    def aside(self: ServerTest, job: Job, grid: Grid) -> None:
        begin(self, job, grid)
        assert isinstance(grid, LocalGrid)
        self._workers = grid

    if name == "cpu":
        monkeypatch.setattr(ServerTest, "__init__", aside)
    return name


def job_of(device: str, overrides: str = "") -> Job:
    model = "small_cnn" if device == "cuda" else "logistic"  # cheap
    fixed = f"task=digits model={model} clients=5 cohort=3 rounds=2 engine.workers=2 device={device}"
    return config.job(config.compose(f"{fixed} {overrides}"))


def beside(device: str, overrides: str) -> list[tuple[Federation, list[Round]]]:
    """The same rounds there and on a CPU."""
    model = "small_cnn" if device == "cuda" else "logistic"
    return [rounds_here(job_of(where, f"model={model} {overrides}")) for where in (device, "cpu")]


def apart(device: str, function: Callable[..., Any], *calls: tuple[Any, ...]) -> list[Any]:
    """What the function returns of these arguments behind the device, in another process.

    This one must not touch CUDA, and any gradient does: torch then counts devices, by the driver.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return [pool.submit(function, device, *arguments).result() for arguments in calls]


def distance(found: ArrayRecord, wanted: ArrayRecord, start: ArrayRecord) -> float:
    """Norm of the difference of two models, over how far training has gone."""
    a, b, c = (ravel(arrays, layout_of(start)) for arrays in (found, wanted, start))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - c))


# Whole rounds


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_seed_is_one_model_with_any_number_of_workers(device: str, setting: str) -> None:
    models = []
    for workers in (1, 2):
        job = job_of(device, f"{SETTINGS[setting]} engine.workers={workers}")
        federation, records = rounds_here(job)
        assert [record.failures for record in records] == [0, 0]
        assert records[-1].accuracy is not None
        models.append(bits(federation.arrays))
    assert models[0] == models[1]
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("setting", ["plain", "central", "sums"])
def test_training_is_that_of_a_cpu_up_to_rounding(device: str, setting: str) -> None:
    """Where noise is drawn on the CPU; what is summed under secure aggregation is the same whole numbers."""
    overrides = f"{SETTINGS[setting]} codec=identity rounds=1"
    (found, _), (wanted, _) = beside(device, overrides)
    assert distance(found.arrays, wanted.arrays, wanted.job.initial) < 1e-4


def test_digits_are_learned_as_well_as_on_a_cpu(device: str) -> None:
    found, wanted = (
        records[-1].accuracy for _, records in beside(device, "privacy=none rounds=5 trainer.lr=0.3")
    )
    assert found == pytest.approx(wanted, abs=0.03)
    assert found is not None
    assert found > 0.8


@everywhere
@pytest.mark.parametrize("where", ["server", "clients"])
def test_the_model_is_tested_as_on_a_cpu(device: str, where: str) -> None:
    federation, records = rounds_here(job_of(device, f"privacy=none evaluate={where}"))
    assert records[-1].accuracy is not None
    if where == "server":
        task, model = federation.job.task, federation.job.task.model(0)
        model.load_state_dict(federation.arrays.to_torch_state_dict())
        test = task.test_data()
        assert test is not None
        wanted = task.evaluate(model, test)
        assert records[-1].accuracy == pytest.approx(wanted["accuracy"], abs=1.5 / len(test))
        assert records[-1].loss == pytest.approx(wanted["loss"], rel=1e-4)


def test_clients_without_examples_reply(device: str) -> None:
    job = job_of(device, "privacy=none clients=3 cohort=null evaluate=clients")
    empty = Data(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
    object.__setattr__(job.task, "client_data", lambda _: empty)
    _, records = rounds_here(job)
    assert [(record.replies, record.failures) for record in records] == [(3, 0)] * 2


# Faults


@everywhere
def test_a_worker_that_is_killed_is_replaced_by_one_that_trains(device: str) -> None:
    """Between rounds, after the model was tested; then both, so that all who go on were forked anew."""
    job = job_of(device, "privacy=none cohort=null rounds=3")
    job.prepare()
    sizes = [len(part) for part in job.task.partitions()]
    with local(job).grid(local_app(job), sizes, job.in_round, job.fold) as grid:
        first = [worker.process.pid for worker in grid._pool.workers]

        class Killer:
            def reply(self, number: int, done: int, total: int) -> None:
                if done == 0:
                    for worker in grid._pool.workers:
                        os.kill(worker.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
                        worker.process.join()

        federation = Federation(job, grid)
        records = [one for some in federation.run(Killer()) for one in some]  # type: ignore[arg-type]
        last = [worker.process.pid for worker in grid._pool.workers]
    assert [(record.replies, record.failures) for record in records] == [(5, 0)] * 3
    assert not set(first) & set(last)
    assert all(record.accuracy is not None for record in records)


@everywhere
def test_a_worker_killed_while_it_tests_is_replaced(device: str) -> None:
    job = job_of(device, "privacy=none rounds=1")
    task, there = job.task, os.getpid()
    calls = multiprocessing.get_context("fork").Value("i", 0)

    def scores(model: torch.nn.Module, data: Data) -> list[Score]:
        assert os.getpid() != there
        calls.value += 1
        if calls.value == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return type(task).scores(task, model, data)

    object.__setattr__(task, "scores", scores)
    _, records = rounds_here(job)
    assert calls.value == 2
    assert records[0].accuracy is not None


def test_a_worker_killed_while_it_trains_costs_a_reply(device: str) -> None:
    epochs = 100 if device == "cuda" else 20
    job = job_of(device, f"privacy=none cohort=null rounds=3 trainer.epochs={epochs}")
    job.prepare()
    sizes = [len(part) for part in job.task.partitions()]
    with local(job).grid(local_app(job), sizes, job.in_round, job.fold) as grid:
        federation, records = Federation(job, grid), []
        for some in federation.run(Progress(Console(file=io.StringIO()), 3)):
            records += [(record.replies, record.failures) for record in some]
            if federation.finished == 1:
                victim = grid._pool.workers[0].process.pid
                assert victim is not None
                threading.Timer(0.1, os.kill, (victim, signal.SIGKILL)).start()
    assert records == [(5, 0), (4, 1), (5, 0)]


def test_a_run_that_stopped_goes_on_to_the_same_bits(device: str, tmp_path: Path) -> None:
    model = "small_cnn" if device == "cuda" else "logistic"
    fixed = (
        f"task=digits model={model} clients=5 cohort=3 rounds=4 privacy=none codec.rate=0.5 "
        f"codec.feedback=true engine.workers=2 checkpoint=0 device={device}"
    )

    def simulate(folder: Path, overrides: str) -> None:
        tree, console = config.compose(overrides), Console(file=io.StringIO(), width=200)
        server_app.simulate(tree, folder, console, time.perf_counter(), overrides.split())

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    simulate(whole, f"{fixed} run_dir={whole}")
    child = os.fork()
    if not child:
        run = Federation.run

        def dying(self: Federation, progress: Any) -> Any:
            for records in run(self, progress):
                if self.finished == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield records

        Federation.run = dying  # type: ignore[method-assign]
        simulate(stopped, f"{fixed} run_dir={stopped}")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    simulate(stopped, f"resume={stopped}")
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ends = [json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1]) for folder in (whole, stopped)]
    assert ends[0]["accuracy"] == ends[1]["accuracy"]
    assert not torch.cuda.is_initialized()


# What trainers promise, by numbers


TASK = Digits(build=SmallCnn(), partition=Iid(), clients=4, seed=0)
PRIVATE = DpSgd(
    lr=0.5, sampling_rate=0.2, examples_per_client=300, steps=3, rounds=2,
    privacy=ExamplePrivacy(test_seed=1),
)  # fmt: skip


def fit(device: str, build: Any, trainer: Trainer, count: int, outlier: bool = False) -> NDArray[np.float64]:
    """The update of one fit on the first `count` digits, and on a large one if asked."""
    job = job_of(device)  # sets what is to hold on its device
    task, digits = replace(TASK, build=build), TASK.train_data()
    x, y = digits.x[:count], digits.y[:count]
    if outlier:
        x, y = torch.cat([x, 1e2 * torch.ones(1, 1, 8, 8)]), torch.cat([y, torch.tensor([3])])
    model, rng = task.model(0).to(job.torch_device), np.random.default_rng(0)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
    data = Data(x.to(job.torch_device), y.to(job.torch_device))
    trainer.fit(task, model, data, {}, rng, 0.0)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
    moved: NDArray[np.float64] = (after - before).cpu().numpy()
    return moved


@everywhere
@pytest.mark.usefixtures("clipping")
def test_noise_has_the_stated_deviation(device: str) -> None:
    """As in test_training.py: on no data an update is noise alone, and another each time."""
    dp = replace(PRIVATE, privacy=ExamplePrivacy(), max_grad_norm=0.7)
    update, other = apart(device, fit, *2 * [(SmallCnn(), dp, 0)])
    deviation = dp.noise_multiplier * 0.7 * 0.5 / (0.2 * 300) * np.sqrt(3)
    low, high = chi2.ppf([5e-7, 1 - 5e-7], len(update))
    for claimed in (2 / 3, 1.0, 3 / 2):
        statistic = float(np.sum((update / (claimed * deviation)) ** 2))
        assert (low < statistic < high) == (claimed == 1.0)
    assert not np.isin(update, other).all()


@everywhere
@pytest.mark.usefixtures("clipping")
def test_one_example_moves_an_update_by_the_clip_norm_at_most(device: str) -> None:
    """Also where norms and sums are of different products, which with fewer bits differ by a thousandth."""
    dp = replace(PRIVATE, steps=1, sampling_rate=1.0, max_grad_norm=0.5)
    few, more = apart(device, fit, (SmallCnn(), dp, 20), (SmallCnn(), dp, 20, True))
    moved, bound = float(np.linalg.norm(more - few)), 0.5 * 0.5 / 300
    assert 0.99 * bound < moved < 1.0001 * bound


@pytest.mark.parametrize("build", [SmallCnn(), Cnn(), Resnet18(), Resnet18(norm="batch")], ids=str)
def test_every_model_trains_to_the_same_bits(device: str, build: Any) -> None:
    first, second = apart(device, fit, *2 * [(build, Sgd(batch_size=8), 40)])
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)


@everywhere
def test_overlapping_windows_give_the_same_bits(device: str) -> None:
    """The pooling of small_cnn on large images, whose gradients are added up."""
    first, *others = apart(device, pooled, *4 * [()])
    assert all(np.array_equal(first, other) for other in others)


def pooled(device: str) -> NDArray[np.float32]:
    job = job_of(device)
    model = SmallCnn()((3, 40, 40), 10).to(job.torch_device)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(job.torch_device) / 10
    x = torch.randn(64, 3, 40, 40, generator=generator).to(job.torch_device)
    gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found: NDArray[np.float32] = torch.cat([g.reshape(-1) for g in gradients]).cpu().numpy()
    return found


def total(device: str) -> NDArray[np.float64]:
    job = job_of(device)
    data, model = TASK.train_data(), TASK.model(0).to(job.torch_device)
    data = Data(data.x[:300].to(job.torch_device), data.y[:300].to(job.torch_device))
    return DpStep().total(TASK, model, data, source(1, 7, 1, 0))


def test_sums_of_gradients_are_those_of_a_cpu(device: str) -> None:
    """In double precision, which the sensitivity of the rounded sum counts on."""
    (found,), (wanted,) = apart(device, total, ()), apart("cpu", total, ())
    assert np.linalg.norm(found - wanted) < 1e-12 * np.linalg.norm(wanted)
