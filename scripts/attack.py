"""Gradient inversion: what a curious server makes of one client's update, under each protection.

usage: .venv/bin/python scripts/attack.py [--plot F] [--steps N]

A client holds one digit and sends one update of the small CNN at its initial weights, by the app's own
trainer and codec. The attacker knows model, weights and trainer, reads the label off the last layer's bias
(Zhao et al. 2020, "iDLG"), and looks for the image in [0, 1] whose gradient has the direction of the update,
with a little total variation (Zhu et al. 2019, "Deep leakage from gradients"; Geiping et al. 2020, "Inverting
gradients", equation 4). A second attacker holds all training examples and picks the one whose gradient fits
best. Prints a table and draws the images. Needs the extra dev for the plot.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, grad, vmap

from fedapp.config import compose, job
from fedapp.dp_step import DpStep
from fedapp.job import Job
from fedapp.tasks import Data
from fedapp.vector import layout_of

SETTINGS = "task=digits rounds=1"
OPEN = f"{SETTINGS} privacy=none trainer.epochs=1 trainer.momentum=0.0 trainer.weight_decay=0.0"
PROTECTIONS = {
    "no protection": f"{OPEN} codec=identity",
    "1 bit codec": f"{OPEN} codec=default codec.rate=1",
    # The whole budget goes into one step without sampling, which serves the attacker best.
    "DP, epsilon 8": f"{SETTINGS} privacy=example privacy.epsilon=8 privacy.test_seed=0 codec=identity "
    "trainer.steps=1 trainer.sampling_rate=1.0 trainer.examples_per_client=1",
}
VARIATION = 1e-3  # weight of total variation beside the cosine distance
STARTS = 3
SOUGHT = 200  # clients of one example each whom the second attacker seeks
NOTHING = "no update, mean image"


def updates(job: Job, data: Data, clients: torch.Tensor) -> torch.Tensor:
    """What the server knows of the updates (n, size) of clients that hold one of these examples each."""
    layout, received = layout_of(job.initial), []
    assert not isinstance(job.trainer, DpStep)
    for i in clients.tolist():
        model = job.task.model(job.seed)
        before, one = flat(model), Data(data.x[i : i + 1], data.y[i : i + 1])
        job.trainer.fit(job.task, model, one, {}, job.public_rng(1, i, use=0), 0.0)
        packet, _ = job.codec.encode(flat(model) - before, layout, {}, job.public_rng(1, i, use=1))
        received.append(job.codec.decode(packet, layout))
    return torch.from_numpy(np.stack(received))


def flat(model: nn.Module) -> NDArray[np.float32]:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])


def gradients(job: Job, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient of each example (n, size) at the initial weights, differentiable in x."""
    model = job.task.model(job.seed)

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return job.task.loss(functional_call(model, weights, (x[None],)), y[None])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def invert(job: Job, received: torch.Tensor, steps: int) -> torch.Tensor:
    """Images (n, 1, 8, 8) whose gradients point against the updates (n, size); the best of some starts."""
    n = len(received)
    target = -received.repeat(STARTS, 1)
    labels = target[:, -job.task.classes :].argmin(1)  # the bias gradient is negative for the label alone
    x = torch.rand(len(target), *job.task.input_shape, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        distance = 1 - nn.functional.cosine_similarity(gradients(job, x, labels), target)
        variation = x.diff(dim=-1).abs().mean((1, 2, 3)) + x.diff(dim=-2).abs().mean((1, 2, 3))
        objective = distance + VARIATION * variation
        objective.sum().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    best = objective.detach().view(STARTS, n).argmin(0)
    return x.detach().view(STARTS, n, *x.shape[1:])[best, torch.arange(n)]


def picked(job: Job, received: torch.Tensor, data: Data) -> torch.Tensor:
    """Which training example's gradient fits each update best (n,): an attacker who holds the candidates."""
    cosines = [
        nn.functional.normalize(gradients(job, x, y)) @ -received.T
        for x, y in zip(data.x.split(100), data.y.split(100), strict=True)
    ]
    return torch.cat(cosines).argmax(0)


def psnr(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB; the peak is 1."""
    return -10 * torch.log10((x - truth).square().mean((1, 2, 3)).clamp(min=1e-10))


def draw(rows: dict[str, torch.Tensor], truth: torch.Tensor, path: Path) -> None:
    """One row of images a protection, the PSNR under each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    every = {"the client's digit": truth, **rows}
    figure, axes = pyplot.subplots(
        len(every), len(truth), figsize=(len(truth) * 0.95 + 1.6, len(every) * 1.12)
    )
    for line, (name, images) in zip(axes, every.items(), strict=True):
        for axis, image, value in zip(line, images, psnr(images, truth), strict=True):
            axis.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if images is not truth:
                axis.set_xlabel(f"{value:.0f} dB", fontsize=9, labelpad=2)
        line[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=11)
    figure.tight_layout(h_pad=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "plots" / "attack.png")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs = {name: job(compose(settings)) for name, settings in PROTECTIONS.items()}
    task: Any = jobs["no protection"].task
    data = task.train_data()
    drawn = torch.tensor([int((data.y == digit).nonzero()[0]) for digit in range(10)])
    truth, sought = data.x[drawn], torch.arange(SOUGHT)
    rows, hits = {}, {}
    for name, one in jobs.items():
        rows[name] = invert(one, updates(one, data, drawn), arguments.steps)
        guess = picked(one, updates(one, data, sought), data)
        hits[name] = guess == sought, data.y[guess] == data.y[sought]
    rows[NOTHING] = data.x.mean(0, keepdim=True).expand_as(truth)
    print("| protection | PSNR of the reconstruction, dB | example picked out of 1,438 | its label |")
    print("|---|---|---|---|")
    for name, images in rows.items():
        found = " | ".join(f"{hit.float().mean():.0%}" for hit in hits[name]) if name in hits else "- | -"
        print(f"| {name} | {psnr(images, truth).mean():.1f} | {found} |")
    draw(rows, truth, arguments.plot)


if __name__ == "__main__":
    main()
