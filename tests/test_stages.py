"""Where the time goes: stages add up to what the processes had, on every path, and a trace shows them."""

import io
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grids import Elsewhere, rounds_here, rounds_on
from rich.console import Console

from fedapp import config, server_app, stages
from fedapp.client_app import client_app
from fedapp.job import Job
from fedapp.report.folder import RunFolder, read_rounds
from fedapp.report.page import write_page
from fedapp.report.summary import Summary
from fedapp.rounds import Federation
from fedapp.stages import CLOCK, DECODE, ENCODE, NAMES, TRAIN, WAIT, Clock, Span, total

FAST = "task=digits privacy=none model=logistic clients=4 rounds=2 engine.workers=2 checkpoint=null"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


def simulate(folder: Path, overrides: str = "", shown: Console | None = None) -> Summary:
    tree = config.compose(f"{FAST} {overrides} run_dir={folder}")
    console = shown or Console(file=io.StringIO(), width=200)
    return server_app.simulate(tree, folder, console, time.perf_counter())


def added(found: Mapping[str, float | None]) -> float:
    return sum(s or 0.0 for s in found.values())


@dataclass(frozen=True)
class Sleeps:
    """A trainer that sleeps, and trains nothing."""

    seconds: float

    def fit(self, task: Any, model: Any, data: Any, state: Any, rng: Any, progress: float) -> Any:
        time.sleep(self.seconds)
        return {"num-examples": 1}, state


# The clock


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock, at which every look takes a second."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(stages, "perf_counter", lambda: float(next(seconds)))
    clock = Clock()
    monkeypatch.setattr(stages, "CLOCK", clock)
    return clock


def test_time_belongs_to_the_innermost_stage(ticks: Clock) -> None:
    ticks.begin_round(1)
    with ENCODE:  # looks: 1
        with TRAIN:  # 2
            pass  # 3
        with ENCODE, DECODE:  # 4, 5
            pass  # 6, 7
    found = ticks.end_round(0)  # 8, 9
    assert {name: s for name, s in found.items() if s} == {"encode": 5, "train": 1, "decode": 1, "other": 2}
    assert list(found) == list(NAMES)


def test_making_each_thing_belongs_to_a_stage_and_using_it_does_not(ticks: Clock) -> None:
    ticks.begin_round(1)
    for _ in ENCODE.each(range(3)):  # enters and leaves four times: the last finds the end
        with TRAIN:
            pass
    found = ticks.end_round(0)
    assert (found["encode"], found["train"]) == (4, 3)


def test_a_stage_that_raises_is_left(ticks: Clock) -> None:
    @TRAIN
    def fit() -> None:
        """Raise."""
        raise ValueError

    assert (fit.__name__, fit.__doc__) == ("fit", "Raise.")
    ticks.begin_round(1)
    with pytest.raises(ValueError), ENCODE:  # noqa: PT011
        fit()
    assert ticks.end_round(0)["other"] == 2


def test_what_lies_between_rounds_belongs_to_none(ticks: Clock) -> None:
    for number in (1, 2):
        with ENCODE:
            pass
        ticks.begin_round(number)
        assert added(ticks.end_round(0)) == 1


def test_idle_is_what_workers_had_beyond_their_work(ticks: Clock) -> None:
    def in_round(*works: float) -> float | None:
        ticks.begin_round(1)
        for worker, seconds in enumerate(works):
            ticks.hear(({"train": seconds}, []), worker + 1, 0)
        return ticks.end_round(2)["idle"]  # two seconds: one look for each worker

    assert in_round(0.25, 0.5) == 1.25
    assert in_round(2.0, 1.0) == 0  # begun in a round before
    assert in_round() == 1  # where it was taken for idle, so that it is not so again
    assert in_round() == 2


def test_a_worker_tells_what_was_since_it_told_last(ticks: Clock) -> None:
    ticks.begin(traced=True)
    for _ in range(2):
        with WAIT, TRAIN:
            pass
        seconds, spans = ticks.tell()
        assert seconds["train"] == 1
        assert "wait" not in seconds
        assert [span.stage for span in spans] == ["other", "train"]
    ticks.begin_round(7)
    ticks.hear((seconds, spans), 2, 31)
    assert {span[3:] for span in ticks.spans[-2:]} == {(2, 7, 31)}


def test_sums_are_null_where_a_round_does_not_know() -> None:
    known: dict[str, float | None] = dict.fromkeys(NAMES, 1.5)
    assert total([known, known]) == dict.fromkeys(NAMES, 3.0)
    found = total([known, {**known, "train": None}])
    assert found is not None
    assert (found["train"], found["encode"]) == (None, 3.0)
    assert total([known, None]) is None
    assert total([]) is None


