"""The summary of a run, and the one way this application writes sizes, shares, times and budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedapp.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"  # how a number that does not apply is shown


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished (or interrupted) run comes to; the keys of summary.json.

    A number that does not apply is None. Bytes are sums over all rounds and clients; `uncompressed_bytes` is
    what float32 would have cost in both directions, `uplink_ratio` float32 / sent for the uplink alone. Of a
    run that went on after a stop, times add up over its processes, each up to its last checkpoint; bytes are
    those of the rounds in rounds.jsonl.
    """

    task: str
    codec: str
    privacy: str
    engine: str
    clients: int
    cohort: int
    rounds: int  # finished
    accuracy: float | None  # 0 to 1
    loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    uplink_bits_per_parameter: float | None
    uncompressed_bytes: int
    compression_ratio: float | None
    uplink_ratio: float | None
    parameters: int
    epsilon: float | None
    delta: float | None
    accountant: str | None
    privacy_unit: Literal["example", "client"] | None
    startup_s: float
    seconds_per_round: float | None
    wall_s: float
    peak_rss_mb: float
    seed: int
    versions: dict[str, str]
    clients_mean: float | None = None  # where clients test: accuracy, where each of them counts the same
    clients_worst: float | None = None  # and that of the worst tenth of them
    clients_tested: int | None = None  # how many did
    releases: Sequence[Mapping[str, object]] | None = None  # those that epsilon is computed from
    privacy_against: str | None = None
    coding: str | None = None  # how updates were coded, where the settings leave that open
    interrupted: bool = False
    stages: Mapping[str, float | None] | None = None  # seconds of all rounds by stage, see fedapp/stages.py
    note: str | None = None  # what a reader must know, e.g. why epsilon is None

    @property
    def float32_uplink_bytes(self) -> int | None:
        """What the uplink would have cost in float32, in bytes."""
        return None if self.uplink_ratio is None else round(self.uplink_ratio * self.uplink_bytes)


def to_json(record: Any, *, indent: int | None = None) -> str:
    """A flat dataclass instance as strictly valid JSON: NaN and infinities become null."""
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(record).items()
    }
    return json.dumps(values, indent=indent, allow_nan=False)


def read_summary(path: Path) -> Summary:
    """The Summary in a summary.json; ConfigError if there is none or it misses a key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Summary(**{field.name: found[field.name] for field in fields(Summary) if field.name in found})
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} is no finished run (no summary.json): name a run folder") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {path} ({error}): run it again or restore the file") from error


def bytes_text(count: float) -> str:
    """12345678 -> '12.3 MB' (decimal units, three digits)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{digits(count)} {unit}"
        count /= 1000
    return f"{digits(count)} TB"


def digits(value: float) -> str:
    """Three significant digits, never in powers of ten for everyday sizes: 0.0123, 1.23, 12.3, 123, 12345."""
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    power = math.floor(math.log10(abs(float(f"{value:.3g}"))))  # of the rounded value: 9.999 is 10.0
    return f"{value:.{max(0, 2 - power)}f}"


def percent_text(share: float | None) -> str:
    """0.8124 -> '81.24 %'."""
    return NONE if share is None else f"{100 * share:.2f} %"


def part_text(part: float, whole: float) -> str:
    """How much of a whole, roughly: '81 %', '0.4 %'; of nothing '-'."""
    share = 100 * part / whole if whole else None
    return NONE if share is None else f"{share:.{int(share < 9.95)}f} %"


def ratio_text(ratio: float | None) -> str:
    """How many times smaller: 28.4 -> '28.4x'."""
    return NONE if ratio is None else f"{digits(ratio)}x"


def seconds_text(seconds: float | None) -> str:
    """0.8 -> '0.800 s', 75 -> '1 min 15 s', 7300 -> '2 h 01 min'."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{digits(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def guarantee_text(summary: Summary) -> str:
    """What stands beside epsilon: 'delta 1e-05, per client, ..., by prv', or that nothing is private."""
    if summary.privacy == "none":
        return "no differential privacy"
    parts = [
        None if summary.delta is None else f"delta {summary.delta:.3g}",
        None if summary.privacy_unit is None else f"per {summary.privacy_unit}",
        None if summary.privacy_against is None else f"against {summary.privacy_against}",
        None if summary.accountant is None else f"by {summary.accountant}",
    ]
    return ", ".join(part for part in parts if part) or "not accounted"


def release_text(release: Mapping[str, object]) -> str:
    """One release, as summary.json has it: 'noise 1.20, sampling none, rate 1.00, count 3, ...'."""
    return ", ".join(
        f"{name} {digits(value) if isinstance(value, float) else value}" for name, value in release.items()
    )


def spread_text(summary: Summary) -> str:
    """What stands beside the mean over clients: 'worst tenth 79.12 %, 10 clients tested'."""
    many = summary.clients_tested or 0
    return f"worst tenth {percent_text(summary.clients_worst)}, {many} client{'s' * (many != 1)} tested"


def table(summary: Summary, folder_path: Path) -> Table:
    """The end of a run on a terminal: accuracy, traffic, privacy, time; titled with the run folder's name."""
    from rich.table import Table
    from rich.text import Text

    s = summary
    ended = f"{'interrupted after ' * s.interrupted}{s.rounds} round{'s' * (s.rounds != 1)}"
    rows = [
        ("accuracy", percent_text(s.accuracy), f"{ended}, {s.cohort} of {s.clients} clients a round"),
        ("uplink", bytes_text(s.uplink_bytes), _smaller(s.uplink_ratio)),
        ("downlink", bytes_text(s.downlink_bytes), ""),
        (
            "both ways",
            bytes_text(s.uplink_bytes + s.downlink_bytes),
            _smaller(s.compression_ratio),
        ),
        ("epsilon", NONE if s.epsilon is None else digits(s.epsilon), guarantee_text(s)),
        (
            "time",
            seconds_text(s.wall_s),
            f"start-up {seconds_text(s.startup_s)}, {seconds_text(s.seconds_per_round)} a round",
        ),
    ]
    if s.clients_mean is not None:
        rows.insert(1, ("by client", percent_text(s.clients_mean), spread_text(s)))
    if s.note:
        rows.append(("note", "", s.note))
    shown = Table(title=Text(folder_path.name), show_header=False, title_justify="left")
    shown.add_column(style="bold")
    shown.add_column(justify="right", no_wrap=True)
    shown.add_column(style="dim")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))  # Text: a note's square brackets are not markup
    return shown


def _smaller(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio_text(ratio)} smaller than float32"
