"""Local differential privacy: every client noises its own update, and trusts nobody."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import State
from fedapp.errors import ConfigError
from fedapp.privacy.accounting import noise_for
from fedapp.privacy.mechanism import Numbers, Plan, clipped, require_budget
from fedapp.privacy.release import Gaussian
from fedapp.privacy.secret import Secret, normal


@dataclass(frozen=True)
class LocalGaussian:
    """Each client clips its update to a norm of `clip`, and adds Gaussian noise before anything leaves it.

    *Formal guarantees.* All that one client sends over the run is (epsilon, delta)-DP. Adjacency: the
    client's whole data set is replaced by any other. Released: its noised update in each round that it takes
    part in, so all that follows: the packet and its size, every model. Sensitivity: twice the clip norm,
    since a clipped update may turn into its opposite; the noise has standard deviation noise multiplier times
    clip norm in every coordinate. Sampling assumed: none; the server draws the cohort and knows it, so
    nothing is amplified. T participations are one Gaussian mechanism with the noise divided by sqrt(T) (Dong
    et al. 2019, "Gaussian differential privacy", Corollary 3.3), calibrated by the analytic Gaussian
    mechanism (Balle and Wang 2018, Theorem 8), which is right at any epsilon; T is the most rounds that the
    public draws of the run give one client, and a client that is asked more often declines. Against: the
    server, observers of the models, other clients, all together. Not covered: a server that repeats rounds to
    a client that has forgotten them (a stock SuperNode that was restarted), unless a ledger counts them;
    whether a client takes part or fails, timing, the choice of hyper-parameters on private data, and
    floating-point noise, which is not exactly Gaussian.

    What it costs: the mean of n clients carries noise of noise multiplier * clip / sqrt(n) in *every*
    coordinate, its norm sqrt(parameters) times that. At 10 clients and 26 thousand parameters the update,
    no longer than the clip norm, drowns, and accuracy is chance; scripts/bench_privacy.py shows from which
    cohort on it is not.
    """

    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    clip: float = 1.0
    test_seed: int | None = None
    plan: Plan | None = None
    unit: Literal["client"] = "client"
    packet_bytes: ClassVar[None] = None  # a packet's size follows from what is noised already
    against: ClassVar[str] = "the server too"

    def __post_init__(self) -> None:
        require_budget(self.epsilon, self.delta, self.noise_multiplier, self.test_seed)
        check.real("privacy.clip", self.clip, above=0.0, high=1e6)

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the noise over the clip norm."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        assert self.plan is not None
        return noise_for(self.epsilon, self.delta, "none", 1.0, max(1, self.plan.most), "replace")

    def releases(self, rounds: int, participations: int) -> tuple[Gaussian, ...]:
        return (Gaussian(self.noise, "none", 1.0, participations, "replace"),)

    def terms(self, state: Numbers) -> Numbers:
        return {}

    def on_client(
        self, update: NDArray[np.float32], terms: Numbers, state: State, secret: Secret
    ) -> tuple[NDArray[np.float32], Numbers, State]:
        """Clip and noise; raises ConfigError where the run's budget does not pay for one more time."""
        assert self.plan is not None
        times = 1 + int(state.get("times", np.array(0)))
        if times > self.plan.most:
            raise ConfigError(f"asked {times} times, and the noise is set for {self.plan.most}")
        noise = self.noise * self.clip * normal(len(update), secret)
        return (clipped(update, self.clip) + noise).astype(np.float32), {}, {"times": np.array(times)}

    def on_reply(
        self, update: NDArray[np.float32], side: Numbers, terms: Numbers
    ) -> tuple[NDArray[np.float32], Numbers]:
        return update, {}

    def on_server(
        self, total: NDArray[np.float64], side: Numbers, replies: int, state: Numbers, secret: Secret
    ) -> tuple[NDArray[np.float64], Numbers]:
        """The plain mean: all that came is private already."""
        return total / max(1, replies), state
