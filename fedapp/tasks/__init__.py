"""What is learned from which data: the tasks, and how their examples are split over clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedapp.errors import DataError

__all__ = ["EVALUATION_BATCH", "Data", "Score", "Task", "means"]


EVALUATION_BATCH = 1000  # examples; whoever tests them, batches are the same, and so is each bit of a mean


@dataclass(frozen=True)
class Data:
    """The examples of one client, or the test set.

    x: float32, (n, *input_shape). y: int64, (n,). n may be 0. Raises DataError if the lengths differ.
    """

    x: torch.Tensor
    y: torch.Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"{len(self.x)} examples have {len(self.y)} labels: give each example one label")

    def at(self, rows: NDArray[np.int64]) -> "Data":
        """Those examples, by their numbers, (m,)."""
        chosen = torch.from_numpy(rows)
        return Data(self.x[chosen], self.y[chosen])

    def __len__(self) -> int:
        return len(self.y)


class Score(NamedTuple):
    """A test on one batch: right answers, loss summed over examples, and how many these are."""

    right: int
    loss: float
    examples: int


def means(scores: Sequence[Score]) -> dict[str, float]:
    """Accuracy (0 to 1) and mean loss over all examples, at least one; sums are in the order of batches."""
    count = sum(score.examples for score in scores)
    return {
        "accuracy": sum(score.right for score in scores) / count,
        "loss": sum(score.loss for score in scores) / count,
    }


class Task(Protocol):
    """A learning problem: its model, its loss, its data and how they are split.

    Formal guarantees: the same settings and seed give the same weights and the same split on every node.
    """

    @property
    def input_shape(self) -> tuple[int, ...]: ...  # of one example

    @property
    def classes(self) -> int: ...

    @property
    def labels(self) -> Sequence[str]: ...  # what the classes are called

    @property
    def private_preprocessing(self) -> bool: ...  # True: statistics of private data, which DP does not cover

    def model(self, seed: int) -> nn.Module: ...

    def client_data(self, node_config: Mapping[str, bool | int | float | str]) -> Data: ...

    def test_data(self) -> Data | None: ...

    def loss(self, output: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor: ...

    def evaluate(self, model: nn.Module, data: Data) -> dict[str, float]: ...  # the means of `scores`

    def scores(self, model: nn.Module, data: Data) -> list[Score]: ...  # of each batch of EVALUATION_BATCH

    def partitions(self) -> list[NDArray[np.int64]]: ...

    def label_counts(self) -> NDArray[np.int64]: ...  # (clients, classes)
