"""Canaries for example-level privacy: among the per-example gradients of the real DP-SGD trainers."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedapp.audit.one_run import LEAST, SIZE, Claim
from fedapp.dp_step import DpStep, Step
from fedapp.errors import ConfigError
from fedapp.example_gradients import ExampleGradients, are_known
from fedapp.job import Job
from fedapp.privacy.distributed_example import StepTerms
from fedapp.privacy.secret import BATCH, CLIENT, source
from fedapp.public_rng import Use
from fedapp.tasks import Data, Task
from fedapp.training import DpSgd, State

_LARGE = 2.0**20  # of an input


@dataclass(frozen=True)
class Examples:
    """One client's training with canaries beside its examples: Dirac canaries, a weight of its own each.

    A canary is one more row of the client's data, so the trainer draws it, batches it, measures, clips and
    adds up its gradient as any example's; only what the gradient is a product of is not computed but set.
    Released are the weights after each step. Source: Steinke, Nasr and Jagielski 2023, section 6, "Dirac
    canaries".

    The client's own examples move the canaries' weights too. That blurs scores and can only lower the bound.
    """

    job: Job
    coordinates: torch.Tensor  # int64 (m,), different: where in the flat weights each canary points

    @property
    def trainer(self) -> DpSgd:
        assert isinstance(self.job.trainer, DpSgd)
        return self.job.trainer

    def claim(self) -> Claim:
        """Epsilon of the client that takes part most often."""
        dp = self.trainer
        assert dp.privacy is not None
        spent, steps = self.job.spent(self.job.rounds, dp.rounds), dp.rounds * dp.steps
        assert spent is not None
        return Claim(spent.epsilon, dp.privacy.delta, dp.noise_multiplier, dp.sampling_rate, steps)

    def __call__(self, included: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A `Release`: trains so many rounds on the first client's data and the canaries that are in."""
        model = self.job.task.model(self.job.seed).to(self.job.torch_device)
        data = with_canaries(self.job.task.client_data({"partition-id": 0}), included)
        data = Data(data.x.to(self.job.torch_device), data.y.to(self.job.torch_device))
        seen: list[NDArray[np.float64]] = []
        step = partial(CanaryStep, coordinates=self.coordinates.to(self.job.torch_device), seen=seen)
        state: State = {}
        for round_ in range(self.trainer.rounds):
            rng, progress = self.job.public_rng(round_ + 1, 0, Use.TRAINING), round_ / self.trainer.rounds
            _, state = self.trainer.fit(self.job.task, model, data, state, rng, progress, step)
        return np.stack(seen)


