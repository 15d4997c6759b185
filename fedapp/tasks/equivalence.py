"""Equivalence classes of a table: their k, l, alpha and t, and hierarchies of categories."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import ConfigError

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Tree = str | tuple["Tree", ...]
"""A hierarchy of categories: a leaf is its name, a node the tuple of its children."""
Distance = Callable[[Floats, Floats], float]
"""Earth mover's distance, from 0 to 1, of two distributions over m values, (m,) each."""


def equal(p: Floats, q: Floats) -> float:
    """Any two categories are as far apart. Source: Li et al. 2007, section 5.2."""
    return float(np.abs(p - q).sum()) / 2


def ordered(p: Floats, q: Floats) -> float:
    """Values, in ascending order, are as far apart as their ranks among those that occur.

    Source: Li et al. 2007, section 5.1.
    """
    difference = (p - q)[(p > 0) | (q > 0)]
    return float(np.abs(np.cumsum(difference)).sum()) / max(1, len(difference) - 1)


def hierarchical(tree: Tree, categories: Sequence[str]) -> Distance:
    """Categories are as far apart as the node that joins them is high. Source: Li et al. 2007, section 5.2.

    The names of the hierarchy must include the categories.
    """
    edges: list[list[float]] = []  # what flows over an edge is the difference of all leaves below it

    def walk(node: Tree) -> None:
        for child in () if isinstance(node, str) else node:
            length = (_height(node) - _height(child)) / (2 * _height(tree))
            edges.append([length * (name in leaves(child)) for name in categories])
            walk(child)

    walk(tree)
    matrix = np.array(edges, dtype=np.float64)
    return lambda p, q: float(np.abs(matrix @ (p - q)).sum())


@dataclass(frozen=True)
class Sensitive:
    """A sensitive column: each row's value, its index (n,) int64 among `size` values, and their distance."""

    codes: NDArray[np.int64]
    size: int
    distance: Distance

    def counts(self, rows: Rows) -> NDArray[np.int64]:
        """How often each value occurs in these rows, (size,)."""
        return np.bincount(self.codes[rows], minlength=self.size)


@dataclass(frozen=True)
class Measures:
    """How anonymous a table is, by its worst equivalence class and its worst sensitive column.

    k: rows of the smallest class (Sweeney 2002). distinct_l: least number of different sensitive values;
    entropy_l: least exp(entropy) of them (Machanavajjhala et al. 2007, definitions 4.1 and 3.1). alpha:
    greatest share of one value (Wong et al. 2006, over all values). t: greatest distance of a class from the
    whole table (Li et al. 2007, definition 2).
    """

    k: int
    distinct_l: int
    entropy_l: float
    alpha: float
    t: float

    def __str__(self) -> str:
        return (
            f"k={self.k}, distinct l={self.distinct_l}, entropy l={self.entropy_l:.3g}, "
            f"alpha={self.alpha:.3g}, t={self.t:.3g}"
        )


def measure(
    classes: Sequence[Rows], sensitive: Sequence[Sensitive], overall: Sequence[Floats] | None = None
) -> Measures:
    """The measures of equivalence classes, each the indices of its rows; at least one class, none empty.

    overall: how each column's values are distributed in the whole table; by default that of all classes.
    """
    overall = overall_of(np.concatenate(classes), sensitive) if overall is None else overall
    found = []
    for rows in classes:
        for column, whole in zip(sensitive, overall, strict=True):
            counts = column.counts(rows)
            found.append((*diversity(counts), column.distance(counts / len(rows), whole)))
    distinct, entropy, alpha, t = zip(*found, strict=True)
    return Measures(min(map(len, classes)), min(distinct), min(entropy), max(alpha), max(t))


def overall_of(rows: Rows, sensitive: Sequence[Sensitive]) -> list[Floats]:
    """How the values of each column are distributed over these rows, (size,) each."""
    return [column.counts(rows) / len(rows) for column in sensitive]


def diversity(counts: NDArray[np.int64]) -> tuple[int, float, float]:
    """Distinct l, entropy l and alpha of one class with these counts of sensitive values, (size,)."""
    share = counts[counts > 0] / counts.sum()
    return len(share), math.exp(-float(share @ np.log(share))), float(share.max())


# Hierarchies of categories


def tree_of(column: str, given: object) -> Tree:
    """A hierarchy from nested lists or mappings (whose names are only for the reader) of category names.

    Raises ConfigError for an empty list, or a category named twice.
    """
    tree = _tree(given)
    names = leaves(tree)
    if isinstance(tree, str) or not names or len({*names}) < len(names):
        raise ConfigError(
            f"task.anonymity.hierarchies.{column} must nest lists that name each category once, got {given}: "
            "write [[a,b],[c,d]], for example"
        )
    return tree


def _tree(given: object) -> Tree:
    if isinstance(given, Mapping):
        given = list(given.values())
    return tuple(map(_tree, given)) if isinstance(given, (list, tuple)) else str(given)


def leaves(tree: Tree) -> tuple[str, ...]:
    """The categories of a hierarchy, in order."""
    return (tree,) if isinstance(tree, str) else tuple(name for child in tree for name in leaves(child))


def covering(tree: Tree, names: frozenset[str]) -> tuple[str, ...]:
    """The categories below the lowest node that covers all these names."""
    for child in () if isinstance(tree, str) else tree:
        if names <= {*leaves(child)}:
            return covering(child, names)
    return leaves(tree)


def _height(tree: Tree) -> int:
    return 0 if isinstance(tree, str) else 1 + max(map(_height, tree))
