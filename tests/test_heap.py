"""Memory that is freed is used again."""

import subprocess
import sys

import pytest

from fedapp.engine import heap

_COUNTS = """
import resource
import sys

import numpy as np

from fedapp.engine.heap import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

np.ones(10_000_000)
before = faults()
for _ in range(5):
    np.ones(10_000_000)
print(faults() - before)
"""


def faults(how: str) -> int:
    """Pages that the system hands out while an array of 80 MB is made five times."""
    done = subprocess.run([sys.executable, "-c", _COUNTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(heap._MALLOPT is None, reason="the C library is not glibc")
def test_an_array_takes_the_pages_of_one_that_is_gone() -> None:
    assert faults("keep") < 100 < faults("not")
