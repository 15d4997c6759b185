"""Epsilon and noise of example-level differential privacy, against independent computations."""

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fedapp.errors import ConfigError
from fedapp.privacy.example import ExamplePrivacy, epsilon, noise_multiplier

SETTINGS = [  # noise multiplier, sampling rate, steps, delta
    (1.5, 0.04, 1000, 1e-5),
    (1.1, 256 / 60_000, 14_062, 1e-5),  # TensorFlow Privacy's MNIST tutorial: batch 256, 60 epochs
    (1.3, 150 / 60_000, 6_000, 1e-5),
    (0.85, 0.05, 300, 1e-5),
    (4.0, 0.5, 50, 1e-6),
]


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SETTINGS)
def test_epsilon_against_google_dp_accounting(sigma: float, rate: float, steps: int, delta: float) -> None:
    """PRV lies within 2 % above the tight PLD value of another library; RDP equals its RDP."""
    event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    tight = PLDAccountant().compose(event).get_epsilon(delta)
    history = ((sigma, rate, steps),)
    prv = epsilon(history, delta, "prv")
    assert 0.999 * tight <= prv <= 1.02 * tight + 0.01
    assert epsilon(history, delta, "rdp") == pytest.approx(
        RdpAccountant().compose(event).get_epsilon(delta), rel=0.03
    )
    assert prv < epsilon(history, delta, "rdp")


def test_epsilon_published_by_opacus() -> None:
    """Opacus' own tests state 6.777 (PRV) and 7.329 (RDP) for noise 1.5, rate 0.04, 90 epochs, 1e-5."""
    history = ((1.5, 0.04, 2250),)
    assert epsilon(history, 1e-5, "prv") == pytest.approx(6.777395712150674, rel=1e-3)
    assert epsilon(history, 1e-5, "rdp") == pytest.approx(7.32911117143, rel=1e-6)


@pytest.mark.parametrize(("budget", "steps"), [(0.5, 1), (1.0, 1), (1.0, 10), (8.0, 20)])
def test_unsampled_noise_is_the_analytic_gaussian_mechanism(budget: float, steps: int) -> None:
    """Balle and Wang 2018, Theorem 8, with sensitivity 1; T steps equal one with sigma / sqrt(T)."""
    sigma = noise_multiplier(budget, 1e-5, 1.0, steps, "prv") / math.sqrt(steps)
    a, b = 1 / (2 * sigma) - budget * sigma, -1 / (2 * sigma) - budget * sigma
    delta = norm.cdf(a) - math.exp(budget) * norm.cdf(b)
    assert 0.7e-5 < delta <= 1e-5  # PRV keeps 0.01 of epsilon in hand, and is never over


def test_rounds_compose_on_one_history() -> None:
    """Fifteen rounds of 20 steps cost what 300 steps cost; a changed noise adds to it."""
    whole = epsilon(((1.0, 0.05, 300),), 1e-5, "prv")
    parts = tuple((1.0, 0.05, 20) for _ in range(15))
    assert epsilon(parts, 1e-5, "prv") == pytest.approx(whole, rel=5e-3)
    assert epsilon((*parts, (2.0, 0.05, 20)), 1e-5, "prv") > whole
    assert epsilon((), 1e-5, "prv") == 0.0


@pytest.mark.parametrize("budget", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.01, 100), (0.2, 75), (1.0, 3)])
def test_noise_is_the_least_that_keeps_the_budget(budget: float, rate: float, steps: int) -> None:
    sigma = ExamplePrivacy(epsilon=budget).sigma(rate, steps)
    assert epsilon(((sigma, rate, steps),), 1e-5, "prv") <= budget
    assert sigma == 0.2 or epsilon(((0.99 * sigma, rate, steps),), 1e-5, "prv") > budget


def test_given_noise_sets_epsilon() -> None:
    privacy = ExamplePrivacy(epsilon=None, noise_multiplier=1.5)
    assert privacy.sigma(0.04, 2250) == 1.5
    assert privacy.spent(((1.5, 0.04, 2250),)) == pytest.approx(6.777, abs=0.01)


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
        ({"accountant": "gdp"}, "privacy.accountant must be one of prv, rdp, got 'gdp'"),
        ({"test_seed": -1}, "privacy.test_seed"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExamplePrivacy(**bad)  # type: ignore[arg-type]


def test_unreachable_budget_names_the_repair() -> None:
    with pytest.raises(ConfigError, match="set a larger epsilon or fewer rounds"):
        noise_multiplier(0.01, 1e-12, 1.0, 10**7, "rdp")
