"""Renyi divergences of releases, and the epsilon that they come to together."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedapp.privacy.release import ORDERS, Curve, Gaussian, Release, SharedGaussian, Spent


def by_rdp(releases: Sequence[Release], delta: float) -> Spent:
    """An upper bound on epsilon at `delta` of all releases: their divergences add up.

    To epsilon by Canonne, Kamath and Steinke 2020, Proposition 12.
    """
    from dp_accounting.rdp import compute_epsilon

    total = np.sum([rdp(release) for release in releases], axis=0)
    return Spent(float(compute_epsilon(ORDERS, total, delta)[0]), "RDP (dp-accounting)")


def rdp(release: Release) -> NDArray[np.float64]:
    """Float64 (len(ORDERS),): the Renyi divergence of all `count` releases at ORDERS."""
    if isinstance(release, Curve):
        return release.count * np.array(release.rdp)
    return release.count * _one_rdp(replace(release, count=1))


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
