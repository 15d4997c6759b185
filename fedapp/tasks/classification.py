"""Classification: everything that the classification tasks share but the reading of their data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedapp import check
from fedapp.errors import ConfigError, DataError
from fedapp.tasks import EVALUATION_BATCH, Data, Score, means
from fedapp.tasks.partition import Partition
from fedapp.tasks.quality import Findings, Problem, of_data


@dataclass(frozen=True, kw_only=True)
class Classification(ABC):
    """A classification task: a subclass reads data, and all the rest is here.

    build: makes a model from (input_shape, classes). partition: how training examples are split over
    `clients` simulated clients by `seed`. Raises ConfigError for fewer than one client.
    """

    build: Callable[[tuple[int, ...], int], nn.Module]
    partition: Partition
    clients: int
    seed: int

    def __post_init__(self) -> None:
        check.whole("clients", self.clients, 1)
        check.whole("seed", self.seed, 0, 2**32 - 1)

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many classes there are."""

    @abstractmethod
    def train_data(self) -> Data:
        """All training examples, read once per process."""

    @abstractmethod
    def test_data(self) -> Data | None:
        """The test examples, read once per process; None where there are none."""

    @abstractmethod
    def read(self, path: Path) -> Data:
        """A client's own examples: the whole of that file or folder, read anew at each call."""

    def arrived(self, path: Path, *narrowed: Callable[[Any], Any]) -> Data:
        """As `read`, of a file or folder that grows: what is whole in it, in order of arrival; may be none.

        Raises ConfigError where the task reads nothing that could grow.
        """
        raise ConfigError(
            f"{type(self).__name__} reads no data that grow on a node's disk: "
            "choose task@task.source=csv or image_folder"
        )

    def examined(self, path: Path, *narrowed: Callable[[Any], Any], growing: bool = False) -> Findings:
        """A check of a client's own file or folder, or what of it is narrowed to; never a DataError."""
        try:
            return of_data((self.arrived if growing else self.read)(path), self.labels)
        except DataError as error:
            return Findings({}, (Problem(str(error), fatal=True),))

    @property
    def labels(self) -> Sequence[str]:
        """What the classes are called; numbers where the data do not name them."""
        names: Sequence[str] | None = getattr(self, "class_names", None)
        return [str(index) for index in range(self.classes)] if names is None else names

    def client_names(self) -> NDArray[np.generic] | None:
        """The client each training example belongs to by nature, (n,); None where the data do not say."""
        return None

    @property
    def private_preprocessing(self) -> bool:
        """True when inputs are scaled by statistics of private data, which no privacy choice covers."""
        return False

    def model(self, seed: int) -> nn.Module:
        """A new float32 model whose initial weights depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator only: weights are drawn there, and an accelerator's stream is left alone.
            torch.default_generator.manual_seed(seed)
            return self.build(self.input_shape, self.classes).to(torch.float32)

    def client_data(self, node_config: Mapping[str, bool | int | float | str]) -> Data:
        """The examples of the node with this config: the only place where deployment and simulation differ.

        "data" names the node's own file or folder; else "partition-id" picks one of `clients` parts of the
        training data. Raises ConfigError for a config that names neither, or a part that does not exist;
        DataError for data that cannot be read.
        """
        if "data" in node_config:
            return self.read(Path(str(node_config["data"])).expanduser())
        if "partition-id" not in node_config:
            raise ConfigError(
                'the node config names no data: give the node data="<path>", or partition-id=<number>'
            )
        parts = node_config.get("num-partitions", self.clients)
        if parts != self.clients:
            raise ConfigError(
                f"the node counts {parts} partitions and the run {self.clients} clients: set clients={parts}"
            )
        index = node_config["partition-id"]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.clients:
            raise ConfigError(
                f"partition-id must be a whole number from 0 to {self.clients - 1}, got {index!r}: "
                "change it in the node config, or set clients higher"
            )
        return self.train_data().at(self._partitions[index])

    def loss(self, output: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross entropy of logits (n, classes) against labels (n,) in nats: the mean, or "none" (n,)."""
        return functional.cross_entropy(output, target, reduction=reduction)

    def evaluate(self, model: nn.Module, data: Data) -> dict[str, float]:
        """Accuracy (0 to 1) and mean loss over all of `data`, in evaluation mode and without gradients.

        Raises DataError when there are no examples.
        """
        if not len(data):
            raise DataError("there are no examples to evaluate on: leave this client out of evaluation")
        return means(self.scores(model, data))

    def scores(self, model: nn.Module, data: Data) -> list[Score]:
        """How each EVALUATION_BATCH examples are answered; works where the model is, restores its mode."""
        device = next((p.device for p in model.parameters()), data.x.device)
        xs, ys = torch.split(data.x, EVALUATION_BATCH), torch.split(data.y, EVALUATION_BATCH)
        was_training = model.training
        model.eval()
        scores = []
        try:
            with torch.no_grad():
                for x, y in zip(xs, ys, strict=True):
                    output, target = model(x.to(device)), y.to(device)
                    right = int((output.argmax(dim=1) == target).sum())
                    scores.append(Score(right, float(self.loss(output, target)) * len(y), len(y)))
        finally:
            model.train(was_training)
        return scores

    def partitions(self) -> list[NDArray[np.int64]]:
        """Which training examples each simulated client has: `clients` disjoint index arrays."""
        return list(self._partitions)

    def label_counts(self) -> NDArray[np.int64]:
        """How many examples of each class each simulated client has, (clients, classes)."""
        labels = self.train_data().y.numpy()
        counts = [np.bincount(labels[part], minlength=self.classes) for part in self._partitions]
        return np.stack(counts).astype(np.int64)

    @cached_property
    def _partitions(self) -> list[NDArray[np.int64]]:
        labels = self.train_data().y.numpy()
        return self.partition.split(labels, self.clients, self.seed, self.client_names())


_NOT_DATA = {field.name for field in fields(Classification)}
_Task = TypeVar("_Task", bound=Classification)
_Result = TypeVar("_Result")


def once(read: Callable[[_Task], _Result]) -> Callable[[_Task], _Result]:
    """A reading method that runs once per process for the same data settings.

    A task is made anew for every message in some engines; its data are not, and forked workers share them.
    """
    kept: dict[Hashable, _Result] = {}

    @wraps(read)
    def call(task: _Task) -> _Result:
        settings = tuple(getattr(task, f.name) for f in fields(task) if f.name not in _NOT_DATA)
        if settings not in kept:
            kept[settings] = read(task)
        return kept[settings]

    return call


def held_out(
    labels: NDArray[np.int64], fraction: float, rng: np.random.Generator | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A split (train, test) of len(labels) examples, stratified by label; without `rng` always the same one.

    Returns two disjoint sorted index arrays; the test part has round(n * fraction) examples.
    Raises DataError when it leaves no training example.
    """
    count, size = len(labels), round(len(labels) * fraction)
    if size >= count:
        raise DataError(
            f"holding out {size} of {count} examples leaves none to train on: lower task.test_fraction"
        )
    order = (rng or np.random.default_rng(0)).permutation(count)
    by_label = order[np.argsort(labels[order], kind="stable")]
    test = by_label[(2 * np.arange(size) + 1) * count // (2 * max(size, 1))]  # evenly spaced
    return np.setdiff1d(np.arange(count), test), np.sort(test)


def check_names(field: str, names: Sequence[object]) -> tuple[str, ...]:
    """The names as strings. Raises ConfigError when there are none, or one twice."""
    found = tuple(str(name) for name in names) if not isinstance(names, str) else ()
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"task.{field} must list different names, got {names}: set task.{field}=[a,b]")
    return found
