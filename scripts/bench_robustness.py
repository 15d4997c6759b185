"""Poisoned updates: what is left of the accuracy where 2 of 12 clients attack; reprints a table.

usage: .venv/bin/python scripts/bench_robustness.py [--seeds 0 1 2] [--folder F] [--plots F] [KEY=VALUE ...]

A small network on digits, labels Dirichlet(1) over 12 clients, nothing private or coded. Attackers are
clients whose trainer is replaced here; the product has no such setting. They flip the sign of their update,
send 100 times it, or train on labels counted from the other end; each as it comes, or cut to the norm bound,
so that norms tell nothing. Each run is kept under `--folder`, and not repeated. Needs the extra dev for the
plot.
"""

import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import arguments, save, spread
from rich.console import Console
from torch import nn

from fedapp import config
from fedapp.client_app import client_app, partition_of
from fedapp.engine.local import Local
from fedapp.report.folder import write_text
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.tasks import Data, Task
from fedapp.training import Metrics, Sgd, State

BOUND = 1.0  # about the norm of an honest client's update, in the mean over rounds
CLIENTS, ATTACKERS = 12, (0, 1)
COMMON = [
    "task=digits", "model=mlp", "privacy=none", "codec=identity", "downlink=plain",
    f"clients={CLIENTS}", "rounds=15", "trainer.epochs=2", "trainer.batch_size=16", "trainer.lr=0.2",
    "trainer.schedule=constant", "partition=dirichlet", "partition.alpha=1.0",
]  # fmt: skip
RULES = {
    "mean": [],
    "norm-clipped mean": [f"norm_bound={BOUND}"],
    "median": ["strategy=fedmedian"],
    "trimmed mean": ["strategy=fedtrimmedavg", "strategy.beta=0.2"],
    "Krum": ["strategy=krum", "strategy.num_malicious_nodes=2"],
    "MultiKrum": [
        "strategy=multikrum", "strategy.num_malicious_nodes=2", "strategy.num_nodes_to_select=8",
    ],
    "Bulyan": ["strategy=bulyan", "strategy.num_malicious_nodes=2"],
}  # fmt: skip


@dataclass(frozen=True)
class Attacker(Sgd):
    """A client that trains as told, but for its labels, and then sends `factor` times its update."""

    factor: float = 1.0
    flipped: bool = False
    bound: float | None = None

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
        """As `Sgd.fit`; weights other than those it came to are left in the model."""
        received = [p.detach().clone() for p in model.parameters()]
        data = Data(data.x, task.classes - 1 - data.y) if self.flipped else data
        told = super().fit(task, model, data, state, rng, progress, way)
        with torch.no_grad():
            updates = [self.factor * (p - w) for p, w in zip(model.parameters(), received, strict=True)]
            norm = float(torch.linalg.vector_norm(torch.cat([u.reshape(-1) for u in updates])))
            shorter = 1.0 if self.bound is None else min(1.0, self.bound / norm)
            for p, w, update in zip(model.parameters(), received, updates, strict=True):
                p.copy_(w + shorter * update)
        return told


ATTACKS: dict[str, dict[str, Any] | None] = {
    "nobody": None,
    "sign flip": {"factor": -1.0},
    "sign flip, cut": {"factor": -1.0, "bound": BOUND},
    "times 100": {"factor": 100.0},
    "times 100, cut": {"factor": 100.0, "bound": BOUND},
    "label flip": {"flipped": True},
    "label flip, cut": {"flipped": True, "bound": BOUND},
}


def accuracies(overrides: list[str], attack: dict[str, Any] | None) -> list[float]:
    """Test accuracy after each round of a run with that attack."""
    job = config.job_of(shlex.join(overrides))
    attacking, sgd = job, job.trainer
    if attack is not None:
        assert isinstance(sgd, Sgd)
        honest = {field.name: getattr(sgd, field.name) for field in fields(Sgd)}
        attacking = replace(job, trainer=Attacker(**honest, **attack))
    app = client_app(lambda context: attacking if partition_of(context) in ATTACKERS else job)
    job.prepare()
    sizes, quiet = [len(part) for part in job.task.partitions()], Console(file=io.StringIO())
    assert isinstance(job.engine, Local)
    with job.engine.grid(app, sizes, job.at_once, job.fold) as grid:
        rounds = [r for some in Federation(job, grid).run(Progress(quiet, job.rounds)) for r in some]
    return [r.accuracy for r in rounds if r.accuracy is not None]


def run(path: Path, overrides: list[str], attack: dict[str, Any] | None) -> list[float]:
    """The same from the file at `path`; made now unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(accuracies(overrides, attack)))
    found: list[float] = json.loads(path.read_text())
    return found


def plot(table: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8.5, 4.2))
    image = [[np.mean(found) for found in row.values()] for row in table.values()]
    axis.imshow(image, cmap="RdYlGn", vmin=60, vmax=100, aspect="auto", alpha=0.6)
    for y, row in enumerate(image):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(ATTACKS)), [name.replace(", ", ",\n") for name in ATTACKS], fontsize=9)
    axis.set_yticks(range(len(table)), list(table), fontsize=9)
    axis.set_title("test accuracy, %, where 2 of 12 clients attack", fontsize=10)
    axis.tick_params(length=0)
    save(figure, path)


def main() -> None:
    options, overrides = arguments(__doc__, Path("bench/robustness")).parse_known_args()
    torch.set_num_threads(1)

    print(f"| rule | {' | '.join(ATTACKS)} |")
    print("|---" * (len(ATTACKS) + 1) + "|")
    table: dict[str, dict[str, list[float]]] = {}
    for rule, chosen in RULES.items():
        table[rule] = {}
        for attack, settings in ATTACKS.items():
            folder = options.folder / f"{rule}/{attack}".replace(", ", "-").replace(" ", "-")
            runs = [
                run(folder / f"{seed}.json", [*COMMON, f"seed={seed}", *chosen, *overrides], settings)
                for seed in options.seeds
            ]
            table[rule][attack] = [100 * found[-1] for found in runs]
        print(f"| {rule} | {' | '.join(spread(found) for found in table[rule].values())} |", flush=True)
    plot(table, options.plots / "robustness.png")


if __name__ == "__main__":
    main()
