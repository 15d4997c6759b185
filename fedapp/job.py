"""Everything one run is made of, checked before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedapp import check
from fedapp.codec import Codec, Layout, Slot
from fedapp.codec.chain import Identity
from fedapp.codec.feedback import AutoFeedback
from fedapp.downlink import Coded, Plain
from fedapp.errors import ConfigError
from fedapp.privacy.example import ExamplePrivacy
from fedapp.privacy.none import NoPrivacy
from fedapp.tasks import Task
from fedapp.training import DpSgd, Trainer

if TYPE_CHECKING:
    from fedapp.engine.local import Local


@dataclass(frozen=True)
class Job:
    """One run: the same on the server and on every client, since each composes it from the same YAML."""

    clients: int
    cohort: int | None
    rounds: int
    seed: int
    sampling: str
    evaluate: str
    device: str
    round_timeout: float
    task: Task
    trainer: Trainer
    codec: Codec
    downlink: Plain | Coded
    strategy: Strategy
    privacy: NoPrivacy | ExamplePrivacy
    engine: "Local"
    choices: Mapping[str, str | None]
    feedback: str | None = field(init=False, default=None)  # what `codec.feedback=auto` came to, and why

    def __post_init__(self) -> None:
        check.whole("clients", self.clients, 1)
        if self.cohort is not None:
            check.whole("cohort", self.cohort, 1, self.clients)
        check.whole("rounds", self.rounds, 0)
        check.whole("seed", self.seed, 0, 2**32 - 1)
        check.choice("sampling", self.sampling, ("fixed",))
        check.choice("evaluate", self.evaluate, ("server", "clients", "none"))
        check.choice("device", self.device, ("auto", "cpu", "cuda"))
        check.real("round_timeout", self.round_timeout, above=0.0)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch sees no CUDA device: set device=cpu or device=auto")
        self._check_privacy()
        self._decide_feedback()

    def _check_privacy(self) -> None:
        """What would leak beside a private update, and trainers without their privacy, are refused."""
        private = isinstance(self.privacy, ExamplePrivacy)
        if isinstance(self.trainer, DpSgd) != private:
            fitting = "privacy=none" if private else "privacy=example"
            raise ConfigError(
                f"trainer={self.choices['trainer']} does not go with privacy={self.choices['privacy']}: "
                f"choose {fitting}, or leave trainer to the privacy choice"
            )
        if not (isinstance(self.trainer, DpSgd) and isinstance(self.privacy, ExamplePrivacy)):
            return
        trainer = replace(self.trainer, privacy=self.privacy, rounds=max(1, self.rounds))
        object.__setattr__(self, "trainer", trainer)
        strategy, given = type(self.strategy).__name__, f"privacy={self.choices['privacy']}"
        refused = (
            (strategy == "QFedAvg", "strategy=qfedavg needs the clients' losses: choose strategy=fedavg"),
            (strategy == "FedProx", "strategy=fedprox needs trainer=sgd: choose strategy=fedavg"),
            (self.evaluate == "clients", "evaluate=clients sends private accuracies: set evaluate=server"),
            (
                self.task.private_preprocessing,
                "task.standardize=true takes statistics of private data: give public task.mean and task.std",
            ),
        )
        for holds, reason in refused:
            if holds:
                raise ConfigError(f"{given} keeps what is private on the client, but {reason}")

    def _decide_feedback(self) -> None:
        """Both ends get the same codec of `codec.feedback=auto`."""
        if isinstance(self.codec, AutoFeedback):
            privacy = f"privacy={self.choices['privacy']}" if self.privacy.unit else None
            codec, said = self.codec.decide(self.in_round, self.clients, privacy)
            object.__setattr__(self, "codec", codec)
            object.__setattr__(self, "feedback", said)

    @property
    def in_round(self) -> int:
        """How many clients train in a round."""
        return self.cohort or self.clients

    @property
    def wire_codec(self) -> Codec | None:
        """None where weights come back as plain Flower sends them."""
        plain = isinstance(self.codec, Identity) and isinstance(self.downlink, Plain)
        return None if plain else self.codec

    @cached_property
    def torch_device(self) -> torch.device:
        """Where models train."""
        chosen = self.device
        if chosen == "auto":
            chosen = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(chosen)

    @cached_property
    def initial(self) -> ArrayRecord:
        """The weights that the seed gives, the same on server and clients."""
        return ArrayRecord(self.task.model(self.seed).state_dict())

    @cached_property
    def model(self) -> nn.Module:
        """The one resident model of this process; weights are copied into it in place."""
        return self.task.model(self.seed).to(self.torch_device)

    def prepare(self) -> None:
        """Do once what every worker would do again, and refuse a model that the trainer cannot train."""
        import torch._dynamo  # noqa: F401  (any optimizer imports it, in every worker)

        model = self.task.model(self.seed)
        _check_codec(self.codec, model)
        if isinstance(self.trainer, DpSgd):
            _check_private_model(model)
            self.epsilon(self.rounds)  # finds the noise, and imports Opacus

    def epsilon(self, participations: int) -> float | None:
        """Epsilon of a client that took part in so many rounds; None where nothing is private."""
        if not isinstance(self.trainer, DpSgd) or self.note:
            return None
        assert isinstance(self.privacy, ExamplePrivacy)
        return self.privacy.spent(self.trainer.history(participations)) if participations else 0.0

    @property
    def note(self) -> str | None:
        """What a reader of the results must know."""
        if isinstance(self.privacy, ExamplePrivacy) and self.privacy.test_seed is not None:
            return "privacy.test_seed fixes the noise, so nothing is private and epsilon is null"
        return None

    def public_rng(self, server_round: int, partition: int, use: int) -> np.random.Generator:
        """Public randomness of one client in one round; `use` tells its consumers apart."""
        return np.random.default_rng([self.seed, server_round, partition, use])


def _check_codec(codec: Codec, model: nn.Module) -> None:
    """Code a few values a layer there and back: stages may not fit together, or not this model."""
    slots, size = [], 0
    for name, array in model.state_dict().items():
        if array.is_floating_point():
            slots.append(Slot(name, (2,) * array.ndim, size))
            size += 2**array.ndim
    x, layout = np.linspace(-1, 1, size, dtype=np.float32), Layout(tuple(slots), size)
    try:
        packet, _ = codec.encode(x, layout, {}, np.random.default_rng(0))
        codec.decode(packet, layout)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"codec={codec} cannot code an update ({error}): order its stages anew") from error


def _check_private_model(model: nn.Module) -> None:
    from opacus.validators import ModuleValidator

    errors: list[Any] = ModuleValidator.validate(model, strict=False)
    if errors:
        raise ConfigError(
            f"this model cannot be trained under privacy=example ({str(errors[0]).splitlines()[0]}): "
            f"use group normalisation (model.norm=group for resnet18), or privacy=none"
        )
