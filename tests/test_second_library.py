"""Epsilon in summary.json is what a second library finds from the releases that summary.json records."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import second_library
from opacus.accountants.analysis.rdp import get_privacy_spent
from rich.console import Console

from fedapp import config, server_app
from fedapp.privacy.release import ORDERS

FAST = "task=digits model=logistic clients=6 rounds=2 evaluate=none engine.workers=1"
Recorded = dict[str, Any]


def run(folder: Path, overrides: str) -> Recorded:
    """What summary.json says."""
    tree = config.compose(f"{FAST} {overrides} run_dir={folder}")
    server_app.simulate(tree, folder, Console(file=io.StringIO()), time.perf_counter())
    return dict(json.loads((folder / "summary.json").read_text()))


def found(release: Recorded, delta: float) -> tuple[float, float]:
    """Epsilon by Opacus, from below and from above.

    A replaced unit moves a sum by twice the clip norm. Opacus knows no cohorts of a set size: who replaces a
    unit where all others hold its opposite attacks a Poisson sample, and in the few rounds here no other
    attack is better by more than PRV's error.
    """
    noise = release["noise"] / (2 if release["adjacency"] == "replace" else 1)
    if "shares" in release:  # of the continuous Gaussian; shares of this variance together are as good as one
        curve = [release["count"] * order / (2 * noise**2) for order in ORDERS]
        spent = float(get_privacy_spent(orders=ORDERS, rdp=curve, delta=delta)[0])
        return 0.9999 * spent, 1.0001 * spent
    low, _, high = second_library.prv(((noise, release["rate"], release["count"]),), delta)
    return low, high


PLANS = {
    "privacy=example trainer.steps=2": ("add_remove", "poisson", 0.12, 4),
    "privacy=example trainer.steps=2 cohort=2 rounds=4": ("add_remove", "poisson", 0.12, 4),
    "privacy=example trainer.steps=2 selection=poisson cohort=2 rounds=4": ("add_remove", "poisson", 0.12, 4),
    "privacy=distributed_example": ("add_remove", "poisson", 0.12, 2),
    "privacy=distributed_example cohort=3 rounds=5": ("add_remove", "poisson", 0.12, 4),
    "privacy=local_gaussian": ("replace", "none", 1.0, 2),
    "privacy=local_gaussian cohort=2 rounds=4": ("replace", "none", 1.0, 2),
    "privacy=central_gaussian": ("add_remove", "poisson", 1.0, 2),
    "privacy=central_gaussian cohort=2": ("add_remove", "poisson", 1 / 3, 2),
    "privacy=central_gaussian cohort=2 sampling=fixed": ("replace", "fixed", 1 / 3, 2),
    "privacy=central_gaussian privacy.quantile=0.5 cohort=3": ("add_remove", "poisson", 0.5, 2),
    "privacy=central_gaussian privacy.network=untrusted codec=public_step cohort=2 rounds=4": (
        "replace",
        "none",
        1.0,
        2,
    ),
    "privacy=distributed_gaussian": ("replace", None, None, 2),
    "privacy=distributed_gaussian cohort=3 rounds=5": ("replace", None, None, 4),
}
"""Adjacency, sampling, rate, and how many releases: those of who took part most often."""


@pytest.mark.parametrize("noise", [None, 2.0], ids=["calibrated", "given"])
@pytest.mark.parametrize("overrides", PLANS)
def test_epsilon_in_the_summary(overrides: str, noise: float | None, tmp_path: Path) -> None:
    given = "" if noise is None else f"privacy.epsilon=null privacy.noise_multiplier={noise}"
    summary = run(tmp_path / "run", f"{overrides} {given}")
    (release,) = summary["releases"]
    plan = tuple(release.get(name) for name in ("adjacency", "sampling", "rate", "count"))
    assert plan == PLANS[overrides]
    low, high = found(release, summary["delta"])
    assert low < summary["epsilon"] < high
    louder = release | {"noise": 0.95 * release["noise"]}
    assert summary["epsilon"] < found(louder, summary["delta"])[0]  # so little is told apart
    if noise is None:
        assert 0.97 * 8 < summary["epsilon"] <= 8  # noise for the rounds of who takes part most often
    else:
        assert noise <= release["noise"] < 1.003 * noise


@pytest.mark.parametrize("overrides", ["privacy=none", "privacy=central_gaussian privacy.test_seed=1"])
def test_where_nothing_is_private_there_is_nothing_to_compute_from(overrides: str, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", overrides)
    assert summary["epsilon"] is summary["releases"] is None
