"""What a node tells of itself before the rounds: no more than the run's selection asks."""

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from flwr.app import ConfigRecord
from torch import nn

from fedapp.errors import DecodeError
from fedapp.tasks import Data, Task

ASKS = "asks"
EXAMPLES, LABELS, CORES, MEMORY, SPEED, TAGS = "examples", "labels", "cores", "memory-mb", "speed", "tags"
OF_DATA = frozenset({EXAMPLES, LABELS})
_MOST, _TAGS, _LETTERS = 2**24 - 1, 32, 64
_BATCH, _STEPS = 32, 5  # of a trial
Told = dict[str, int | list[int] | list[str]]


@dataclass(frozen=True)
class Facts:
    """What the server knows of a node; None where it does not tell.

    examples: how many it trains on. labels: how many of each class, (classes,). cores; memory_mb: all of its
    machine's, in 10^6 bytes. speed: examples a second (`speed_of`). tags: words that its participant gave
    it, and `gpu` where it has one.
    """

    examples: int | None = None
    labels: tuple[int, ...] | None = None
    cores: int | None = None
    memory_mb: int | None = None
    speed: int | None = None
    tags: frozenset[str] = frozenset()


def of_machine(asked: Collection[str], config: Mapping[str, bool | float | int | str]) -> Told:
    """What is asked of the machine, and of the tags in a node's configuration: words between commas."""
    tags = {word.strip() for word in str(config.get(TAGS, "")).split(",")} - {""}
    tags |= {"gpu"} if torch.cuda.is_available() else set()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10**6
    has: Told = {CORES: len(os.sched_getaffinity(0)), MEMORY: memory, TAGS: sorted(tags)}
    return {name: value for name, value in has.items() if name in asked}


def speed_of(task: Task, model: nn.Module) -> int:
    """Examples a second that this machine trains on: the quickest of a few steps on noise, none kept."""
    device, parameters = next(model.parameters()).device, list(model.parameters())
    x = torch.rand(_BATCH, *task.input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    y, least = torch.zeros(_BATCH, dtype=torch.int64, device=device), float("inf")
    model.train()
    for _ in range(_STEPS):
        begun = time.perf_counter()
        found = torch.autograd.grad(task.loss(model(x), y), parameters, materialize_grads=True)
        float(found[0].sum())  # waits for a GPU
        least = min(least, time.perf_counter() - begun)
    return min(int(_BATCH / least), _MOST)


def of_data(asked: Collection[str], data: Data, classes: int) -> Told:
    """What is asked of a client's examples."""
    has: Told = {EXAMPLES: len(data), LABELS: torch.bincount(data.y, minlength=classes).tolist()}
    return {name: value for name, value in has.items() if name in asked}


def read(told: ConfigRecord, classes: int) -> Facts:
    """The facts in an answer; raises DecodeError for what no node of ours says."""
    bounds = {EXAMPLES: _MOST, CORES: 2**16, MEMORY: 2**40, SPEED: _MOST}
    whole = {name: _whole(name, told[name], most) for name, most in bounds.items() if name in told}
    labels, tags = told.get(LABELS), told.get(TAGS, [])
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != classes:
            raise DecodeError(f"labels are not numbers of {classes} classes")
        labels = [_whole(LABELS, count, _MOST) for count in labels]
    if not isinstance(tags, list) or len(tags) > _TAGS:
        raise DecodeError(f"tags are not a list of at most {_TAGS} words")
    words = [tag for tag in tags if isinstance(tag, str) and len(tag) <= _LETTERS]
    if len(words) < len(tags):
        raise DecodeError(f"tags are not words of at most {_LETTERS} letters")
    return Facts(
        whole.get(EXAMPLES),
        None if labels is None else tuple(labels),
        whole.get(CORES),
        whole.get(MEMORY),
        whole.get(SPEED),
        frozenset(words),
    )


def _whole(name: str, value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DecodeError(f"{name} is not a whole number from 0 to {most}")
    return value


def simulated(
    sizes: list[int], labels: Callable[[], list[list[int]]], speed: Callable[[int], int],
    asked: Collection[str], given: tuple[tuple[str, ...], ...],
) -> list[Facts]:  # fmt: skip
    """Facts of simulated nodes, by partition: all are this machine, but for data, speed and given tags.

    `given` goes round the partitions.
    """
    machine = of_machine(asked, {})
    cores, memory = (machine.get(name) for name in (CORES, MEMORY))
    counts = labels() if LABELS in asked else None
    return [
        Facts(
            size if EXAMPLES in asked else None,
            None if counts is None else tuple(counts[partition]),
            cores if isinstance(cores, int) else None,
            memory if isinstance(memory, int) else None,
            speed(partition) if SPEED in asked else None,
            frozenset(given[partition % len(given)]) if given else frozenset(),
        )
        for partition, size in enumerate(sizes)
    ]
