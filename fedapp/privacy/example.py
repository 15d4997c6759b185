"""Example-level differential privacy: how much noise a budget needs, and how much of it is spent."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedapp.privacy.accounting import noise_for, spent_by
from fedapp.privacy.mechanism import require_budget
from fedapp.privacy.release import Gaussian

History = tuple[tuple[float, float, int], ...]
"""Composed releases of one client's data: (noise multiplier, sampling rate, steps) in order."""


@dataclass(frozen=True)
class ExamplePrivacy:
    """One training example of one client is protected; DP-SGD in the trainer does the work.

    *Formal guarantees.* Each client's sequence of updates over the whole run is (epsilon, delta)-DP.
    Adjacency: add or remove one example of that client. Released: the client's noised gradient sums, so all
    that follows from them (its updates, their compressed form and size, every model). Sensitivity: the clip
    norm, since each example's gradient is clipped and added to a sum over a Poisson sample; the noise has
    standard deviation noise multiplier times clip norm; denominators, steps and sampling rate are public
    constants. Sampling assumed, and done: every example joins each step independently with probability q,
    drawn on the client by the operating system's entropy and seen by nobody else, so the amplification holds
    against the server, observers of the models and other clients alike. Clients hold disjoint data, so the
    loss is that of one client (the largest), not their sum: of the one that takes part most often. Cohorts
    are drawn in public and look at no data, so they amplify nothing, and say beforehand how often that is:
    the noise is set for so many rounds, and a client that is asked more often declines. Asynchronous rounds
    draw whoever is free, so there it is set for all rounds. Not covered: a server that repeats rounds to a
    client that has forgotten them (a stock SuperNode that was restarted), unless a ledger counts them;
    whether a client fails, as one example that cannot be read makes it; the choice of hyper-parameters on
    private data, the floating-point Gaussian noise (exact DP needs discrete noise; the generator is a
    Mersenne Twister, on CUDA Philox, seeded by the operating system, not a cryptographic one), timing, and
    statistics that a task takes from the data before training.

    `epsilon` is the budget of the planned run and sets the noise; a `noise_multiplier` given instead sets
    the noise, and epsilon is what follows: then nobody declines. `test_seed` fixes noise and sampling: then
    nothing is private.
    """

    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    test_seed: int | None = None
    unit: Literal["example"] = "example"
    against: ClassVar[str] = "the server too"

    def __post_init__(self) -> None:
        require_budget(self.epsilon, self.delta, self.noise_multiplier, self.test_seed)

    def sigma(self, sampling_rate: float, steps: int) -> float:
        """The noise multiplier for so many steps that are planned of a client; the smallest within 0.2 %."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return noise_for(self.epsilon, self.delta, "poisson", sampling_rate, steps, "add_remove")

    def spent(self, history: History) -> float:
        """Epsilon at `delta` of everything in the history, composed."""
        return spent_by(releases(history), self.delta).epsilon


def releases(history: History) -> tuple[Gaussian, ...]:
    """What the accountants are told of a history."""
    return tuple(Gaussian(noise, "poisson", rate, steps, "add_remove") for noise, rate, steps in history)
