"""What noised releases cost together: epsilon at a delta, and the noise that a budget needs."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np

from fedapp import check
from fedapp.errors import ConfigError
from fedapp.privacy.release import (
    LEAST_NOISE,
    MOST_NOISE,
    Adjacency,
    Curve,
    Gaussian,
    Release,
    Sampling,
    Spent,
)
from fedapp.privacy.renyi import by_rdp


@cache
def spent_by(releases: tuple[Release, ...], delta: float) -> Spent:
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
        return by_rdp(merged, delta)
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
        sampled = by_rdp(gaussians, delta)
    else:
        sampled = by_pld(gaussians, delta - rounding, exact.epsilon)
    return min(exact, sampled, key=lambda spent: spent.epsilon)


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
        return spent_by((release,), delta).epsilon / budget - 1

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
