"""Compiled code that the disk keeps is good for as long as everything that was compiled into it."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedapp import jit

PACKAGE = Path(jit.__file__).parent
LOOP = """
from fedapp.jit import jit
from fedapp.middle import twice

@jit
def loop(x):
    return twice(x)
"""
MIDDLE = """
from fedapp.jit import inlined
from fedapp.constants import (
    FACTOR,
)

@inlined
def twice(x):
    return FACTOR * x
"""
RUN = """
from fedapp.loop import loop
print(loop(1), sum(loop.stats.cache_hits.values()))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of the same name, in which one compiled loop needs a constant of another file."""
    package = tmp_path / "fedapp"
    package.mkdir()
    shutil.copy(jit.__file__, package / "jit.py")
    files = {"__init__": "", "loop": LOOP, "middle": MIDDLE, "constants": "FACTOR = 2", "other": "A = 1"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return package


def run(package: Path, code: str = RUN, **environment: str) -> str:
    home = {"PATH": "", "XDG_CACHE_HOME": str(package.parent / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=package.parent, env=home | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("place", ["beside", "chosen", "at home"])
def test_code_is_compiled_anew_when_a_constant_of_another_file_changes(package: Path, place: str) -> None:
    if place == "at home":
        (package / "__pycache__").write_text("not a folder, so nothing can be kept here")
    folder = package.parent / "chosen"
    chosen = {"NUMBA_CACHE_DIR": str(folder)} if place == "chosen" else {}
    assert run(package, **chosen) == "2 0\n"
    assert run(package, **chosen) == "2 1\n"
    (package / "other.py").write_text("A = 2")
    assert run(package, **chosen) == "2 1\n"
    (package / "constants.py").write_text("FACTOR = 3")
    assert run(package, **chosen) == "3 0\n"
    assert run(package, **chosen) == "3 1\n"
    kept = {"beside": package / "__pycache__", "chosen": folder, "at home": package.parent / "home"}
    assert list(kept[place].rglob("loop*.nbi"))


def test_code_of_a_source_that_changes_meanwhile_is_for_that_process_alone(package: Path) -> None:
    late = "import fedapp.constants, fedapp.jit; open('fedapp/constants.py', 'w').write('FACTOR = 7')" + RUN
    assert run(package, late) == "2 0\n"
    assert run(package) == "7 0\n"
    assert run(package) == "7 1\n"


def test_where_others_keep_their_code_is_theirs(package: Path) -> None:
    """What was chosen for them stays, and matters no more to the package than what Numba forgets."""
    theirs = (
        "from numba import config, njit; config.CACHE_LOCATOR_CLASSES = 'ZipCacheLocator'; import fedapp.jit"
    )
    assert run(package, f"{theirs}{RUN}print(config.CACHE_LOCATOR_CLASSES)") == "2 0\nZipCacheLocator\n"
    anew = "; import os; os.environ['NUMBA_NUM_THREADS'] = '1'; njit(lambda: 0)()"  # reads its environment
    assert run(package, theirs + anew + RUN) == "2 1\n"
    (package / "constants.py").write_text("FACTOR = 3")
    assert run(package, theirs + anew + RUN) == "3 0\n"


def test_a_file_needs_what_its_imports_need() -> None:
    codec = PACKAGE / "codec"
    assert {codec / "model.py", codec / "trellis.py"} < jit.sources(codec / "quantizer.py")
    assert codec / "trellis.py" not in jit.sources(codec / "rounding.py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_of_the_package_is_overlooked(path: Path) -> None:
    """Python's own parser finds no file that the quick look at its lines does not."""
    found = set[Path]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):  # of these the package itself, which holds nothing, is the only one
            assert not any(alias.name.startswith("fedapp.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            module, *within = str(node.module).split(".")
            inside = [PACKAGE.joinpath(*within), *(PACKAGE.joinpath(*within, a.name) for a in node.names)]
            found |= {one.with_suffix(".py") for one in inside if module == "fedapp"}
            found |= {one / "__init__.py" for one in inside if module == "fedapp"}
    assert {file for file in found if file.is_file()} <= jit.sources(path)
