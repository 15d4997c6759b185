"""Charts as pieces of HTML: lines stretch as SVG, words stay HTML text, so both read well at any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fedapp.report.summary import part_text

POINTS = 150  # drawn in a line at most; more cannot be told apart and only make the page heavy
BARS = 60  # drawn in a chart of bars at most
ROWS = 24  # clients drawn at most
BINS = 10  # label colours that can be told apart


@dataclass(frozen=True)
class Series:
    """One line: its name, its (round or time, value) points, and how a value is written out."""

    name: str
    points: Sequence[tuple[float, float]]
    text: Callable[[float], str]


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    scale: float = 1,
    zero: bool = False,
    axis: str = "round",
) -> str:
    """Values over rounds, or over what `axis` says; at least one.

    The axis of values shows value / scale in `unit`, and begins at 0 if `zero`.
    """
    rounds = [x for one in series for x, _ in one.points]
    values = [y / scale for one in series for _, y in one.points]
    left, right = min(rounds), max(rounds)
    y_ticks = _ticks(min(0.0, *values) if zero else min(values), max(values))
    bottom, top = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return 50 if left == right else 100 * (x - left) / (right - left)

    def down(y: float) -> float:
        return 100 * (top - y) / (top - bottom)

    rows = [(down(y), text) for y, text in zip(y_ticks, _tick_texts(y_ticks), strict=True)]
    whole = axis == "round"
    ticks = _round_ticks(int(left), int(right)) if whole else _within(_ticks(left, right), left, right)
    columns = [(across(x), f"{x:g}") for x in ticks]
    lines = "".join(
        _line(i, one, lambda x: 10 * across(x), lambda y: 10 * down(y / scale), axis)
        for i, one in enumerate(series)
    )
    legend = "".join(
        f'<span><b class="s{i}"></b>{escape(one.name)} '
        f"<strong>{escape(one.text(one.points[-1][1]))}</strong></span>"
        for i, one in enumerate(series)
    )
    longest = max(len(one.points) for one in series)
    note = f" ({POINTS} of {longest} drawn)" if longest > POINTS else ""
    plot = _plot(title, unit, legend, rows, columns, lines, f"{axis}{note}")
    return f'<figure class="card">{plot}</figure>'


def stacked_chart(
    title: str,
    unit: str,
    names: Sequence[str],
    rounds: Sequence[tuple[int, Sequence[float]]],
    text: Callable[[float], str],
    note: str,
) -> str:
    """What each round is made of: bars of as many values of at least 0 as there are names, in their order.

    Of many rounds a bar is the mean of some. The legend says each name's share of all.
    """
    width = math.ceil(len(rounds) / BARS)
    bars = [rounds[start : start + width] for start in range(0, len(rounds), width)]
    means = [[sum(column) / len(bar) for column in zip(*(v for _, v in bar), strict=True)] for bar in bars]
    y_ticks = _ticks(0.0, max(map(sum, means)))
    top, left, right = y_ticks[-1], rounds[0][0], rounds[-1][0]

    def across(x: float) -> float:
        return 100 * (x - left + 0.5) / (right - left + 1)

    paths = [""] * len(names)
    hits = ""
    for bar, values in zip(bars, means, strict=True):
        first, last = bar[0][0], bar[-1][0]
        x, wide, y = 10 * across(first - 0.4), 10 * (across(last + 0.4) - across(first - 0.4)), 1000.0
        for i, value in enumerate(values):
            high = 1000 * value / top
            y -= high
            paths[i] += f"M{x:.1f} {y:.1f}h{wide:.1f}v{high:.1f}h{-wide:.1f}z"
        said = ", ".join(f"{name} {text(value)}" for name, value in zip(names, values, strict=True) if value)
        which = f"round {first}" if first == last else f"mean of rounds {first} to {last}"
        hits += f'<path class="area" d="M{x:.1f} 0h{wide:.1f}v1000h{-wide:.1f}z">'
        hits += f"<title>{which}: {escape(said)}</title></path>"
    drawn = "".join(f'<path class="c{_colour(i, names)}" d="{path}"/>' for i, path in enumerate(paths))
    sums = [sum(values[i] for _, values in rounds) for i in range(len(names))]
    legend = "".join(
        f'<span><b class="c{_colour(i, names)}"></b>{escape(name)} '
        f"<strong>{part_text(one, sum(sums))}</strong></span>"
        for i, (name, one) in enumerate(zip(names, sums, strict=True))
    )
    rows = [(100 * (top - y) / top, told) for y, told in zip(y_ticks, _tick_texts(y_ticks), strict=True)]
    columns = [(across(x), f"{x}") for x in _round_ticks(left, right)]
    axis = "round" if width == 1 else f"round (bars are means of {width})"
    plot = _plot(title, unit, legend, rows, columns, drawn + hits, axis)
    return f'<figure class="card wide">{plot}<p class="note">{escape(note)}</p></figure>'


def _colour(index: int, names: Sequence[str]) -> int:
    """The last one is what is left over, and grey."""
    return BINS - 1 if index == len(names) - 1 else index


def split_chart(counts: Sequence[Sequence[int]]) -> str:
    """How the labels lie over the clients: one bar a client, one colour a label (or a range of labels)."""
    labels = max((len(row) for row in counts), default=0)
    if not labels:
        return ""
    width = math.ceil(labels / BINS)
    bins = [range(start, min(start + width, labels)) for start in range(0, labels, width)]
    names = [str(b[0]) if len(b) == 1 else f"{b[0]}-{b[-1]}" for b in bins]
    shown = _spread(len(counts), ROWS)
    longest = max(max(sum(counts[client]) for client in shown), 1)
    rows = "".join(
        f'<div class="row"><i>{client}</i><div class="bar">'
        + "".join(
            f'<b class="c{i}" style="width:{100 * size / longest:.2f}%"'
            f' title="client {client}, label {name}: {size}"></b>'
            for i, (name, size) in enumerate(_binned(counts[client], bins, names))
            if size
        )
        + f"</div><i>{sum(counts[client])}</i></div>"
        for client in shown
    )
    legend = "".join(f'<span><b class="c{i}"></b>{name}</span>' for i, name in enumerate(names))
    title, legend = (
        ("Examples over clients", "") if labels == 1 else ("Labels over clients", f"label {legend}")
    )
    sizes = sorted(sum(row) for row in counts)
    kinds = sorted(sum(count > 0 for count in row) for row in counts)
    held = "" if labels == 1 else f" and {_range(kinds)} of {labels} labels"
    note = f"All {len(counts)} clients: {_range(sizes)} examples{held} each."
    if len(shown) < len(counts):
        note += f" {len(shown)} of them drawn, evenly spaced by number."
    return (
        f'<figure class="card wide"><figcaption><h3>{title}</h3>'
        f'<div class="legend">{legend}</div></figcaption><div class="ends"><span>client</span>'
        f'<span>examples</span></div><div class="bars">{rows}</div><p class="note">{note}</p></figure>'
    )


def _plot(
    title: str,
    unit: str,
    legend: str,
    rows: Sequence[tuple[float, str]],
    columns: Sequence[tuple[float, str]],
    drawing: str,
    axis: str,
) -> str:
    """A frame of so many percent from above and from the left, with a drawing in 1000 by 1000."""
    grid = "".join(f'<line class="grid" x2="1000" y1="{10 * y:.0f}" y2="{10 * y:.0f}"/>' for y, _ in rows)
    words = "".join(f'<i class="y" style="top:{y:.1f}%">{text}</i>' for y, text in rows)
    words += "".join(f'<i class="x" style="left:{x:.1f}%">{text}</i>' for x, text in columns)
    return (
        f'<figcaption><h3>{escape(title)}</h3><div class="legend">{legend}</div></figcaption>'
        f'<div class="unit">{escape(unit)}</div><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'{grid}{drawing}</svg>{words}</div><div class="axis">{axis}</div>'
    )


def _line(
    index: int,
    series: Series,
    across: Callable[[float], float],
    down: Callable[[float], float],
    axis: str,
) -> str:
    drawn = [series.points[i] for i in _spread(len(series.points), POINTS)]
    path = "L".join(f"{across(x):.0f} {down(y):.0f}" for x, y in drawn)
    marks = "".join(
        f'<g><path class="hit" d="M{across(x):.0f} 0v1000"/>'
        f'<path class="dot" d="M{across(x):.0f} {down(y):.0f}h0"/>'
        f"<title>{axis} {x:g}: {escape(series.name)} {escape(series.text(y))}</title></g>"
        for x, y in drawn
    )
    dotted = " dotted" if len(drawn) <= 30 else ""
    return f'<g class="s{index}{dotted}"><path class="line" d="M{path}"/>{marks}</g>'


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around [low, high] in a few steps of 1, 2, 2.5 or 5; below 0 only if a value is."""
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        spare = abs(high) / 10 or 1.0
        low, high = (low - spare if low else low), high + spare
    step = _step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """As many places as their step needs."""
    places = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    if not math.isclose(round(ticks[1], places), ticks[1]):  # steps of 2.5
        places += 1
    return [f"{tick:.{places}f}" for tick in ticks]


def _round_ticks(left: int, right: int) -> list[int]:
    step = max(1, round(_step(max(right - left, 1) / 6)))
    return [x for x in range(left, right + 1) if x % step == 0] or [left]


def _within(ticks: Sequence[float], left: float, right: float) -> Sequence[float]:
    return [x for x in ticks if left <= x <= right] or [left]


def _binned(row: Sequence[int], bins: Sequence[range], names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, sum(row[i] for i in b if i < len(row))) for b, name in zip(bins, names, strict=True)]


def _range(ordered: Sequence[int]) -> str:
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return f"{low}" if low == high else f"{low} to {high} (median {middle})"
