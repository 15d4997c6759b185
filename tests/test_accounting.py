"""Epsilon of releases and the noise a budget needs, against published figures, two libraries and sampling."""

import itertools
import math
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import second_library
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from fedapp.errors import ConfigError
from fedapp.privacy.accounting import analytic_gaussian, gaussian_epsilon, noise_for, spent_by
from fedapp.privacy.release import (
    ORDERS,
    Adjacency,
    Curve,
    Gaussian,
    Release,
    Sampling,
    SharedGaussian,
    Spent,
)
from fedapp.privacy.renyi import rdp


def spent(noise: float, sampling: Sampling, rate: float, count: int, adjacency: Adjacency) -> float:
    return spent_by((Gaussian(noise, sampling, rate, count, adjacency),), 1e-5).epsilon


def by_rdp(release: Gaussian, delta: float) -> float:
    return float(compute_epsilon(ORDERS, rdp(release), delta)[0])


def by_moments(release: Gaussian, delta: float) -> float:
    """Epsilon by the older conversion of Abadi et al. 2016 and Mironov 2017, Proposition 3."""
    orders = np.array(ORDERS)
    return float((rdp(release) + math.log(1 / delta) / (orders - 1)).min())


# Known figures.


def test_a_hundred_of_a_thousand_clients_for_a_hundred_rounds() -> None:
    """The same noise costs 7 or 84, by who is sampled how, who is a neighbour and which accountant counts."""
    assert spent(1.0, "poisson", 0.1, 100, "add_remove") == pytest.approx(7.05, abs=0.005)
    assert spent(1.0, "poisson", 0.1, 100, "replace") == pytest.approx(10.52, abs=0.005)
    fixed = Gaussian(1.0, "fixed", 0.1, 100, "replace")
    assert by_rdp(fixed, 1e-5) == pytest.approx(83.9, abs=0.05)
    # Noise over C taken for noise over 2C: the wrong figure that a sensitivity of C would give.
    assert by_rdp(Gaussian(2.0, "fixed", 0.1, 100, "replace"), 1e-5) == pytest.approx(14.05, abs=0.005)
    # The losses of sampling without replacement, tight, lie far below RDP's general theorem.
    assert spent(1.0, "fixed", 0.1, 100, "replace") == pytest.approx(34.17, abs=0.01)
    assert spent(1.0, "none", 1.0, 100, "add_remove") == pytest.approx(91.82, abs=0.005)


def test_the_accountant_is_named() -> None:
    def name(*releases: Release, delta: float = 1e-5) -> str:
        return spent_by(releases, delta).accountant

    whole = Gaussian(4.0, "none", 1.0, 10, "replace")
    poisson = Gaussian(4.0, "poisson", 0.1, 10, "replace")
    fixed = Gaussian(4.0, "fixed", 0.1, 10, "replace")
    curve = Curve("skellam", tuple(order / 100 for order in ORDERS), 1)
    assert name(whole, whole) == "analytic Gaussian"
    assert name(Gaussian(4.0, "poisson", 1.0, 10, "replace")) == "analytic Gaussian"
    assert name(poisson) == name(whole, poisson) == "PLD (dp-accounting)"
    assert name(fixed) == name(poisson, fixed) == "PLD (Zhu et al. 2022)"
    shared = SharedGaussian(4.0, 100, 9, 16.0, 1)
    for other in (curve, shared):
        assert name(other) == name(whole, other) == name(poisson, other) == "RDP (dp-accounting)"
    assert name(poisson, delta=1e-12) == "RDP (dp-accounting)"  # below what the FFT's rounding leaves
    assert spent_by((), 1e-5) == Spent(0.0, "none")
    assert spent_by((Gaussian(4.0, "poisson", 0.1, 0, "replace"),), 1e-5) == Spent(0.0, "none")


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_epsilon_near_zero(sampling: Sampling) -> None:
    """A tiny loss has a tiny grid, and so has a delta that noise alone all but reaches."""
    assert spent_by((Gaussian(1000.0, sampling, 0.1, 10, "replace"),), 1e-2) == Spent(
        0.0, "analytic Gaussian"
    )
    edge = 2 * norm.cdf(1 / 100) - 1  # one Gaussian's delta at epsilon 0, noise 100 and 2C
    assert spent_by((Gaussian(100.0, sampling, 0.5, 1, "replace"),), 0.999999 * edge).epsilon < 1e-5
    assert 0 < spent_by((Gaussian(1000.0, sampling, 1e-3, 1, "replace"),), 1e-7).epsilon < 1e-5


