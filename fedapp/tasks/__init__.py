"""What is learned from which data: the tasks, and how their examples are split over clients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedapp.errors import DataError

__all__ = ["Data", "Task"]


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

    def __len__(self) -> int:
        return len(self.y)


class Task(Protocol):
    """A learning problem: its model, its loss, its data and how they are split.

    Formal guarantees: the same settings and seed give the same weights and the same split on every node.
    """

    @property
    def input_shape(self) -> tuple[int, ...]: ...  # of one example

    @property
    def classes(self) -> int: ...

    @property
    def private_preprocessing(self) -> bool: ...  # True: statistics of private data, which DP does not cover

    def model(self, seed: int) -> nn.Module: ...

    def client_data(self, node_config: Mapping[str, bool | int | float | str]) -> Data: ...

    def test_data(self) -> Data | None: ...

    def loss(self, output: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor: ...

    def evaluate(self, model: nn.Module, data: Data) -> dict[str, float]: ...

    def partitions(self) -> list[NDArray[np.int64]]: ...

    def label_counts(self) -> NDArray[np.int64]: ...  # (clients, classes)
