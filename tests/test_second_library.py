"""Epsilon in summary.json is what a second library finds from what the run's folder records."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import second_library
import yaml
from opacus.accountants.analysis.rdp import get_privacy_spent
from rich.console import Console

from fedapp import config, server_app
from fedapp.privacy.accounting import ORDERS

FAST = "task=digits model=logistic clients=6 rounds=2 evaluate=none engine.workers=1"
Recorded = tuple[dict[str, Any], dict[str, Any]]  # summary.json, config.yaml


def run(folder: Path, overrides: str) -> Recorded:
    tree = config.compose(f"{FAST} {overrides} run_dir={folder}")
    server_app.simulate(tree, folder, Console(file=io.StringIO()), time.perf_counter())
    return (
        json.loads((folder / "summary.json").read_text()),
        yaml.safe_load((folder / "config.yaml").read_text()),
    )


def by_prv(noise: float, rate: float, count: int, delta: float) -> tuple[float, float]:
    low, _, high = second_library.prv(((noise, rate, count),), delta)
    return low, high


def of_examples(recorded: Recorded) -> tuple[float, float]:
    """Every client takes part in every round; one example comes or goes."""
    summary, settings = recorded
    trainer = settings["trainer"]
    steps = trainer.get("steps", 1) * summary["rounds"]
    return by_prv(settings["privacy"]["noise_multiplier"], trainer["sampling_rate"], steps, summary["delta"])


def of_replaced_clients(recorded: Recorded) -> tuple[float, float]:
    """Nobody is sampled, and one client's data are replaced: twice the clip norm."""
    summary, settings = recorded
    return by_prv(settings["privacy"]["noise_multiplier"] / 2, 1.0, summary["rounds"], summary["delta"])


def of_drawn_clients(recorded: Recorded) -> tuple[float, float]:
    summary, settings = recorded
    rate = settings["cohort"] / settings["clients"]
    return by_prv(settings["privacy"]["noise_multiplier"], rate, summary["rounds"], summary["delta"])


def of_shared_noise(recorded: Recorded) -> tuple[float, float]:
    """Renyi divergence of the continuous Gaussian, by Opacus; of the discrete one it is no less."""
    summary, settings = recorded
    noise = settings["privacy"]["noise_multiplier"] / 2
    curve = [summary["rounds"] * order / (2 * noise**2) for order in ORDERS]
    found = float(get_privacy_spent(orders=ORDERS, rdp=curve, delta=summary["delta"])[0])
    return 0.98 * found, 1.02 * found


@pytest.mark.parametrize(
    ("overrides", "bounds"),
    [
        ("privacy=example trainer.steps=2", of_examples),
        ("privacy=distributed_example", of_examples),
        ("privacy=local_gaussian", of_replaced_clients),
        ("privacy=central_gaussian cohort=2", of_drawn_clients),
        ("privacy=distributed_gaussian", of_shared_noise),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_epsilon_in_the_summary(
    overrides: str, bounds: Callable[[Recorded], tuple[float, float]], tmp_path: Path
) -> None:
    recorded = run(tmp_path / "run", f"{overrides} privacy.epsilon=null privacy.noise_multiplier=2")
    summary, settings = recorded
    low, high = bounds(recorded)
    assert low < summary["epsilon"] < high
    wrong = summary, settings | {"privacy": settings["privacy"] | {"noise_multiplier": 1.9}}
    assert summary["epsilon"] < bounds(wrong)[0]  # noise that is 5 % less is told apart
