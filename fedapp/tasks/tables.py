"""Tables: a text file with one example a line and a column of labels."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, DataError
from fedapp.tasks import Data
from fedapp.tasks.anonymity import Anonymity, Cost, anonymise, total
from fedapp.tasks.classification import Classification, check_names, held_out, once
from fedapp.tasks.quality import Findings, Problem, Ranges, check_ranges, of_table
from fedapp.tasks.schema import Schema, categories_of, in_order, need, read_growing, read_table, whole

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger("fedapp.tasks")


@dataclass(frozen=True)
class _Read:
    """What the files of a task hold, encoded, and scaled unless it is yet to be made anonymous."""

    schema: Schema
    train: Data | None
    test: Data | None
    names: NDArray[np.generic] | None


@dataclass(frozen=True)
class _Shared:
    """Training rows after anonymising each client's, which of them each client has, and what it cost."""

    train: Data
    parts: list[NDArray[np.int64]]
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Csv(Classification):
    """A table with a header line and a column of labels.

    path: the training table; null where every node brings its own data. label: the label's column.
    class_names: its values as written in the file, in order; null takes those of the training table, sorted.
    features: the columns to learn from, numbers or categories (one-hot encoded); null takes all but the label
    and client_column. client_column: the column that names each row's client, for partition=natural; never a
    feature. test_path: the test table; null holds out test_fraction of the rows, the same ones for every
    seed. separator: what stands between columns. mean, std: public constants, one for all features or a list,
    for (x - mean) / std.

    standardize: take mean and std from the training rows instead. They depend on the data, so differential
    privacy does not cover them (private_preprocessing is then True), and nodes with their own data refuse it.
    The classes and categories listed from the training table are taken as public.

    anonymity: what each client's training rows must reach before it learns from them, see `Anonymity`; test
    rows stay as they are. In a simulation the training table is split first: a client knows only its own
    rows. It is no differential privacy, and mixes rows, so private_preprocessing is True with it.

    ranges: public bounds [low, high] of columns, for the check of a client's data alone (`quality`).

    Raises ConfigError for settings that do not fit together; DataError, when data are read, for a table that
    cannot be read, is empty, lacks a column, or has a value that is missing, infinite or unknown.
    """

    path: str | None = None
    label: str = "label"
    class_names: Sequence[str] | None = None
    features: Sequence[str] | None = None
    client_column: str | None = None
    test_path: str | None = None
    test_fraction: float = 0.2
    separator: str = ","
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    standardize: bool = False
    anonymity: Anonymity | None = None
    ranges: Mapping[str, Sequence[float]] | Ranges | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("class_names", "features"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, check_names(field, getattr(self, field)))
        for field in ("mean", "std"):
            object.__setattr__(self, field, _constants(field, getattr(self, field)))
        object.__setattr__(self, "ranges", check_ranges(self.ranges))
        check.real("task.test_fraction", self.test_fraction, low=0.0, below=1.0)
        if self.path is None and (self.class_names is None or self.features is None):
            raise ConfigError(
                "task=csv does not know its columns: "
                "set task.path=<file>, or both task.class_names and task.features"
            )
        if self.features is not None and {self.label, self.client_column} & set(self.features):
            raise ConfigError(
                f"task.features must not list the label {self.label} or the client column: "
                "take it out of the list"
            )
        if self.standardize and (self.path is None or (self.mean, self.std) != ((0.0,), (1.0,))):
            raise ConfigError(
                "task.standardize=true needs task.path, and no task.mean or task.std: "
                "set public task.mean and task.std and task.standardize=false"
            )
        if self.anonymity is not None:
            self._check_anonymity(self.anonymity)

    def _check_anonymity(self, rules: Anonymity) -> None:
        if self.standardize:
            raise ConfigError(
                "task.standardize=true takes statistics of rows that task.anonymity is to hide: "
                "set public task.mean and task.std and task.standardize=false"
            )
        if self.label in rules.quasi_identifiers:
            raise ConfigError(
                f"task.anonymity.quasi_identifiers must not list the label {self.label}, which is learned "
                "as it is: take it out of the list, and bound alpha or t to hide it"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(features,), after one-hot encoding."""
        return (self._schema().width,)

    @property
    def classes(self) -> int:
        """How many different labels there are."""
        return len(self._schema().classes)

    @property
    def private_preprocessing(self) -> bool:
        """True when features depend on statistics of the training rows, be it those of a class of rows."""
        return self.standardize or self.anonymity is not None

    @property
    def anonymity_cost(self) -> Cost | None:
        """What anonymity costs all simulated clients together; None where none is required."""
        return None if self.anonymity is None else self._shared.cost

    def train_data(self) -> Data:
        """The training rows. Raises ConfigError without a path."""
        train = self._files().train
        if train is None:
            raise ConfigError(
                "task=csv has no training table: set task.path, or give every node its own data"
            )
        return train if self.anonymity is None else self._shared.train

    def test_data(self) -> Data | None:
        """The test rows; None without a test table and with nothing held out."""
        return self._files().test

    def read(
        self, path: Path, shared: Callable[["pd.DataFrame"], "pd.DataFrame"] = lambda table: table
    ) -> Data:
        """A client's own table, or what is shared of it, with the columns and classes that all agree on."""
        return self._own(shared(read_table(path, self.separator)), path)

    def arrived(self, path: Path, *narrowed: Callable[["pd.DataFrame"], "pd.DataFrame"]) -> Data:
        """The same of the lines that are whole, in order: one that is half written is left for later."""
        table = read_growing(path, self.separator)
        for share in narrowed:
            table = share(table)
        return self._own(table, path)

    def examined(
        self, path: Path, *narrowed: Callable[["pd.DataFrame"], "pd.DataFrame"], growing: bool = False
    ) -> Findings:
        """A check of all columns, rather than up to the first error."""
        try:
            table = (read_growing if growing else read_table)(path, self.separator)
        except DataError as error:
            return Findings({}, (Problem(str(error), fatal=True),))
        for share in narrowed:
            table = share(table)
        return of_table(table, self._schema(), check_ranges(self.ranges), growing)

    @property
    def labels(self) -> Sequence[str]:
        """The classes as written in the table."""
        return self._schema().classes

    def _own(self, table: "pd.DataFrame", path: Path) -> Data:
        if self.standardize:
            raise ConfigError(
                "task.standardize=true uses statistics that nodes with their own data do not share: "
                "set public task.mean and task.std instead"
            )
        schema = self._schema()
        data = self._encode(schema, table, str(path))
        if self.anonymity is None:
            return self._scaled(data)
        found = anonymise(data.x.numpy(), data.y.numpy(), schema, self.anonymity, str(path))
        _log.info("%s: %s", path, found.cost)
        return self._scaled(Data(torch.from_numpy(found.x), data.y[found.rows]))

    def client_names(self) -> NDArray[np.generic] | None:
        """The client_column of the training rows."""
        return self._files().names

    def _encode(self, schema: Schema, table: "pd.DataFrame", source: str) -> Data:
        """Features as they are written, and labels."""
        x, y = schema.encode(table, source)
        for field, values in (("mean", self.mean), ("std", self.std)):
            if np.size(values) not in (1, schema.width):
                raise ConfigError(
                    f"task.{field} has {np.size(values)} numbers for {schema.width} features: "
                    "give one number, or one per feature"
                )
        return Data(torch.from_numpy(x), torch.from_numpy(y))

    def _scaled(self, data: Data) -> Data:
        return Data((data.x - torch.tensor(self.mean)) / torch.tensor(self.std), data.y)

    @cached_property
    def _partitions(self) -> list[NDArray[np.int64]]:
        return super()._partitions if self.anonymity is None else self._shared.parts

    @cached_property
    def _shared(self) -> _Shared:
        """Rows that are suppressed, or that no client has, are left out; the others keep their order."""
        files, rules = self._files(), self.anonymity
        assert files.train is not None
        assert rules is not None
        x, y, parts, costs = files.train.x.numpy().copy(), files.train.y.numpy(), [], []
        split = self.partition.split(y, self.clients, self.seed, self.client_names())
        for number, part in enumerate(split):
            found = anonymise(x[part], y[part], files.schema, rules, f"client {number} of {self.path}")
            parts.append(part[found.rows])
            x[parts[-1]] = found.x
            costs.append(found.cost)
        cost, kept = total(costs), np.sort(np.concatenate(parts))
        _log.info("%s: %s", self.path, cost)
        train = self._scaled(Data(torch.from_numpy(x[kept]), torch.from_numpy(y[kept])))
        return _Shared(train, [np.searchsorted(kept, part) for part in parts], cost)

    def _schema(self) -> Schema:
        """What all nodes agree on: the settings say it, or the training table; a node has no test table."""
        if self.path is not None:
            return self._files().schema
        columns = tuple((name, None) for name in self.features or ())
        return Schema(self.label, tuple(self.class_names or ()), columns)

    @once
    def _files(self) -> _Read:
        if self.path is None:
            schema = self._schema()
            return _Read(schema, None, self._test_table(schema), None)
        path = Path(self.path).expanduser()
        table = read_table(path, self.separator)
        schema = self._infer(table, str(path))
        train, test, names = self._encode(schema, table, str(path)), self._test_table(schema), None
        if self.client_column is not None:
            names = whole(table[self.client_column], str(path)).to_numpy(dtype=str)
        if self.test_path is None:
            rows, out = held_out(train.y.numpy(), self.test_fraction)
            test = Data(train.x[out], train.y[out]) if len(out) else None
            train, names = Data(train.x[rows], train.y[rows]), None if names is None else names[rows]
            test = None if test is None else self._scaled(test)
        if self.anonymity is None:
            train = self._scaled(train)
        if self.standardize:
            std, mean = torch.std_mean(train.x, dim=0, correction=0)
            std = torch.where(std > 0, std, 1.0)
            train = Data((train.x - mean) / std, train.y)
            test = None if test is None else Data((test.x - mean) / std, test.y)
        return _Read(schema, train, test, names)

    def _test_table(self, schema: Schema) -> Data | None:
        if self.test_path is None:
            return None
        path = Path(self.test_path).expanduser()
        return self._scaled(self._encode(schema, read_table(path, self.separator), str(path)))

    def _infer(self, table: "pd.DataFrame", source: str) -> Schema:
        """The schema of the training table, as far as the settings leave it open."""
        client = [] if self.client_column is None else [self.client_column]
        need(table, [self.label, *client, *(self.features or ())], source)
        names = self.features or [name for name in table.columns if name not in (self.label, *client)]
        if not names:
            raise DataError(f"{source} has no columns to learn from beside {self.label}: add some")
        columns = tuple((name, categories_of(table[name], source)) for name in names)
        classes = self.class_names or in_order(list(whole(table[self.label], source).unique()))
        return Schema(self.label, tuple(classes), columns)


def _constants(field: str, value: float | Sequence[float]) -> tuple[float, ...]:
    """A mean or std as a tuple of one or more. Raises ConfigError unless finite, and above zero for a std."""
    try:
        values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (ValueError, TypeError):
        values = np.array([np.nan])
    fits = values.ndim == 1 and len(values) > 0 and bool(np.isfinite(values).all())
    if not fits or (field == "std" and values.min() <= 0):
        bound = "finite numbers above 0" if field == "std" else "finite numbers"
        raise ConfigError(f"task.{field} must be {bound}, got {value}: set one number, or one per feature")
    return tuple(values.tolist())
