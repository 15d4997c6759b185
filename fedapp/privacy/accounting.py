"""What noised releases cost together: epsilon at a delta, and the noise that a budget needs.

The caller gives noise over the clip norm C; sensitivities are known here alone. One unit that comes or goes
(add_remove) moves a sum by C; one that is replaced (replace) moves it by 2C.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError

Sampling = Literal["none", "poisson", "fixed"]
Adjacency = Literal["add_remove", "replace"]

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *map(float, range(11, 65)),
    *(72.0, 80.0, 96.0, 112.0, 128.0, 192.0, 256.0, 512.0, 1024.0),
)
"""Orders of Renyi divergence at which curves are kept; ledgers on disk compose at them, so they stay."""

LEAST_NOISE, MOST_NOISE = 0.01, 1e7


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise on a sum of clipped vectors, released `count` times.

    `noise` is the noise's standard deviation over the clip norm C (not over the sensitivity). `sampling` says
    who is in a sum: `none` everyone, or the adversary knows who; `poisson` each unit independently with
    probability `rate`; `fixed` a uniform subset of a set size, drawn without replacement, `rate` its share.
    Raises ConfigError on values out of range and on `fixed` with `add_remove`.
    """

    noise: float
    sampling: Sampling
    rate: float
    count: int
    adjacency: Adjacency

    def __post_init__(self) -> None:
        check.real("privacy.noise_multiplier", self.noise, low=LEAST_NOISE, high=MOST_NOISE)
        check.choice("privacy.sampling", self.sampling, ("none", "poisson", "fixed"))
        check.choice("privacy.adjacency", self.adjacency, ("add_remove", "replace"))
        check.real("the sampling rate", self.rate, above=0.0, high=1.0)
        check.whole("the count of releases", self.count, 0)
        if self.sampling == "none" and self.rate != 1:
            raise ConfigError(
                f"the sampling rate must be 1 without sampling, got {self.rate}: set the rate to 1"
            )
        if self.sampling == "fixed" and self.adjacency == "add_remove":
            # A cohort of a fixed size has no neighbour with one unit fewer: another one takes the place.
            raise ConfigError(
                "privacy.sampling=fixed has no add_remove guarantee: set privacy.adjacency=replace, "
                "or privacy.sampling=poisson"
            )

    @property
    def multiplier(self) -> float:
        """Noise over the sensitivity."""
        return self.noise if self.adjacency == "add_remove" else self.noise / 2


@dataclass(frozen=True)
class Curve:
    """Any other mechanism, by the Renyi divergence of one release at each of ORDERS, released `count` times.

    The divergence is under the adjacency of the releases it is composed with; infinity where none is known.
    """

    mechanism: str
    rdp: tuple[float, ...]
    count: int

    def __post_init__(self) -> None:
        check.whole("the count of releases", self.count, 0)
        if len(self.rdp) != len(ORDERS) or not all(value >= 0 for value in self.rdp):
            raise ConfigError(
                f"the curve of {self.mechanism} must hold {len(ORDERS)} values of at least 0, one for each "
                f"order, got {len(self.rdp)} values from {min(self.rdp, default=0)}: compute it at ORDERS"
            )


Release = Gaussian | Curve


@dataclass(frozen=True)
class Spent:
    """An upper bound on epsilon, and by whose computation."""

    epsilon: float
    accountant: str


@cache
def epsilon(releases: tuple[Release, ...], delta: float) -> Spent:
    """The least upper bound on epsilon at `delta` of all releases together, each chosen in view of the last.

    Raises ConfigError on a delta outside (0, 1), and where no accountant is right for all of them.
    """
    check.real("privacy.delta", delta, above=0.0, below=1.0)
    gaussians, curves = _merge(releases)
    if not gaussians and not curves:
        return Spent(0.0, "none")
    if curves:
        return _by_rdp((*gaussians, *curves), delta)
    # Sampling never harms: given the same draw for both neighbours, a release is the Gaussian one or equal.
    unsampled = math.fsum(release.count / release.multiplier**2 for release in gaussians) ** -0.5
    known = Spent(_gaussian_epsilon(unsampled, delta), "analytic Gaussian")
    if all(release.sampling == "none" for release in gaussians):
        return known
    if any(release.sampling == "fixed" for release in gaussians):
        return min(known, _by_rdp(gaussians, delta), key=lambda spent: spent.epsilon)
    return min(known, _by_pld(gaussians, delta, known.epsilon), key=lambda spent: spent.epsilon)


def rdp(release: Release) -> NDArray[np.float64]:
    """Float64 (len(ORDERS),): the Renyi divergence of all `count` releases at ORDERS."""
    if isinstance(release, Curve):
        return release.count * np.array(release.rdp)
    return release.count * _one_rdp(replace(release, count=1))