# Whole rounds


@pytest.mark.parametrize("setting", ["", "codec=identity", "strategy=fedmedian"])
def test_stages_add_up_to_what_the_processes_had(setting: str) -> None:
    job = replace(job_of(f"clients=3 {setting}"), trainer=Sleeps(0.3))
    for record in rounds_here(job)[1][1:]:  # the first one imports
        found = record.stages
        assert found is not None
        assert added(found) == pytest.approx(3 * record.seconds, rel=0.02)
        assert 0.6 <= record.seconds < 0.9  # two of three sleep at once
        assert found["train"] == pytest.approx(0.9, rel=0.1)
        idle = 2 * record.seconds - 0.9  # at most: a little was coding
        assert idle - 0.3 < found["idle"] <= idle + 0.01  # type: ignore[operator]
        assert found["wait"] == pytest.approx(record.seconds, rel=0.3)
        assert all(s is not None and s >= 0 for s in found.values())


PATHS = {
    "coded": ("", "train encode transfer decode aggregate evaluate"),
    "every update": ("strategy=fedmedian codec=topk", "train encode transfer decode aggregate evaluate"),
    "plain Flower": ("codec=identity", "train transfer decode aggregate evaluate"),
    "clients test": ("evaluate=clients", "train encode transfer decode aggregate evaluate"),
    "nobody tests": ("evaluate=none", "train encode transfer decode aggregate"),
    "small cohorts": ("cohort=2 engine.workers=1", "train encode transfer decode aggregate evaluate"),
    "central": (
        "privacy=central_gaussian privacy.epsilon=null privacy.noise_multiplier=1",
        "train encode transfer decode aggregate evaluate",
    ),
    "secure sums": ("privacy=distributed_gaussian clients=6", "train encode transfer decode aggregate"),
    "homomorphic": ("aggregation=ckks", "train encode transfer decode aggregate evaluate"),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_knows_its_stages(path: str) -> None:
    if path == "homomorphic":
        pytest.importorskip("tenseal")
    setting, expected = PATHS[path]
    job = job_of(setting)
    for record in rounds_here(job)[1]:
        assert record.stages is not None
        for name in expected.split():
            assert record.stages[name], name
        workers = 1 if "workers=1" in setting else 2
        assert added(record.stages) == pytest.approx((workers + 1) * record.seconds, rel=0.1)


def test_of_other_nodes_nothing_is_known() -> None:
    job = job_of("rounds=1")
    job.prepare()
    _, (record,) = rounds_on(job, Elsewhere(client_app(lambda _: job), [9, 7, 5, 3]))
    assert record.stages is not None
    assert record.stages["train"] is record.stages["idle"] is None
    assert all(record.stages[name] for name in ("transfer", "decode", "aggregate", "evaluate", "wait"))


def test_no_time_is_in_a_reply() -> None:
    def sent(seconds: float) -> list[tuple[int, int]]:
        job = replace(job_of("clients=2"), trainer=Sleeps(seconds))
        return [(record.uplink_bytes, record.downlink_bytes) for record in rounds_here(job)[1]]

    assert sent(0.0) == sent(0.1)


# What is left behind


def test_records_of_before_are_read_and_add_up_to_nothing(tmp_path: Path) -> None:
    simulate(tmp_path)
    records = read_rounds(tmp_path)
    page = write_page(tmp_path).read_text()
    assert "Where the time goes" in page
    assert re.search(
        r"Workers were busy [\d.]+ % of the time. Of all work that is counted here: training", page
    )
    assert "2 workers and the server" in page
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["stages"]
    (tmp_path / "rounds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_rounds(tmp_path) == [replace(record, stages=None) for record in records]
    assert total([record.stages for record in read_rounds(tmp_path)]) is None
    assert "Where the time goes" not in write_page(tmp_path).read_text()


def test_the_summary_holds_all_rounds(tmp_path: Path) -> None:
    summary = simulate(tmp_path)
    rounds = [record.stages for record in read_rounds(tmp_path)]
    assert summary.stages == total(rounds) == json.loads((tmp_path / "summary.json").read_text())["stages"]


def test_the_page_of_nodes_that_tell_nothing_and_of_many_rounds(tmp_path: Path) -> None:
    summary = simulate(tmp_path / "a", "rounds=1")
    (record,) = read_rounds(tmp_path / "a")
    known = {name: 0.25 for name in NAMES if name not in ("train", "idle")}
    folder = RunFolder(tmp_path / "b")
    made = [
        replace(record, round=i, seconds=1.75, stages={**known, "train": None, "idle": None})
        for i in range(1, 1001)
    ]
    lines = [json.dumps(vars(one)) + "\n" for one in made]
    (tmp_path / "b" / "rounds.jsonl").write_text("".join(lines))
    folder.write_summary(summary)
    page = write_page(tmp_path / "b").read_text()
    assert "The server waited for replies 14 % of the time. Of all work that is counted here: coding" in page
    assert "training" not in page
    assert "bars are means of 17" in page
    assert "mean of rounds 1 to 17: encode 0.250 s, transfer" in page
    assert page.count('class="area"') == 59


def events_of(folder: Path) -> tuple[dict[int, str], list[dict[str, Any]], dict[str, Any]]:
    """The names of the tracks, the spans, and what is said beside."""
    trace = json.loads((folder / "trace.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    return names, [e for e in trace["traceEvents"] if e["ph"] == "X"], trace["otherData"]


def test_a_trace_shows_every_process_and_adds_up_to_the_stages(tmp_path: Path) -> None:
    summary = simulate(tmp_path, "profile=true")
    names, spans, beside = events_of(tmp_path)
    assert names == {0: "server", 1: "worker 0", 2: "worker 1"}
    assert beside == {"events left out": 0}
    tracks = defaultdict(list)
    for span in spans:
        assert span["pid"] == span["tid"]
        assert 0 < span["ts"] <= span["ts"] + span["dur"] < 1e6 * summary.wall_s
        tracks[span["pid"]].append(span)
    assert sorted(tracks) == [0, 1, 2]
    for track in tracks.values():  # spans nest: what begins within another one ends within it
        ends: list[float] = []
        for span in sorted(track, key=lambda span: (span["ts"], -span["dur"])):
            while ends and ends[-1] <= span["ts"] + 1e-4:
                ends.pop()
            assert not ends or span["ts"] + span["dur"] <= ends[-1] + 1e-4
            ends.append(span["ts"] + span["dur"])
    assert {span["name"] for span in tracks[1]} <= {*NAMES} - {"idle", "wait", "evaluate"}
    assert {span["name"] for span in tracks[0]} <= {*NAMES, "round"} - {"train", "idle"}
    assert Counter(s["args"]["round"] for s in spans if s["name"] == "round") == {1: 1, 2: 1}
    trained = [s["args"] for track in (1, 2) for s in tracks[track] if s["name"] == "train"]
    assert {(args["round"], args["partition"]) for args in trained} == set(np.ndindex(3, 4)) - {
        (0, i) for i in range(4)
    }
    assert summary.stages is not None
    for name in set(NAMES) - {"idle", "other"}:
        drawn = sum(span["dur"] for span in spans if span["name"] == name) / 1e6
        assert drawn == pytest.approx(summary.stages[name], rel=0.03, abs=1e-3)


def test_no_profile_no_trace(tmp_path: Path) -> None:
    simulate(tmp_path, "rounds=1")
    assert not (tmp_path / "trace.json").exists()
    assert not CLOCK.spans


def test_an_interrupted_run_leaves_the_trace_of_its_last_round_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Federation._evaluate

    def interrupted(self: Federation, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return evaluate(self, number)

    monkeypatch.setattr(Federation, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path, "profile=true")
    _, spans, _ = events_of(tmp_path)
    assert {span["args"]["round"] for span in spans if span["name"] == "train"} == {1, 2}


def test_a_trace_is_bounded_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "MOST", 30)
    monkeypatch.setattr(server_app, "MOST", 30)
    out = Console(file=io.StringIO(), width=200)
    simulate(tmp_path, "profile=true", out)
    _, spans, beside = events_of(tmp_path)
    assert len(spans) == 30
    assert beside["events left out"] > 30
    said = f"trace.json holds the first 30 events; {beside['events left out']} later ones are left out"
    assert said in out.file.getvalue()  # type: ignore[attr-defined]


def test_whether_a_run_is_profiled_changes_no_bit(tmp_path: Path) -> None:
    simulate(tmp_path / "a")
    simulate(tmp_path / "b", "profile=true")
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert not config.differences(config.compose(FAST), config.compose(f"{FAST} profile=true"))


def test_spans_too_short_to_be_seen_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.begin(traced=True)
    times = iter([1.0, 1.0 + 1e-6, 1.5])
    monkeypatch.setattr(stages, "perf_counter", lambda: next(times))
    clock.begin_round(1)
    clock.enter("train")
    clock.leave()
    assert clock.spans == [Span("train", 1.0 + 1e-6, 1.5, 0, 1)]
