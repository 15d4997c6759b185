"""Who tests a model, on what, and how that spreads over clients."""

import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from grids import Elsewhere, bits, local, rounds_here, rounds_on
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedapp import config, evaluation
from fedapp.client_app import client_app, local_app
from fedapp.errors import ConfigError, FedappError
from fedapp.evaluation import over_clients
from fedapp.job import Job
from fedapp.models import load
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.synchronous import Stepped, Synchronous
from fedapp.tasks import Data, Score, means
from fedapp.tasks.images import Digits
from fedapp.training import Sgd

FAST = "task=digits model=logistic privacy=none clients=4 rounds=2 evaluate=clients trainer.lr=0.5"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


def parts(job: Job) -> list[tuple[Data, Data]]:
    """Of each client: what it trains on, what it holds out."""
    return [job.split(job.task.client_data({"partition-id": n}), n) for n in range(job.clients)]


def rows(data: Data) -> set[bytes]:
    return {x.numpy().tobytes() + bytes([int(y)]) for x, y in zip(data.x, data.y, strict=True)}


@settings(deadline=None)
@given(st.integers(0, 200), st.floats(0.01, 0.5), st.integers(0, 3))
def test_a_client_holds_out_a_share_of_what_it_has(count: int, share: float, partition: int) -> None:
    job = replace(config.job_of(FAST), held_out=share)
    data = Data(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count) % 3)
    train, test = job.split(data, partition)
    assert len(test) == round(count * share)
    assert sorted([*train.x[:, 0].tolist(), *test.x[:, 0].tolist()]) == list(range(count))
    assert bool(len(train)) == bool(count)


def test_what_is_held_out_is_fixed_by_the_seed() -> None:
    data = Data(torch.arange(100, dtype=torch.float32)[:, None], torch.zeros(100, dtype=torch.int64))
    held = [set(job_of(f"seed={s}").split(data, n)[1].x[:, 0].tolist()) for s, n in ((0, 0), (0, 1), (1, 0))]
    assert held[0] == set(job_of("seed=0 trainer.lr=0.1").split(data, 0)[1].x[:, 0].tolist())
    assert len({frozenset(one) for one in held}) == 3


def test_nothing_is_held_out_where_clients_do_not_test() -> None:
    job = job_of("evaluate=server")
    data = job.task.client_data({"partition-id": 0})
    train, test = job.split(data, 0)
    assert train is data
    assert len(test) == 0


def test_a_client_never_trains_on_what_it_tests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    job, seen = job_of(), list[Data]()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
    assert isinstance(job.trainer, Sgd)
    fit, evaluate = Sgd.fit, type(job.task).evaluate

    def fitted(trainer: Any, task: Any, model: Any, data: Data, *rest: Any, **others: Any) -> Any:
        seen.append(data)
        return fit(trainer, task, model, data, *rest, **others)

    def evaluated(task: Any, model: Any, data: Data) -> dict[str, float]:
        seen.append(data)
        return evaluate(task, model, data)

    monkeypatch.setattr(Sgd, "fit", fitted)
    monkeypatch.setattr(type(job.task), "evaluate", evaluated)
    app, weights = client_app(lambda _: job_of("downlink=plain codec=identity")), job.initial
    for kind in ("train", "evaluate"):
        content = RecordDict({"arrays": weights, "config": ConfigRecord({"server-round": 1})})
        context = Context(1, 3, {"partition-id": 2, "num-partitions": 4}, RecordDict(), {})
        assert app(Message(content, 3, kind), context).has_content()
    train, test = map(rows, seen)
    assert not train & test
    assert train | test == rows(job.task.client_data({"partition-id": 2}))


def test_rounds_tell_how_accuracy_spreads_over_clients() -> None:
    job = job_of("downlink=plain codec=identity")
    federation, records = rounds_here(job)
    load(job.model, federation.arrays)
    held = [test for _, test in parts(job)]
    each = [job.task.evaluate(job.model, test)["accuracy"] for test in held]
    last = records[-1]
    assert last.clients_tested == 4
    assert last.clients_worst == pytest.approx(min(each), abs=1e-12)
    assert last.clients_mean == pytest.approx(np.mean(each), abs=1e-12)
    weighed = np.average(each, weights=[len(test) for test in held])
    assert last.accuracy == pytest.approx(weighed, abs=1e-12)
    assert len({last.clients_worst, last.clients_mean, last.accuracy}) == 3


