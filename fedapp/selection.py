"""Who trains in a round: drawn alike, by what nodes have, or by how badly the model does on their data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, FedappError
from fedapp.facts import CORES, EXAMPLES, LABELS, MEMORY, SPEED, TAGS, Facts
from fedapp.privacy.secret import Secret, uniform


class Selection(Protocol):
    """Draws the nodes that train in a round; `facts` are theirs, in the order of their partitions.

    `asks` names the facts that nodes are asked for. `draw` returns places in that order, about `size` of
    them, and draws from `secret` alone. A client counts at least `least_weight` examples in the mean; 0: as
    many as it has. Both raise FedappError where no node will do.
    """

    @property
    def asks(self) -> tuple[str, ...]: ...

    def draw(self, facts: Sequence[Facts], size: int, secret: Secret) -> list[int]: ...

    def least_weight(self, facts: Sequence[Facts], size: int) -> int: ...


@dataclass(frozen=True)
class Uniform:
    """So many without replacement, each node as likely as any other."""

    asks = ()

    def draw(self, facts: Sequence[Facts], size: int, secret: Secret) -> list[int]:
        numbers = uniform(len(facts), secret)
        return [int(i) for i in np.flatnonzero(numbers.argsort().argsort() < size)]

    def least_weight(self, facts: Sequence[Facts], size: int) -> int:
        return 0


@dataclass(frozen=True)
class Poisson:
    """Each node by itself, so many in the mean: what `sampling=poisson` says too."""

    asks = ()

    def draw(self, facts: Sequence[Facts], size: int, secret: Secret) -> list[int]:
        return [int(i) for i in np.flatnonzero(uniform(len(facts), secret) < size / len(facts))]

    def least_weight(self, facts: Sequence[Facts], size: int) -> int:
        return 0


@dataclass(frozen=True)
class BySize:
    """Without replacement; a node takes part with a probability proportional to its examples, at most 1.

    Nodes that do not tell how many they have are never drawn. Systematic sampling of nodes in random order
    has just these probabilities. In the mean a client counts its examples over its probability, the same for
    all but those that are always drawn, so that the expected mean is that of all clients. Nothing proves what
    a node tells: one that boasts takes part more often.
    Sources: Madow 1949, "On the theory of systematic sampling, II"; Horvitz and Thompson 1952, "A
    generalization of sampling without replacement from a finite universe".
    """

    asks = (EXAMPLES,)

    def draw(self, facts: Sequence[Facts], size: int, secret: Secret) -> list[int]:
        chances = probabilities(self._sizes(facts), size)
        order, start = uniform(len(facts), secret).argsort(), float(uniform(1, secret)[0])
        rest = order[(chances[order] > 0) & (chances[order] < 1)]
        ends = np.concatenate([[0.0], np.cumsum(chances[rest])])
        ends[-1] = np.rint(ends[-1])  # of a point in each unit, just one belongs to somebody
        drawn = rest[np.diff(np.ceil(ends - start)) > 0]
        return sorted(int(i) for i in (*np.flatnonzero(chances == 1), *drawn))

    def least_weight(self, facts: Sequence[Facts], size: int) -> int:
        sizes = self._sizes(facts)
        chances = probabilities(sizes, size)
        some = (chances > 0) & (chances < 1)
        return round(float((sizes[some] / chances[some]).mean())) if some.any() else 0

    def _sizes(self, facts: Sequence[Facts]) -> NDArray[np.float64]:
        sizes = np.array([node.examples or 0 for node in facts], np.float64)
        if not sizes.any():
            raise FedappError("no node tells how many examples it has: set selection=uniform")
        return sizes


def probabilities(sizes: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """With which probability each is among so many: proportional to its size, at most 1; float64 (n,).

    They add up to `count`, or to the number of those that are not empty.
    """
    count, sure = min(count, int(np.count_nonzero(sizes))), np.zeros(len(sizes), bool)
    while True:
        rest, left = (sizes > 0) & ~sure, count - np.count_nonzero(sure)
        more = rest & (sizes * left >= sizes[rest].sum())
        if not more.any():
            break
        sure |= more
    return np.where(sure, 1.0, np.where(rest, sizes * left / max(sizes[rest].sum(), 1.0), 0.0))


@dataclass(frozen=True)
class PowerOfChoice:
    """Of candidates drawn by size, those on whose data the model does worst; they count alike in the mean.

    candidates: how many are asked for their loss on the weights of the round; None: two for each that is to
    train. Goes faster at first, and to another place than all clients' mean: it cares for those who are
    badly off. Nothing proves a loss: a node that exaggerates is chosen.
    Source: Cho, Wang and Joshi 2020, "Client selection in federated learning: convergence analysis and
    power-of-choice selection strategies", section 4; without replacement as in `BySize`.
    """

    candidates: int | None = None

    asks = (EXAMPLES,)

    def __post_init__(self) -> None:
        if self.candidates is not None:
            check.whole("selection.candidates", self.candidates, 1)

    def draw(self, facts: Sequence[Facts], size: int, secret: Secret) -> list[int]:
        return BySize().draw(facts, self.candidates or 2 * size, secret)

    def worst(self, losses: Mapping[int, float], size: int) -> list[int]:
        """So many of the highest losses, of equal ones the lowest place first; in order."""
        return sorted(sorted(losses, key=lambda place: (-losses[place], place))[:size])

    def least_weight(self, facts: Sequence[Facts], size: int) -> int:
        return max((node.examples or 0 for node in facts), default=0)


@dataclass(frozen=True)
class Tags:
    """So many without replacement of the nodes that have all that is asked, each as likely as any other.

    tags: words that all must be among a node's. labels: classes of which it must hold an example. cores,
    memory_gb, examples_per_second: as many, or more. given: in a simulation the tags of nodes; the list goes
    round the partitions. The model is that of these nodes: others have no part in it.
    """

    tags: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    cores: int = 0
    memory_gb: float = 0.0
    examples_per_second: int = 0
    given: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        given = self.given if isinstance(self.given, (list, tuple)) else [self.given]
        if any(not isinstance(tags, (list, tuple)) for tags in given):
            raise ConfigError(f"selection.given must list tags of nodes, got {self.given!r}: write [[a],[b]]")
        for name, values, kind in (("tags", self.tags, str), ("labels", self.labels, int)):
            if not isinstance(values, (list, tuple)) or any(type(value) is not kind for value in values):
                of = "words" if kind is str else "whole numbers"
                raise ConfigError(f"selection.{name} must be a list of {of}, got {values!r}")
        check.whole("selection.cores", self.cores, 0)
        check.real("selection.memory_gb", self.memory_gb, low=0.0)
        check.whole("selection.examples_per_second", self.examples_per_second, 0)
        object.__setattr__(self, "tags", tuple(self.tags))
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "given", tuple(tuple(map(str, tags)) for tags in given))

    @property
    def asks(self) -> tuple[str, ...]:
        asked = {
            TAGS: self.tags, LABELS: self.labels,
            CORES: self.cores, MEMORY: self.memory_gb, SPEED: self.examples_per_second,
        }  # fmt: skip
        return tuple(name for name, value in asked.items() if value)

    def draw(self, facts: Sequence[Facts], size: int, secret: Secret) -> list[int]:
        fitting = [place for place, node in enumerate(facts) if self.fits(node)]
        if not fitting:
            raise FedappError(f"none of {len(facts)} nodes tells that it has what {self} asks: ask for less")
        return [fitting[i] for i in Uniform().draw([facts[place] for place in fitting], size, secret)]

    def fits(self, node: Facts) -> bool:
        """Whether a node has all that is asked."""
        held = {label for label, count in enumerate(node.labels or ()) if count}
        return (
            node.tags.issuperset(self.tags)
            and held.issuperset(self.labels)
            and (node.cores or 0) >= self.cores
            and (node.memory_mb or 0) >= 1000 * self.memory_gb
            and (node.speed or 0) >= self.examples_per_second
        )

    def least_weight(self, facts: Sequence[Facts], size: int) -> int:
        return 0
