"""Where tests train."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _on_a_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU, whatever is there, but for test_cuda.py: many call clients in this process, and it forks."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_cuda.py":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
