"""How a text table becomes numbers: the same columns, categories and classes on every node."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MAX_CATEGORIES = 100  # more words than that in one column are names or text, not categories


@dataclass(frozen=True)
class Schema:
    """How a table becomes numbers, the same on every node.

    label: the label's column. classes: its values, in order. columns: each feature column with its
    categories, one 0/1 feature per category; None for a column of numbers.
    """

    label: str
    classes: tuple[str, ...]
    columns: tuple[tuple[str, tuple[str, ...] | None], ...]

    @property
    def width(self) -> int:
        """The number of features."""
        return sum(1 if categories is None else len(categories) for _, categories in self.columns)

    def encode(self, table: "pd.DataFrame", source: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features (n, width) and labels (n,). Raises DataError naming the column that does not fit."""
        need(table, [self.label, *(name for name, _ in self.columns)], source)
        blocks = []
        for name, categories in self.columns:
            if categories is None:
                blocks.append(_numbers(table[name], source)[:, None])
            else:
                codes = _codes(table[name], categories, source)
                blocks.append(np.eye(len(categories), dtype=np.float32)[codes])
        return np.concatenate(blocks, axis=1), _codes(table[self.label], self.classes, source)


def read_table(path: Path, separator: str) -> "pd.DataFrame":
    """All columns of a table as text, missing values marked. Raises DataError for a file that is no table."""
    table = _parsed(path, path, separator)
    if not len(table):
        raise DataError(f"{path} has no rows: give at least one example")
    return table


def read_growing(path: Path, separator: str) -> "pd.DataFrame":
    """The same of a file that is being written to: the whole lines that are there now, be it the first alone.

    Values must have no line breaks. Raises DataError where there is no line yet.
    """
    try:
        with path.open("rb") as file:
            data = file.read(os.fstat(file.fileno()).st_size)  # what comes meanwhile is for the next round
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): give a text file with a header line") from error
    end = data.rfind(b"\n") + 1
    if not end:
        raise DataError(f"{path} has no whole line yet: begin it with a header line")
    return _parsed(BytesIO(data[:end]), path, separator)


def _parsed(source: Path | BytesIO, path: Path, separator: str) -> "pd.DataFrame":
    import pandas as pd

    try:
        # As text, because a type guessed from one node's rows need not be another node's.
        return pd.read_csv(source, sep=separator, dtype=str, skipinitialspace=True)
    except (OSError, ValueError) as error:  # pandas' and Unicode's errors are ValueErrors
        raise DataError(
            f"{path} cannot be read as a table ({error}): give a text file with a header line"
        ) from error


def need(table: "pd.DataFrame", names: Sequence[str], source: str) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise DataError(f"{source} lacks the columns {missing}: it has {list(table.columns)}")


def whole(column: "pd.Series", source: str) -> "pd.Series":
    """The column. Raises DataError when a value is missing."""
    missing = int(column.isna().sum())
    if missing:
        raise DataError(
            f"{source} misses {missing} values in column {column.name}: fill them in or drop the rows"
        )
    return column


def _numbers(column: "pd.Series", source: str) -> NDArray[np.float32]:
    """A column of finite numbers as float32."""
    import pandas as pd

    parsed = pd.to_numeric(whole(column, source), errors="coerce")
    with np.errstate(over="ignore"):
        values: NDArray[np.float32] = parsed.to_numpy(dtype=np.float32)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise DataError(
            f"{source} has {bad} values in column {column.name} that are no finite float32 numbers: "
            "correct them, or list other columns in task.features"
        )
    return values


def _codes(column: "pd.Series", values: Sequence[str], source: str) -> NDArray[np.int64]:
    """The index of each entry in `values`."""
    import pandas as pd

    codes = pd.Index(values).get_indexer(pd.Index(whole(column, source)))
    unknown = sorted(set(column[codes < 0]))
    if unknown:
        raise DataError(
            f"{source} has unknown values {unknown[:5]} in column {column.name}: "
            f"the task knows {list(values)[:20]}"
        )
    return np.asarray(codes, dtype=np.int64)


def categories_of(column: "pd.Series", source: str) -> tuple[str, ...] | None:
    """The sorted words of a column; None for a column of numbers. Raises DataError when it is neither."""
    import pandas as pd

    words = whole(column, source)[
        pd.to_numeric(column, errors="coerce").isna() & (column.str.lower() != "nan")
    ]
    if not len(words):
        return None
    if len(words) < len(column):
        raise DataError(
            f"{source} has {len(words)} words such as {words.iloc[0]!r} among the numbers "
            f"of column {column.name}: "
            "write only numbers or only words, or list other columns in task.features"
        )
    categories = words.unique()
    if len(categories) > MAX_CATEGORIES:
        raise DataError(
            f"{source} has {len(categories)} different words in column {column.name}, "
            f"more than {MAX_CATEGORIES}: "
            "it is no category, so list other columns in task.features"
        )
    return tuple(sorted(categories))


def in_order(labels: Sequence[str]) -> list[str]:
    """Labels in order: as numbers where all are numbers."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)
