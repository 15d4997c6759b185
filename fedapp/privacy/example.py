"""Example-level differential privacy: how much noise a budget needs, and how much of it is spent."""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from fedapp import check
from fedapp.errors import ConfigError
from fedapp.privacy.mechanism import require_budget

History = tuple[tuple[float, float, int], ...]
"""Composed releases of one client's data: (noise multiplier, sampling rate, steps) in order."""


@dataclass(frozen=True)
class ExamplePrivacy:
    """One training example of one client is protected; DP-SGD in the trainer does the work.

    *Formal guarantees.* Each client's sequence of updates over the whole run is (epsilon, delta)-DP.
    Adjacency: add or remove one example of that client. Released: the client's noised gradient sums, so
    all that follows from them (its updates, their compressed form and size, every model). Sensitivity: the
    clip norm, since each example's gradient is clipped and added to a sum over a Poisson sample; the noise
    has standard deviation noise multiplier times clip norm; denominators, steps and sampling rate are
    public constants. Sampling assumed, and done: every example joins each step independently with
    probability q, drawn on the client by the operating system's entropy and seen by nobody else, so the
    amplification holds against the server, observers of the models and other clients alike. Clients hold
    disjoint data, so the loss is that of one client (the largest), not their sum. Not covered: the choice
    of hyper-parameters on private data, the floating-point Gaussian noise (exact DP needs discrete noise;
    the generator is a Mersenne Twister, on CUDA Philox, seeded by the operating system, not a cryptographic
    one), timing, and statistics that a task takes from the data before training.

    `epsilon` is the budget of the planned run and sets the noise; a `noise_multiplier` given instead sets
    the noise, and epsilon is what follows. `test_seed` fixes noise and sampling: then nothing is private.
    """

    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    accountant: Literal["prv", "rdp"] = "prv"
    test_seed: int | None = None
    unit: Literal["example"] = "example"
    against: ClassVar[str] = "the server too"

    def __post_init__(self) -> None:
        require_budget(self.epsilon, self.delta, self.noise_multiplier, self.test_seed)
        if self.noise_multiplier is not None:  # the accountants are not made for less
            check.real("privacy.noise_multiplier", self.noise_multiplier, low=0.2, high=1e4)
        check.choice("privacy.accountant", self.accountant, ("prv", "rdp"))

    def sigma(self, sampling_rate: float, steps: int) -> float:
        """The noise multiplier for a planned run of so many steps; the smallest within 0.2 %."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return noise_multiplier(self.epsilon, self.delta, sampling_rate, steps, self.accountant)

    def spent(self, history: History) -> float:
        """Epsilon at `delta` of everything in the history, composed."""
        return epsilon(history, self.delta, self.accountant)


@cache
def epsilon(history: History, delta: float, accountant: Literal["prv", "rdp"]) -> float:
    """An upper bound on epsilon by Opacus: PRV (Gopi et al. 2021) or RDP (Mironov et al. 2019)."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    if not sum(steps for _, _, steps in history):
        return 0.0
    counter = {"prv": PRVAccountant, "rdp": RDPAccountant}[accountant]()
    counter.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus says which RDP order was best, and numpy notes underflows
        return float(counter.get_epsilon(delta))


@cache
def noise_multiplier(
    budget: float, delta: float, sampling_rate: float, steps: int, accountant: Literal["prv", "rdp"]
) -> float:
    """The smallest noise multiplier, within 0.2 %, whose composed epsilon stays within the budget."""
    from scipy.optimize import brentq

    def excess(log_sigma: float) -> float:
        return epsilon(((math.exp(log_sigma), sampling_rate, steps),), delta, accountant) - budget

    # The central limit theorem of Gaussian DP (Dong et al. 2019) under-reports, but starts the search well.
    mu = math.sqrt(2 * math.log(1.25 / delta) + 2 * budget) - math.sqrt(2 * math.log(1.25 / delta))
    least = math.log(0.2)  # the accountants are not made for less
    start = -0.5 * math.log(math.log1p((mu / sampling_rate) ** 2 / steps))
    low = high = max(start, least)
    while excess(low) <= 0:
        if low == least:
            return math.exp(least)
        low = max(low - 0.3, least)
    high = max(high, low + 0.15)
    while excess(high) > 0:
        low, high = high, high + 0.15
        if high > math.log(1e4):
            raise ConfigError(
                f"privacy.epsilon={budget} cannot be reached in {steps} steps at sampling rate "
                f"{sampling_rate}: set a larger epsilon or fewer rounds"
            )
    sigma = math.exp(brentq(excess, low, high, xtol=5e-4, rtol=1e-6))
    while epsilon(((sigma, sampling_rate, steps),), delta, accountant) > budget:
        sigma *= 1.0005
    return float(sigma)
