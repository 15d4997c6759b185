"""Data that grow: windows, replay and snapshots by hand; drift; whole rounds; what is private stays so."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from grids import Elsewhere, model_of, rounds_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chi2_contingency

from fedapp import config
from fedapp.client_app import client_app
from fedapp.errors import ConfigError, DataError
from fedapp.job import Job
from fedapp.models import Logistic
from fedapp.privacy.policy import Policy
from fedapp.records import ARRAYS, CONFIG, DRIFT, METRICS, WEIGHT
from fedapp.report.page import _alarms
from fedapp.tasks import Data
from fedapp.tasks.drift import LEAST, homogeneity, noticed
from fedapp.tasks.folders import ImageFolder
from fedapp.tasks.images import Digits
from fedapp.tasks.partition import Iid
from fedapp.tasks.stream import Stream
from fedapp.tasks.tables import Csv

RUN: dict[str, Any] = {"build": Logistic(), "partition": Iid(), "clients": 3, "seed": 0}
FAST = "task=stream task@task.source=digits model=logistic clients=3 rounds=3 codec=identity partition=iid"
OWN = "task=stream task.source.features=[a,b] task.source.class_names=[n,y] model=logistic codec=identity"


def job_of(overrides: str) -> Job:
    return config.job(config.compose(overrides))


def stream(**settings: Any) -> Stream:
    return Stream(**RUN, source=Digits(**RUN), **settings)


def numbered(count: int) -> Data:
    """Examples that say which they are."""
    return Data(torch.arange(count, dtype=torch.float32)[:, None], torch.zeros(count, dtype=torch.int64))


def rounds_of(task: Stream, sizes: dict[int, int]) -> dict[int, list[int]]:
    """Which examples each round of a node trains on, if so many are there when it looks."""
    state: Any = {}
    found = {}
    for number, size in sizes.items():
        data, state, _ = task.of_round(numbered(size), number, 0, state, own=True)
        found[number] = data.x[:, 0].int().tolist()
    return found


# Windows and replay


def test_windows_by_hand() -> None:
    sizes = {1: 2, 2: 5, 4: 6, 5: 9}
    assert rounds_of(stream(), sizes) == {n: [*range(size)] for n, size in sizes.items()}
    assert rounds_of(stream(rows=3), sizes) == {1: [0, 1], 2: [2, 3, 4], 4: [3, 4, 5], 5: [6, 7, 8]}
    newest = {1: [0, 1], 2: [2, 3, 4], 4: [5], 5: [6, 7, 8]}
    assert rounds_of(stream(rounds=1), sizes) == newest
    last_two = {1: [0, 1], 2: [0, 1, 2, 3, 4], 4: [5], 5: [5, 6, 7, 8]}
    assert rounds_of(stream(rounds=2), sizes) == last_two


def test_a_round_that_looks_again_sees_the_same() -> None:
    task = stream(rounds=2)
    first, state, _ = task.of_round(numbered(4), 3, 0, {}, own=True)
    again, state, _ = task.of_round(numbered(9), 3, 0, state, own=True)
    later, state, _ = task.of_round(numbered(9), 4, 0, state, own=True)
    assert torch.equal(first.x, again.x)
    assert (len(again), len(later)) == (4, 9)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 4))
def test_what_is_remembered_stays_short(more: list[int], window: int) -> None:
    task, state, there = stream(rounds=window), dict[str, Any](), 0
    for number, grown in enumerate(more, 1):
        there += grown
        _, kept, _ = task.of_round(numbered(there), number, 0, state, own=True)
        state = dict(kept)
        assert len(state["marks"]) <= window + 1


def test_data_that_went_away_are_an_error() -> None:
    _, state, _ = stream().of_round(numbered(5), 1, 0, {}, own=True)
    with pytest.raises(DataError, match="4 examples are left of 5 that had arrived"):
        stream().of_round(numbered(4), 2, 0, state, own=True)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 3))
def test_replay_is_algorithm_r(size: int, older: int, seed: int) -> None:
    """Vitter (1985), Algorithm R, one example after the other."""
    numbers = np.random.default_rng([seed, 1, 6]).random(older)
    reservoir: list[int] = []
    for index in range(older):
        slot = int(numbers[index] * (index + 1))
        if index < size:
            reservoir.append(index)
        elif slot < size:
            reservoir[slot] = index
    task = Stream(**{**RUN, "seed": seed}, source=Digits(**RUN), rows=1, replay=size)
    assert task._replayed(older, 1).tolist() == sorted(reservoir)


def test_replay_draws_all_older_examples_alike() -> None:
    """Of 20, 5 are held: each with probability 1/4, in 400 seeds within 4 standard deviations."""
    tasks = [Stream(**{**RUN, "seed": s}, source=Digits(**RUN), rows=1, replay=5) for s in range(400)]
    held = Counter(int(i) for task in tasks for i in task._replayed(20, 0))
    assert all(abs(held[i] - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5 for i in range(20))
    assert rounds_of(stream(rows=2, replay=3), {1: 2, 2: 9})[2][-2:] == [7, 8]


def test_the_simulated_clock() -> None:
    task = stream(initial=0.2, arriving=0.3)
    assert [task.simulated(10, r) for r in range(1, 6)] == [2, 5, 8, 10, 10]
    data, _, _ = task.of_round(numbered(10), 2, 0, {}, own=False)
    assert data.x[:, 0].tolist() == [0, 1, 2, 3, 4]


# Files that grow


def table(**settings: Any) -> Csv:
    return Csv(**RUN, features=["a", "b"], class_names=["n", "y"], **settings)


def test_a_line_that_is_half_written_waits(tmp_path: Path) -> None:
    task, path = Stream(**RUN, source=table()), tmp_path / "t.csv"
    node = {"data": str(path)}
    path.write_text("a,b,la")
    with pytest.raises(DataError, match="no whole line yet"):
        task.client_data(node)
    path.write_text("a,b,label\n")
    assert len(task.client_data(node)) == 0
    path.write_text("a,b,label\n1,2,y\n3,4")
    assert task.client_data(node).x.tolist() == [[1, 2]]
    path.write_text("a,b,label\n1,2,y\n3,4,n\n")
    data = task.client_data(node)
    assert (data.x.tolist(), data.y.tolist()) == ([[1, 2], [3, 4]], [1, 0])


def test_images_come_in_order_of_arrival(tmp_path: Path) -> None:
    source = ImageFolder(**RUN, class_names=["cat", "dog"], size=4, channels=1)
    task, node = Stream(**RUN, source=source), {"data": str(tmp_path)}
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    assert len(task.client_data(node)) == 0
    for value, place in ((90, "dog/z"), (10, "cat/b"), (200, "cat/a")):
        Image.new("L", (4, 4), value).save(tmp_path / "new.part", "png")
        assert len(task.client_data(node)) == [90, 10, 200].index(value)
        os.rename(tmp_path / "new.part", tmp_path / f"{place}.png")
        os.utime(tmp_path / f"{place}.png", (1, 1))  # what a copy may say of its age counts for nothing
    data = task.client_data(node)
    assert data.y.tolist() == [1, 0, 0]
    assert [round(float(x)) for x in (data.x[:, 0, 0, 0] + 1) * 127.5] == [90, 10, 200]


def test_digits_do_not_grow_on_disk() -> None:
    with pytest.raises(ConfigError, match="no data that grow"):
        stream().client_data({"data": "x"})


# Drift


@given(st.lists(st.tuples(st.integers(10, 99), st.integers(10, 99)), min_size=2, max_size=6))
def test_homogeneity_is_scipys_test(cells: list[tuple[int, int]]) -> None:
    one, other = np.array(cells).T
    expected = chi2_contingency(np.stack([one, other]), correction=False).pvalue
    assert homogeneity(one, other) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_rare_cells_are_taken_together() -> None:
    one, other = np.array([50, 3, 1, 0, 0]), np.array([50, 1, 3, 2, 0])
    assert homogeneity(one, other) == homogeneity(np.array([50, 4]), np.array([50, 6]))
    assert homogeneity(np.array([5, 0]), np.array([3, 0])) == 1.0


def sample(rng: np.random.Generator, count: int, shift: float = 0.0, classes: int = 4) -> Data:
    x = rng.normal(size=(count, 3)) + np.array([0, shift, 0])
    return Data(torch.tensor(x, dtype=torch.float32), torch.from_numpy(rng.integers(0, classes, count)))


def joined(*parts: Data) -> Data:
    return Data(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def test_false_alarms_are_as_rare_as_said() -> None:
    """At alarm=0.1 in 200 streams that do not change, fewer than 35: the bound, and three deviations."""
    alarms = 0
    for seed in range(200):
        data = sample(np.random.default_rng(seed), 300)
        _, state = noticed(data, 0, 100, 4, 0.1, {})
        alarms += noticed(data, 0, 300, 4, 0.1, state)[0]
    assert 2 < alarms < 35


@pytest.mark.parametrize("change", ["feature", "label"])
def test_drift_is_noticed(change: str) -> None:
    rng = np.random.default_rng(0)
    later = sample(rng, 200, 1.0) if change == "feature" else sample(rng, 200, classes=2)
    data = joined(sample(rng, 200), later)
    _, state = noticed(data, 0, 200, 4, 0.001, {})
    assert noticed(data, 0, 400, 4, 0.001, state)[0]
    assert not noticed(data, 0, 200 + LEAST - 1, 4, 0.001, state)[0]  # too few are new
    assert not noticed(data, 0, 400, 4, 0.0, state)[0]


# Whole rounds


@pytest.mark.parametrize("codec", ["codec=identity downlink=plain", "codec=default"])
def test_the_same_bits_for_any_number_of_workers(codec: str) -> None:
    window = f"{FAST} privacy=none task.rounds=2 task.replay=7 task.arriving=0.3 {codec}"
    assert model_of(f"{window} engine.workers=1") == model_of(f"{window} engine.workers=3")
    assert model_of(f"{window} engine.workers=1") != model_of(f"{window} engine.workers=1 task.replay=6")


def test_all_at_once_is_the_task_itself() -> None:
    """A stream that has arrived is what it reads."""
    whole = model_of(f"{FAST} privacy=none task.initial=1.0 engine.workers=1")
    plain = FAST.replace("task=stream task@task.source=digits", "task=digits")
    assert whole == model_of(f"{plain} privacy=none engine.workers=1")


def test_drift_is_in_the_rounds_and_in_the_report() -> None:
    """Labels in order, all of one kind first, are told of by every client."""
    job = job_of(f"{FAST} privacy=none task.initial=0.5 task.arriving=0.25 task.rounds=1 clients=2")
    assert isinstance(job.task, Stream)
    order = torch.argsort(job.task.train_data().y)
    parts = [order[::2].numpy(), order[1::2].numpy()]
    job.task.__dict__["_partitions"] = parts
    for fold in (True, False):
        _, rounds = rounds_here(job, fold=fold)
        assert [r.drift for r in rounds] == [0, 2, 2]
    assert "from round 2 on, up to 2 clients" in _alarms(rounds)[0]
    assert not _alarms(rounds[:1])


# What is private


PRIVATE = "privacy=example privacy.test_seed=1 trainer.steps=2 trainer.examples_per_client=100"


@pytest.mark.parametrize("window", ["task.rows=20", "task.rounds=1 task.replay=5"])
@pytest.mark.parametrize("private", ["privacy=example", "privacy=distributed_example"])
def test_windows_that_move_with_other_examples_are_refused(window: str, private: str) -> None:
    with pytest.raises(ConfigError, match=r"task.rows and task.replay .* set task.rounds"):
        job_of(f"{FAST} {private} {window}")


def test_one_example_less_is_the_only_difference_where_privacy_counts_on_it() -> None:
    """The law behind the accounting: who leaves takes nobody along, in no round."""
    task, sizes = stream(rounds=2), {1: 3, 2: 5, 3: 8, 4: 8, 5: 9}
    for gone in range(9):
        whole, without = dict[str, Any](), dict[str, Any]()
        for number, size in sizes.items():
            data, kept, _ = task.of_round(numbered(size), number, 0, whole, own=True)
            left = numbered(size).x[:, 0]
            left = left[left != gone]
            rest, less, _ = task.of_round(
                Data(left[:, None], torch.zeros(len(left), dtype=torch.int64)), number, 0, without, own=True
            )
            whole, without = dict(kept), dict(less)
            assert [i for i in data.x[:, 0].tolist() if i != gone] == rest.x[:, 0].tolist()


def test_a_private_round_tells_nothing_of_drift_nor_of_how_much_there_is() -> None:
    job = job_of(f"{FAST} {PRIVATE} task.rounds=2")
    _, rounds = rounds_here(job)
    assert [r.drift for r in rounds] == [None] * 3


def asked(job: Job, number: int, node: Context) -> Message:
    grid = Elsewhere(client_app(lambda _: job), [7])
    grid._contexts = {7: node}
    content = RecordDict({ARRAYS: job.initial, CONFIG: ConfigRecord({"server-round": number})})
    grid.push_messages([Message(content, 7, MessageType.TRAIN)])
    return next(iter(grid.pull_messages([])))


def rows_of(rng: np.random.Generator, count: int, shift: float = 0.0) -> str:
    values = rng.normal(size=(count, 2)) + shift
    return "".join(f"{a:.3f},{b:.3f},{'ny'[int(a > shift)]}\n" for a, b in values)


@pytest.mark.parametrize("private", [False, True])
def test_a_node_takes_what_is_there_and_keeps_drift_from_private_runs(
    tmp_path: Path, private: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path, rng = tmp_path / "t.csv", np.random.default_rng(0)
    choice = PRIVATE if private else "privacy=none"
    job = job_of(f"{OWN} task.rounds=1 {choice} rounds=3 clients=1")
    node = Context(1, 7, {"partition-id": 0, "data": str(path)}, RecordDict(), {})
    path.write_text("a,b,label\n" + rows_of(rng, 60) + "0.1,0.")
    with caplog.at_level(logging.WARNING, "fedapp.client"):
        first = asked(job, 1, node).content[METRICS]
        path.write_text(path.read_text() + "2,y\n" + rows_of(rng, 80, 3.0))
        again, second = (asked(job, number, node).content[METRICS] for number in (1, 2))
    if private:
        assert dict(first) == dict(second) == {WEIGHT: 1}
    else:
        assert [reply[WEIGHT] for reply in (first, again, second)] == [60, 60, 81]
        assert [reply[DRIFT] for reply in (first, second)] == [0, 1]
    assert "examples of round 2 differ from the first window" in caplog.text


def test_a_policy_is_asked_about_the_table_and_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,label\n1,2,y\n3,4,n\n5,6,y\n7,")
    accepted: Any = {"tasks": ("stream",), "privacy": ("none",), "metrics": ("num-examples",)}
    policy, task = Policy(**accepted, rows={"a": ("1", "5")}), job_of(f"{OWN} privacy=none").task
    assert policy.data(task, {"data": str(path)}).x.tolist() == [[1, 2], [5, 6]]
    refused = job_of(f"{OWN} privacy=none task.source.path={path}")
    with pytest.raises(Exception, match=r"task.path names a file of the client's machine"):
        policy.check(refused, "train", 1, ())
    with pytest.raises(Exception, match="the column b"):
        Policy(**accepted, columns=("a", "label")).check(job_of(f"{OWN} privacy=none"), "train", 1, ())


# Settings


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("task.rows=0", r"task.rows .* at least 1, got 0"),
        ("task.rows=2 task.rounds=2", "two windows"),
        ("task.replay=5", "takes examples older than a window"),
        ("task.initial=0", r"task.initial .* above 0 .*, got 0"),
        ("task.arriving=2", r"task.arriving .* at most 1, got 2"),
        ("task.source=5", r"task.source must be a task, got 5"),
    ],
)
def test_what_is_wrong_is_told(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(f"{FAST} privacy=none {overrides}")


def test_what_does_not_grow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,label\n" + "1,2,y\n3,4,n\n" * 20)
    anonymous = "task.source.anonymity.quasi_identifiers=[a] task.source.anonymity.k=2"
    with pytest.raises(ConfigError, match="neither a stream itself nor anonymous"):
        job_of(f"task=stream task.source.path={path} {anonymous} privacy=none model=logistic")
    with pytest.raises(ConfigError, match="plain override"):
        config.split("task@task.source=../x")
    with pytest.raises(ConfigError, match="plain override"):
        config.split("task@task=csv")