@pytest.mark.parametrize("adjacency", ["add_remove", "replace"])
@pytest.mark.parametrize(("noise", "rate", "count"), [(0.01, 0.9, 1000), (1e5, 0.1, 10), (3.0, 1e-5, 10**4)])
def test_extremes_are_bounded(noise: float, rate: float, count: int, adjacency: Adjacency) -> None:
    whole = spent(noise, "none", 1.0, count, adjacency)
    assert 0 <= spent(noise, "poisson", rate, count, adjacency) <= whole < math.inf


def test_figure_of_the_moments_accountant() -> None:
    """Abadi et al. 2016, section 3.2 and figure 2: 1.26 at q = 0.01, sigma = 4, 10 000 steps, delta 1e-5."""
    release = Gaussian(4.0, "poisson", 0.01, 10_000, "add_remove")
    assert by_moments(release, 1e-5) == pytest.approx(1.26, abs=0.005)
    assert spent(4.0, "poisson", 0.01, 10_000, "add_remove") < by_rdp(release, 1e-5) < 1.26


@pytest.mark.parametrize(
    ("noise", "epochs", "published"), [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)]
)
def test_figures_of_tensorflow_privacys_tutorials(noise: float, epochs: int, published: float) -> None:
    """tensorflow/privacy, tutorials/README.md: MNIST, batch 256, delta 1e-5, by RDP."""
    release = Gaussian(noise, "poisson", 256 / 60_000, epochs * (60_000 // 256), "add_remove")
    assert by_moments(release, 1e-5) == pytest.approx(published, abs=0.015)
    assert spent_by((release,), 1e-5).epsilon < published


def test_figures_of_opacus_tests() -> None:
    """Opacus 1.6, accountants_test.py: noise 1.5, rate 0.04, 2250 steps: 6.777 by PRV, 7.329 by RDP."""
    release = Gaussian(1.5, "poisson", 0.04, 2250, "add_remove")
    assert 6.777 - 0.02 < spent_by((release,), 1e-5).epsilon <= 6.778
    assert by_rdp(release, 1e-5) == pytest.approx(7.32911117143, rel=1e-3)


def test_figures_of_dp_accountings_tests() -> None:
    """dp-accounting 0.6: pld_privacy_accountant_test.py and rdp_privacy_accountant_test.py."""
    release = Gaussian(0.5, "poisson", 0.2, 3, "add_remove")
    assert spent_by((release,), 0.0999).epsilon > 1 > spent_by((release,), 0.157).epsilon
    assert spent_by((release,), 0.15594).epsilon == pytest.approx(1, abs=1e-3)
    whole = Gaussian(math.sqrt(3), "none", 1.0, 3, "add_remove")
    assert spent_by((whole,), 0.126936).epsilon == pytest.approx(1, abs=1e-5)
    orders = {1.5: 6.70579741e-04, 2.5: 1.08548710e-03, 5.0: 2.18075656e-03, 50.0: 2.38460375e-02}
    found = rdp(Gaussian(2.5, "poisson", 0.01, 50, "add_remove"))
    for order, value in orders.items():
        assert found[ORDERS.index(order)] == pytest.approx(value, rel=1e-4)


def test_closed_forms_of_renyi_divergence() -> None:
    """Mironov 2017, Proposition 7; Mironov, Talwar and Zhang 2019, Section 3.3, at orders 2 and 3."""
    assert rdp(Gaussian(3.0, "none", 1.0, 2, "add_remove")) == pytest.approx(np.array(ORDERS) / 9)
    assert rdp(Gaussian(3.0, "none", 1.0, 2, "replace")) == pytest.approx(4 * np.array(ORDERS) / 9)
    q, noise = 0.3, 1.7
    found = rdp(Gaussian(noise, "poisson", q, 1, "add_remove"))
    second, third = math.exp(1 / noise**2), math.exp(3 / noise**2)
    assert found[ORDERS.index(2.0)] == pytest.approx(math.log1p(q * q * (second - 1)))
    cubed = (1 - q) ** 3 + 3 * q * (1 - q) ** 2 + 3 * q * q * (1 - q) * second + q**3 * third
    assert found[ORDERS.index(3.0)] == pytest.approx(math.log(cubed) / 2)


@pytest.mark.parametrize("budget", [1e-3, 0.1, 1.0, 8.0, 50.0, 500.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
def test_analytic_gaussian_at_any_epsilon(budget: float, delta: float) -> None:
    """Balle and Wang 2018, Theorem 8, in 60 digits."""

    def loss(noise: float) -> Any:
        with mpmath.workdps(60):
            s, e = mpmath.mpf(noise), mpmath.mpf(budget)
            first = mpmath.ncdf(1 / (2 * s) - e * s)
            return first - mpmath.exp(e) * mpmath.ncdf(-1 / (2 * s) - e * s)

    noise = analytic_gaussian(budget, delta)
    assert loss(noise) == pytest.approx(delta, rel=1e-6)
    assert loss(noise / 1.001) > delta
    assert gaussian_epsilon(noise, delta) == pytest.approx(budget, rel=1e-6)


def test_unsampled_gaussians_are_one() -> None:
    """Mixed counts and noises add up as 1 / noise^2; a replaced unit costs twice the distance."""
    mixed = (Gaussian(3.0, "none", 1.0, 4, "add_remove"), Gaussian(6.0, "none", 1.0, 20, "add_remove"))
    assert spent_by(mixed, 1e-6).epsilon == pytest.approx(gaussian_epsilon(1.0, 1e-6))
    replaced = tuple(Gaussian(2 * one.noise, "none", 1.0, one.count, "replace") for one in mixed)
    assert spent_by(replaced, 1e-6) == spent_by(mixed, 1e-6)


# A second library.


@pytest.mark.parametrize(
    ("noise", "count"), [(0.7, 1), (2.0, 1), (2.0, 30), (10.0, 1), (10.0, 30), (10.0, 300), (50.0, 1000)]
)
def test_the_analytic_gaussian_is_what_dp_accountings_pld_finds(noise: float, count: int) -> None:
    """Its accountant discretizes the losses, so it knows nothing of the closed form."""
    whole = PLDAccountant().compose(SelfComposedDpEvent(GaussianDpEvent(noise), count))
    for delta in (1e-3, 1e-5, 1e-9):
        found = whole.get_epsilon(delta)
        assert gaussian_epsilon(noise / math.sqrt(count), delta) == pytest.approx(found, rel=1e-5)
        for release in (
            Gaussian(noise, "none", 1.0, count, "add_remove"),
            Gaussian(2 * noise, "none", 1.0, count, "replace"),
        ):
            assert spent_by((release,), delta).epsilon == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("noise", "rate", "count", "delta"),
    [
        (1.0, 0.1, 100, 1e-5),
        (0.8, 0.005, 100, 1e-6),  # the mechanism of prv_accountant's README (Gopi et al. 2021)
        (0.9, 256 / 100_000, 4900, 1e-5),  # tests/test_accountant.py of the same
        (2.0, 0.02, 1000, 1e-8),
    ],
)
def test_epsilon_equals_what_a_second_library_computes(
    noise: float, rate: float, count: int, delta: float
) -> None:
    """PLD of dp-accounting against PRV of Opacus, whose error bound is 0.01; RDP lies above both."""
    release = Gaussian(noise, "poisson", rate, count, "add_remove")
    ours = spent_by((release,), delta)
    low, _, high = second_library.prv(((noise, rate, count),), delta)
    assert ours.accountant == "PLD (dp-accounting)"
    assert low < ours.epsilon < high
    assert ours.epsilon < by_rdp(release, delta)
    assert by_rdp(release, delta) == pytest.approx(
        second_library.rdp(((noise, rate, count),), delta), rel=0.02
    )


def test_mixed_releases_equal_a_second_library() -> None:
    rounds = ((1.0, 0.05, 200), (2.0, 0.2, 50), (8.0, 1.0, 3))
    releases = tuple(Gaussian(noise, "poisson", rate, count, "add_remove") for noise, rate, count in rounds)
    low, _, high = second_library.prv(rounds, 1e-5)
    assert low < spent_by(releases, 1e-5).epsilon < high


# Laws.


def gaussians(most: int) -> st.SearchStrategy[Gaussian]:
    kinds: list[tuple[Sampling, Adjacency]] = [
        ("poisson", "add_remove"),
        ("poisson", "replace"),
        ("fixed", "replace"),
    ]
    return st.builds(
        lambda kind, noise, rate, count: Gaussian(noise, kind[0], rate, count, kind[1]),
        st.sampled_from(kinds),
        st.floats(0.5, 20.0),
        st.floats(0.01, 0.9),
        st.integers(1, most),
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(gaussians(200), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_bounds_are_ordered(release: Gaussian, delta: float) -> None:
    """Tight <= RDP, tight <= unsampled, and a smaller delta costs more."""
    tight = spent_by((release,), delta).epsilon
    assert tight <= 1.0001 * by_rdp(release, delta)
    whole = Gaussian(release.noise, "none", 1.0, release.count, release.adjacency)
    assert tight <= spent_by((whole,), delta).epsilon
    assert tight <= 1.0001 * spent_by((release,), delta / 2).epsilon


@settings(max_examples=10, deadline=None, derandomize=True)
@given(gaussians(50), st.integers(1, 49))
def test_composition_does_not_depend_on_how_it_is_written(release: Gaussian, part: int) -> None:
    part = min(part, release.count)
    halves = tuple(
        Gaussian(release.noise, release.sampling, release.rate, count, release.adjacency)
        for count in (part, release.count - part)
    )
    assert spent_by(halves, 1e-5) == spent_by((release,), 1e-5)


def test_a_curve_equals_the_gaussian_it_describes() -> None:
    """By RDP, and next to Gaussians of any sampling."""
    described = Gaussian(5.0, "none", 1.0, 7, "replace")
    curve = Curve("as Gaussian", tuple(rdp(Gaussian(5.0, "none", 1.0, 1, "replace"))), 7)
    assert rdp(curve) == pytest.approx(rdp(described))
    other = Gaussian(3.0, "poisson", 0.1, 20, "replace")
    total = rdp(described) + rdp(other)
    expected = Spent(float(compute_epsilon(ORDERS, total, 1e-5)[0]), "RDP (dp-accounting)")
    assert spent_by((curve, other), 1e-5).epsilon == pytest.approx(expected.epsilon)
    assert spent_by((curve, other), 1e-5).epsilon > spent_by((described, other), 1e-5).epsilon


def test_shares_of_large_variance_are_one_gaussian() -> None:
    """Noise over the bound on a norm, twice which a replaced vector moves; small shares lack something."""
    shared = SharedGaussian(5.0, 1000, 9, 16.0, 7)
    assert rdp(shared) == pytest.approx(rdp(Gaussian(5.0, "none", 1.0, 7, "replace")), rel=1e-12)
    assert (rdp(SharedGaussian(5.0, 1000, 9, 0.25, 7)) > rdp(shared)).all()


def test_fixed_size_lies_between_a_real_attack_and_rdp() -> None:
    """All others hold the opposite of the replaced unit: then the sum is sampled by Poisson, moved by 2C."""
    for noise, rate, count in ((1.0, 0.1, 100), (4.0, 0.1, 100), (20.0, 0.1, 1000)):
        attacked = spent(noise / 2, "poisson", rate, count, "add_remove")
        release = Gaussian(noise, "fixed", rate, count, "replace")
        assert 0.9995 * attacked < spent_by((release,), 1e-5).epsilon < by_rdp(release, 1e-5)


COHORTS = [(2.0, 4, 2), (1.0, 3, 1), (3.0, 5, 4)]
"""Noise, units, and how many of them are drawn."""


def cohort_laws(noise: float, units: int, drawn: int, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Float64 (pairs, 2, len(x)): both laws of a sum of units at -1, 0 and 1, the first of which is replaced.

    Both ways round, for all values of the others.
    """

    def law(values: tuple[float, ...]) -> NDArray[np.float64]:
        sums = [sum(cohort) for cohort in itertools.combinations(values, drawn)]
        found = norm.pdf(x[:, None], sums, noise).mean(axis=1)
        return np.asarray(found / found.sum())

    others = itertools.combinations_with_replacement((-1.0, 0.0, 1.0), units - 1)
    ways = [(1.0, -1.0), (-1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]
    return np.array([[law((value, *rest)) for value in way] for rest in others for way in ways])


def attacked(laws: NDArray[np.float64], budget: float, releases: int) -> float:
    """The largest delta of all these data; those of a second release are chosen in view of the first."""

    def second(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        odds = math.exp(budget) * other / one
        best = np.zeros_like(one)
        for p, q in laws:
            best = np.maximum(best, np.maximum(p - odds[:, None] * q, 0.0).sum(axis=1))
        return float(one @ best)

    if releases == 1:
        return max(float(np.maximum(p - math.exp(budget) * q, 0.0).sum()) for p, q in laws)
    return max(second(*laws[0]), second(*laws[1]))  # all others at -1, either way round


@pytest.mark.parametrize(("noise", "units", "drawn"), COHORTS)
@pytest.mark.parametrize("delta", [0.1, 1e-2])
def test_no_data_of_a_small_fixed_cohort_exceed_the_bound(
    noise: float, units: int, drawn: int, delta: float
) -> None:
    """Every cohort counted out. One release meets the bound; of two, the second may turn the worse way round.

    Then delta exceeds what either way, composed for itself, gives.
    """
    reach = drawn + 7 * noise
    laws = cohort_laws(noise, units, drawn, np.linspace(-reach, reach, 401))
    for releases, least in ((1, 0.99), (2, 0.94)):
        release = Gaussian(noise, "fixed", drawn / units, releases, "replace")
        found = attacked(laws, spent_by((release,), delta).epsilon, releases)
        assert least * delta < found <= 1.001 * delta
    one_way = Gaussian(noise / 2, "poisson", drawn / units, 2, "add_remove")
    assert attacked(laws, spent_by((one_way,), delta).epsilon, 2) > 1.001 * delta


# Sampling of the losses themselves.


def mixture(x: NDArray[np.float64], rate: float, shift: float, noise: float) -> NDArray[np.float64]:
    """Log density of a unit that is there with probability `rate`, over that of nobody there."""
    return np.log1p(rate * np.expm1((2 * shift * x - shift * shift) / (2 * noise * noise)))


def delta_at(losses: NDArray[np.float64], budget: float) -> float:
    return float(np.maximum(0.0, -np.expm1(budget - losses)).mean())


def poisson_losses(noise: float, rate: float, count: int) -> NDArray[np.float64]:
    """Float64 (250_000,): one at +C against one at -C, drawn under the first."""
    rng = np.random.default_rng(7)
    total = np.zeros(250_000)
    for _ in range(count):
        x = noise * rng.standard_normal(total.size) + (rng.random(total.size) < rate)
        total += mixture(x, rate, 1.0, noise) - mixture(x, rate, -1.0, noise)
    return total


def fixed_losses(noise: float, rate: float, count: int) -> NDArray[np.float64]:
    """Float64 (250_000,): above 0 the mixture's loss, below 0 that of the other way round, the rest at 0.

    The hockey-stick curve of one way for epsilon above 0 and of the other way below belongs to this law.
    """
    rng = np.random.default_rng(8)
    total = np.zeros(250_000)
    below = norm.sf(1.0, scale=noise)  # nobody there, and the mixture the likelier: beyond half of 2C
    for _ in range(count):
        x = noise * rng.standard_normal(total.size) + 2 * (rng.random(total.size) < rate)
        loss = np.maximum(mixture(x, rate, 2.0, noise), 0.0)
        above = (1 - rate) * below + rate * norm.sf(-1.0, scale=noise)
        other = (loss == 0) & (rng.random(total.size) < below / (1 - above))
        tail = noise * norm.isf(below * rng.random(total.size))
        total += np.where(other, -mixture(tail, rate, 2.0, noise), loss)
    return total


@pytest.mark.parametrize(
    ("sampling", "losses"), [("poisson", poisson_losses), ("fixed", fixed_losses)], ids=["poisson", "fixed"]
)
def test_delta_of_sampled_losses_under_replace(sampling: Sampling, losses: Any) -> None:
    """The reported epsilon has the delta asked for; noise at 2/3 and 3/2 of what is said has not."""
    noise, rate, count, delta = 2.0, 0.2, 12, 1e-2
    budget = spent_by((Gaussian(noise, sampling, rate, count, "replace"),), delta).epsilon
    assert delta_at(losses(noise, rate, count), budget) == pytest.approx(delta, rel=0.03)
    assert delta_at(losses(noise * 2 / 3, rate, count), budget) > 2 * delta
    assert delta_at(losses(noise * 3 / 2, rate, count), budget) < delta / 2


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_opposites_are_the_worst_to_replace(noise: float, budget: float) -> None:
    """No two vectors of norm at most C, under Poisson sampling, differ more than C and -C do."""
    axis = np.linspace(-1 - 7 * noise, 1 + 7 * noise, 301)
    area = (axis[1] - axis[0]) ** 2

    def density(at: tuple[float, float]) -> NDArray[np.float64]:
        def bump(x: float, y: float) -> NDArray[np.float64]:
            return np.outer(norm.pdf(axis, x, noise), norm.pdf(axis, y, noise))

        return 0.7 * bump(0.0, 0.0) + 0.3 * bump(*at)

    def apart(one: tuple[float, float], other: tuple[float, float]) -> float:
        return float(np.maximum(density(one) - math.exp(budget) * density(other), 0.0).sum() * area)

    worst = apart((1.0, 0.0), (-1.0, 0.0))
    for angle in np.linspace(0, math.pi, 7):
        for norms in ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0)):
            other = (norms[1] * math.cos(angle), norms[1] * math.sin(angle))
            assert apart((norms[0], 0.0), other) <= worst + 1e-6


# The noise for a budget.

PLANS: list[tuple[Sampling, float, int, Adjacency]] = [
    ("none", 1.0, 30, "replace"),
    ("poisson", 0.1, 100, "add_remove"),
    ("poisson", 0.05, 60, "replace"),
    ("fixed", 0.1, 100, "replace"),
]


@pytest.mark.parametrize("budget", [0.2, 2.0, 30.0])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan[0]}-{plan[3]}")
def test_noise_is_the_least_that_keeps_the_budget(
    budget: float, plan: tuple[Sampling, float, int, Adjacency]
) -> None:
    noise = noise_for(budget, 1e-5, *plan)
    assert spent(noise, *plan) <= budget < spent(0.998 * noise, *plan)


def test_noise_where_sampling_alone_is_enough_and_where_nothing_is() -> None:
    assert noise_for(1.0, 1e-2, "poisson", 1e-3, 1, "add_remove") == 0.01  # who is never drawn never leaks
    with pytest.raises(ConfigError, match="set a larger epsilon or fewer rounds"):
        noise_for(1e-3, 1e-9, "none", 1.0, 10**9, "replace")


# What is refused.


@pytest.mark.parametrize("noise", [math.nan, math.inf, 0.0, -1.0, 1e-3, "1", True])
def test_bad_noise_is_named(noise: Any) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier must be a number at least 0\.01"):
        Gaussian(noise, "none", 1.0, 1, "replace")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Gaussian(1.0, "fixed", 0.1, 1, "add_remove"), "fixed has no add_remove guarantee"),
        (lambda: Gaussian(1.0, "none", 0.5, 1, "replace"), "rate must be 1 without sampling, got 0.5"),
        (lambda: Gaussian(1.0, "poisson", 0.0, 1, "replace"), "sampling rate must be a number above 0"),
        (lambda: Gaussian(1.0, "poisson", math.nan, 1, "replace"), "the sampling rate"),
        (lambda: Gaussian(1.0, "poisson", 1.1, 1, "replace"), "at most 1"),
        (lambda: Gaussian(1.0, "poisson", 0.1, -1, "replace"), "the count of releases"),
        (lambda: Gaussian(1.0, "poisson", 0.1, 1.5, "replace"), "a whole number"),  # type: ignore[arg-type]
        (lambda: Gaussian(1.0, "shuffled", 0.1, 1, "replace"), "privacy.sampling must be"),  # type: ignore[arg-type]
        (lambda: Gaussian(1.0, "none", 1.0, 1, "zero_out"), "privacy.adjacency must be"),  # type: ignore[arg-type]
        (lambda: Curve("skellam", (1.0,), 1), f"curve of skellam must hold {len(ORDERS)} values"),
        (lambda: Curve("skellam", (math.nan,) * len(ORDERS), 1), "values of at least 0"),
        (lambda: Curve("skellam", (-1.0,) * len(ORDERS), 1), "got .* values from -1"),
        (lambda: SharedGaussian(0.0, 9, 9, 16.0, 1), "the noise must be a number at least 0.01"),
        (lambda: SharedGaussian(1.0, 0, 9, 16.0, 1), "the size of a vector"),
        (lambda: SharedGaussian(1.0, 9, 0, 16.0, 1), "the count of shares"),
        (lambda: SharedGaussian(1.0, 9, 9, 0.0, 1), "the variance of a share"),
        (lambda: SharedGaussian(1.0, 9, 9, 16.0, -1), "the count of releases"),
        (lambda: SharedGaussian(1.0, 9, 9, 16.0, 1, "add_remove"), "must be one of replace"),  # type: ignore[arg-type]
        (lambda: spent_by((), 0.0), r"privacy\.delta must be a number above 0 and below 1"),
        (lambda: spent_by((), 1.0), "privacy.delta"),
        (lambda: spent_by((), math.nan), "privacy.delta"),
        (
            lambda: noise_for(0.0, 1e-5, "none", 1.0, 1, "replace"),
            "privacy.epsilon must be a number at least",
        ),
        (lambda: noise_for(math.inf, 1e-5, "none", 1.0, 1, "replace"), "privacy.epsilon"),
        (lambda: noise_for(1.0, 1e-5, "none", 1.0, 0, "replace"), "the count of releases"),
        (lambda: noise_for(1.0, 1e-5, "fixed", 0.1, 1, "add_remove"), "fixed has no add_remove"),
        (lambda: analytic_gaussian(-1.0, 1e-5), "privacy.epsilon"),
    ],
)
def test_bad_values_are_named(made: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made()


@pytest.mark.parametrize(
    "replaced", [Gaussian(1.0, "none", 1.0, 1, "replace"), SharedGaussian(1.0, 9, 9, 16.0, 1)]
)
def test_two_adjacencies_do_not_compose(replaced: Release) -> None:
    both = (replaced, Gaussian(1.0, "none", 1.0, 1, "add_remove"))
    with pytest.raises(ConfigError, match="releases under add_remove and under replace do not compose"):
        spent_by(both, 1e-5)