@dataclass(frozen=True)
class SharedExamples:
    """As many rounds of a distributed job as one client takes part in at most: for these noise is set.

    Canaries are beside its clients' examples as in `Examples`. Released is the mean gradient of each round,
    from the sum modulo 2^bits that secure aggregation would show. Of a cohort that is drawn as many have
    dropped out, or told their noise, as are tolerated; canaries are at those that are left, which carry the
    least noise that is claimed. The weights stay the first ones: what is made of them is after the noise.
    """

    job: Job
    coordinates: torch.Tensor  # as in `Examples`

    def claim(self) -> Claim:
        """Epsilon of the client that takes part most often, which is the run's."""
        spent, terms = self.job.spent(self.job.rounds, self.job.cohorts.most), self._terms
        assert spent is not None
        assert self.job.privacy.delta is not None
        noise = terms.step * math.sqrt(terms.honest * terms.share) / self._trainer.max_grad_norm
        return Claim(spent.epsilon, self.job.privacy.delta, noise, terms.rate, self.job.cohorts.most)

    def __call__(self, included: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A `Release`: canary j is an example of client j modulo those that are left."""
        job, terms, dp, seed = self.job, self._terms, self._trainer, self.job.privacy.test_seed
        model = job.task.model(job.seed).to(job.torch_device)
        at, place = self.coordinates.to(job.torch_device), np.arange(len(included)) % terms.honest
        step, released = partial(Canaries, coordinates=at, norm=SIZE * dp.max_grad_norm), []
        data = [
            with_canaries(job.task.client_data({"partition-id": i}), included & (place == i))
            for i in range(terms.honest)
        ]
        for number in range(1, job.cohorts.most + 1):
            total = np.zeros(terms.size, np.int64)
            for i, own in enumerate(data):
                here = Data(own.x.to(job.torch_device), own.y.to(job.torch_device))
                made = dp.total(job.task, model, here, source(seed, BATCH, number, i), step)
                secret = source(seed, CLIENT, number, i)
                total += terms.encode(made, job.public_rng(number, 0, Use.SUM), secret)
            mean = terms.decode(total % terms.modulus, terms.honest, job.public_rng(number, 0, Use.SUM))
            released.append(
                -mean[self.coordinates.numpy()].astype(np.float64) * terms.batch / dp.max_grad_norm
            )
        return np.stack(released)

    @property
    def _trainer(self) -> DpStep:
        assert isinstance(self.job.trainer, DpStep)
        return self.job.trainer

    @property
    def _terms(self) -> StepTerms:
        assert isinstance(self.job.terms, StepTerms)
        return self.job.terms


def examples(job: Job, canaries: int, rng: np.random.Generator) -> Examples | SharedExamples:
    """So many canaries on weights of the job's model; raises ConfigError where they do not fit."""
    if not isinstance(job.trainer, (DpSgd, DpStep)):
        raise ConfigError(f"privacy={job.choices['privacy']} has no audit: set privacy=example, for example")
    model = job.task.model(job.seed)
    if not are_known(model):
        raise ConfigError(
            "canaries have no place in layers whose gradients Opacus finds: audit another model"
        )
    places = np.concatenate([np.arange(start, start + p.numel()) for start, p in _open_to(model)])
    if canaries > len(places):
        fewer = f"set canaries={len(places)} or " if len(places) >= LEAST else ""
        raise ConfigError(
            f"each of {canaries} canaries needs a weight of its own, the model has {len(places)}: "
            f"{fewer}choose a larger model"
        )
    coordinates = torch.from_numpy(rng.permutation(places)[:canaries])
    return (Examples if isinstance(job.trainer, DpSgd) else SharedExamples)(job, coordinates)


def _open_to(model: nn.Module) -> list[tuple[int, nn.Parameter]]:
    """Where canaries can point: parameters, and where each begins in the flat weights."""
    scales = {id(m.weight) for m in model.modules() if isinstance(m, nn.GroupNorm)}
    trained = [p for p in model.parameters() if p.requires_grad]
    starts = np.cumsum([0, *(p.numel() for p in trained)])
    return [(int(start), p) for start, p in zip(starts, trained, strict=False) if id(p) not in scales]


def with_canaries(data: Data, included: NDArray[np.bool_]) -> Data:
    """The data and a row for each canary that is in: canary j has the label -1 - j, which no example has."""
    labels = -1 - torch.from_numpy(np.flatnonzero(included)).to(data.y)
    x = torch.cat([data.x, data.x.new_zeros(len(labels), *data.x.shape[1:])])
    return Data(x, torch.cat([data.y, labels]))


class Canaries(Step):
    """The trainer's own step, with the factors of the canaries' gradients in their rows."""

    def __init__(
        self, task: Task, model: nn.Module, dp: DpSgd | DpStep, noise: torch.Generator | None, lr: float, *,
        coordinates: torch.Tensor, norm: float,
    ) -> None:  # fmt: skip
        super().__init__(task, model, dp, noise, lr)
        self._coordinates, self._norm = coordinates, norm
        self._starts = {p: start for start, p in _open_to(model)}

    def _gradients(self, x: torch.Tensor, y: torch.Tensor) -> ExampleGradients:
        gradients = super()._gradients(x, y.clamp(min=0))
        rows = (y < 0).nonzero().squeeze(1)
        at = self._coordinates[-1 - y[rows]]
        for layer in gradients.layers:
            ((given, g),) = layer.uses
            given, g = given.clone(), g.clone()  # other layers may share them
            given[rows], g[rows] = 0, 0
            for name, p in layer.layer.named_parameters(recurse=False):
                if p in self._starts:
                    here = at - self._starts[p]
                    own = (here >= 0) & (here < p.numel())
                    _plant(layer.layer, name, given, g, rows[own], here[own], self._norm)
            layer.uses = [(given, g)]
        return gradients


def _plant(
    layer: nn.Module, name: str, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor, at: torch.Tensor,
    norm: float,
) -> None:  # fmt: skip
    """Give each row a gradient so long that points at one weight of its layer, by the weight's place.

    Its bias would have some of it too: `_LARGE` times less.
    """
    if name == "bias":
        (g if g.ndim == 2 else g.flatten(2)[:, :, 0])[rows, at] = norm
    elif isinstance(layer, nn.Linear):
        x[rows, at % x.shape[1]] = _LARGE
        g[rows, at // x.shape[1]] = norm / _LARGE
    else:
        assert isinstance(layer, nn.Conv2d)
        unit, channel, *taps = torch.unravel_index(at, layer.weight.shape)
        tap, stride, padding = torch.stack(taps, 1), *map(at.new_tensor, (layer.stride, layer.padding))
        window = ((padding - tap).clamp(min=0) + stride - 1) // stride  # the first where it lies on a pixel
        x[rows, channel, *(window * stride - padding + tap).unbind(1)] = _LARGE
        g[rows, unit, *window.unbind(1)] = norm / _LARGE


class CanaryStep(Canaries):
    """The same, which notes what each step released."""

    def __init__(
        self, task: Task, model: nn.Module, dp: DpSgd, noise: torch.Generator, lr: float, *,
        coordinates: torch.Tensor, seen: list[NDArray[np.float64]],
    ) -> None:  # fmt: skip
        super().__init__(task, model, dp, noise, lr, coordinates=coordinates, norm=SIZE * dp.max_grad_norm)
        self._seen, self._momentum = seen, dp.momentum
        self._unit = lr * dp.max_grad_norm / (dp.sampling_rate * dp.examples_per_client)
        self._velocity = np.zeros(len(coordinates))

    def __call__(self, data: Data, batch: torch.Tensor) -> None:
        before = self._weights()
        super().__call__(data, batch)
        velocity = (before - self._weights()) / self._unit
        self._seen.append(velocity - self._momentum * self._velocity)
        self._velocity = velocity

    def _weights(self) -> NDArray[np.float64]:
        flat = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        return flat[self._coordinates].cpu().numpy().astype(np.float64)
