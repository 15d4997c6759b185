"""How training examples are split over simulated clients, by the partitioners of flwr-datasets."""

import contextlib
import hashlib
import io
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = NDArray[np.int64]


class Partition(Protocol):
    """A way to split examples over clients; what a split is made of is in its fields."""

    def split(
        self, labels: Indices, clients: int, seed: int, column: NDArray[np.generic] | None = None
    ) -> list[Indices]:
        """Return `clients` disjoint int64 index arrays into `labels`; some may be empty.

        labels: (n,). column: (n,), each example's natural client, used by Natural only. The same arguments
        give the same split. Raises ConfigError for settings that cannot be met, DataError for a bad column.
        """


@dataclass(frozen=True)
class Iid:
    """Equal parts of all examples in a random order."""

    def split(
        self, labels: Indices, clients: int, seed: int, column: NDArray[np.generic] | None = None
    ) -> list[Indices]:
        """See Partition.split."""

        def partitioner() -> "Partitioner":
            from flwr_datasets.partitioner import IidPartitioner

            return IidPartitioner(num_partitions=clients)

        order = np.random.default_rng(seed).permutation(len(labels))
        return _split(self, labels, clients, seed, partitioner, order)


@dataclass(frozen=True)
class Dirichlet:
    """Each class spread over clients by proportions from a Dirichlet distribution: smaller alpha, more skew.

    No client gets fewer than min_partition_size examples: the draw is repeated, ten times at most.
    """

    alpha: float = 0.5
    min_partition_size: int = 10

    def __post_init__(self) -> None:
        check.real("partition.alpha", self.alpha, above=0.0)
        check.whole("partition.min_partition_size", self.min_partition_size, 0)

    def split(
        self, labels: Indices, clients: int, seed: int, column: NDArray[np.generic] | None = None
    ) -> list[Indices]:
        """See Partition.split."""

        def partitioner() -> "Partitioner":
            from flwr_datasets.partitioner import DirichletPartitioner

            return DirichletPartitioner(
                num_partitions=clients,
                partition_by="key",
                alpha=float(self.alpha),
                min_partition_size=self.min_partition_size,
                self_balancing=False,
                seed=seed,
            )

        return _split(self, labels, clients, seed, partitioner)


@dataclass(frozen=True)
class Shard:
    """Examples sorted by label and cut into equal shards; each client gets some (McMahan et al., 2017).

    What is left over after equal cutting belongs to nobody.
    """

    num_shards_per_partition: int = 2

    def __post_init__(self) -> None:
        check.whole("partition.num_shards_per_partition", self.num_shards_per_partition, 1)

    def split(
        self, labels: Indices, clients: int, seed: int, column: NDArray[np.generic] | None = None
    ) -> list[Indices]:
        """See Partition.split."""

        def partitioner() -> "Partitioner":
            from flwr_datasets.partitioner import ShardPartitioner

            shards = self.num_shards_per_partition
            return ShardPartitioner(
                num_partitions=clients, partition_by="key", num_shards_per_partition=shards, seed=seed
            )

        return _split(self, labels, clients, seed, partitioner)


@dataclass(frozen=True)
class Pathological:
    """Each client gets exactly so many classes (Li et al., 2021).

    A class that no client drew belongs to nobody.
    """

    num_classes_per_partition: int = 2

    def __post_init__(self) -> None:
        check.whole("partition.num_classes_per_partition", self.num_classes_per_partition, 1)

    def split(
        self, labels: Indices, clients: int, seed: int, column: NDArray[np.generic] | None = None
    ) -> list[Indices]:
        """See Partition.split."""

        def partitioner() -> "Partitioner":
            from flwr_datasets.partitioner import PathologicalPartitioner

            return PathologicalPartitioner(
                num_partitions=clients,
                partition_by="key",
                num_classes_per_partition=self.num_classes_per_partition,
                class_assignment_mode="first-deterministic",
                seed=seed,
            )

        return _split(self, labels, clients, seed, partitioner)


