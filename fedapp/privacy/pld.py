"""Epsilon of sampled Gaussian releases by their privacy loss distributions, with dp-accounting."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, identity
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from fedapp.privacy.release import Gaussian, Spent

MOST_POINTS = 2**17
"""Of one release's grid: about half a second's work."""


def by_pld(releases: Sequence[Gaussian], delta: float, scale: float) -> Spent:
    """An upper bound on epsilon at `delta` of all releases, under one adjacency; `scale` is a rougher bound.

    Losses are composed on ever finer grids until epsilon moves by less than 0.5 % and 0.1 (or MOST_POINTS
    stop it). Connect-the-dots (Doroshenko et al. 2022) makes each grid's value an upper bound. Its excess
    goes with the square of the grid once that is finer than one release's loss: a 15th of the last move is
    left, 0.03 % and less than the 0.01 that Opacus' PRV accountant adds to its estimate to make it a bound.
    """
    losses = [(_losses(release), release.count) for release in releases]
    spread = max(_spread(pairs) for ways, _ in losses for pairs in ways)
    finest = spread / MOST_POINTS

    def on_grid(step: float) -> float:
        total = identity(step)
        for ways, count in losses:
            one = PrivacyLossDistribution(*(_on_grid(pairs, step) for pairs in ways))
            total = total.compose(one.self_compose(count))
        with np.errstate(over="ignore"):  # an epsilon beyond the floats is infinite
            return float(total.get_epsilon_for_delta(delta))

    step = max(min(scale / 1000, spread / 100), finest)
    last, now = math.inf, on_grid(step)
    while last - now > min(0.005 * last, 0.1) and step > finest:
        step = max(step / 4, finest)
        last, now = now, min(now, on_grid(step))
    fixed = any(release.sampling == "fixed" for release in releases)
    return Spent(now, "PLD (Zhu et al. 2022)" if fixed else "PLD (dp-accounting)")


def _losses(release: Gaussian) -> tuple[tuple[Any, ...], ...]:
    """dp-accounting's privacy losses of one release: composed each for itself, the larger within a tuple.

    Poisson under add_remove: who is added stays added in all releases, so each way round composes for itself.
    Poisson under replace: C against -C, which dp-accounting's REPLACE makes of a sensitivity of C. They are
    the worst in any dimension: of all sets that are as likely under N(0), a half-space is the likeliest under
    N(C) and the least likely under N(-C), by the lemma of Neyman and Pearson.
    Fixed size under replace, which dp-accounting itself knows by RDP only. Where the unit is drawn, its two
    values are at most 2C apart; where it is not, another unit has its place, at most 2C from it too. So by
    advanced joint convexity (Balle, Barthe and Gaboardi 2018) the release is dominated at epsilon above 0 by
    (1 - rate) N(0) + rate N(2C) against N(0) and, the relation being symmetric, below by N(0) against that
    mixture: at each epsilon the larger (Zhu, Dong and Wang 2022). The larger of two convex curves is convex,
    so it is the curve of one pair, which composes. The two ways do not compose each for itself: data whose
    worse way round changes from release to release exceed both.
    """
    add, remove, both = AdjacencyType.ADD, AdjacencyType.REMOVE, AdjacencyType.REPLACE
    ways: tuple[tuple[Any, ...], ...]
    if release.sampling == "fixed":
        noise, ways = release.noise / 2, ((remove, add),)
    elif release.adjacency == "add_remove":
        noise, ways = release.noise, ((remove,), (add,))
    else:
        noise, ways = release.noise, ((both,),)
    return tuple(
        tuple(GaussianPrivacyLoss(noise, sampling_prob=release.rate, adjacency_type=way) for way in pairs)
        for pairs in ways
    )


def _bounds(pairs: tuple[Any, ...]) -> tuple[float, float]:
    """Least and largest loss, but for a mass of e**-50."""
    bounds = [pair.connect_dots_bounds() for pair in pairs]
    return min(bound.epsilon_lower for bound in bounds), max(bound.epsilon_upper for bound in bounds)


def _spread(pairs: tuple[Any, ...]) -> float:
    low, high = _bounds(pairs)
    return high - low


def _on_grid(pairs: tuple[Any, ...], step: float) -> Any:
    """dp-accounting's pessimistic distribution over multiples of `step`, of the larger delta at each."""
    low, high = _bounds(pairs)
    first, last = math.floor(low / step), math.ceil(high / step)
    grid = np.arange(first, last + 1) * step
    deltas = np.max([pair.get_delta_for_epsilon(grid) for pair in pairs], axis=0)
    return create_pmf_pessimistic_connect_dots_fixed_gap(step, first, last, deltas)
