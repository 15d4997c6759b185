"""What noised releases cost together: epsilon at a delta, and the noise that a budget needs.

The caller gives noise over the clip norm C; sensitivities are known here alone. One unit that comes or goes
(add_remove) moves a sum by C; one that is replaced (replace) moves it by 2C.
"""

import logging
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
class SharedGaussian:
    """Shares of discrete Gaussian noise on a sum of vectors of whole numbers, released `count` times.

    `noise` is the standard deviation of all shares together over the bound on a vector's norm. A vector has
    so many `values`; so many `shares` of the noise are unknown, each of that `variance`. One vector is
    replaced, and nobody is sampled. Raises ConfigError on values out of range.
    """

    noise: float
    values: int
    shares: int
    variance: float
    count: int
    adjacency: Literal["replace"] = "replace"

    def __post_init__(self) -> None:
        check.real("the noise", self.noise, low=LEAST_NOISE, high=MOST_NOISE)
        check.whole("the size of a vector", self.values, 1)
        check.whole("the count of shares", self.shares, 1)
        check.real("the variance of a share", self.variance, above=0.0)
        check.whole("the count of releases", self.count, 0)
        check.choice("privacy.adjacency", self.adjacency, ("replace",))


@dataclass(frozen=True)
class Curve:
    """Any other mechanism, by the Renyi divergence of one release at each of ORDERS, released `count` times.

    The divergence is under the adjacency of the releases it is composed with; infinity where none is known.
    So ledgers hold what distributed_gaussian released before there was SharedGaussian.
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


Release = Gaussian | SharedGaussian | Curve


@dataclass(frozen=True)
class Spent:
    """An upper bound on epsilon, and by whose computation."""

    epsilon: float
    accountant: str


@cache
def epsilon(releases: tuple[Release, ...], delta: float) -> Spent:
    """The least upper bound on epsilon at `delta` of all releases together, each chosen in view of the last.

    Unsampled Gaussians: exact. Sampled ones among them: privacy loss distributions, about 0.03 % above their
    limit, or RDP where delta is too small for their rounding. Anything else among them: RDP. Raises
    ConfigError on a delta outside (0, 1) and on releases under different adjacencies.

    *Formal guarantees.* Adjacency and sensitivity: those of the releases, all of one unit's data. Released:
    all the noised sums, each chosen in view of those before, at noise and rates fixed beforehand. Sampling:
    as each release says, drawn afresh and unseen by whoever sees the sums; then against all who see them.
    With `fixed` nobody else's draw may be seen either, for it changes this unit's chance. Not covered: what
    else leaves, and noise that is not what `noise` says.
    """
    check.real("privacy.delta", delta, above=0.0, below=1.0)
    merged = _merge(releases)
    gaussians = tuple(release for release in merged if isinstance(release, Gaussian))
    if not merged:
        return Spent(0.0, "none")
    if len(gaussians) < len(merged):
        return _by_rdp(merged, delta)
    # T Gaussians are one with noise / sqrt(T). Sampling only helps: given the same draw for both neighbours,
    # what is released is the Gaussian or does not differ at all, and the hockey-stick divergence that gives
    # delta is jointly convex.
    unsampled = math.fsum(release.count / release.multiplier**2 for release in gaussians) ** -0.5
    exact = Spent(gaussian_epsilon(unsampled, delta), "analytic Gaussian")
    if exact.epsilon == 0 or all(release.sampling == "none" for release in gaussians):
        return exact
    from fedapp.privacy.pld import by_pld  # dp-accounting takes a second to import

    # Convolutions by FFT round delta: 3e-14 was seen at 1000 releases, 2e-12 at 1e5, 3e-11 at 1e6.
    rounding = 1e-13 + 1e-16 * sum(release.count for release in gaussians)
    if rounding > delta / 100:
        sampled = _by_rdp(gaussians, delta)
    else:
        sampled = by_pld(gaussians, delta - rounding, exact.epsilon)
    return min(exact, sampled, key=lambda spent: spent.epsilon)


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

    check.real("privacy.epsilon", budget, low=1e-3, high=1e5)
    check.real("privacy.delta", delta, above=0.0, below=1.0)
    check.whole("the count of releases", count, 1)

    def excess(log_noise: float) -> float:
        noise = min(max(math.exp(log_noise), LEAST_NOISE), MOST_NOISE)
        release = Gaussian(noise, sampling, rate, count, adjacency)
        return epsilon((release,), delta).epsilon / budget - 1

    sensitivity = 1.0 if adjacency == "add_remove" else 2.0
    once = analytic_gaussian(budget, delta)
    least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    # The central limit theorem of Gaussian DP (Bu et al. 2020) under-reports, but starts the search well.
    start = math.log(sensitivity) - 0.5 * math.log(math.log1p(1 / (count * (rate * once) ** 2)))
    low = high = min(max(start, least), most)
    width = 0.05
    while excess(low) <= 0:
        if low == least:
            return LEAST_NOISE
        high, low, width = low, max(low - width, least), 2 * width
    while excess(high) > 0:
        if high == most:
            raise ConfigError(
                f"privacy.epsilon={budget} needs noise beyond {MOST_NOISE:g} times the clip norm in {count} "
                f"releases: set a larger epsilon or fewer rounds"
            )
        low, high, width = high, min(high + width, most), 2 * width
    log_noise = brentq(excess, low, high, xtol=2e-4, rtol=1e-6)
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
    with np.errstate(divide="ignore"):  # the log of a delta that rounds to zero
        return float(get_sigma_gaussian(epsilon, delta))


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The inverse of `analytic_gaussian` in its first argument: Balle and Wang 2018, Theorem 8."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    with np.errstate(divide="ignore"):
        return float(get_epsilon_gaussian(multiplier, delta))


def _merge(releases: tuple[Release, ...]) -> tuple[Release, ...]:
    """Equal releases counted together; sampling at rate 1 is none."""
    counts: Counter[Release] = Counter()
    for release in releases:
        if isinstance(release, Gaussian) and release.rate == 1:
            release = replace(release, sampling="none")
        counts[replace(release, count=1)] += release.count
    # A bound for a unit that goes says nothing of one that is replaced, nor the other way round (a set of
    # fixed size has no neighbour of another size): there is no one pair of data sets to compose over.
    if len({release.adjacency for release in counts if not isinstance(release, Curve)}) > 1:
        raise ConfigError(
            "releases under add_remove and under replace do not compose: use one privacy.adjacency for both"
        )
    return tuple(replace(release, count=count) for release, count in counts.items() if count)


def _by_rdp(releases: tuple[Release, ...], delta: float) -> Spent:
    """Renyi divergences add up; to epsilon by Canonne, Kamath and Steinke 2020, Proposition 12."""
    from dp_accounting.rdp import compute_epsilon

    total = np.sum([rdp(release) for release in releases], axis=0)
    return Spent(float(compute_epsilon(ORDERS, total, delta)[0]), "RDP (dp-accounting)")


@cache
def _one_rdp(release: Gaussian | SharedGaussian) -> NDArray[np.float64]:
    """Float64 (len(ORDERS),): one release; what is sampled by dp-accounting."""
    orders = np.array(ORDERS)
    if isinstance(release, SharedGaussian):
        return _shared_rdp(release, orders)
    unsampled = orders / (2 * release.multiplier**2)
    if release.sampling == "none" or release.rate == 1:
        return unsampled
    if release.sampling == "fixed":
        sampled = _library_rdp(release.multiplier, release.rate, "fixed", ORDERS)
    elif release.adjacency == "add_remove":
        sampled = _library_rdp(release.noise, release.rate, "poisson", ORDERS)
    else:
        # One unit goes, then another comes: the weak triangle inequality of Mironov 2017, Corollary 4.
        # That the first bounds both ways is Theorem 5 of Mironov, Talwar and Zhang 2019.
        goes = _library_rdp(release.noise, release.rate, "poisson", tuple(2 * orders))
        comes = _library_rdp(release.noise, release.rate, "poisson", tuple(2 * orders - 1))
        sampled = (orders - 0.5) / (orders - 1) * goes + comes
    # Divergences grow with their order, so one that did not converge is bounded by the next.
    sampled = np.minimum.accumulate(sampled[::-1])[::-1]
    return np.minimum(sampled, unsampled)


def _shared_rdp(release: SharedGaussian, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Float64 (len(orders),): one release, when one vector is replaced.

    Kairouz, Liu and Steinke 2021, Proposition 14, with an L1 norm of at most sqrt(values) L2 norms; tau is
    how far the log-probabilities of a sum of discrete Gaussians are from those of one, at most.
    """
    k = np.arange(1, release.shares)
    tau = float(10 * np.sum(np.exp(-2 * math.pi**2 * release.variance * k / (k + 1))))
    half, moved = orders / 2, 2 / release.noise
    apart = half * (moved + tau * math.sqrt(release.values)) ** 2
    return np.asarray(np.minimum(apart, half * moved**2 + tau * release.values))


def _library_rdp(
    multiplier: float, rate: float, sampling: Literal["poisson", "fixed"], orders: tuple[float, ...]
) -> NDArray[np.float64]:
    """Float64 (len(orders),): one release by dp-accounting; infinity at orders that do not converge.

    `poisson` under add_remove: Mironov, Talwar and Zhang 2019. `fixed` under replace: Wang, Balle and
    Kasiviswanathan 2019, Theorem 27, whose sensitivity of 1 is that of the replacement.
    """
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    noise = dp.GaussianDpEvent(multiplier)
    if sampling == "fixed":
        drawn, of = rate.as_integer_ratio()
        event = dp.SampledWithoutReplacementDpEvent(of, drawn, noise)
        accountant = RdpAccountant(orders, dp.NeighboringRelation.REPLACE_ONE)
    else:
        event = dp.PoissonSampledDpEvent(rate, noise)
        accountant = RdpAccountant(orders, dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    log = logging.getLogger("absl")  # where each order that does not converge costs a line
    muted, log.disabled = log.disabled, True
    try:
        found: NDArray[np.float64] = accountant.compose(event).rdp
    finally:
        log.disabled = muted
    return found
