"""Anonymity of a table: rows are generalised, and a few suppressed, until k, l, alpha and t are reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, DataError
from fedapp.tasks.classification import check_names
from fedapp.tasks.equivalence import (
    Floats,
    Measures,
    Rows,
    Sensitive,
    Tree,
    covering,
    diversity,
    equal,
    hierarchical,
    leaves,
    measure,
    ordered,
    overall_of,
    tree_of,
)
from fedapp.tasks.mondrian import balance, mondrian, outliers
from fedapp.tasks.schema import Schema

_SLACK = 1e-9  # of a float measure against its bound


@dataclass(frozen=True, kw_only=True)
class Anonymity:
    """What is required of a table, and how far it may be changed.

    quasi_identifiers: features by which somebody could know a row's person; they are generalised. k: rows
    that must share each of their combinations. sensitive: features, or the label, that a class must not give
    away; null takes the label. distinct_l, entropy_l, alpha, t: bounds on `Measures`; null requires none.
    suppress: greatest share of a table's rows that may be dropped. hierarchies: by column, its categories as
    nested lists or mappings; a class then takes the lowest node that covers it, and t its distances.

    *Formal guarantees.* Of one client's rows, as a table that is read: each is one of k alike, and its class
    gives the sensitive values away no more than the bounds say. This is no differential privacy, and says
    nothing of a model trained on the rows. Not covered: an attacker with background knowledge, who knows
    other rows of a class or what is unlikely, and so excludes values; features that are no quasi-identifiers,
    which stay as they are; two tables with common people; the cost, which follows from all rows. A row's
    class depends on other rows, so example-level differential privacy would not hold for training on them.
    """

    quasi_identifiers: Sequence[str]
    k: int
    sensitive: Sequence[str] | None = None
    distinct_l: int | None = None
    entropy_l: float | None = None
    alpha: float | None = None
    t: float | None = None
    suppress: float = 0.0
    hierarchies: Mapping[str, Any] | tuple[tuple[str, Tree], ...] | None = None

    def __post_init__(self) -> None:
        for field in ("quasi_identifiers", "sensitive"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, check_names(f"anonymity.{field}", getattr(self, field)))
        both = sorted({*self.quasi_identifiers} & {*(self.sensitive or ())})
        if both:
            raise ConfigError(
                f"task.anonymity.sensitive and quasi_identifiers both list {both}: take them out of one"
            )
        check.whole("task.anonymity.k", self.k, 2)
        if self.distinct_l is not None:
            check.whole("task.anonymity.distinct_l", self.distinct_l, 1)
        for field, bounds in (("entropy_l", {"low": 1.0}), ("alpha", {"above": 0.0, "high": 1.0}),
                              ("t", {"low": 0.0, "high": 1.0})):  # fmt: skip
            if getattr(self, field) is not None:
                check.real(f"task.anonymity.{field}", getattr(self, field), **bounds)
        check.real("task.anonymity.suppress", self.suppress, low=0.0, below=1.0)
        given = self.hierarchies or {}
        trees = given.items() if isinstance(given, Mapping) else given
        made = tuple((str(name), tree_of(name, tree)) for name, tree in trees)
        object.__setattr__(self, "hierarchies", made)

    def met_by(self, found: Measures) -> bool:
        """Whether measures are within all bounds."""
        return (
            found.k >= self.k
            and found.distinct_l >= (self.distinct_l or 1)
            and found.entropy_l >= (self.entropy_l or 1.0) - _SLACK
            and found.alpha <= (self.alpha or 1.0) + _SLACK
            and found.t <= (1.0 if self.t is None else self.t) + _SLACK
        )

    @property
    def trees(self) -> dict[str, Tree]:
        """The hierarchy of each column that has one."""
        return dict(self.hierarchies or ())


def required(
    quasi_identifiers: Sequence[str] | None = None, k: int | None = None, **settings: Any
) -> Anonymity | None:
    """What settings require; None where they require nothing. Raises ConfigError for half of it."""
    if quasi_identifiers is None or k is None:
        given = {"quasi_identifiers": quasi_identifiers, "k": k} | settings
        said = {name: value for name, value in given.items() if value not in (None, 0.0)}
        if said:
            raise ConfigError(
                f"task.anonymity has {said} alone: set task.anonymity.quasi_identifiers=[a,b] and "
                "task.anonymity.k, or leave all of it out"
            )
        return None
    return Anonymity(quasi_identifiers=quasi_identifiers, k=k, **settings)


@dataclass(frozen=True)
class Cost:
    """What anonymity cost one table, or several together, and the measures reached; None without any rows.

    rows: before. suppressed: rows dropped. classes: how many. discernibility: the sum of squared class sizes,
    and rows for each suppressed one (Bayardo and Agrawal 2005). loss: normalized certainty penalty from 0 (as
    it was) to 1, mean over rows and quasi-identifiers, 1 for a suppressed row (Xu et al. 2006).
    """

    rows: int
    suppressed: int
    classes: int
    discernibility: int
    loss: float
    measures: Measures | None

    def __str__(self) -> str:
        size = (self.rows - self.suppressed) / max(1, self.classes)
        return (
            f"anonymity: {self.measures}; {self.suppressed} of {self.rows} rows suppressed, "
            f"{self.classes} classes of {size:.1f} rows in the mean, discernibility {self.discernibility}, "
            f"information loss {self.loss:.3f}"
        )


def total(costs: Sequence[Cost]) -> Cost:
    """The cost of several tables, each anonymous by itself: sums, the mean loss, the worst measures."""
    rows = sum(cost.rows for cost in costs)
    all_of = [c.measures for c in costs if c.measures is not None]
    worst = Measures(
        min(m.k for m in all_of), min(m.distinct_l for m in all_of), min(m.entropy_l for m in all_of),
        max(m.alpha for m in all_of), max(m.t for m in all_of),
    ) if all_of else None  # fmt: skip
    return Cost(
        rows, sum(c.suppressed for c in costs), sum(c.classes for c in costs),
        sum(c.discernibility for c in costs), sum(c.loss * c.rows for c in costs) / max(1, rows), worst,
    )  # fmt: skip


@dataclass(frozen=True)
class Anonymised:
    """What may be shared of a table.

    x: its kept rows, float32 (n, width), in their order, where each quasi-identifier is that of its class:
    the mean of numbers, so that a model can learn from it, and equal shares over the categories it
    covers. rows: their indices before, ascending. classes: indices into x of each class's rows.
    """

    x: NDArray[np.float32]
    rows: Rows
    classes: list[Rows]
    cost: Cost


def anonymise(x: NDArray[np.float32], y: Rows, schema: Schema, rules: Anonymity, source: str) -> Anonymised:
    """Generalise and suppress rows until the rules are met; x (n, width) and y (n,) as `schema.encode` gives.

    Classes come from the median cuts of Mondrian (LeFevre et al. 2006, section 4), made wherever both sides
    meet the rules. Then whatever rows of a class make it wide are suppressed, where this loses less than it
    spares. No rows are anonymous. Deterministic; the input is not changed. Raises ConfigError for a column
    that does not exist or hierarchies that do not fit; DataError for rows that cannot meet the rules.
    """
    secrets = rules.sensitive or (schema.label,)
    quasi = [_Quasi.of(name, x, schema, rules) for name in rules.quasi_identifiers]
    sensitive = [_sensitive(name, x, y, schema, rules) for name in secrets]
    stray = {*rules.trees} - {*rules.quasi_identifiers, *secrets}
    if stray:
        raise ConfigError(
            f"task.anonymity.hierarchies has {sorted(stray)}, which are neither quasi-identifiers nor "
            "sensitive: leave them out"
        )
    if not len(x):
        return Anonymised(x.copy(), np.arange(0), [], Cost(0, 0, 0, 0, 0.0, None))
    budget, units = int(rules.suppress * len(x)), np.stack([column.units for column in quasi], axis=1)

    def balanced(counts: NDArray[np.int64]) -> bool:
        return rules.met_by(Measures(rules.k, len(x), *diversity(counts)[1:], t=0.0))

    table = balance(units, sensitive, balanced, budget)
    if not rules.met_by(reached := measure([table], sensitive)):
        raise DataError(
            f"{source} cannot be as anonymous as task.anonymity requires: {len(table)} of its {len(x)} rows "
            f"as one class reach {reached}; require no more than that, give more rows, or let more go "
            f"than task.anonymity.suppress={rules.suppress:g}"
        )
    overall = overall_of(table, sensitive)

    def admissible(rows: Rows) -> bool:
        return len(rows) >= rules.k and rules.met_by(measure([rows], sensitive, overall))  # k is cheap

    classes = mondrian(units, table, admissible)
    trims = outliers(units, classes, admissible, budget - (len(x) - len(table)))
    while trims:
        fewer = [rows[~np.isin(rows, trims.get(i, []))] for i, rows in enumerate(classes)]
        if rules.met_by(measure(fewer, sensitive)):
            classes = fewer
            break
        trims = dict(list(trims.items())[: len(trims) // 2])  # fewer rows change the whole, so every t
    kept = np.sort(np.concatenate(classes))
    shared, loss = x.copy(), float(len(x) - len(kept))
    for rows in classes:
        loss += len(rows) * float(np.mean([column.generalise(shared, rows) for column in quasi]))
    sizes = np.array([len(rows) for rows in classes])
    cost = Cost(
        len(x), len(x) - len(kept), len(classes),
        int((sizes**2).sum()) + (len(x) - len(kept)) * len(x), loss / len(x), measure(classes, sensitive),
    )  # fmt: skip
    return Anonymised(shared[kept], kept, [np.searchsorted(kept, rows) for rows in classes], cost)


@dataclass(frozen=True)
class _Quasi:
    """A quasi-identifier: where its features are, its categories, and each row's place from 0 to 1 (n,)."""

    block: slice
    categories: tuple[str, ...] | None
    tree: Tree | None
    units: Floats

    @classmethod
    def of(cls, name: str, x: NDArray[np.float32], schema: Schema, rules: Anonymity) -> "_Quasi":
        block, categories = _feature(name, schema, "quasi_identifiers")
        tree = _fitting(name, categories, rules)
        if categories is None:
            values = x[:, block.start].astype(np.float64)
            low, span = (values.min(), np.ptp(values)) if len(x) else (0.0, 0.0)
            return cls(block, None, None, (values - low) / (span or 1.0))
        order = list(categories) if tree is None else [name for name in leaves(tree) if name in categories]
        places = np.array([order.index(name) for name in categories]) / max(1, len(categories) - 1)
        return cls(block, categories, tree, places[x[:, block].argmax(axis=1)])

    def generalise(self, x: NDArray[np.float32], rows: Rows) -> float:
        """Give these rows of x the value of their class, in place; returns the loss (NCP), from 0 to 1."""
        if self.categories is None:
            x[rows, self.block] = x[rows, self.block].mean(axis=0, dtype=np.float64)
            return float(np.ptp(self.units[rows]))
        names = np.array(self.categories)
        covers: NDArray[np.bool_] = x[rows, self.block].max(axis=0) > 0
        if self.tree is not None:
            covers = np.isin(names, covering(self.tree, frozenset(names[covers].tolist())))
        x[rows, self.block] = covers / covers.sum()
        return float(covers.sum() - 1) / max(1, len(self.categories) - 1)


