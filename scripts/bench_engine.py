"""Seconds a round: the local engine beside a bare loop on the same work; reprints the README's table.

usage: .venv/bin/python scripts/bench_engine.py [--only lr cnn noop ...] [--repeats 3] [--peers FOLDER] [KEY=VALUE ...]

lr: logistic regression (7,850 parameters), 10 of 1000 clients a round. cnn: 1.2 million parameters, 50 of 1000.
noop: the same, and nobody trains. All on Fashion-MNIST, an equal random split, batches of 10, one local epoch.
The bare loop is FedAvg in one process on one thread: no messages, no codec, no engine. Each figure is from
processes that ran in turns, so that a busy machine is busy for all: the least and the median over rounds. In
FOLDER, scripts `stock_flower.py` and `pfl_peer.py` that take SETTING and ROUNDS and print "min X median Y" are
run in the same turns, where the packages that they need are installed.
"""

import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Setting:
    """One federation: what the bare loop does, and how fedapp is told to do it."""

    model: str
    clients: int
    cohort: int
    lr: float
    epochs: int
    rounds: int

    @property
    def overrides(self) -> list[str]:
        return [
            "privacy=none", "task.features=pixels", "partition=iid", "evaluate=none", "checkpoint=null",
            f"model={self.model}", f"clients={self.clients}", f"cohort={self.cohort}",
            f"rounds={self.rounds + 1}", f"trainer.lr={self.lr}", f"trainer.epochs={self.epochs}",
            "trainer.batch_size=10", "trainer.schedule=constant",
        ]  # fmt: skip


SETTINGS = {
    "lr": Setting("logistic", 1000, 10, 0.03, 1, 40),
    "cnn": Setting("cnn", 1000, 50, 0.1, 1, 3),
    "noop": Setting("cnn", 1000, 50, 0.1, 0, 8),
}
UNCODED = ["codec=identity", "downlink=coded"]
RUNS = {
    "bare loop": [],
    "fedapp, 1 worker": [*UNCODED, "engine.workers=1"],
    "fedapp, 2 workers": [*UNCODED, "engine.workers=2"],
    "fedapp, 2 workers, default codec": ["engine.workers=2"],
}


@dataclass
class Found:
    """Seconds of all rounds but each process's first, which warms up."""

    seconds: list[float] = field(default_factory=list)
    startup: list[float] = field(default_factory=list)
    peak_mb: float = 0.0


def bare(name: str) -> None:
    """The floor, in a process of its own; prints the seconds of each round."""
    import torch
    from torch import nn

    sys.path.insert(0, str(ROOT))
    from fedapp import config

    setting = SETTINGS[name]
    job = config.job(config.compose(" ".join(setting.overrides).replace("checkpoint=null", "")))
    parts, model = job.task.partitions(), job.task.model(0)
    data = [job.task.client_data(i, {}) for i in range(setting.clients)]
    del parts
    weights = [p.detach().clone() for p in model.parameters()]
    for _ in range(setting.rounds + 1):
        start = time.perf_counter()
        total = [torch.zeros_like(w) for w in weights]
        for client in random.sample(range(setting.clients), setting.cohort):
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    p.copy_(w)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
            for _ in range(setting.epochs):
                for batch in torch.randperm(len(data[client])).split(10):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(
                        model(data[client].x[batch]), data[client].y[batch]
                    ).backward()
                    optimizer.step()
            with torch.no_grad():
                for t, p in zip(total, model.parameters(), strict=True):
                    t.add_(p)
        weights = [t / setting.cohort for t in total]
        print(time.perf_counter() - start, flush=True)
