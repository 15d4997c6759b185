"""Gradient inversion: what a curious server makes of one client's update, under each protection.

A client holds one image and sends one update of the model at its initial weights, by the app's own trainer
and codec. The attacker knows model, weights and trainer, reads the label off the last layer's bias (Zhao et
al. 2020, "iDLG"), and looks for the image whose gradient has the direction of the update, with a little total
variation (Zhu et al. 2019, "Deep leakage from gradients"; Geiping et al. 2020, "Inverting gradients",
equation 4). A second attacker holds all training examples and picks the one whose gradient fits best.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, grad, vmap

from fedapp.config import compose, job
from fedapp.dp_step import DpStep
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.public_rng import Use
from fedapp.tasks import Data
from fedapp.tasks.classification import Classification
from fedapp.vector import layout_of

STEPS = 600  # of the search for an image
VARIATION = 1e-3  # weight of total variation beside the cosine distance
STARTS = 3
SHOWN = 10  # clients whose image is sought, of a label each
SOUGHT = 200  # clients whose example the second attacker seeks
NOTHING = "no update, mean image"
OPEN = "rounds=1 privacy=none trainer.epochs=1 trainer.momentum=0.0 trainer.weight_decay=0.0"
# The whole budget goes into one step without sampling, which serves the attacker best.
ONE_STEP = (
    "rounds=1 privacy=example codec=identity trainer.steps=1 trainer.sampling_rate=1.0 "
    "trainer.examples_per_client=1"
)


@dataclass(frozen=True)
class Attacked:
    """What attackers make of updates under one protection.

    images: float32 (n, channels, height, width), and how near each is to the client's, as a peak
    signal-to-noise ratio in dB. picked: of the clients that the second attacker seeks, the share whose
    example it picks; labelled: the share for which its pick has the right label; None without an update.
    """

    images: torch.Tensor
    psnr: torch.Tensor
    picked: float | None = None
    labelled: float | None = None


@dataclass(frozen=True)
class Attack:
    """The clients' own images, out of how many examples one is picked, and each protection by its name."""

    truth: torch.Tensor
    candidates: int
    rows: Mapping[str, Attacked]


def protections(settings: Mapping[str, str], epsilon: float) -> dict[str, Job]:
    """Jobs that differ in what protects an update: nothing, coding alone, noise for this epsilon.

    `settings` are overrides by key; only those of task, model and seeds count. Raises ConfigError where
    examples are no images.
    """
    kept = {k: v for k, v in settings.items() if k.partition(".")[0] in ("task", "model", "seed")}
    noised = {k: v for k, v in settings.items() if k in ("privacy.delta", "privacy.test_seed")}
    base = shlex.join(f"{key}={value}" for key, value in kept.items())
    noise = shlex.join(f"{key}={value}" for key, value in {**noised, "privacy.epsilon": epsilon}.items())
    jobs = {
        "no protection": job(compose(f"{base} {OPEN} codec=identity")),
        "1 bit codec": job(compose(f"{base} {OPEN} codec=default codec.rate=1")),
        f"DP, epsilon {epsilon:.3g}": job(compose(f"{base} {ONE_STEP} {noise}")),
    }
    shape = jobs["no protection"].task.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(
            f"attack=true draws images, and examples of this task have shape {shape}: "
            "set task.features=pixels, or task=digits"
        )
    return jobs


def attack(jobs: Mapping[str, Job], steps: int = STEPS) -> Attack:
    """Attack clients under each protection; `steps` of search for an image. All share task and model."""
    task = next(iter(jobs.values())).task
    assert isinstance(task, Classification)
    data = task.train_data()
    labels = data.y.unique()[:SHOWN]
    drawn = torch.stack([(data.y == label).nonzero()[0, 0] for label in labels])
    truth, sought, rows = data.x[drawn], torch.arange(min(SOUGHT, len(data))), dict[str, Attacked]()
    low, high = float(data.x.min()), float(data.x.max())
    for name, one in jobs.items():
        images = invert(one, updates(one, data, drawn), steps, low, high)
        guess = picked(one, updates(one, data, sought), data)
        same = (guess == sought, data.y[guess] == data.y[sought])
        rows[name] = Attacked(
            images, psnr(images, truth, high - low), *(float(hit.float().mean()) for hit in same)
        )
    mean = data.x.mean(0, keepdim=True).expand_as(truth)
    return Attack(truth, len(data), rows | {NOTHING: Attacked(mean, psnr(mean, truth, high - low))})


def updates(job: Job, data: Data, clients: torch.Tensor) -> torch.Tensor:
    """What the server knows of the updates (n, size) of clients that hold one of these examples each."""
    layout, received = layout_of(job.initial), []
    assert not isinstance(job.trainer, DpStep)
    for i in clients.tolist():
        model = job.task.model(job.seed)
        before, one = _flat(model), Data(data.x[i : i + 1], data.y[i : i + 1])
        job.trainer.fit(job.task, model, one, {}, job.public_rng(1, i, Use.TRAINING), 0.0)
        packet, _ = job.codec.encode(_flat(model) - before, layout, {}, job.public_rng(1, i, Use.CODEC))
        received.append(job.codec.decode(packet, layout))
    return torch.from_numpy(np.stack(received))


def gradients(job: Job, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient of each example (n, size) at the initial weights, differentiable in x."""
    model = job.task.model(job.seed).eval()

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return job.task.loss(functional_call(model, weights, (x[None],)), y[None])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def invert(
    job: Job, received: torch.Tensor, steps: int = STEPS, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """Images (n, *input_shape), from `low` to `high`, whose gradients point against the updates (n, size).

    The best of some starts.
    """
    n = len(received)
    target = -received.repeat(STARTS, 1)
    labels = target[:, -job.task.classes :].argmin(1)  # the bias gradient is negative for the label alone
    x = torch.rand(len(target), *job.task.input_shape, generator=torch.Generator().manual_seed(0))
    x = (low + (high - low) * x).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1 * (high - low))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        distance = 1 - nn.functional.cosine_similarity(gradients(job, x, labels), target)
        variation = x.diff(dim=-1).abs().mean((1, 2, 3)) + x.diff(dim=-2).abs().mean((1, 2, 3))
        objective = distance + VARIATION / (high - low) * variation
        objective.sum().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(low, high)
    best = objective.detach().view(STARTS, n).argmin(0)
    return x.detach().view(STARTS, n, *x.shape[1:])[best, torch.arange(n)]


def picked(job: Job, received: torch.Tensor, data: Data) -> torch.Tensor:
    """Which training example's gradient fits each update best (n,): an attacker who holds the candidates."""
    cosines = [
        nn.functional.normalize(gradients(job, x, y)) @ -received.T
        for x, y in zip(data.x.split(100), data.y.split(100), strict=True)
    ]
    return torch.cat(cosines).argmax(0)


def psnr(x: torch.Tensor, truth: torch.Tensor, peak: float = 1.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB."""
    return -10 * torch.log10(((x - truth) / peak).square().mean((1, 2, 3)).clamp(min=1e-10))


def _flat(model: nn.Module) -> NDArray[np.float32]:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])
