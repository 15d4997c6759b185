"""Milliseconds of one training step: other ways to take it, what privacy adds; reprints the README's tables.

usage: .venv/bin/python scripts/bench_step.py [--only plain private] [--repeats 8]

All on one thread and on Fashion-MNIST; ways take turns of ten steps on the same batch, and a figure is the
least turn's. plain: SGD as `trainer=sgd` takes it, with torch's own layers or optimizer, and in ways that
might be faster (what is compiled, or mapped over clients, has torch's layers). private: a step of DP-SGD
beside a plain one, both on pixels.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torchs_layers import with_torchs_layers

from fedapp import config
from fedapp.dp_step import Step
from fedapp.engine.heap import keep_freed_memory
from fedapp.tasks import Data, Task
from fedapp.training import DpSgd

COHORT = 10  # clients whose steps are taken at once
Steps = Mapping[str, Callable[[], None]]
PLAIN = (
    ("logistic", "pixels", 10),
    ("small_cnn", "oriented", 32),
    ("small_cnn", "pixels", 32),
    ("cnn", "pixels", 10),
    ("cnn", "pixels", 64),
)


def milliseconds(ways: Steps, repeats: int, steps: int = 10) -> dict[str, float]:
    """The least of so many turns, by way; the first turn does not count."""
    turns: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, step in ways.items():
            begun = time.perf_counter()
            for _ in range(steps):
                step()
            turns[name].append(1e3 * (time.perf_counter() - begun) / steps)
    return {name: min(taken[1:]) for name, taken in turns.items()}


def with_optimizer(task: Task, net: nn.Module, batch: Data, fused: bool = False) -> Callable[[], None]:
    """As the bare loop does it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(net(batch.x), batch.y).backward()
        optimizer.step()

    return step


def by_hand(task: Task, net: nn.Module, batch: Data, half: bool = False) -> Callable[[], None]:
    """As `training.Sgd` does it; `half` computes in bfloat16."""
    parameters: list[torch.Tensor] = list(net.parameters())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = task.loss(net(batch.x), batch.y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-0.01)

    return step


def cohort_at_once(task: Task, net: nn.Module, batch: Data, clients: int = COHORT) -> Callable[[], None]:
    """A step of each of so many clients, in one call: their weights stacked, the model mapped over them."""
    weights = {name: torch.stack([p.detach()] * clients) for name, p in net.named_parameters()}
    x, y = torch.stack([batch.x] * clients), torch.stack([batch.y] * clients)

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return task.loss(functional_call(net, weights, (x,)), y)

    gradients = vmap(grad(loss), randomness="different")

    def step() -> None:
        found = gradients(weights, x, y)
        torch._foreach_add_(list(weights.values()), [found[name] for name in weights], alpha=-0.01)

    return step


def plain(repeats: int) -> None:
    print("\n| model | batch | way | ms | of the trainer's |\n|---|---|---|---|---|")
    for model, seen, size in PLAIN:
        job = config.job_of(f"privacy=none partition=iid clients=10 task.features={seen} model={model}")
        task, batch = job.task, first(job.task, size)
        last = task.model(0).to(memory_format=torch.channels_last)
        compiled, torchs = (with_torchs_layers(task.model(0)) for _ in range(2))
        compiled.compile()
        ways = {
            "trainer=sgd": by_hand(task, task.model(0), batch),
            "torch's layers": by_hand(task, torchs, batch),
            "torch.optim.SGD": with_optimizer(task, task.model(0), batch),
            "the same, fused": with_optimizer(task, task.model(0), batch, fused=True),
            "channels last": by_hand(task, last, batch),
            "torch.compile": by_hand(task, compiled, batch),
            "bfloat16": by_hand(task, task.model(0), batch, half=True),
        }
        found = milliseconds(ways, repeats)
        mapped = cohort_at_once(task, with_torchs_layers(task.model(0)), batch)
        found["a cohort of ten at once"] = milliseconds({"at once": mapped}, repeats)["at once"] / COHORT
        for name, ms in found.items():
            share = ms / found["trainer=sgd"]
            print(f"| {model} on {seen} | {size} | {name} | {ms:.2f} | {share:.2f} |", flush=True)


def private(repeats: int) -> None:
    print("\n| model | batch | plain step, ms | private step, ms | ratio |\n|---|---|---|---|---|")
    for model, size in (("small_cnn", 64), ("small_cnn", 256), ("cnn", 64), ("cnn", 256)):
        job = config.job_of(f"task.features=pixels partition=iid clients=10 model={model}")
        assert isinstance(job.trainer, DpSgd)
        batch, places = first(job.task, size), torch.arange(size)
        noised = Step(job.task, job.task.model(0), job.trainer, torch.Generator(), 0.01)
        ways: Steps = {
            "plain": by_hand(job.task, job.task.model(0), batch),
            "private": partial(noised, batch, places),
        }
        found = milliseconds(ways, repeats)
        noised.close()
        ratio = found["private"] / found["plain"]
        print(
            f"| {model} | {size} | {found['plain']:.1f} | {found['private']:.1f} | {ratio:.2f} |", flush=True
        )


def first(task: Task, size: int) -> Data:
    """So many examples of a client."""
    data = task.client_data({"partition-id": 0, "num-partitions": 10})
    return Data(data.x[:size], data.y[:size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = {"plain": plain, "private": private}
    parser.add_argument("--only", choices=list(parts), nargs="+", default=list(parts))
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    for name in options.only:
        parts[name](options.repeats)


if __name__ == "__main__":
    main()
