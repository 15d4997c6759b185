"""Drift: whether examples that came later are distributed as those of the first window.

Pearson's two-sample chi-square test of homogeneity, on labels and on each feature in tenths of the first
window; features are columns of a table, or the mean of each channel of an image. The smallest p-value, times
the number of tests (Bonferroni), below `alarm` is an alarm: so in a round where nothing has changed there is
one with at most that probability, as far as the chi-square distribution approximates. Compared are only
examples that were not in the first window, so that the two samples share none.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.tasks import Data

LEAST = 50  # examples on either side, below which nothing is compared
POOLED = 10  # examples of both sides in a cell, which a rarer one shares with others: 5 are expected, about
State = Mapping[str, NDArray[Any]]
Counts = NDArray[np.int64]


def noticed(
    data: Data, start: int, count: int, classes: int, alarm: float, state: State
) -> tuple[bool, State]:
    """Whether the window [start, count) has drifted from the first one; and what to remember of that.

    The state: `first`, int64 (1,), where the first window of LEAST examples or more ends; `labels`, int64
    (classes,); `edges`, float32 (features, 9); `features`, int64 (features, 10).
    """
    if "first" not in state:
        if count - start < LEAST:
            return False, {}
        x, labels = _features(data, start, count), data.y[start:count].numpy()
        edges = np.quantile(x, np.arange(1, 10) / 10, axis=0).T.astype(np.float32)
        return False, {
            "first": np.array([count]),
            "labels": np.bincount(labels, minlength=classes),
            "edges": edges,
            "features": _counted(x, edges),
        }
    kept = {name: state[name] for name in ("first", "labels", "edges", "features")}
    new = max(start, int(kept["first"][0]))
    if count - new < LEAST:
        return False, kept
    labels = np.bincount(data.y[new:count].numpy(), minlength=classes)
    features = _counted(_features(data, new, count), kept["edges"])
    values = [homogeneity(kept["labels"], labels)]
    values += [homogeneity(a, b) for a, b in zip(kept["features"], features, strict=True)]
    return min(values) * len(values) < alarm, kept


def homogeneity(one: Counts, other: Counts) -> float:
    """The p-value of Pearson's chi-square test that two samples, counted in the same cells, are alike."""
    from scipy.special import chdtrc

    table = np.stack([one, other]).astype(np.float64)
    rare = table.sum(axis=0) < POOLED
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        return 1.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    return float(chdtrc(table.shape[1] - 1, ((table - expected) ** 2 / expected).sum()))


def _features(data: Data, start: int, end: int) -> NDArray[np.float32]:
    """What is compared of each example, (n, features)."""
    x = data.x[start:end]
    return (x if x.dim() == 2 else x.flatten(2).mean(dim=2)).numpy()


def _counted(x: NDArray[np.float32], edges: NDArray[np.float32]) -> Counts:
    """How many values of each feature lie between its edges, (features, 10)."""
    cells = [np.searchsorted(edge, column, side="right") for edge, column in zip(edges, x.T, strict=True)]
    return np.stack([np.bincount(cell, minlength=10) for cell in cells]).astype(np.int64)
