"""How long simulated clients take to train and to send, in simulated seconds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedapp import check

Seconds = Callable[[int, int], float]
"""Of the client of a partition, for so many examples, or bytes."""


@dataclass(frozen=True)
class Untimed:
    """Nobody counts seconds: answers come when they come, and in simulated rounds nobody is late."""

    def times(self, clients: int, epochs: int, rng: np.random.Generator) -> None:
        """No time is simulated."""

    def links(self, clients: int, rng: np.random.Generator) -> None:
        """No time is simulated."""


@dataclass(frozen=True)
class Stragglers:
    """A share of the clients is slower; the time of each is proportional to its examples and epochs.

    Who is slow, the run's seed decides once. Sending takes no time, or that of `bytes_per_second`; then
    as many clients, drawn anew, have links that are as much slower.
    """

    share: float = 0.2
    slowdown: float = 10.0
    seconds_per_example: float = 1e-3
    bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        check.real("speeds.share", self.share, low=0.0, high=1.0)
        check.real("speeds.slowdown", self.slowdown, low=1.0, high=1e6)
        check.real("speeds.seconds_per_example", self.seconds_per_example, above=0.0, high=1e6)
        if self.bytes_per_second is not None:
            check.real("speeds.bytes_per_second", self.bytes_per_second, above=0.0)

    def times(self, clients: int, epochs: int, rng: np.random.Generator) -> Seconds:
        """How long the client of a partition, with so many examples, trains; `rng` draws who is slow.

        The share of so many clients is slow, to the nearest whole one.
        """
        slow = self._slow(clients, rng)
        fast = self.seconds_per_example * epochs
        return lambda partition, examples: fast * examples * (self.slowdown if partition in slow else 1.0)

    def links(self, clients: int, rng: np.random.Generator) -> Seconds | None:
        """How long the client of a partition sends so many bytes; None where that takes no time."""
        if (speed := self.bytes_per_second) is None:
            return None
        slow = self._slow(clients, rng)
        return lambda partition, size: size / speed * (self.slowdown if partition in slow else 1.0)

    def _slow(self, clients: int, rng: np.random.Generator) -> frozenset[int]:
        return frozenset(rng.permutation(clients)[: round(self.share * clients)].tolist())
