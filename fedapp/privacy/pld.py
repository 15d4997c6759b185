"""Epsilon of sampled Gaussian releases by their privacy loss distributions, with dp-accounting."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from fedapp.privacy.accounting import Gaussian, Spent


def by_pld(releases: Sequence[Gaussian], delta: float, scale: float) -> Spent:
    """An upper bound on epsilon at `delta` of all releases, under one adjacency; `scale` is a rougher bound.

    Losses are composed on ever finer grids until epsilon moves by less than 0.5 %. Connect-the-dots
    (Doroshenko et al. 2022) makes each grid's value an upper bound. Its excess goes with the square of the
    grid once that is finer than one release's loss, so about a 15th of the last move, 0.03 %, is left.
    """

    def on_grid(step: float) -> float:
        total = privacy_loss_distribution.identity(step)
        for release in releases:
            total = total.compose(_loss(release, step).self_compose(release.count))
        with np.errstate(over="ignore"):  # an epsilon beyond the floats is infinite
            return float(total.get_epsilon_for_delta(delta))

    step = scale / 1000
    last, now = math.inf, on_grid(step)
    while now < 0.995 * last:
        step /= 4
        last, now = now, min(now, on_grid(step))
    fixed = any(release.sampling == "fixed" for release in releases)
    return Spent(now, "PLD (Zhu et al. 2022)" if fixed else "PLD (dp-accounting)")


def _loss(release: Gaussian, step: float) -> Any:
    """dp-accounting's PrivacyLossDistribution of one release, on a grid of `step`, rounded up."""
    if release.sampling == "fixed":
        return _loss_without_replacement(release, step)
    add_remove = release.adjacency == "add_remove"
    return privacy_loss_distribution.from_gaussian_mechanism(
        release.noise,  # not halved: REPLACE_ONE itself moves the sum by C each way
        value_discretization_interval=step,
        sampling_prob=release.rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE
        if add_remove
        else NeighboringRelation.REPLACE_ONE,
    )


def _loss_without_replacement(release: Gaussian, step: float) -> Any:
    """The same for a cohort of fixed size under replace, which dp-accounting itself knows by RDP only.

    Where the replaced unit is not drawn another one takes its place, so that by advanced joint convexity
    (Balle, Barthe and Gaboardi 2018) the release is dominated by (1 - rate) N(0) + rate N(2C) against N(0) at
    epsilon above 0 and, the relation being symmetric, by N(0) against that mixture below: at each epsilon the
    larger (Zhu, Dong and Wang 2022). Composing each way round by itself, as add_remove may, would be wrong:
    nothing makes the same way round the worse in each release.
    """
    pairs = [
        GaussianPrivacyLoss(release.multiplier, sampling_prob=release.rate, adjacency_type=way)
        for way in (AdjacencyType.ADD, AdjacencyType.REMOVE)
    ]
    bounds = [pair.connect_dots_bounds() for pair in pairs]
    low = math.floor(min(bound.epsilon_lower for bound in bounds) / step)
    high = math.ceil(max(bound.epsilon_upper for bound in bounds) / step)
    grid = np.arange(low, high + 1) * step
    deltas = np.maximum(*(pair.get_delta_for_epsilon(grid) for pair in pairs))
    return privacy_loss_distribution.PrivacyLossDistribution(
        pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(step, low, high, deltas)
    )
