"""Everything one run is made of, checked before anything starts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedapp import check
from fedapp.codec import Codec, Layout, Slot
from fedapp.codec.chain import ErrorFeedback, Identity
from fedapp.codec.feedback import AutoFeedback
from fedapp.downlink import Coded, Plain
from fedapp.errors import ConfigError
from fedapp.privacy.accounting import Sampling, Spent
from fedapp.privacy.accounting import epsilon as epsilon_of
from fedapp.privacy.central import CentralGaussian
from fedapp.privacy.example import ExamplePrivacy
from fedapp.privacy.local import LocalGaussian
from fedapp.privacy.mechanism import Mechanism, Plan
from fedapp.privacy.none import NoPrivacy
from fedapp.privacy.secret import COHORT, Secret, source, uniform
from fedapp.tasks import Task
from fedapp.training import DpSgd, Trainer
from fedapp.wire import STREAMED

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
    privacy: NoPrivacy | ExamplePrivacy | LocalGaussian | CentralGaussian
    engine: "Local"
    choices: Mapping[str, str | None]
    feedback: str | None = field(init=False, default=None)  # what `codec.feedback=auto` came to, and why

    def __post_init__(self) -> None:
        check.whole("clients", self.clients, 1)
        if self.cohort is not None:
            check.whole("cohort", self.cohort, 1, self.clients)
        check.whole("rounds", self.rounds, 0)
        check.whole("seed", self.seed, 0, 2**32 - 1)
        check.choice("sampling", self.sampling, ("auto", "fixed", "poisson"))
        check.choice("evaluate", self.evaluate, ("server", "clients", "none"))
        check.choice("device", self.device, ("auto", "cpu", "cuda"))
        check.real("round_timeout", self.round_timeout, above=0.0)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch sees no CUDA device: set device=cpu or device=auto")
        central = isinstance(self.privacy, CentralGaussian)
        if self.sampling == "auto":
            object.__setattr__(self, "sampling", "poisson" if central else "fixed")
        self._check_privacy()
        self._decide_feedback()

    def _check_privacy(self) -> None:
        """What would leak beside a private update, and trainers without their privacy, are refused."""
        given, strategy = f"privacy={self.choices['privacy']}", type(self.strategy).__name__
        example = isinstance(self.privacy, ExamplePrivacy)
        if isinstance(self.trainer, DpSgd) != example:
            fitting = "privacy=example" if isinstance(self.trainer, DpSgd) else "trainer=dp_sgd"
            raise ConfigError(
                f"trainer={self.choices['trainer']} does not go with {given}: "
                f"choose {fitting}, or leave trainer to the privacy choice"
            )
        if self.privacy.unit is None:
            return
        client, central = not example, isinstance(self.privacy, CentralGaussian)
        refused = (
            (strategy == "QFedAvg", "strategy=qfedavg needs the clients' losses: choose strategy=fedavg"),
            (
                strategy == "FedProx" and example,
                "strategy=fedprox needs trainer=sgd: choose strategy=fedavg",
            ),
            (
                strategy not in STREAMED and client,
                f"strategy={self.choices['strategy']} needs each update by itself, and what is private is "
                f"their mean: choose strategy=fedavg",
            ),
            (
                central and isinstance(self.codec, ErrorFeedback),
                "error feedback would bring back what the clip has cut: set codec.feedback=false",
            ),
            (self.evaluate == "clients", "evaluate=clients sends private accuracies: set evaluate=server"),
            (
                self.task.private_preprocessing,
                "task.standardize=true takes statistics of private data: give public task.mean and task.std",
            ),
        )
        for holds, reason in refused:
            if holds:
                raise ConfigError(f"{given} keeps what is private on the client, but {reason}")
        if isinstance(self.trainer, DpSgd) and isinstance(self.privacy, ExamplePrivacy):
            trainer = replace(self.trainer, privacy=self.privacy, rounds=max(1, self.rounds))
            object.__setattr__(self, "trainer", trainer)
        elif isinstance(self.privacy, (LocalGaussian, CentralGaussian)):
            object.__setattr__(self, "privacy", replace(self.privacy, plan=self._plan()))

    def _plan(self) -> Plan:
        """What the accounting needs: who takes part how often is public where nobody claims amplification."""
        most = self.rounds
        if not isinstance(self.privacy, CentralGaussian) and self.in_round < self.clients:
            drawn = Counter(i for r in range(1, self.rounds + 1) for i in self.draw(r, self.clients))
            most = max(drawn.values(), default=0)
        return Plan(cast(Sampling, self.sampling), self.in_round, self.clients, self.rounds, most)

    def draw(self, server_round: int, nodes: int) -> list[int]:
        """Who trains in a round: of so many nodes, by partition.

        By the operating system's randomness where amplification counts on it, else by the seed.
        """
        secret: Secret = self.public_rng(server_round, partition=0, use=2).bytes
        if isinstance(self.privacy, CentralGaussian):
            secret = source(self.privacy.test_seed, COHORT, server_round)
        numbers, size = uniform(nodes, secret), min(self.in_round, nodes)
        chosen = numbers < size / nodes if self.sampling == "poisson" else numbers.argsort().argsort() < size
        return [int(i) for i in np.flatnonzero(chosen)]

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
    def mechanism(self) -> Mechanism | None:
        """Client-level privacy, if that is what was chosen."""
        return self.privacy if isinstance(self.privacy, (LocalGaussian, CentralGaussian)) else None

    @property
    def wire_codec(self) -> Codec | None:
        """None where weights come back as plain Flower sends them."""
        plain = isinstance(self.codec, Identity) and isinstance(self.downlink, Plain) and not self.mechanism
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
        if self.mechanism is not None and any(True for _ in model.buffers()):
            raise ConfigError(
                f"privacy={self.choices['privacy']} noises parameters, and this model has other state too "
                f"({next(name for name, _ in model.named_buffers())}): use model.norm=group for resnet18"
            )
        self.spent(self.rounds, self.rounds)  # finds the noise, and imports accountants

    def spent(self, rounds: int, participations: int) -> Spent | None:
        """What so many rounds cost, where a client took part in so many; None where nothing is private.

        Epsilon of client-level privacy in the central model is that of all rounds, whoever took part.
        """
        if isinstance(self.trainer, DpSgd) and isinstance(self.privacy, ExamplePrivacy):
            history = self.trainer.history(participations)
            epsilon = self.privacy.spent(history) if participations else 0.0
            return Spent(epsilon, self.privacy.accountant)
        if self.mechanism is None:
            return None
        return epsilon_of(self.mechanism.releases(rounds, participations), self.privacy.delta)

    @property
    def note(self) -> str | None:
        """What a reader of the results must know."""
        if not isinstance(self.privacy, NoPrivacy) and self.privacy.test_seed is not None:
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