@cache
def noise_for(
    budget: float, delta: float, sampling: Sampling, rate: float, count: int, adjacency: Adjacency
) -> float:
    """The smallest noise over the clip norm, within 0.2 %, whose `count` releases stay within the budget.

    Raises ConfigError on values out of range and on budgets that no noise reaches.
    """
    from scipy.optimize import brentq

    check.real("privacy.epsilon", budget, above=0.0)
    check.real("privacy.delta", delta, above=0.0, below=1.0)
    check.whole("the count of releases", count, 1)

    def excess(log_noise: float) -> float:
        noise = min(max(math.exp(log_noise), LEAST_NOISE), MOST_NOISE)
        release = Gaussian(noise, sampling, rate, count, adjacency)
        return epsilon((release,), delta).epsilon / budget - 1

    sensitivity = 1.0 if adjacency == "add_remove" else 2.0
    enough = analytic_gaussian(budget, delta) * sensitivity * math.sqrt(count)  # without any sampling
    if enough > MOST_NOISE:
        raise ConfigError(
            f"privacy.epsilon={budget} needs noise beyond {MOST_NOISE:g} times the clip norm in {count} "
            f"releases: set a larger epsilon or fewer rounds"
        )
    least = math.log(LEAST_NOISE)
    high = max(math.log(enough) + 1e-9, least)
    low = high
    while excess(low) <= 0:
        if low == least:
            return LEAST_NOISE
        high, low = low, max(low - 0.5, least)
    log_noise = brentq(excess, low, high, xtol=2e-4, rtol=1e-6) if low < high else high
    while excess(log_noise) > 0:
        log_noise += 2e-4
    return math.exp(log_noise)


def analytic_gaussian(epsilon: float, delta: float) -> float:
    """The least noise over sensitivity of one (epsilon, delta)-DP Gaussian release, for any epsilon > 0.

    Source: Balle and Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", Algorithm 1.
    """
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    check.real("privacy.epsilon", epsilon, above=0.0)
    check.real("privacy.delta", delta, above=0.0, below=1.0)
    return float(get_sigma_gaussian(epsilon, delta))


def _gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The inverse of `analytic_gaussian` in its first argument: Balle and Wang 2018, Theorem 8."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    return float(get_epsilon_gaussian(multiplier, delta))


def _merge(releases: tuple[Release, ...]) -> tuple[tuple[Gaussian, ...], tuple[Curve, ...]]:
    """Equal releases counted together; sampling at rate 1 is none."""
    counts: Counter[Release] = Counter()
    for release in releases:
        if release.count:
            whole = isinstance(release, Gaussian) and release.rate == 1
            one = replace(release, count=1, sampling="none") if whole else replace(release, count=1)
            counts[one] += release.count
    merged = [replace(release, count=count) for release, count in counts.items()]
    gaussians = tuple(release for release in merged if isinstance(release, Gaussian))
    # A bound for a unit that goes says nothing of one that is replaced, nor the other way round (a set of
    # fixed size has no neighbour of another size), so there is no pair of data sets to compose over.
    if len({release.adjacency for release in gaussians}) > 1:
        raise ConfigError(
            "releases under add_remove and under replace do not compose: use one privacy.adjacency for both"
        )
    return gaussians, tuple(release for release in merged if isinstance(release, Curve))


@cache
def _one_rdp(release: Gaussian) -> NDArray[np.float64]:
    """Float64 (len(ORDERS),): one release, by dp-accounting."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    unsampled = np.array(ORDERS) / (2 * release.multiplier**2)
    event, relation = dp.GaussianDpEvent(release.multiplier), dp.NeighboringRelation.REPLACE_ONE
    if release.sampling == "none" or release.rate == 1:
        return unsampled
    if release.sampling == "fixed":  # Wang, Balle and Kasiviswanathan 2019, Theorem 27
        drawn, of = release.rate.as_integer_ratio()
        event = dp.SampledWithoutReplacementDpEvent(of, drawn, event)
    elif release.adjacency == "add_remove":  # Mironov, Talwar and Zhang 2019
        event = dp.PoissonSampledDpEvent(release.rate, event)
        relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    else:
        raise ConfigError(
            "no RDP accountant knows Poisson sampling under replace: set privacy.adjacency=add_remove, or "
            "keep such releases apart from those that only RDP can account"
        )
    sampled: NDArray[np.float64] = RdpAccountant(ORDERS, relation).compose(event).rdp
    return np.minimum(sampled, unsampled)


def _by_rdp(releases: tuple[Release, ...], delta: float) -> Spent:
    from dp_accounting.rdp import compute_epsilon

    total = np.sum([rdp(release) for release in releases], axis=0)
    return Spent(float(compute_epsilon(ORDERS, total, delta)[0]), "RDP (dp-accounting)")


def _by_pld(releases: tuple[Gaussian, ...], delta: float, scale: float) -> Spent:
    """Privacy loss distributions, on ever finer grids until epsilon is right within 0.1 %.

    Connect-the-dots (Doroshenko et al. 2022) makes each grid's value an upper bound, whose excess goes with
    the square of the grid once that is finer than one release's loss.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    def on_grid(step: float) -> float:
        total = pld.identity(step)
        for release in releases:
            one = pld.from_gaussian_mechanism(
                release.noise,  # sensitivity 1 is one unit's; REPLACE_ONE itself takes one away and adds one
                value_discretization_interval=step,
                sampling_prob=release.rate,
                neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
                if release.adjacency == "add_remove"
                else NeighboringRelation.REPLACE_ONE,
            )
            total = total.compose(one.self_compose(release.count))
        return float(total.get_epsilon_for_delta(delta))

    step = scale / 1000
    last, now = math.inf, on_grid(step)
    while now < 0.999 * last:
        step /= 4
        last, now = now, min(now, on_grid(step))
    return Spent(now, "PLD (dp-accounting)")
