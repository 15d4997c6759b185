"""Where tests train: on one thread, as workers do, since their number changes the last bits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """Programs in a folder of their own."""
    running = Shell(tmp_path)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(params=["fedapp", "Opacus"])
def clipping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who clips gradients: fedapp, or Opacus as where layers are not known."""
    if request.param == "Opacus":
        monkeypatch.setattr("fedapp.dp_step.are_known", lambda model: False)
    return str(request.param)


@pytest.fixture(autouse=True, scope="module")
def _where(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU, whatever is there, but for test_cuda.py: many call clients in this process, and it forks."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_cuda.py":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
