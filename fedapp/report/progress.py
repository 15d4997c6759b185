"""What a run shows while it runs: one live line on a terminal, one plain line a round anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedapp.report.folder import Round
from fedapp.report.summary import bytes_text, digits, percent_text, seconds_text

NARROW = 110  # columns; with fewer, the line leaves out the bar and shortens words


class Progress:
    """A context manager around the rounds; leaving it, in whatever way, gives the terminal back as it was."""

    def __init__(self, console: Console, rounds: int, uplink_bytes: int = 0) -> None:
        """`uplink_bytes` were sent in rounds before."""
        self._console = console
        self._rounds = rounds
        self._status = "starting"
        self._current, self._replies = 0, ""
        self._last: Round | None = None
        self._uplink_bytes = uplink_bytes
        self._seconds: list[float] = []
        self._started = time.monotonic()
        on_terminal = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self, console=console, refresh_per_second=8) if on_terminal else None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._replies = ""
            self._live.stop()

    def status(self, text: str) -> None:
        """What happens outside the rounds, such as "loading data"; shown on a terminal only."""
        self._status = text

    def reply(self, number: int, done: int, total: int) -> None:
        """`done` of the `total` clients of this round have replied; shown on a terminal only."""
        self._current, self._status, self._replies = number, "", f"clients {done}/{total}"

    def round(self, r: Round) -> None:
        """A round is finished, and tested; the next one may have been, too, but for its test."""
        self._last, self._status = r, ""
        if r.round == self._current:
            self._replies = ""
        self._uplink_bytes += r.uplink_bytes
        self._seconds.append(r.seconds)
        if not self._live:
            text = "  ".join([f"round {r.round}/{self._rounds}", *self._numbers(r), seconds_text(r.seconds)])
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def __rich__(self) -> Table:
        finished = self._last.round if self._last else 0
        elapsed = _clock(time.monotonic() - self._started)
        left = ""
        if self._seconds and finished < self._rounds:
            mean = sum(self._seconds) / len(self._seconds)
            left = f"{_clock(mean * (self._rounds - finished))} left"
        current = max(finished, self._current)
        cells: list[RenderableType] = [Text(f"round {current}/{self._rounds}", style="bold")]
        words = [self._status, *(self._numbers(self._last) if self._last else []), self._replies]
        if self._console.width < NARROW:
            words = [word.replace("accuracy", "acc").replace("epsilon", "eps") for word in words]
            words.append(left or elapsed)
        else:
            words += [elapsed, left]
            cells.append(ProgressBar(total=max(self._rounds, 1), completed=finished, width=12))
        cells.append(Text("  ".join(word for word in words if word)))
        line = Table.grid(padding=(0, 1))
        for _ in cells:
            line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(*cells)
        return line

    def _numbers(self, r: Round) -> list[str]:
        numbers = [] if r.accuracy is None else [f"accuracy {percent_text(r.accuracy)}"]
        numbers.append(f"uplink {bytes_text(self._uplink_bytes)}")
        if r.epsilon is not None:
            numbers.append(f"epsilon {digits(r.epsilon)}")
        if r.clock is not None:
            numbers.append(f"simulated {seconds_text(r.clock)}")
        if r.failures:
            numbers.append(f"{r.failures} failed")
        return numbers


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:02d}:{whole % 60:02d}"
