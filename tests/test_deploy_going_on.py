"""Which runs a server takes up again by itself, and how often."""

from pathlib import Path

import pytest

from fedapp.deploy.going_on import broken_off


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