def test_the_worst_tenth_is_one_client_at_least() -> None:
    accuracies = [i / 100 for i in range(29)][::-1]

    def of(some: list[float]) -> Mapping[str, Any]:
        return over_clients({"accuracy": 0.5, "loss": 1.0, "accuracies": some})._asdict()

    assert of(accuracies) == {
        "accuracy": 0.5, "loss": 1.0, "clients_mean": pytest.approx(0.14),
        "clients_worst": pytest.approx(0.005), "clients_tested": 29,
    }  # fmt: skip
    assert of([0.75, 0.25])["clients_worst"] == 0.25


def test_no_spread_where_the_server_tests() -> None:
    _, records = rounds_here(job_of("evaluate=server rounds=1"))
    assert records[0].accuracy is not None
    assert (records[0].clients_mean, records[0].clients_worst, records[0].clients_tested) == (None,) * 3


@pytest.mark.parametrize("share", ["0", "0.6", "null", "true"])
def test_a_share_that_cannot_be_held_out_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match=r"held_out must be"):
        job_of(f"held_out={share}")


# The server's test


class Many(Digits):
    """Digits whose test set is that of seven batches, and a part of one."""

    def test_data(self) -> Data | None:
        data = super().train_data()
        return Data(*(torch.cat([part] * 5)[:7100] for part in (data.x, data.y)))


def many(workers: int, overrides: str = "") -> Job:
    job = job_of(f"evaluate=server engine.workers={workers} {overrides}")
    given = {field.name: getattr(job.task, field.name) for field in fields(job.task)}  # type: ignore[arg-type]
    return replace(job, task=Many(**given))


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff strategy.concurrency=3 strategy.buffer=2"])
def test_any_number_of_workers_test_to_the_same_bits(strategy: str) -> None:
    told = set()
    for workers in (1, 2, 3):
        federation, records = rounds_here(many(workers, f"strategy={strategy}"))
        told.add((bits(federation.arrays), *((r.accuracy, r.loss) for r in records)))
    assert len(told) == 1
    load(federation.job.model, federation.arrays)
    test = federation.job.task.test_data()
    assert test is not None
    wanted = federation.job.task.evaluate(federation.job.model, test)
    assert (records[-1].accuracy, records[-1].loss) == (wanted["accuracy"], wanted["loss"])


def test_all_workers_test_a_part_each_and_another_that_of_one_that_dies() -> None:
    job, there = many(3, "rounds=1"), os.getpid()
    parts = multiprocessing.get_context("fork").Array("i", 8)
    died = multiprocessing.get_context("fork").Value("i", 0)

    def scores(model: torch.nn.Module, data: Data) -> list[Score]:
        assert os.getpid() != there
        with died.get_lock():
            died.value += 1
            first = died.value == 1
            parts[len(data) // 1000] += not first
        if first:
            os.kill(os.getpid(), signal.SIGKILL)
        return Many.scores(job.task, model, data)  # type: ignore[arg-type]

    object.__setattr__(job.task, "scores", scores)
    _, records = rounds_here(job)
    assert records[0].accuracy is not None
    assert parts[:] == [0, 0, 2, 1, 0, 0, 0, 0]  # batches 0 to 1, 2 to 4, 5 to 7, and that has 2100


class Late:
    """A grid whose first answer to each request comes with those to the next one."""

    workers = 2

    def __init__(self, job: Job) -> None:
        self._app, self._asked, self._kept = local_app(job), list[RecordDict](), list[Message]()

    def test(self, contents: list[RecordDict]) -> None:
        self._asked = contents

    def tested(self, timeout: float) -> list[Message]:
        context = Context(1, 1, {}, RecordDict(), {})
        answers = [self._app(Message(content, 1, "query.test"), context) for content in self._asked]
        came, self._kept = [*answers[1:], *self._kept], answers[:1]
        return came


def test_a_part_that_is_late_is_not_counted_for_the_next_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "LocalGrid", Late)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    job = many(2)
    test, told = evaluation.ServerTest(job, cast(Grid, Late(job))), list[float | None]()
    weights = [job.initial, ArrayRecord(job.task.model(1).state_dict())]
    for arrays in (*weights, *weights):
        test.begin(arrays)
        told.append(test.end().accuracy)
    wanted = []
    for arrays in weights:
        load(job.model, arrays)
        whole = job.task.test_data()
        assert whole is not None
        wanted.append(job.task.evaluate(job.model, whole)["accuracy"])
    assert told == [*wanted, *wanted]
    assert wanted[0] != wanted[1]


