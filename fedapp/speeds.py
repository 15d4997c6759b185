"""How long simulated clients take to train, in simulated seconds."""

from dataclasses import dataclass

import numpy as np

from fedapp import check


@dataclass(frozen=True)
class Untimed:
    """Nobody counts seconds: answers come when they come, and in simulated rounds nobody is late."""


@dataclass(frozen=True)
class Stragglers:
    """A share of the clients is slower; the time of each is proportional to its examples and epochs.

    Who is slow, the run's seed decides once. Sending takes no time.
    """

    share: float = 0.2
    slowdown: float = 10.0
    seconds_per_example: float = 1e-3

    def __post_init__(self) -> None:
        check.real("speeds.share", self.share, low=0.0, high=1.0)
        check.real("speeds.slowdown", self.slowdown, low=1.0, high=1e6)
        check.real("speeds.seconds_per_example", self.seconds_per_example, above=0.0, high=1e6)

    def slow(self, clients: int, rng: np.random.Generator) -> frozenset[int]:
        """The partitions that are slow: the share of so many, to the nearest whole client."""
        return frozenset(int(i) for i in rng.permutation(clients)[: round(self.share * clients)])

    def seconds(self, examples: int, epochs: int, slow: bool) -> float:
        """How long a client trains."""
        return self.seconds_per_example * examples * epochs * (self.slowdown if slow else 1.0)
