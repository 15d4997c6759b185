"""Discrete Gaussian noise against its exact probabilities, at every variance that the mechanism may use."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from fedapp.errors import ConfigError
from fedapp.privacy.discrete import MOST, discrete_gaussian, sampled_variance

VARIANCES = [Fraction(1, 2), Fraction(9, 4), Fraction(249, 64), Fraction(100), Fraction(13_225)]
LARGE = [sampled_variance(2.0**20 - 0.3), sampled_variance(1e9), Fraction(MOST)]
DRAWS = 300_000


def draws(variance: Fraction, seed: int = 1, size: int = DRAWS) -> NDArray[np.int64]:
    return discrete_gaussian(size, variance, np.random.default_rng(seed).bytes)


def probabilities(variance: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The integers within 12 deviations, and the law on them."""
    most = math.ceil(12 * math.sqrt(variance)) + 1
    k = np.arange(-most, most + 1)
    weight = np.exp(-(k**2) / (2 * variance))
    return k, weight / weight.sum()


def fits(x: NDArray[np.int64], variance: float) -> float:
    """The p-value of a chi-square test, on neighbours pooled until 20 are expected."""
    k, p = probabilities(variance)
    cell = np.floor(np.cumsum(p) * min(len(x) / 20, 200)).astype(int)
    _, cell = np.unique(cell, return_inverse=True)
    seen = np.bincount(cell, np.bincount(x - k[0], minlength=len(k)))
    expected = np.bincount(cell, p) * len(x)
    return float(chisquare(seen, expected).pvalue)


def has_deviation(x: NDArray[np.int64], sigma: float) -> bool:
    """Whether the spread of the draws is that of the law of this sigma, within 2 % in variance."""
    k, p = probabilities(sigma**2)
    return bool(abs(np.mean(x.astype(float) ** 2) / np.sum(p * k**2) - 1) < 0.02)


@pytest.mark.parametrize("variance", VARIANCES)
def test_draws_follow_the_exact_probabilities(variance: Fraction) -> None:
    assert fits(draws(variance), float(variance)) > 1e-6
    for wrong in (0.95, 1.05):
        assert fits(draws(variance), float(variance) * wrong**2) < 1e-6


@pytest.mark.parametrize("variance", [*VARIANCES, *LARGE[:2]])
def test_variance_is_the_stated_one(variance: Fraction) -> None:
    x, sigma = draws(variance), float(variance) ** 0.5
    assert has_deviation(x, sigma)
    for wrong in (0.95, 1.05, 2 / 3, 3 / 2):
        assert not has_deviation(x, wrong * sigma)
    assert abs(x.mean()) < 4 * sigma / DRAWS**0.5


@pytest.mark.parametrize("variance", LARGE)
def test_large_draws_are_continuous_gaussians_in_all_but_name(variance: Fraction) -> None:
    """Where steps are fine: quantiles, and no low digit is preferred (the largest variance fits 64 bits)."""
    from scipy.stats import kstest, norm

    x = draws(variance)
    assert kstest(x / float(variance) ** 0.5, norm.cdf).pvalue > 1e-6
    assert chisquare(np.bincount(x % 16)).pvalue > 1e-6


def test_far_draws_come_as_often_as_they_must() -> None:
    """Beyond 3 deviations: 0.29 % of draws, and the law says how many exactly."""
    x, (k, p) = draws(Fraction(100), size=1_000_000), probabilities(100.0)
    for far in (30, 40):
        expected = len(x) * p[np.abs(k) > far].sum()
        assert abs(np.sum(np.abs(x) > far) - expected) < 4 * expected**0.5


def test_draws_are_independent() -> None:
    """No correlation between neighbours, magnitudes of neighbours, or secrets."""
    x, y = draws(Fraction(100)).astype(float), draws(Fraction(100), seed=2).astype(float)
    pairs = [
        (x[:-1], x[1:]),
        (np.abs(x[:-1]), np.abs(x[1:])),
        (x[:-7], x[7:]),
        (x, y),
        (np.abs(x), np.abs(y)),
    ]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / DRAWS**0.5
    assert (draws(Fraction(100)) == x).all()
    assert not (x == y).all()


def test_any_number_of_draws_and_no_byte_twice() -> None:
    given: list[bytes] = []

    def secret(size: int) -> bytes:
        given.append(np.random.default_rng(len(given)).bytes(size))
        return given[-1]

    assert len(discrete_gaussian(0, Fraction(1), secret)) == 0
    assert not given
    x = discrete_gaussian(200_000, Fraction(13_225), secret)
    assert len(x) == 200_000
    assert len(given) > 1
    assert sum(map(len, given)) < 30 * len(x)


@pytest.mark.parametrize("byte", [0, 255])
def test_a_source_that_is_stuck_is_an_error_not_a_value(byte: int) -> None:
    stuck: Callable[[int], bytes] = lambda size: bytes([byte]) * size  # noqa: E731
    with pytest.raises(IndexError, match="4096 bytes"):
        discrete_gaussian(10, Fraction(100), stuck)


@given(st.floats(0, float(MOST)))
def test_sampled_variance_is_no_less_and_little_more(variance: float) -> None:
    taken = sampled_variance(variance)
    assert taken >= variance
    assert float(taken) <= max(1.002 * variance, variance + 1 / 64)
    assert sampled_variance(taken) == taken


@pytest.mark.parametrize("variance", [Fraction(1, 3), Fraction(0), Fraction(-1), Fraction(2**20 + 1)])
def test_other_variances_are_refused(variance: Fraction) -> None:
    with pytest.raises(ConfigError, match=f"variance {variance}: take"):
        draws(variance, size=1)


@pytest.mark.parametrize("variance", [2.0**53, math.inf, math.nan])
def test_too_large_variances_are_refused(variance: float) -> None:
    with pytest.raises(ConfigError, match="at most 2\\^52"):
        sampled_variance(variance)
