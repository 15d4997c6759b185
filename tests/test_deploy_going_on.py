"""Which runs a server takes up again by itself, and how often."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.common.constant import Status, SubStatus
from flwr.supercore.run import Run, RunStatus

from fedapp.deploy.going_on import SILENT, broken_off, unbegun

BEGAN = datetime(2026, 11, 28, 12, tzinfo=UTC)  # this server


def begun(runs: Path, number: int) -> Path:
    """The folder of a run that began."""
    folder = runs / str(number)
    folder.mkdir()
    (folder / "config.yaml").write_text("rounds: 5\n")
    return folder


def test_a_run_that_began_and_did_not_end_was_broken_off(tmp_path: Path) -> None:
    begun(tmp_path, 10)
    (begun(tmp_path, 11) / "summary.json").write_text("{}")  # it ended, or was stopped
    (tmp_path / "12").mkdir()  # it was not begun
    begun(tmp_path, 13).rename(tmp_path / "other")
    assert list(broken_off(tmp_path)) == [tmp_path / "10"]


@pytest.mark.parametrize(("times", "again"), [(0, True), (2, True), (3, False), (4, False)])
def test_a_run_is_taken_up_three_times(tmp_path: Path, times: int, again: bool) -> None:
    """Each leaves a link by its own id; those of another run do not count."""
    folder, other = begun(tmp_path, 10), begun(tmp_path, 11)
    for number in range(20, 20 + times):
        (tmp_path / str(number)).symlink_to(folder)
    for number in range(30, 33):
        (tmp_path / str(number)).symlink_to(other)
    assert list(broken_off(tmp_path)) == [folder] * again


def known(number: int, status: RunStatus, minutes: int = -1, overrides: str = "rounds=5") -> Run:
    """A run that had a process so long after this server began."""
    running = "" if status.status == Status.PENDING else (BEGAN + timedelta(minutes=minutes)).isoformat()
    run = Run.create_empty(number)
    return replace(run, status=status, running_at=running, override_config={"overrides": overrides})


RUNNING, PENDING = RunStatus(Status.RUNNING, "", ""), RunStatus(Status.PENDING, "", "")
SILENCED = RunStatus(Status.FINISHED, SubStatus.FAILED, SILENT)


def test_a_run_whose_process_died_before_it_wrote_anything_was_broken_off_too(tmp_path: Path) -> None:
    begun(tmp_path, 10)
    (tmp_path / "11").mkdir()
    runs = [
        known(10, RUNNING),  # its folder says the rest
        known(11, RUNNING),
        known(12, SILENCED),
        known(13, RUNNING, minutes=1),  # in this server's time
        known(14, PENDING),
        known(15, RunStatus(Status.FINISHED, SubStatus.FAILED, "there is no such test table")),
        known(16, RunStatus(Status.FINISHED, SubStatus.STOPPED, "")),
    ]
    assert list(unbegun(runs, tmp_path, BEGAN)) == [11, 12]


@pytest.mark.parametrize(("times", "again"), [(0, True), (2, True), (3, False)])
def test_such_a_run_is_taken_up_three_times_as_well(tmp_path: Path, times: int, again: bool) -> None:
    later = [known(number, SILENCED, overrides="rounds=5 resume=10") for number in range(20, 20 + times)]
    assert list(unbegun([*later, known(10, SILENCED)], tmp_path, BEGAN)) == [10] * again


def test_such_a_run_that_is_under_way_again_is_left_alone(tmp_path: Path) -> None:
    runs = [known(20, PENDING, overrides="rounds=5 resume=10"), known(10, SILENCED)]
    assert list(unbegun(runs, tmp_path, BEGAN)) == []
