"""Is this data fit to train on? Counts of what is wrong with a client's own, and how each is mended."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedapp.errors import ConfigError
from fedapp.tasks import Data
from fedapp.tasks.schema import Schema

if TYPE_CHECKING:
    import pandas as pd

COUNTS = (
    "examples", "columns-missing", "values-missing", "values-malformed", "values-out-of-range",
    "labels-unknown", "duplicates", "classes-absent", "largest-class",
)  # fmt: skip
"""What is counted; a policy names those that may leave."""
UNEVEN = 0.9  # share of one class above which a line says so
Ranges = Sequence[tuple[str, float, float]]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong and how to mend it, in a line for the client alone: it may quote its data.

    `logged` is what a log may hold: no value of the data.
    """

    said: str
    fatal: bool  # training is impossible
    unquoted: str = ""  # the line without values, where it has any

    @property
    def logged(self) -> str:
        return self.unquoted or self.said


@dataclass(frozen=True)
class Findings:
    """What a check comes to. counts: by names of COUNTS; those that do not apply are left out."""

    counts: Mapping[str, int]
    problems: tuple[Problem, ...] = ()

    @property
    def fatal(self) -> bool:
        """Whether training is impossible."""
        return any(problem.fatal for problem in self.problems)


def of_data(data: Data, class_names: Sequence[str]) -> Findings:
    """A check of examples that could be read: x of any shape, labels of these classes."""
    known = (data.y >= 0) & (data.y < len(class_names))
    malformed = int((~torch.isfinite(data.x)).sum())
    keys = {x.tobytes() + y.tobytes() for x, y in zip(data.x.numpy(), data.y.numpy(), strict=True)}
    counts = {
        "examples": len(data),
        "values-malformed": malformed,
        "labels-unknown": int((~known).sum()),
        "duplicates": len(data) - len(keys),
    }
    problems = [
        Problem(f"{malformed} values are not finite: correct them, or take their examples out", True)
    ] * (malformed > 0)
    return _with_balance(counts, problems, data.y[known].numpy(), class_names)


def of_table(table: "pd.DataFrame", schema: Schema, ranges: Ranges = (), empty: bool = False) -> Findings:
    """A check of a table of text by its schema, all of it, where reading would stop at the first error.

    ranges: (column, low, high), outside of which numbers are counted. empty: no rows is no problem.
    """
    import pandas as pd

    columns = {**dict(schema.columns), schema.label: schema.classes}
    lacking, has = [name for name in columns if name not in table.columns], list(table.columns)
    there = table[[name for name in columns if name not in lacking]]
    bounds, problems = {name: (low, high) for name, low, high in ranges}, list[Problem]()
    if lacking:
        said, mend = f"columns {lacking} are not there", "add or rename them"
        # Without a header line the first row stands for one.
        problems.append(Problem(f"{said}, of {has}: {mend}", True, f"{said}: {mend}"))
    if not len(table) and not empty:
        problems.append(Problem("there are no rows: give at least one example", True))
    sums = Counter({"examples": len(table), "columns-missing": len(lacking)})
    for name in there.columns:
        categories, given = columns[name], there[name].dropna()
        if missing := len(there) - len(given):
            sums["values-missing"] += missing
            said = f"column {name}: {missing} values are missing: fill them in, or take the rows out"
            problems.append(Problem(said, True))
        if categories is None:
            problems += _numbers(given, bounds.get(name), sums)
            continue
        words = given[~given.isin(categories)]
        sums["labels-unknown" if name == schema.label else "values-malformed"] += len(words)
        if len(words):
            some, many = sorted(set(words))[:5], f"column {name}: {len(words)} values"
            none = f"are none of {list(categories)[:20]}: rename them, or take the rows out"
            problems.append(Problem(f"{many} such as {some} {none}", True, f"{many} {none}"))
    sums["duplicates"] = int(there.duplicated().sum())
    counts = {name: sums[name] for name in COUNTS[:7]}
    if schema.label in lacking:
        return Findings(counts, tuple(problems))
    codes = pd.Index(schema.classes).get_indexer(pd.Index(there[schema.label]))
    return _with_balance(counts, problems, codes[codes >= 0].astype(np.int64), schema.classes)


def _numbers(
    column: "pd.Series", bounds: tuple[float, float] | None, sums: Counter[str]
) -> Iterator[Problem]:
    """What is wrong with a column that should hold numbers; adds to the sums."""
    import pandas as pd

    with np.errstate(over="ignore"):
        values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float32)
    if malformed := int((~np.isfinite(values)).sum()):
        sums["values-malformed"] += malformed
        said = f"column {column.name}: {malformed} values are no finite float32 numbers: correct them"
        yield Problem(f"{said}, or list other columns in task.features", True)
    low, high = bounds or (-np.inf, np.inf)
    if outside := int(((values < low) | (values > high)).sum()):
        sums["values-out-of-range"] += outside
        said = f"column {column.name}: {outside} values are outside {low:g} to {high:g}: check their unit"
        yield Problem(f"{said}, or correct them", False)


def _with_balance(
    counts: Mapping[str, int],
    problems: Sequence[Problem],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
) -> Findings:
    """The same, with what repeats and which classes there are."""
    found, said = list(problems), counts["duplicates"]
    sizes = np.bincount(labels, minlength=len(class_names))
    if said:
        found.append(Problem(f"{said} examples repeat an earlier one and count double: take them out", False))
    absent = [name for name, size in zip(class_names, sizes, strict=True) if not size]
    if absent and len(labels):
        listed = ", ".join(absent[:10])
        found.append(Problem(f"no examples of the classes {listed}: add some, if you have any", False))
    largest = int(sizes.max(initial=0))
    if largest > UNEVEN * len(labels) and len(class_names) > 1 and len(absent) < len(class_names) - 1:
        share, name = 100 * largest / len(labels), class_names[int(sizes.argmax())]
        found.append(Problem(f"{share:.1f} % of the examples are of class {name}: add others", False))
    return Findings({**counts, "classes-absent": len(absent), "largest-class": largest}, tuple(found))


def check_ranges(ranges: object) -> Ranges:
    """Ranges as (column, low, high), of a mapping from columns to [low, high]. Raises ConfigError."""
    if ranges is None:
        return ()
    if isinstance(ranges, tuple):
        return ranges
    found: list[tuple[str, float, float]] = []
    items: Any = ranges.items() if isinstance(ranges, Mapping) else [("column", None)]
    for name, pair in items:
        numbers = isinstance(pair, (list, tuple)) and len(pair) == 2
        numbers = numbers and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in pair)
        if not numbers or not pair[0] <= pair[1]:
            raise ConfigError(
                f"task.ranges.{name} must be [low, high] with low at most high, got {pair!r}: "
                "set task.ranges={age:[0,120]}, for example"
            )
        found.append((str(name), float(pair[0]), float(pair[1])))
    return tuple(found)
