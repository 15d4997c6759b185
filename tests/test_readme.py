"""The README says what is there: its commands compose, its tables name every choice, its scripts exist."""

import os
import re
import shlex
from pathlib import Path

import pytest

from fedapp import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^fedapp simulate (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose_and_build(command: str) -> None:
    """Every `fedapp simulate` line is a valid job; of a sweep, the first of each list is taken."""
    words = shlex.split(command)
    if words[0] == "-m":
        words = [f"{key}={values.split(',')[0]}" for key, values in (w.split("=") for w in words[1:])]
    config.job(config.compose(shlex.join(words)))


def test_every_choice_is_named() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE))
    for group, said in rows.items():
        choices = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert choices == set(re.findall(r"`(\w+)`", said)), group
    assert set(rows) >= {"task", "partition", "model", "privacy", "trainer", "codec", "strategy"}


def test_architecture_names_what_is_there() -> None:
    """Each file and folder in the tree exists, and each module of the package is in the tree."""
    tree = README.split("## Architecture")[1].split("\n## ")[0]
    named = re.findall(r"^      ([\w/.]+) ", tree, re.MULTILINE)
    assert all((ROOT / "fedapp" / name).exists() for name in named)
    there = {path.name for path in (ROOT / "fedapp").iterdir() if not path.name.startswith("_")}
    assert there - {name.strip("/") for name in named} <= {"errors.py", "check.py", "py.typed"}


def test_scripts_can_be_run() -> None:
    for name in re.findall(r"\bscripts/(\w+)\b(?!\.)", README):
        assert os.access(ROOT / "scripts" / name, os.X_OK), name
    for name in re.findall(r"\bscripts/(\w+\.py)\b", README):
        assert (ROOT / "scripts" / name).exists(), name
