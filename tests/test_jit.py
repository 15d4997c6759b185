"""Compiled code that the disk keeps is good for as long as everything that was compiled into it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedapp import jit

LOOP = """
from fedapp.jit import jit
from fedapp.middle import twice

@jit
def loop(x):
    return twice(x)
"""
MIDDLE = """
from fedapp.jit import jit
from fedapp.constants import (
    FACTOR,
)

@jit
def twice(x):
    return FACTOR * x
"""
RUN = "from fedapp.loop import loop; print(loop(1), sum(loop.stats.cache_hits.values()))"


@pytest.mark.parametrize("place", ["beside", "chosen", "at home"])
def test_code_is_compiled_anew_when_a_constant_of_another_file_changes(tmp_path: Path, place: str) -> None:
    package = tmp_path / "fedapp"
    package.mkdir()
    shutil.copy(jit.__file__, package / "jit.py")
    files = {"__init__": "", "loop": LOOP, "middle": MIDDLE, "constants": "FACTOR = 2", "other": "A = 1"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    if place == "at home":
        (package / "__pycache__").write_text("not a folder, so nothing can be kept here")
    chosen = {"NUMBA_CACHE_DIR": str(tmp_path / "chosen")} if place == "chosen" else {}

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", RUN],
            cwd=tmp_path,
            env={
                "PATH": "",
                "XDG_CACHE_HOME": str(tmp_path / "home"),
                "PYTHONDONTWRITEBYTECODE": "1",
                **chosen,
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert run() == "2 0\n"
    assert run() == "2 1\n"
    (package / "other.py").write_text("A = 2")
    assert run() == "2 1\n"
    (package / "constants.py").write_text("FACTOR = 3")
    assert run() == "3 0\n"
    assert run() == "3 1\n"
    kept = {"beside": package / "__pycache__", "chosen": tmp_path / "chosen", "at home": tmp_path / "home"}
    assert list(kept[place].rglob("loop*.nbi"))


def test_a_file_needs_what_its_imports_need() -> None:
    codec = Path(jit.__file__).parent / "codec"
    assert {codec / "model.py", codec / "trellis.py"} < jit.sources(codec / "quantizer.py")
    assert codec / "trellis.py" not in jit.sources(codec / "rounding.py")
