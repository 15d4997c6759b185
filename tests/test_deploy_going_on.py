"""Which runs a server takes up again by itself, and how often."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.common.constant import Status, SubStatus
from flwr.supercore.run import Run, RunStatus

from fedapp.deploy.going_on import SILENT, broken_off

BEGAN = datetime(2026, 11, 28, 12, tzinfo=UTC)  # this server


def known(number: int, status: RunStatus, minutes: int = -1, overrides: str = "rounds=5") -> Run:
    """A run that had a process so long after this server began."""
    running = "" if status.status == Status.PENDING else (BEGAN + timedelta(minutes=minutes)).isoformat()
    run = Run.create_empty(number)
    return replace(run, status=status, running_at=running, override_config={"overrides": overrides})


RUNNING, PENDING = RunStatus(Status.RUNNING, "", ""), RunStatus(Status.PENDING, "", "")
SILENCED = RunStatus(Status.FINISHED, SubStatus.FAILED, SILENT)


STOPPED = RunStatus(Status.FINISHED, SubStatus.STOPPED, "")
FAILED = RunStatus(Status.FINISHED, SubStatus.FAILED, "1 of clients=2 nodes came within round_timeout=60 s")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("status", "minutes", "broken"),
    [
        (RUNNING, -1, True),
        (SILENCED, -9, True),
        (RUNNING, 1, False),  # in this server's time
        (PENDING, -1, False),  # Flower starts it
        (STOPPED, -1, False),
        (FAILED, -1, False),
    ],
)
def test_a_run_was_broken_off_where_its_process_went_with_the_server(
    begun: bool, status: RunStatus, minutes: int, broken: bool, tmp_path: Path
) -> None:
    """Whether or not it had written anything."""
    if begun:
        (tmp_path / "10").mkdir()
        (tmp_path / "10/config.yaml").write_text("rounds: 5\n")
    assert list(broken_off([known(10, status, minutes)], tmp_path, BEGAN)) == [10] * broken


def test_a_run_that_has_a_summary_ended(tmp_path: Path) -> None:
    (tmp_path / "10").mkdir()
    (tmp_path / "10/summary.json").write_text("{}")
    assert list(broken_off([known(10, RUNNING), known(11, RUNNING)], tmp_path, BEGAN)) == [11]


@pytest.mark.parametrize(("times", "again"), [(0, True), (2, True), (3, False), (4, False)])
def test_a_run_is_taken_up_three_times(tmp_path: Path, times: int, again: bool) -> None:
    """Runs of another experiment do not count."""
    later = [known(number, SILENCED, overrides="rounds=5 resume=10") for number in range(20, 20 + times)]
    others = [known(number, STOPPED, overrides="rounds=5 resume=11") for number in range(30, 33)]
    runs = [*later, *others, known(11, SILENCED), known(10, SILENCED)]
    assert list(broken_off(runs, tmp_path, BEGAN)) == [10] * again


@pytest.mark.parametrize("status", [PENDING, STOPPED])
def test_the_newest_run_of_an_experiment_says_what_became_of_it(tmp_path: Path, status: RunStatus) -> None:
    runs = [known(20, status, overrides="rounds=5 resume=10"), known(10, SILENCED)]
    assert list(broken_off(runs, tmp_path, BEGAN)) == []
