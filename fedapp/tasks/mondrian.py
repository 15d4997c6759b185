"""Classes of similar rows: the median cuts of Mondrian, and the rows that are better left out."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedapp.tasks.equivalence import Floats, Rows, Sensitive


def mondrian(units: Floats, table: Rows, admissible: Callable[[Rows], bool]) -> list[Rows]:
    """Cut a table at the median of its widest column, for as long as both sides are admissible.

    units: each row's place in each column, from 0 to 1, (n, columns). table: indices of the rows to cut.
    Where the widest column has no admissible cut, the next is tried; of equally wide ones, the first listed.
    Source: LeFevre et al. 2006, section 4 (strict partitioning, greedy).
    """
    waiting, classes = [table], []
    while waiting:
        rows = waiting.pop()
        widths = np.ptp(units[rows], axis=0)
        for column in np.argsort(-widths, kind="stable"):
            values = units[rows, column]
            median = np.sort(values)[(len(values) - 1) // 2]
            low = values <= median if median < values.max() else values < median
            sides = rows[low], rows[~low]
            if widths[column] > 0 and admissible(sides[0]) and admissible(sides[1]):
                waiting += sides[::-1]
                break
        else:
            classes.append(rows)
    return classes


def outliers(
    units: Floats, classes: Sequence[Rows], admissible: Callable[[Rows], bool], budget: int
) -> dict[int, Rows]:
    """Rows that are better suppressed, by class: those that save most a row come first; at most `budget`.

    They lie at one end of one column. A kept row costs the mean width of its class, a suppressed one 1.
    """
    found = []
    for number, rows in enumerate(classes):
        widths, best, gone = np.ptp(units[rows], axis=0), 0.0, rows[:0]
        drops = np.arange(1, min(budget + 1, len(rows)))
        for column in range(units.shape[1]):
            order = np.argsort(units[rows, column], kind="stable")
            for inwards in (rows[order], rows[order[::-1]]):
                values = units[inwards, column]
                width = (widths.sum() - widths[column] + np.abs(values[drops] - values[-1])) / len(widths)
                saved = (len(rows) * widths.mean() - drops - (len(rows) - drops) * width) / drops
                for i in np.argsort(-saved, kind="stable"):
                    if saved[i] <= best:
                        break
                    if admissible(inwards[drops[i] :]):
                        best, gone = float(saved[i]), inwards[: drops[i]]
        if best > 0:
            found.append((best, number, gone))
    taken: dict[int, Rows] = {}
    for _, number, rows in sorted(found, key=lambda one: -one[0]):
        if len(rows) <= budget:
            taken[number], budget = rows, budget - len(rows)
    return taken


def balance(
    units: Floats, sensitive: Sequence[Sensitive], balanced: Callable[[NDArray[np.int64]], bool], budget: int
) -> Rows:
    """The rows, ascending, that are left once too frequent sensitive values are suppressed; at most `budget`.

    balanced: whether counts of a column's values will do. Of the most frequent value the outermost row goes.
    """
    middle = np.median(units, axis=0)
    rows = np.argsort(-np.abs(units - middle).sum(axis=1), kind="stable")  # the outermost first
    for column in sensitive:
        counts = column.counts(rows)
        goal = counts.copy()
        while budget > 0 and not balanced(goal):
            goal[goal.argmax()] -= 1
            budget -= 1
        for value in np.flatnonzero(counts - goal):
            there = np.flatnonzero(column.codes[rows] == value)
            rows = np.delete(rows, there[: (counts - goal)[value]])
    return np.sort(rows)