def _sensitive(name: str, x: NDArray[np.float32], y: Rows, schema: Schema, rules: Anonymity) -> Sensitive:
    """A sensitive column: numbers by rank, categories and classes by their hierarchy or all alike."""
    categories: tuple[str, ...] | None
    if name == schema.label:
        categories, codes = schema.classes, y
    else:
        block, categories = _feature(name, schema, "sensitive")
        if categories is None:
            _fitting(name, None, rules)
            values, codes = np.unique(x[:, block.start], return_inverse=True)
            return Sensitive(codes, len(values), ordered)
        codes = x[:, block].argmax(axis=1)
    tree = _fitting(name, categories, rules)
    return Sensitive(codes, len(categories), equal if tree is None else hierarchical(tree, categories))


def _feature(name: str, schema: Schema, field: str) -> tuple[slice, tuple[str, ...] | None]:
    """Where the features of a column are, and its categories."""
    start = 0
    for column, categories in schema.columns:
        width = 1 if categories is None else len(categories)
        if column == name:
            return slice(start, start + width), categories
        start += width
    raise ConfigError(
        f"task.anonymity.{field} names {name}, which is no feature: "
        f"choose among {[column for column, _ in schema.columns]}"
    )


def _fitting(name: str, categories: tuple[str, ...] | None, rules: Anonymity) -> Tree | None:
    """The hierarchy of a column; it must name all its categories."""
    tree = rules.trees.get(name)
    lacks = sorted({*(categories or ())} - {*leaves(tree or ())})
    if tree is not None and (categories is None or lacks):
        why = "is for a column of numbers" if categories is None else f"lacks {lacks[:5]}"
        raise ConfigError(f"task.anonymity.hierarchies.{name} {why}: name all categories, or leave it out")
    return tree
