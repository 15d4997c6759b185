"""Trainers: what a client does with the weights it received and its own data."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedapp import check
from fedapp.assignment import WHOLE, Part
from fedapp.dp_step import Step
from fedapp.errors import ConfigError
from fedapp.models import batch_norms
from fedapp.privacy.example import ExamplePrivacy, History
from fedapp.tasks import Data, Task

State = Mapping[str, NDArray[Any]]
Metrics = dict[str, int | float]


class Trainer(Protocol):
    """Trains `model` in place on one client's data, from the weights it holds.

    `rng` is public randomness fixed by (seed, round, partition), `progress` the share of the planned rounds
    that is done. Returns the metrics that may leave the client, with `num-examples` as the client's weight
    in the mean, and the trainer's next state, which stays on the client.
    """

    def fit(
        self,
        task: Task,
        model: nn.Module,
        data: Data,
        state: State,
        rng: np.random.Generator,
        progress: float,
    ) -> tuple[Metrics, State]: ...


SCHEDULES = ("constant", "cosine")


def scheduled(lr: float, schedule: str, progress: float) -> float:
    """The learning rate of a round: constant, or falling along half a cosine to a twentieth."""
    return lr * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2) if schedule == "cosine" else lr


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent for some epochs, with FedProx's pull towards the received weights.

    Clients weigh by their number of examples. Momentum starts at zero each round. Of a `part` of the work,
    the update is scaled to as far as all steps would have gone along one gradient (`reach`).
    `channels_last` has convolutions keep the channels of a pixel together: quicker, and other last bits.
    `bfloat16` computes losses and gradients in mixed precision (`torch.autocast`); weights stay float32.
    Source of `proximal_mu`: Li et al. 2020, "Federated optimization in heterogeneous networks".
    """

    lr: float = 0.05
    schedule: str = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    epochs: int = 1
    proximal_mu: float = 0.0
    channels_last: bool = False
    bfloat16: bool = False
    part: Part = WHOLE

    def __post_init__(self) -> None:
        check.real("trainer.lr", self.lr, above=0.0, high=1e3)
        check.choice("trainer.schedule", self.schedule, SCHEDULES)
        check.real("trainer.momentum", self.momentum, low=0.0, below=1.0)
        check.real("trainer.weight_decay", self.weight_decay, low=0.0, high=1e3)
        check.whole("trainer.batch_size", self.batch_size, 1)
        check.whole("trainer.epochs", self.epochs, 0)
        check.real("trainer.proximal_mu", self.proximal_mu, low=0.0, high=1e3)
        check.flag("trainer.channels_last", self.channels_last)
        check.flag("trainer.bfloat16", self.bfloat16)

    def pulled(self, mu: float) -> "Sgd":
        """The same trainer with the pull that the FedProx strategy asks for."""
        return replace(self, proximal_mu=mu)

    def reach(self, steps: int, lr: float) -> float:
        """How many times as far as one step so many go along a constant gradient: FedNova's ||a||_1."""
        way = velocity = 0.0
        for _ in range(steps):
            velocity = self.momentum * velocity + 1 - self.proximal_mu * lr * way
            way += velocity
        return way

    def fit(
        self,
        task: Task,
        model: nn.Module,
        data: Data,
        state: State,
        rng: np.random.Generator,
        progress: float,
        way: Sequence[torch.Tensor] = (),
    ) -> tuple[Metrics, State]:
        """As `Trainer.fit`; all steps together also go this way, one tensor a parameter, in equal parts."""
        model.train()
        parameters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        whole, size = self.epochs * -(-len(data) // self.batch_size), self._batch_size
        steps = max(1, int(self.part.work * self.epochs * -(-len(data) // size) + 1e-9))
        pushes = [part / steps for part in way]
        received = [p.detach().clone() for p in parameters] if self.proximal_mu or self.part != WHOLE else []
        lr, velocity = scheduled(self.lr, self.schedule, progress), list[torch.Tensor]()
        shuffle = torch.Generator().manual_seed(_seeded(data.x.device, int(rng.integers(2**63))))
        # Batch statistics of a single example do not exist, so such a remainder sits out an epoch.
        smallest = 2 if batch_norms(model) else 1
        losses, seen = [], 0
        # Also where it does nothing, autocast costs a small model 3 % of a step.
        mixed = torch.autocast(data.x.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()
        for batch in islice(self._batches(data, size, shuffle), steps):
            if len(batch) < smallest:
                continue
            with mixed:
                loss = task.loss(model(data.x[batch]), data.y[batch])
            losses.append(loss.detach() * len(batch))
            seen += len(batch)
            # As torch.optim.SGD does it; its bookkeeping costs nearly half of a small model's step.
            gradients = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
            with torch.no_grad():
                if self.weight_decay:
                    torch._foreach_add_(gradients, parameters, alpha=self.weight_decay)
                if self.proximal_mu:
                    pull = [p - w for p, w in zip(parameters, received, strict=True)]
                    torch._foreach_add_(gradients, pull, alpha=self.proximal_mu)
                if velocity:
                    torch._foreach_mul_(velocity, self.momentum)
                    torch._foreach_add_(velocity, gradients)
                elif self.momentum:
                    velocity = [g.clone() for g in gradients]
                torch._foreach_add_(parameters, velocity or gradients, alpha=-lr)
                if pushes:
                    torch._foreach_add_(parameters, pushes)
        if self.part != WHOLE and whole:
            scale = self.reach(whole, lr) / self.reach(steps, lr)
            with torch.no_grad():
                for p, w in zip(parameters, received, strict=True):
                    p.copy_(w + scale * (p - w))
        mean_loss = float(torch.stack(losses).sum()) / seen if losses else 0.0
        return {"num-examples": len(data), "train_loss": mean_loss}, {}

    @property
    def _batch_size(self) -> int:
        return max(1, round(self.part.batch * self.batch_size))

    def _batches(self, data: Data, size: int, shuffle: torch.Generator) -> Iterator[torch.Tensor]:
        """Places of examples, in a new order each epoch."""
        for _ in range(self.epochs):
            yield from torch.randperm(len(data), generator=shuffle).to(data.x.device).split(size)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is quick there: processors without it take some ten times as long as in float32."""
    if device.type != "cpu":
        return True
    return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)


def _seeded(device: torch.device, seed: int) -> int:
    """Seed the generators that dropout draws from, and no other device's, which would take milliseconds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    return seed


@dataclass(frozen=True)
class DpSgd:
    """DP-SGD: per-example gradients clipped and summed over a Poisson sample, Gaussian noise added by Opacus.

    *Formal guarantees* are those of `ExamplePrivacy`, given as `privacy`: each step releases the noised sum
    of gradients clipped to `max_grad_norm`, over a Bernoulli(`sampling_rate`) sample of the client's
    examples. The sum is divided by the public `sampling_rate * examples_per_client`, never by what the
    client holds or drew, and every client does `steps` steps, weighs 1, and reports nothing else. An example
    whose gradient is not finite, or beyond 1e30, counts as zero, and dropout masks are as secret as the
    draws. The noise is set for `rounds`, those that the public draws of the run give one client at most. One
    accountant per client composes over those that it takes part in; its history (float64 (k, 3): noise
    multiplier, rate, steps) is the trainer's state, and a fit that would pass the budget is refused. Source:
    Abadi et al. 2016, "Deep learning with differential privacy", Algorithm 1.

    What is clipped is each example's gradient over all layers (`dp_step`). `physical_batch_size` bounds
    memory and changes no result.
    """

    lr: float = 1.0
    schedule: str = "constant"
    momentum: float = 0.0
    max_grad_norm: float = 1.0
    sampling_rate: float = 0.05
    examples_per_client: int = 6000
    steps: int = 20
    physical_batch_size: int = 512
    rounds: int = 1
    privacy: ExamplePrivacy | None = None

    def __post_init__(self) -> None:
        check.real("trainer.lr", self.lr, above=0.0, high=1e4)
        check.choice("trainer.schedule", self.schedule, SCHEDULES)
        check.real("trainer.momentum", self.momentum, low=0.0, below=1.0)
        check.real("trainer.max_grad_norm", self.max_grad_norm, above=0.0, high=1e6)
        check.real("trainer.sampling_rate", self.sampling_rate, above=0.0, high=1.0)
        check.whole("trainer.examples_per_client", self.examples_per_client, 1)
        check.whole("trainer.steps", self.steps, 1)
        check.whole("trainer.physical_batch_size", self.physical_batch_size, 1)

    @property
    def noise_multiplier(self) -> float:
        """The noise of every step, set for all that one client is planned to do."""
        if self.privacy is None:
            raise ConfigError("trainer=dp_sgd has no privacy budget: choose privacy=example, which sets it")
        return self.privacy.sigma(self.sampling_rate, self.steps * self.rounds)

    def history(self, fits: int) -> History:
        """What a client that took part in so many rounds has released."""
        return ((self.noise_multiplier, self.sampling_rate, self.steps * fits),)

    def fit(
        self,
        task: Task,
        model: nn.Module,
        data: Data,
        state: State,
        rng: np.random.Generator,
        progress: float,
        step_of: "Callable[[Task, nn.Module, DpSgd, torch.Generator, float], Step] | None" = None,
    ) -> tuple[Metrics, State]:
        """As `Trainer.fit`; `step_of` makes the step where an audit puts canaries into it."""
        history = self._charge(state)
        model.train()
        noise, draws = self._secret_generators(rng, data.x.device)
        lr = scheduled(self.lr, self.schedule, progress)
        with closing((step_of or Step)(task, model, self, noise, lr)) as step:
            for _ in range(self.steps):
                drawn = torch.rand(len(data), generator=draws, device=data.x.device) < self.sampling_rate
                step(data, drawn.nonzero().squeeze(1))
        return {"num-examples": 1}, {"history": np.array(history, np.float64)}

    def _charge(self, state: State) -> History:
        """The history with this fit in it; raises ConfigError where that would pass the budget."""
        past = [(float(s), float(q), int(t)) for s, q, t in state.get("history", np.empty((0, 3)))]
        now = self.noise_multiplier, self.sampling_rate
        if past and past[-1][:2] == now:
            past[-1] = (*now, past[-1][2] + self.steps)
        else:
            past.append((*now, self.steps))
        planned = len(past) == 1 and past[0][2] <= self.steps * self.rounds
        assert self.privacy is not None
        budget = self.privacy.epsilon
        if budget is not None and not planned and (spent := self.privacy.spent(tuple(past))) > budget:
            raise ConfigError(
                f"one more round would spend epsilon {spent:.2f} of a budget of {budget}: "
                f"raise privacy.epsilon, or stop"
            )
        return tuple(past)

    def _secret_generators(
        self, rng: np.random.Generator, device: torch.device
    ) -> tuple[torch.Generator, torch.Generator]:
        """Noise and sampling draw from the operating system's entropy, never from the public `rng`.

        So does dropout, by the global generator: masks go to examples by their place in a batch, so one more
        example gives all behind it other masks, which moves an update by far more than the clip norm where
        masks are known.
        """
        assert self.privacy is not None
        secret: Iterator[int] = (int.from_bytes(os.urandom(8), "little") for _ in range(3))
        if self.privacy.test_seed is not None:
            public = np.random.default_rng([self.privacy.test_seed, int(rng.integers(2**63))])
            secret = iter(int(s) for s in public.integers(2**63, size=3))
        _seeded(device, next(secret))
        noise, draws = (torch.Generator(device).manual_seed(s) for s in secret)
        return noise, draws
