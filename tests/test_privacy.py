"""Epsilon and noise of example-level differential privacy, against independent computations."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import second_library
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

from fedapp import config
from fedapp.errors import ConfigError
from fedapp.privacy.accounting import spent_by
from fedapp.privacy.example import ExamplePrivacy, History, releases
from fedapp.training import DpSgd

SETTINGS = [  # noise multiplier, sampling rate, steps, delta
    (1.5, 0.04, 1000, 1e-5),
    (1.1, 256 / 60_000, 14_062, 1e-5),  # TensorFlow Privacy's MNIST tutorial: batch 256, 60 epochs
    (1.3, 150 / 60_000, 6_000, 1e-5),
    (0.85, 0.05, 300, 1e-5),
    (4.0, 0.5, 50, 1e-6),
    (0.3, 0.05, 300, 1e-5),  # epsilon 120, where 0.03 % is more than PRV's error
]


def spent(history: History, delta: float = 1e-5) -> float:
    return ExamplePrivacy(delta=delta).spent(history)


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS)
def test_the_tightest_of_three_accountants_is_reported(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    """PLD by dp-accounting; Opacus' PRV and RDP, as the bounds they are, lie above, PRV's lower bound below.

    PRV's estimate is no bound: between them are its error of epsilon and of delta.
    """
    history = ((sigma, rate, steps),)
    found = spent_by(releases(history), delta)
    low, estimate, high = second_library.prv(history, delta)
    assert found.accountant == "PLD (dp-accounting)"
    assert low < found.epsilon < high < second_library.rdp(history, delta)
    assert low + second_library.PRV_ERROR <= estimate <= high - second_library.PRV_ERROR


def test_the_loss_is_what_dp_accountings_own_accountant_finds() -> None:
    event = SelfComposedDpEvent(PoissonSampledDpEvent(0.04, GaussianDpEvent(1.5)), 1000)
    whole = PLDAccountant().compose(event).get_epsilon(1e-5)
    assert spent(((1.5, 0.04, 1000),)) == pytest.approx(whole, rel=1e-3)


def test_epsilon_published_by_opacus() -> None:
    """Opacus' own tests state 6.777 (PRV) and 7.329 (RDP) for noise 1.5, rate 0.04, 90 epochs, 1e-5."""
    history = ((1.5, 0.04, 2250),)
    assert second_library.prv(history, 1e-5)[2] == pytest.approx(6.777395712150674, rel=1e-3)
    assert second_library.rdp(history, 1e-5) == pytest.approx(7.32911117143, rel=1e-6)
    assert 6.777 - 2 * second_library.PRV_ERROR < spent(history) < 6.777


@pytest.mark.parametrize(("budget", "steps"), [(0.5, 1), (1.0, 1), (1.0, 10), (8.0, 20)])
def test_unsampled_noise_is_the_analytic_gaussian_mechanism(budget: float, steps: int) -> None:
    """Balle and Wang 2018, Theorem 8, with sensitivity 1; T steps equal one with sigma / sqrt(T)."""
    sigma = ExamplePrivacy(epsilon=budget).sigma(1.0, steps) / math.sqrt(steps)
    a, b = 1 / (2 * sigma) - budget * sigma, -1 / (2 * sigma) - budget * sigma
    delta = norm.cdf(a) - math.exp(budget) * norm.cdf(b)
    assert 0.98e-5 < delta <= 1e-5


def test_rounds_compose_on_one_history() -> None:
    """Fifteen rounds of 20 steps cost what 300 steps cost; a changed noise adds to it."""
    whole = spent(((1.0, 0.05, 300),))
    parts = tuple((1.0, 0.05, 20) for _ in range(15))
    assert spent(parts) == whole
    assert spent((*parts, (2.0, 0.05, 20))) > whole
    assert spent(()) == 0.0


@pytest.mark.parametrize("budget", [0.1, 8.0, 50.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.01, 100), (0.2, 75), (1.0, 3)])
def test_noise_is_the_least_that_keeps_the_budget(budget: float, rate: float, steps: int) -> None:
    sigma = ExamplePrivacy(epsilon=budget).sigma(rate, steps)
    assert spent(((sigma, rate, steps),)) <= budget < spent(((0.99 * sigma, rate, steps),))


def test_given_noise_sets_epsilon() -> None:
    privacy = ExamplePrivacy(epsilon=None, noise_multiplier=1.5)
    assert privacy.sigma(0.04, 2250) == 1.5
    assert privacy.spent(((1.5, 0.04, 2250),)) == pytest.approx(6.767, abs=0.01)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"epsilon": 0.0}, "privacy.epsilon must be a number at least 0.01"),
        ({"epsilon": float("nan")}, "privacy.epsilon"),
        ({"epsilon": "8"}, "privacy.epsilon"),
        ({"epsilon": None}, "set exactly one of privacy.epsilon and privacy.noise_multiplier"),
        ({"noise_multiplier": 1.0}, "set exactly one"),
        ({"epsilon": None, "noise_multiplier": 0.0}, "privacy.noise_multiplier"),
        ({"delta": 0.0}, "privacy.delta"),
        ({"delta": 1.0}, "privacy.delta"),
        ({"test_seed": -1}, "privacy.test_seed"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExamplePrivacy(**bad)  # type: ignore[arg-type]


# Jobs


COHORT = "task=digits model=logistic privacy=example clients=100 rounds=20 trainer.steps=2"


@pytest.mark.parametrize(
    "drawn", ["cohort=10", "cohort=10 selection=poisson", "cohort=10 over_selection=1.5"]
)
def test_noise_is_set_for_the_rounds_that_public_draws_give_a_client(drawn: str) -> None:
    job = config.job(config.compose(f"{COHORT} {drawn}"))
    times = Counter(i for r in range(1, 21) for i in job.cohorts.draw(r, 100))
    assert isinstance(job.trainer, DpSgd)
    assert job.trainer.rounds == max(times.values()) < 20
    assert job.trainer.noise_multiplier < 0.9 * replace(job.trainer, rounds=20).noise_multiplier
    spent, more = (job.spent(20, job.trainer.rounds + once) for once in (0, 1))
    assert spent is not None
    assert more is not None
    assert 0.995 * 8 < spent.epsilon <= 8 < more.epsilon  # there a client declines: test_training.py


@pytest.mark.parametrize("drawn", ["strategy=fedbuff strategy.buffer=10", "cohort=100"])
def test_where_any_client_may_take_part_in_all_rounds_noise_is_set_for_all(drawn: str) -> None:
    trainer = config.job(config.compose(f"{COHORT} {drawn}")).trainer
    assert isinstance(trainer, DpSgd)
    assert trainer.rounds == 20
