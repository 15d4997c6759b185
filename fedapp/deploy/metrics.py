"""Numbers for Prometheus: its text exposition format 0.0.4, which any scraper reads."""

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """One family: its name, in base units (seconds, bytes), what it says, and its values by their labels.

    Counters only grow while the process lives, and end in _total.
    """

    name: str
    kind: Literal["counter", "gauge"]
    said: str
    values: Sequence[tuple[Labels, float]]


def metric(name: str, kind: Literal["counter", "gauge"], said: str, value: float) -> Metric:
    """A family of one value without labels."""
    return Metric(name, kind, said, [({}, value)])


def counted(name: str, said: str, label: str, counts: Mapping[str, float]) -> Metric:
    """A counter with one label."""
    return Metric(name, "counter", said, [({label: key}, value) for key, value in sorted(counts.items())])


def text(metrics: Iterable[Metric]) -> bytes:
    """All of them in the format; families without a value are left out."""
    return "".join(f"{line}\n" for each in metrics if each.values for line in _lines(each)).encode()


def process() -> Iterator[Metric]:
    """What this process takes, under the names that Prometheus' own clients use."""
    yield metric("process_cpu_seconds_total", "counter", "CPU time of this process.", time.process_time())
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux
        return
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    yield metric("process_resident_memory_bytes", "gauge", "Memory of this process.", resident)


def _lines(each: Metric) -> Iterator[str]:
    yield f"# HELP {each.name} {each.said}"
    yield f"# TYPE {each.name} {each.kind}"
    for labels, value in each.values:
        named = ",".join(f'{key}="{word.translate(_ESCAPED)}"' for key, word in labels.items())
        yield f"{each.name}{{{named}}} {_number(value)}" if named else f"{each.name} {_number(value)}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) else repr(value)