@dataclass(frozen=True)
class Natural:
    """One client for each value of a column of the data (a hospital, a writer), sorted; nothing is random."""

    def split(
        self, labels: Indices, clients: int, seed: int, column: NDArray[np.generic] | None = None
    ) -> list[Indices]:
        """See Partition.split."""
        if column is None:
            raise ConfigError(
                "partition=natural needs a column that names each example's client: "
                "use task=csv with task.client_column=<column>, or partition=dirichlet"
            )
        if len(column) != len(labels):
            raise DataError(f"{len(labels)} examples have {len(column)} client names: give each example one")
        column = column.astype(str) if column.dtype.hasobject else column
        natural = len(np.unique(column))
        if natural != clients:
            raise ConfigError(
                f"the data come from {natural} natural clients, not {clients}: set clients={natural}"
            )

        def partitioner() -> "Partitioner":
            from flwr_datasets.partitioner import NaturalIdPartitioner

            return NaturalIdPartitioner(partition_by="key")

        return _split(self, column, clients, seed, partitioner)


def _split(
    partition: Partition,
    keys: NDArray[np.generic],
    clients: int,
    seed: int,
    partitioner: Callable[[], "Partitioner"],
    order: Indices | None = None,
) -> list[Indices]:
    """Run a partitioner over examples with these keys, in `order`, or take its result from the disk.

    Importing flwr-datasets costs seconds, so a split is kept in the user's cache folder under a name that
    covers all it depends on.
    """
    if clients < 1 or clients > len(keys):
        raise ConfigError(
            f"clients must be from 1 to the {len(keys)} training examples, got {clients}: "
            "lower clients, or use more data"
        )
    versions = [version(package) for package in ("flwr-datasets", "datasets", "numpy")]
    name = hashlib.sha256(repr((partition, clients, seed, versions, keys.dtype.str)).encode())
    name.update(np.ascontiguousarray(keys).tobytes())
    cached = _cache_folder() / f"{name.hexdigest()}.npz"
    parts = _load(cached, len(keys), clients)
    if parts is None:
        parts = _run(partition, keys, clients, partitioner, np.arange(len(keys)) if order is None else order)
        _save(cached, parts)
    return parts


def _run(
    partition: Partition,
    keys: NDArray[np.generic],
    clients: int,
    partitioner: Callable[[], "Partitioner"],
    order: Indices,
) -> list[Indices]:
    # Progress bars and advice on retries go to stderr and warnings; what matters comes back as an error.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets

        examples = datasets.Dataset.from_dict({"key": keys[order].tolist(), "index": order})
        try:
            splitter = partitioner()
            splitter.dataset = examples
            loaded = [splitter.load_partition(client).with_format("numpy") for client in range(clients)]
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise ConfigError(
                f"{partition} cannot split {len(keys)} examples over {clients} clients "
                f"({str(error).split('. ')[0]}): change these settings, or set fewer clients"
            ) from error
        return [np.asarray(part["index"][:], dtype=np.int64) for part in loaded]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedapp" / "partitions"


def _load(path: Path, examples: int, clients: int) -> list[Indices] | None:
    """The split kept at `path`, or None where there is none that could be right."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            indices, sizes = kept["indices"].astype(np.int64), kept["sizes"].astype(np.int64)
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    fits = len(sizes) == clients and sizes.sum() == len(indices) and len(np.unique(indices)) == len(indices)
    if not fits or (len(indices) and not 0 <= indices.min() <= indices.max() < examples):
        return None
    return np.split(indices, np.cumsum(sizes)[:-1])


def _save(path: Path, parts: list[Indices]) -> None:
    """Keep a split at `path` in one step; a folder that cannot be written only costs time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, indices=np.concatenate(parts), sizes=np.array([len(part) for part in parts]))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
