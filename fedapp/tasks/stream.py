"""Data that grow while a node runs: each round trains on what had arrived when it began."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, DataError
from fedapp.tasks import Data, Task
from fedapp.tasks.classification import Classification
from fedapp.tasks.drift import noticed
from fedapp.tasks.quality import Findings

State = Mapping[str, NDArray[Any]]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Stream(Classification):
    """Another task's data, examples of which arrive from round to round.

    source: the task that reads them (`Classification.arrived` says in which order). A round trains on a
    window: the newest `rows` examples, or those of the last `rounds` rounds, or, with both null, all that
    arrived; and on `replay` older ones, a uniform sample of them all (Vitter 1985, "Random sampling with a
    reservoir", Algorithm R), the same for the same seed. What arrives later waits for the next round.

    In a simulation round r holds the first initial + (r - 1) * arriving of each client's part, in its order.

    alarm: how probable a false alarm of drift is in a round, see `fedapp.tasks.drift`.

    *Formal guarantees.* Under example-level privacy an example is in a round or not by when it came itself,
    whatever other examples there are: so windows by `rounds`, or all. It then is in a part of the steps that
    the accounting takes it to be in, at the same rate, and epsilon is an upper bound. Not covered: when
    examples come, which is taken to be public. Raises ConfigError for settings out of range.
    """

    source: Classification
    rows: int | None = None
    rounds: int | None = None
    replay: int = 0
    initial: float = 0.2
    arriving: float = 0.1
    alarm: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.source, Classification):
            raise ConfigError(f"task.source must be a task, got {self.source!r}: choose task@task.source=csv")
        for name in ("rows", "rounds"):
            if getattr(self, name) is not None:
                check.whole(f"task.{name}", getattr(self, name), 1)
        check.whole("task.replay", self.replay, 0)
        check.real("task.initial", self.initial, above=0.0, high=1.0)
        check.real("task.arriving", self.arriving, low=0.0, high=1.0)
        check.real("task.alarm", self.alarm, low=0.0, below=1.0)
        if self.rows is not None and self.rounds is not None:
            raise ConfigError(
                f"task.rows={self.rows} and task.rounds={self.rounds} are two windows: "
                "set one of them to null"
            )
        if self.replay and self.rows is None and self.rounds is None:
            raise ConfigError(
                f"task.replay={self.replay} takes examples older than a window, and there is none: "
                "set task.rows or task.rounds"
            )
        if isinstance(self.source, Stream) or getattr(self.source, "anonymity", None) is not None:
            raise ConfigError(
                "task.source grows row by row, and can be neither a stream itself nor anonymous, which a "
                "table is as a whole: choose another task.source, without task.source.anonymity"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The source's."""
        return self.source.input_shape

    @property
    def classes(self) -> int:
        """The source's."""
        return self.source.classes

    @property
    def path(self) -> str | None:
        """The source's training data; None where every node brings its own."""
        return getattr(self.source, "path", None)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the source's classes; None where they have none."""
        return getattr(self.source, "class_names", None)

    @property
    def private_preprocessing(self) -> bool:
        """The source's."""
        return self.source.private_preprocessing

    def train_data(self) -> Data:
        """All training examples, those that are yet to arrive too."""
        return self.source.train_data()

    def test_data(self) -> Data | None:
        """The source's, which does not grow."""
        return self.source.test_data()

    def client_names(self) -> NDArray[np.generic] | None:
        """The source's."""
        return self.source.client_names()

    def read(self, path: Path, *narrowed: Callable[[Any], Any]) -> Data:
        """What has arrived in a client's own file or folder, in order."""
        return self.source.arrived(path, *narrowed)

    def examined(self, path: Path, *narrowed: Callable[[Any], Any], growing: bool = True) -> Findings:
        """The source's check of what has arrived."""
        return self.source.examined(path, *narrowed, growing=growing)

    @property
    def labels(self) -> Sequence[str]:
        """The source's."""
        return self.source.labels

    @property
    def shifts(self) -> bool:
        """Whether one example more or less moves others into a round, or out."""
        return self.rows is not None or self.replay > 0

    def simulated(self, count: int, server_round: int) -> int:
        """How many of a part's examples have arrived when a simulated round begins."""
        share = min(1.0, self.initial + self.arriving * (server_round - 1))
        return min(count, math.floor(round(count * share, 6)))

    def of_round(
        self, data: Data, server_round: int, partition: int, state: State, own: bool
    ) -> tuple[Data, State, bool]:
        """What a round trains on, of data in order of arrival; and whether it has drifted.

        own: the data are a node's own, and all there; else a simulated part, of which some are yet to come.
        The state holds the rounds that looked and how much each saw, int64 (n, 2), so a round that looks
        again sees the same; and what `drift` remembers. Raises DataError where examples went away.
        """
        marks = state.get("marks", np.empty((0, 2), np.int64))
        seen = len(data) if own else self.simulated(len(data), server_round)
        before = marks[marks[:, 0] == server_round, 1]
        count = int(before[0]) if len(before) else seen
        most = int(marks[:, 1].max(initial=0))
        if len(data) < most:
            raise DataError(
                f"{len(data)} examples are left of {most} that had arrived: only add to the data of a "
                "stream, or begin a new run after taking some out"
            )
        if not len(before):
            marks = np.concatenate([marks, np.array([[server_round, count]], np.int64)])
        start = self._start(marks, server_round, count)
        chosen = np.concatenate([self._replayed(start, partition), np.arange(start, count)])
        index = torch.from_numpy(chosen)
        drifted, kept = noticed(data, start, count, self.classes, self.alarm, state)
        marks = marks[np.argsort(marks[:, 0], kind="stable")]
        return Data(data.x[index], data.y[index]), {**kept, "marks": self._recent(marks)}, drifted

    def _start(self, marks: Indices, server_round: int, count: int) -> int:
        """Where the window begins."""
        if self.rows is not None:
            return max(0, count - self.rows)
        if self.rounds is None:
            return 0
        return int(marks[marks[:, 0] <= server_round - self.rounds, 1].max(initial=0))

    def _recent(self, marks: Indices) -> Indices:
        """The marks that a later round may ask for: of the newest round, and as many as a window is long."""
        last = int(marks[-1, 0])
        old = np.flatnonzero(marks[:, 0] <= last - (self.rounds or 1))
        return marks[old[-1] if len(old) else 0 :]

    def _replayed(self, older: int, partition: int) -> Indices:
        """Which of so many older examples are trained on again, sorted: what Algorithm R holds after them."""
        held = np.arange(min(self.replay, older), dtype=np.int64)
        if older > self.replay > 0:
            rng = np.random.default_rng([self.seed, partition, 6])
            places = np.arange(older)
            # Example i goes to slot floor(u (i + 1)), if there is one; of several the last one stays.
            slots = np.minimum((rng.random(older) * (places + 1)).astype(np.int64), places)
            later = places[(places >= self.replay) & (slots < self.replay)]
            held[slots[later]] = later
        return np.sort(held)


def reader_of(task: Task) -> Task:
    """The task that reads the data: of a stream, its source."""
    return task.source if isinstance(task, Stream) else task
