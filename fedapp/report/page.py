"""report.html: one run on one page that needs nothing else, neither the network nor a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fedapp.report.charts import Series, line_chart, split_chart, stacked_chart
from fedapp.report.document import document, table, tile
from fedapp.report.folder import Round, read_rounds, write_text
from fedapp.report.summary import (
    NONE,
    Summary,
    bytes_text,
    digits,
    guarantee_text,
    part_text,
    percent_text,
    ratio_text,
    read_summary,
    release_text,
    seconds_text,
    spread_text,
)
from fedapp.stages import NAMES, total


def write_page(folder: Path) -> Path:
    """Write report.html into a run folder, from the files in it; ConfigError if it is no finished run."""
    summary = read_summary(folder / "summary.json")
    config, labels = folder / "config.yaml", folder / "labels.json"
    rounds = read_rounds(folder)
    lines = _charts(rounds)
    split = split_chart(json.loads(labels.read_text(encoding="utf-8"))["counts"]) if labels.exists() else ""
    charts = f'<section class="charts of{len(lines)}">{"".join(lines)}{_stages(rounds)}{split}</section>'
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    page = folder / "report.html"
    write_text(page, _page(summary, charts, text, _alarms(rounds), _data(folder)))
    return page


def _data(folder: Path) -> str:
    """What clients told of the quality of their data: sums, and the most that one of them has."""
    file = folder / "data.json"
    if not file.exists():
        return ""
    counts: list[dict[str, int]] = json.loads(file.read_text(encoding="utf-8"))["counts"]
    rows = [("clients that told", str(len(counts)))]
    for name in dict.fromkeys(name for client in counts for name in client):
        told = [client[name] for client in counts if name in client]
        many = sum(count > 0 for count in told)
        rows.append((name, f"{sum(told):,} of {many} clients, {max(told):,} at most"))
    return table("Data of the clients", rows)


def _alarms(rounds: Sequence[Round]) -> list[str]:
    """Drift that clients told of, in words."""
    alarms = [(r.round, r.drift) for r in rounds if r.drift]
    if not alarms:
        return []
    most = max(count for _, count in alarms)
    return [
        f"Drift: from round {alarms[0][0]} on, up to {most} client{'s' * (most > 1)} a round found new "
        "examples to differ from the first window (two-sample chi-square tests, task.alarm)."
    ]


def _page(s: Summary, charts: str, config: str, alarms: Sequence[str] = (), data: str = "") -> str:
    choices = f"{s.task} · {s.codec} · {s.privacy} · {s.engine}"
    notes = [f"Interrupted; rounds finished: {s.rounds}."] if s.interrupted else []
    notes += [s.note] if s.note else []
    return document(
        choices,
        f'<header><h1>{escape(s.task)}</h1><p class="choices">{_choices(s)}</p></header>'
        + "".join(f'<p class="alert">{escape(note)}</p>' for note in [*notes, *alarms])
        + f'<section class="tiles">{_tiles(s)}</section>'
        + charts
        + f'<section class="tables">{_tables(s)}{data}</section>'
        + (
            f'<details class="card"><summary>Configuration</summary><pre>{escape(config)}</pre></details>'
            if config
            else ""
        ),
    )


def _choices(s: Summary) -> str:
    pairs = (("codec", s.codec), ("privacy", s.privacy), ("engine", s.engine))
    return "".join(f"<span>{name} <strong>{escape(value)}</strong></span>" for name, value in pairs)


def _tiles(s: Summary) -> str:
    float32 = s.float32_uplink_bytes
    sent = bytes_text(s.uplink_bytes)
    bits = s.uplink_bits_per_parameter
    loss = "" if s.loss is None else digits(s.loss)
    tiles = (
        ("loss", loss, "")
        if loss and s.accuracy is None
        else ("accuracy", percent_text(s.accuracy), loss and f"loss {loss}"),
        (
            "uplink against float32",
            ratio_text(s.uplink_ratio),
            sent if float32 is None else f"{sent} instead of {bytes_text(float32)}",
        ),
        ("bits per parameter", NONE if bits is None else digits(bits), f"{s.parameters:,} parameters"),
        ("epsilon", NONE if s.epsilon is None else digits(s.epsilon), guarantee_text(s)),
        ("wall time", seconds_text(s.wall_s), f"start-up {seconds_text(s.startup_s)}"),
    )
    return "".join(tile(*each) for each in tiles)


def _charts(rounds: Sequence[Round]) -> list[str]:
    if not rounds:
        return ['<p class="card wide empty">No round was finished, so there is nothing to draw.</p>']
    accuracy = [(r.round, r.accuracy) for r in rounds if r.accuracy is not None]
    timed = [(r.clock, r.accuracy) for r in rounds if r.accuracy is not None and r.clock is not None]
    loss = [(r.round, r.loss) for r in rounds if r.loss is not None]
    epsilon = [(r.round, r.epsilon) for r in rounds if r.epsilon is not None]
    drift = [(r.round, r.drift) for r in rounds if r.drift is not None]
    charts = []
    if accuracy:
        series = Series("last", accuracy, percent_text)
        charts.append(line_chart("Accuracy", "% of test examples", [series], scale=0.01))
    means = [(r.round, r.clients_mean) for r in rounds if r.clients_mean is not None]
    worst = [(r.round, r.clients_worst) for r in rounds if r.clients_worst is not None]
    if means:
        spread = [Series("mean", means, percent_text), Series("worst tenth", worst, percent_text)]
        charts.append(line_chart("Accuracy by client", "% of what it held out", spread, scale=0.01))
    if timed:
        series = Series("last", timed, percent_text)
        axis = "simulated seconds"
        charts.append(line_chart("Accuracy over time", "% of test examples", [series], scale=0.01, axis=axis))
    if loss:
        charts.append(line_chart("Loss", "test loss", [Series("last", loss, digits)]))
    scale, unit = _unit(max(max(r.uplink_bytes, r.downlink_bytes) for r in rounds))
    traffic = [
        Series("uplink", [(r.round, r.uplink_bytes) for r in rounds], bytes_text),
        Series("downlink", [(r.round, r.downlink_bytes) for r in rounds], bytes_text),
    ]
    charts.append(line_chart("Traffic", f"{unit} a round, all clients", traffic, scale=scale, zero=True))
    if epsilon:
        series = Series("spent", epsilon, digits)
        charts.append(line_chart("Privacy budget", "epsilon", [series], zero=True))
    if any(count for _, count in drift):
        series = Series("last", drift, digits)
        charts.append(line_chart("Drift", "clients whose new examples differ from their first", [series]))
    return charts


def _stages(rounds: Sequence[Round]) -> str:
    """Where the time went, drawn and in words; nothing where no round knows."""
    known = [(r, r.stages) for r in rounds if r.stages is not None]
    sums = total([stages for _, stages in known])
    if sums is None:
        return ""
    took, seconds = {name: s or 0.0 for name, s in sums.items()}, sum(r.seconds for r, _ in known)
    work = [name for name in NAMES if took[name] and name not in ("idle", "wait")]
    if sums["idle"] is None:  # nodes tell nothing of their time
        of, left = "the server", "wait"
        note = f"The server waited for replies {part_text(took['wait'], seconds)} of the time."
    else:
        theirs = sum(took.values()) - seconds  # what the server did and waited makes up the seconds
        many = round(theirs / seconds)
        of, left = f"{many} worker{'s' * (many != 1)} and the server's work", "idle"
        note = f"Workers were busy {part_text(theirs - took['idle'], theirs)} of the time."
    names = [*work, left]
    bars = [(r.round, [stages.get(name) or 0.0 for name in names]) for r, stages in known]
    shares = [
        f"{said} {part_text(sum(took[name] for name in of), sum(took[name] for name in work))}"
        for said, of in _SAID.items()
        if any(took[name] for name in of)
    ]
    note += f" Of all work that is counted here: {', '.join(shares)}."
    return stacked_chart("Where the time goes", f"seconds a round, of {of}", names, bars, seconds_text, note)


_SAID = {
    "training": ("train",),
    "coding": ("encode", "decode"),
    "transfer": ("transfer",),
    "adding up": ("aggregate",),
    "testing": ("evaluate",),
    "the rest": ("other",),
}


def _unit(most: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if most >= scale:
            return scale, unit
    return 1, "bytes"


def _tables(s: Summary) -> str:
    run = (
        ("rounds", f"{s.rounds}"),
        ("clients", f"{s.clients}"),
        ("cohort", f"{s.cohort}"),
        ("seed", f"{s.seed}"),
        ("accuracy", percent_text(s.accuracy)),
        ("loss", NONE if s.loss is None else digits(s.loss)),
        *_by_client(s),
        ("parameters", f"{s.parameters:,}"),
    )
    bits = s.uplink_bits_per_parameter
    traffic = (
        ("uplink", f"{s.uplink_bytes:,}"),
        ("downlink", f"{s.downlink_bytes:,}"),
        ("float32, both ways", f"{s.uncompressed_bytes:,}"),
        ("float32 uplink / uplink", ratio_text(s.uplink_ratio)),
        ("float32 / both ways", ratio_text(s.compression_ratio)),
        ("uplink bits a parameter", NONE if bits is None else digits(bits)),
        ("coding", s.coding or NONE),
    )
    privacy = (
        ("privacy", s.privacy),
        ("epsilon", NONE if s.epsilon is None else digits(s.epsilon)),
        ("delta", NONE if s.delta is None else f"{s.delta:.3g}"),
        ("accountant", s.accountant or NONE),
        *(("release", release_text(release)) for release in s.releases or ()),
        ("unit", s.privacy_unit or NONE),
        ("against", s.privacy_against or NONE),
    )
    cost = (
        ("wall time", seconds_text(s.wall_s)),
        ("start-up", seconds_text(s.startup_s)),
        ("a round", seconds_text(s.seconds_per_round)),
        ("peak memory", bytes_text(s.peak_rss_mb * 1e6)),
        *s.versions.items(),
    )
    groups = (("Run", run), ("Traffic, bytes", traffic), ("Privacy", privacy), ("Time and versions", cost))
    return "".join(table(title, rows) for title, rows in groups)


def _by_client(s: Summary) -> tuple[tuple[str, str], ...]:
    if s.clients_mean is None:
        return ()
    return (("mean over clients", percent_text(s.clients_mean)), ("their spread", spread_text(s)))
