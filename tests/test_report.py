"""What a run leaves behind: the contract of its files, whole or not at all, and a page that stands alone."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fedapp.errors import ConfigError
from fedapp.report.charts import Series, line_chart, split_chart
from fedapp.report.folder import Round, RunFolder, read_rounds
from fedapp.report.page import write_page
from fedapp.report.progress import Progress
from fedapp.report.summary import Summary, bytes_text, digits, part_text, read_summary, seconds_text, table

CONTRACT = (
    "task codec privacy engine clients cohort rounds accuracy loss uplink_bytes downlink_bytes "
    "uplink_bits_per_parameter uncompressed_bytes compression_ratio epsilon delta accountant privacy_unit "
    "startup_s seconds_per_round wall_s peak_rss_mb seed versions"
)
ROUND_CONTRACT = (
    "round accuracy loss uplink_bytes downlink_bytes epsilon seconds replies failures stages clock drift "
    "clients_mean clients_worst clients_tested"
)

SUMMARY = Summary(
    task="fashion_mnist",
    codec="default",
    privacy="none",
    engine="local",
    clients=10,
    cohort=5,
    rounds=2,
    accuracy=0.8124,
    loss=0.5,
    uplink_bytes=1_200_000,
    downlink_bytes=30_000_000,
    uplink_bits_per_parameter=1.13,
    uncompressed_bytes=60_000_000,
    compression_ratio=1.92,
    uplink_ratio=25.0,
    parameters=750_000,
    epsilon=None,
    delta=None,
    accountant=None,
    privacy_unit=None,
    startup_s=3.2,
    seconds_per_round=0.9,
    wall_s=5.0,
    peak_rss_mb=700.0,
    seed=0,
    versions={"torch": "2.14"},
)
PRIVATE = replace(
    SUMMARY,
    privacy="local_gaussian",
    epsilon=3.21,
    delta=1e-5,
    accountant="RDP",
    privacy_unit="client",
    releases=[{"noise": 4.56789, "sampling": "none", "rate": 1.0, "count": 15, "adjacency": "replace"}],
)


def one_round(number: int, **changes: Any) -> Round:
    return replace(Round(number, 0.7, 0.9, 600_000, 15_000_000, None, 0.9, 5, 0), **changes)


def run(path: Path, rounds: int = 2, summary: Summary = SUMMARY, config: str = "rounds: 2\n") -> RunFolder:
    folder = RunFolder(path)
    folder.write_config(config)
    for number in range(1, rounds + 1):
        folder.append(one_round(number))
    folder.write_summary(replace(summary, rounds=rounds))
    return folder


def strict(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# The files


def test_summary_and_rounds_keep_the_contract(tmp_path: Path) -> None:
    run(tmp_path)
    extra = {"uplink_ratio", "parameters", "interrupted", "note", "privacy_against", "coding", "stages"}
    extra |= {"clients_mean", "clients_worst", "clients_tested", "releases"}
    assert set(strict((tmp_path / "summary.json").read_text())) == set(CONTRACT.split()) | extra
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [" ".join(strict(line)) for line in lines] == [ROUND_CONTRACT] * 2


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    folder = run(tmp_path / "a" / "b")
    assert folder.rounds() == [one_round(1), one_round(2)]
    assert read_summary(tmp_path / "a" / "b" / "summary.json") == SUMMARY
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "rounds.jsonl", "summary.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_become_null(tmp_path: Path, value: float) -> None:
    folder = RunFolder(tmp_path)
    folder.append(one_round(1, loss=value, epsilon=value))
    folder.write_summary(replace(SUMMARY, epsilon=value))
    line = strict((tmp_path / "rounds.jsonl").read_text())
    assert line["loss"] is None
    assert line["epsilon"] is None
    assert strict((tmp_path / "summary.json").read_text())["epsilon"] is None


def test_the_model_comes_back_bit_for_bit_tied_tensors_too(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    state = {"a": tied, "b": tied, "t": tied.t(), "n": torch.tensor(7), "empty": torch.zeros(0)}
    RunFolder(tmp_path).write_model(state)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(
        torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state
    )


WRITES: dict[str, Callable[[RunFolder], None]] = {
    "config.yaml": lambda folder: folder.write_config("new"),
    "labels.json": lambda folder: folder.write_split([[9, 9]]),
    "summary.json": lambda folder: folder.write_summary(replace(SUMMARY, seed=9)),
    "model.safetensors": lambda folder: folder.write_model({"w": torch.ones(9)}),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / name).write_text("old")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(ConfigError, match=rf"{name} \(No space left on device\): free space there"):
        WRITES[name](folder)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"


def test_an_interrupt_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.write_model({"w": torch.ones(9)})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_append_leaves_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.append(one_round(1))

    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left"):
            folder.append(one_round(2))
    folder.append(one_round(3))
    assert [r.round for r in folder.rounds()] == [1, 3]


def test_lines_are_on_the_disk_where_a_checkpoint_follows_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced, fsync = RunFolder(tmp_path), list[str](), os.fsync

    def watched(number: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    folder.append(one_round(1), lasting=False)
    monkeypatch.setattr(os, "fsync", watched)
    folder.append(one_round(2), lasting=False)
    assert synced == []
    folder.append(one_round(3))
    assert synced == ["rounds.jsonl"]
    folder.append(one_round(4), lasting=False)
    folder.write_summary(SUMMARY)
    assert synced[1] == "rounds.jsonl"  # before the summary, which says that all is there
    assert [r.round for r in folder.rounds()] == [1, 2, 3, 4]


def test_a_line_cut_off_by_a_crash_is_not_a_round(tmp_path: Path) -> None:
    folder = run(tmp_path)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "accu')
    assert [r.round for r in folder.rounds()] == [1, 2]


# Refusals, before anything is trained


@pytest.mark.parametrize("name", ["rounds.jsonl", "summary.json"])
def test_a_folder_that_holds_a_run_is_refused_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(ConfigError, match=f"already holds a run .{name}.: choose another run_dir") as refusal:
        RunFolder(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert (tmp_path / name).read_text() == "old"


def test_a_folder_with_other_files_is_fine(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    RunFolder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".hydra"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_path_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file.*: free space there or set run_dir"):
        RunFolder(tmp_path / "file" / below)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_unwritable_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot write /proc/self/task"):
        RunFolder(Path("/proc/self/task"))


def test_a_full_disk_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        RunFolder(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The page


class Page:
    def __init__(self, folder: Path) -> None:
        path = write_page(folder)
        assert path == folder / "report.html"
        self.html = path.read_text(encoding="utf-8")
        assert path.stat().st_size < 300_000
        assert not re.search(r"https?:|<script|<link|<img|@import|url\(|\bnan\b|\binf\b|None", self.html)

    def charts(self) -> list[str]:
        return re.findall(r"<figure.*?<h3>(.*?)</h3>", self.html)


def test_the_page_of_a_plain_run(tmp_path: Path) -> None:
    run(tmp_path).write_split([[3, 0], [1, 2]])
    page = Page(tmp_path)
    assert page.charts() == ["Accuracy", "Loss", "Traffic", "Labels over clients"]
    for shown in ("81.24 %", "25.0x", "1.20 MB instead of 30.0 MB", "1.13", "no differential privacy"):
        assert shown in page.html
    assert "All 2 clients: 3 examples and 1 to 2 (median 2) of 2 labels each." in page.html


def test_the_page_of_a_private_run_shows_the_budget(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in (1, 2):
        folder.append(one_round(number, epsilon=1.6 * number))
    folder.write_summary(PRIVATE)
    page = Page(tmp_path)
    assert page.charts() == ["Accuracy", "Loss", "Traffic", "Privacy budget"]
    assert "delta 1e-05, per client, by RDP" in page.html
    assert "noise 4.57, sampling none, rate 1.00, count 15, adjacency replace" in page.html


def test_a_private_run_of_before_releases_were_recorded_is_shown(tmp_path: Path) -> None:
    run(tmp_path, summary=PRIVATE)
    file = tmp_path / "summary.json"
    known = json.loads(file.read_text())
    assert read_summary(file) == PRIVATE
    del known["releases"]
    file.write_text(json.dumps(known))
    page = Page(tmp_path)
    assert "3.21" in page.html
    assert "sampling none" not in page.html


def test_everything_a_user_wrote_stays_text(tmp_path: Path) -> None:
    bad = '<script>alert("1")</script>'
    summary = replace(SUMMARY, task=bad, codec=bad, engine=bad, note=bad, versions={bad: bad})
    run(tmp_path, summary=summary, config=f"name: {bad}\n</pre>")
    assert Page(tmp_path).html.count("&lt;script&gt;") >= 7


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_page_of_hardly_any_rounds(tmp_path: Path, rounds: int) -> None:
    nothing = replace(
        SUMMARY,
        accuracy=None,
        loss=None,
        uplink_bytes=0,
        uplink_bits_per_parameter=None,
        compression_ratio=None,
        uplink_ratio=None,
        seconds_per_round=None,
        interrupted=True,
    )
    run(tmp_path, rounds=rounds, summary=nothing)
    page = Page(tmp_path)
    assert f"Interrupted; rounds finished: {rounds}." in page.html
    assert ("No round was finished" in page.html) == (rounds == 0)


def test_simulated_time_has_a_chart_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number, clock in ((1, 3.25), (2, 17.5)):
        folder.append(one_round(number, clock=clock))
    folder.write_summary(SUMMARY)
    page = Page(tmp_path)
    assert page.charts() == ["Accuracy", "Accuracy over time", "Loss", "Traffic"]
    assert "<title>simulated seconds 17.5: last 70.00 %</title>" in page.html
    assert [float(tick) for tick in re.findall(r'<i class="x"[^>]*>([^<]*)<', page.html)][2:5] == [5, 10, 15]


def test_a_task_without_accuracy_shows_its_loss(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append(one_round(1, accuracy=None, loss=math.nan))
    folder.append(one_round(2, accuracy=None, loss=0.25))
    folder.write_summary(replace(SUMMARY, accuracy=None, loss=0.25))
    page = Page(tmp_path)
    assert page.charts() == ["Loss", "Traffic"]
    assert "<h2>loss</h2><p>0.250</p>" in page.html


def test_a_thousand_clients_and_ten_thousand_rounds_stay_legible(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps(vars(one_round(i, epsilon=i / 10))) + "\n" for i in range(1, 10_001)]
    (tmp_path / "rounds.jsonl").write_text("".join(lines))
    folder.write_summary(PRIVATE)
    folder.write_split([[i % 7, *([1] * 61)] for i in range(1000)])
    page = Page(tmp_path)
    assert "24 of them drawn" in page.html
    assert "150 of 10000 drawn" in page.html
    assert page.html.count('class="row"') == 24
    assert "round 10000: last 70.00 %" in page.html


def test_a_folder_without_a_summary_has_no_page(tmp_path: Path) -> None:
    RunFolder(tmp_path).append(one_round(1))
    with pytest.raises(ConfigError, match=r"no finished run \(no summary.json\)"):
        write_page(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "rounds.jsonl"])
@pytest.mark.parametrize("text", ["{}\n", "[1\n", '{"round": 1}\n'])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [-1.0, 1.0], [1e-9, 2e-9], [1e12, 3e12], [0.999, 0.9991]]
)
def test_axes_hold_their_values(values: list[float]) -> None:
    chart = line_chart("t", "u", [Series("s", list(enumerate(values, 1)), digits)])
    ticks = [float(tick) for tick in re.findall(r'<i class="y"[^>]*>([^<]*)<', chart)]
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= min(values) <= max(values) <= ticks[-1]
    rounds = re.findall(r'<i class="x"[^>]*>([^<]*)<', chart)
    assert rounds == [str(i) for i in range(1, len(values) + 1)]


@pytest.mark.parametrize("counts", [[], [[]], [[0, 0]], [[1], [2, 3]]])
def test_odd_splits_are_drawn_or_left_out(counts: list[list[int]]) -> None:
    assert bool(split_chart(counts)) == any(counts)


# The terminal


def test_no_terminal_one_plain_line_a_round() -> None:
    out = io.StringIO()
    with Progress(Console(file=out), rounds=2) as progress:
        progress.status("loading data")
        for number in (1, 2):
            progress.reply(number, 1, 5)
            progress.round(one_round(number, epsilon=1.5, failures=number - 1))
    assert out.getvalue().splitlines() == [
        "round 1/2  accuracy 70.00 %  uplink 600 kB  epsilon 1.50  0.900 s",
        "round 2/2  accuracy 70.00 %  uplink 1.20 MB  epsilon 1.50  1 failed  0.900 s",
    ]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_terminal_is_given_back(error: type[BaseException] | None) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    stdout = sys.stdout

    def rounds() -> None:
        with Progress(console, rounds=120) as progress:
            progress.round(one_round(12, epsilon=1.5, seconds=1.0))
            progress.reply(13, 7, 10)
            console.print(progress)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            rounds()
    else:
        rounds()
    text = out.getvalue()
    assert "round 13/120 acc 70.00 %  uplink 600 kB  eps 1.50  clients 7/10  01:48 left" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert sys.stdout is stdout


def test_the_table_says_what_the_run_cost(tmp_path: Path) -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(table(replace(PRIVATE, note="[b]odd[/b]"), tmp_path / "run-7"))
    text = out.getvalue()
    for shown in ("run-7", "81.24 %", "1.20 MB", "25.0x smaller", "30.0 MB", "3.21", "[b]odd[/b]", "5.00 s"):
        assert shown in text
    assert "delta 1e-05, per client, by RDP" in text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(999_600), "1.00 MB"),
        (bytes_text(12_345_678), "12.3 MB"),
        (bytes_text(5e15), "5000 TB"),
        (part_text(2, 300), "0.7 %"),
        (part_text(99.6, 1000), "10 %"),
        (part_text(0, 0), "-"),
        (digits(0.01234), "0.0123"),
        (digits(9.999), "10.0"),
        (digits(1e-7), "1e-07"),
        (seconds_text(59.96), "1 min 00 s"),
        (seconds_text(7300), "2 h 01 min"),
    ],
)
def test_numbers_are_short(shown: str, text: str) -> None:
    assert shown == text


def test_importing_the_report_is_cheap() -> None:
    code = (
        "import sys\nfrom fedapp.report import folder, page, progress, summary\n"
        "heavy = {'matplotlib', 'pandas', 'plotly', 'torch', 'flwr'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_rounds_of_no_run_is_empty(tmp_path: Path) -> None:
    assert read_rounds(tmp_path) == []


def test_how_accuracy_spreads_over_clients_is_shown(tmp_path: Path) -> None:
    spread = {"clients_mean": 0.8123, "clients_worst": 0.7, "clients_tested": 9}
    folder = RunFolder(tmp_path)
    for number in (1, 2):
        folder.append(one_round(number, **spread))
    summary = replace(SUMMARY, **spread)  # type: ignore[arg-type]
    folder.write_summary(summary)
    console = Console(file=io.StringIO(), width=120)
    console.print(table(summary, tmp_path))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"by client │ +81\.23 % │ worst tenth 70\.00 %, 9 clients tested", shown)
    page = write_page(tmp_path).read_text()
    assert "Accuracy by client" in page
    assert "worst tenth 70.00 %, 9 clients tested" in page
    console.print(table(SUMMARY, tmp_path))
    assert console.file.getvalue().count("by client") == 1  # type: ignore[attr-defined]
    folder.write_summary(SUMMARY)
    assert "mean over clients" not in write_page(tmp_path).read_text()