def test_a_model_that_nobody_can_test_ends_the_run() -> None:
    job = many(2, "rounds=1")
    object.__setattr__(job.task, "scores", lambda model, data: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(FedappError, match="the model could not be tested; the log says why"):
        rounds_here(job)


def test_workers_test_beside_the_next_round_once_no_client_waits(tmp_path: Path) -> None:
    """Two workers, and clients of which the last one takes long: the other worker tests meanwhile."""
    job, log = many(2, "rounds=3 clients=3 trainer.epochs=1"), tmp_path / "log"
    fit = Sgd.fit

    def written(what: str) -> None:
        with log.open("a") as file:  # by several processes, each whole
            file.write(f"{what}\n")

    def fitted(trainer: Any, task: Any, model: Any, data: Data, *rest: Any, **others: Any) -> Any:
        written("trains")
        time.sleep(0.3)
        return fit(trainer, task, model, data, *rest, **others)

    def scores(model: torch.nn.Module, data: Data) -> list[Score]:
        time.sleep(0.1)  # a client that was begun at the same moment has written by then
        written("tests")
        return Many.scores(job.task, model, data)  # type: ignore[arg-type]

    object.__setattr__(job.task, "scores", scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sgd, "fit", fitted)
        _, records = rounds_here(job)
    train, test = ["trains"] * 3, ["tests"] * 2
    assert log.read_text().split() == [*train, *train, *test, *train, *test, *test]
    assert len({record.accuracy for record in records}) > 1
    assert records == sorted(records, key=lambda record: record.round)
    for record in records:  # what workers did is counted once, in the round in which it came
        assert record.stages is not None
        assert sum(s for s in record.stages.values() if s) == pytest.approx(3 * record.seconds, rel=0.1)
    assert [bool(record.stages and record.stages["evaluate"]) for record in records] == [False, True, True]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_test_beside_the_next_round_is_of_the_weights_before_it(elsewhere: bool) -> None:
    job = many(2, "rounds=3")
    job.prepare()
    models, wanted = list[ArrayRecord](), list[tuple[float, float]]()
    step = Synchronous.round

    def stepped(self: Synchronous, *given: Any) -> Stepped:
        found = step(self, *given)
        models.append(found.arrays)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Synchronous, "round", stepped)
        if elsewhere:
            _, records = rounds_on(job, Elsewhere(client_app(lambda _: job), [9, 7, 5, 3]))
        else:
            _, records = rounds_here(job)
    test = job.task.test_data()
    assert test is not None
    for arrays in models:
        load(job.model, arrays)
        found = job.task.evaluate(job.model, test)
        wanted.append((found["accuracy"], found["loss"]))
    assert [(record.accuracy, record.loss) for record in records] == wanted
    assert len(set(wanted)) == 3


def test_a_thread_that_tests_makes_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its draws would come between those of a node in this process, whose initial model were another then."""
    made, build = list[str](), Digits.model

    def noted(task: Digits, seed: int) -> torch.nn.Module:
        made.append(threading.current_thread().name)
        return build(task, seed)

    monkeypatch.setattr(Digits, "model", noted)
    job = job_of("evaluate=server")
    _, records = rounds_on(job, Elsewhere(client_app(lambda _: job), [5, 6, 7, 8]))
    assert [record.accuracy is not None for record in records] == [True, True]
    assert set(made) == {threading.main_thread().name}


def test_a_worker_that_tests_late_is_no_client_that_is_late() -> None:
    """`collect` ends clients whose time is over, `client_timeout` those that take too long: not a test."""
    job = many(2, "rounds=3 engine.client_timeout=0.5")

    def scores(model: torch.nn.Module, data: Data) -> list[Score]:
        time.sleep(0.7)
        return Many.scores(job.task, model, data)  # type: ignore[arg-type]

    object.__setattr__(job.task, "scores", scores)
    _, records = rounds_here(job)
    assert [(record.replies, record.failures) for record in records] == [(4, 0)] * 3
    assert all(record.accuracy for record in records)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_is_broken_off_has_the_test_of_its_last_round(elsewhere: bool) -> None:
    job = many(2, "rounds=3")
    job.prepare()
    wanted = rounds_here(job)[1]
    grid: Grid
    with ExitStack() as stack:
        if elsewhere:
            grid = Elsewhere(client_app(lambda _: job), [9, 7, 5, 3])
        else:
            sizes = [len(part) for part in job.task.partitions()]
            grid = stack.enter_context(local(job).grid(local_app(job), sizes, job.at_once, job.fold))
        federation = Federation(job, grid)
        rounds = federation.run(Progress(Console(file=io.StringIO()), 3))
        assert next(rounds) == []
        (first,) = next(rounds)
        (second,) = federation.rest()
    assert [(r.round, r.accuracy, r.loss) for r in (first, second)] == [
        (r.round, r.accuracy, r.loss) for r in wanted[:2]
    ]
    assert federation.recorded == 1


def test_means_are_over_examples() -> None:
    assert means([Score(3, 2.0, 4), Score(1, 4.0, 1)]) == {"accuracy": 0.8, "loss": 1.2}
