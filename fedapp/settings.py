"""What may be chosen of a run, each within its bounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flwr.serverapp.strategy import Strategy

from fedapp import check
from fedapp.assignment import Deadline, Whole
from fedapp.ckks import Ckks, Open
from fedapp.codec import Codec
from fedapp.downlink import Coded, Plain
from fedapp.dp_step import DpStep
from fedapp.errors import ConfigError
from fedapp.privacy.central import CentralGaussian
from fedapp.privacy.example import ExamplePrivacy
from fedapp.privacy.local import LocalGaussian
from fedapp.privacy.none import NoPrivacy
from fedapp.secagg.wire import Summed
from fedapp.selection import Selection
from fedapp.speeds import Stragglers, Untimed
from fedapp.tasks import Task
from fedapp.training import Trainer

if TYPE_CHECKING:
    from fedapp.engine.flower import Flower
    from fedapp.engine.local import Local

_MOST_ROUNDS = 1_000_000


@dataclass(frozen=True)
class Settings:
    """The settings of `conf/config.yaml`, by their names; raises ConfigError for what is out of bounds."""

    clients: int
    begin_with: int | None
    cohort: int | None
    rounds: int
    seed: int
    sampling: str
    over_selection: float
    deadline: float | None
    norm_bound: float | None
    evaluate: str
    held_out: float
    device: str
    round_timeout: float
    checkpoint: float | None
    profile: bool
    task: Task
    trainer: Trainer | DpStep
    codec: Codec
    downlink: Plain | Coded
    strategy: Strategy
    privacy: NoPrivacy | ExamplePrivacy | LocalGaussian | CentralGaussian | Summed
    aggregation: Open | Ckks
    engine: "Local | Flower"
    speeds: Untimed | Stragglers
    selection: Selection
    assignment: Whole | Deadline
    choices: Mapping[str, str | None]

    def __post_init__(self) -> None:
        check.whole("clients", self.clients, 1)
        if self.begin_with is not None:
            check.whole("begin_with", self.begin_with, 1, self.clients)
        if self.cohort is not None:
            check.whole("cohort", self.cohort, 1, self.clients)
        check.whole("rounds", self.rounds, 0, _MOST_ROUNDS)
        check.whole("seed", self.seed, 0, 2**32 - 1)
        check.choice("sampling", self.sampling, ("auto", "fixed", "poisson"))
        check.real("over_selection", self.over_selection, low=1.0, high=100.0)
        if self.deadline is not None:
            check.real("deadline", self.deadline, above=0.0)
        if self.norm_bound is not None:
            check.real("norm_bound", self.norm_bound, above=0.0, high=1e6)
        check.choice("evaluate", self.evaluate, ("server", "clients", "none"))
        check.real("held_out", self.held_out, above=0.0, high=0.5)
        check.choice("device", self.device, ("auto", "cpu", "cuda"))
        check.real("round_timeout", self.round_timeout, above=0.0)
        if self.checkpoint is not None:
            check.real("checkpoint", self.checkpoint, low=0.0)
        check.flag("profile", self.profile)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch sees no CUDA device: set device=cpu or device=auto")
