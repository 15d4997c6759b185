"""Epsilon of Poisson-sampled Gaussians by Opacus, which fedapp's own accounting never asks."""

import warnings
from functools import cache

from opacus.accountants import PRVAccountant, RDPAccountant

from fedapp.privacy.example import History

PRV_ERROR = 0.01  # of epsilon; beside it a thousandth of delta


@cache
def prv(history: History, delta: float) -> tuple[float, float, float]:
    """What PRV (Gopi et al. 2021) bounds epsilon by from below, its estimate, its bound from above."""
    counter = PRVAccountant()
    counter.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy notes underflows
        losses = counter._get_dprv(eps_error=PRV_ERROR, delta_error=delta / 1000)
        low, estimate, high = map(float, losses.compute_epsilon(delta, delta / 1000, PRV_ERROR))
    return low, estimate, high


@cache
def rdp(history: History, delta: float) -> float:
    """An upper bound by Renyi divergence (Mironov et al. 2019)."""
    counter = RDPAccountant()
    counter.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which order was best
        return float(counter.get_epsilon(delta))
