"""Distributed DP-SGD: a round is one step over everybody's examples, and clients share its noise."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import seed
from fedapp.codec.rotate import rotated, rotated_back
from fedapp.errors import ConfigError
from fedapp.privacy.accounting import noise_for
from fedapp.privacy.discrete import discrete_gaussian, sampled_variance
from fedapp.privacy.integer_sum import WRAPS, honest_of, lifted, reach
from fedapp.privacy.mechanism import require_budget
from fedapp.privacy.release import Gaussian
from fedapp.privacy.secret import Secret

MOST_BITS = 31  # what secure aggregation adds
_FINE = 50  # steps of the grid in the clip norm, over the root of the size: rounding costs 2 % of the noise
_SLACK = 1.001  # what floating-point numbers add to a step of rounding
_ROUNDED = 8  # variance that makes whole numbers of a continuous Gaussian, see `DistributedExample`
_LEAST_SHARE = 16.0  # variance from which sums of discrete Gaussians are as good as one
_CROWDED = 1e-9  # of `WRAPS`: the chance that more examples join a round than its bits are made for


@dataclass(frozen=True)
class DistributedExample:
    """One training example of one client is protected from the server too, at the noise of central DP-SGD.

    A round is one step of DP-SGD over the examples of all clients. A client draws a Poisson batch of its own,
    clips each gradient, adds them up, rotates and rounds the sum to whole steps of a public grid, adds its
    share of discrete Gaussian noise, and sends the residues modulo 2^bits. Secure aggregation adds them. So
    the noise is that of one central step, not one for each client.

    *Formal guarantees.* The sequence of sums over the run is (epsilon, delta)-DP. Adjacency: add or remove
    one example of one client. Released: each round's sum modulo 2^bits, so all that follows from it (every
    model). Sensitivity: the clip norm C and sqrt(size) steps. Whatever else is in the batch, one more
    gradient moves the values to be rounded by a vector of norm C, and a value that moves by d moves the whole
    number nearest to it by |d| + 1 at most. A thousandth of a step more is for floating-point errors: in
    double precision they stay below that, in the norm over all values, for batches up to 10^5 examples. The
    noise is `noise_multiplier` times that sensitivity. Grid, modulus, rotation and divisor are public, and
    none depends on data. Sampling assumed, and done: every example joins each round independently with a
    public probability, drawn from the operating system's bytes and seen by nobody else, so the amplification
    holds against the server, observers of the models and other clients alike. Clients hold disjoint data, so
    the loss is that of one client (who took part most often), not their sum. Against: a server that follows
    the protocol and sees only the sum, together with clients that tell it their batches and noise; all who
    leave and all who collude are at most the `tolerated` share of the cohort, and the other shares alone
    carry the stated noise. With a `roster` the server need not follow it, as in `DistributedGaussian`. Not
    covered: what `DistributedGaussian` does not cover of secure aggregation, clients that omit their noise,
    timing and tails; whether a client fails, as one example that cannot be read makes it; gradients that
    depend on who else is in the batch by more than that thousandth (an activation within rounding of a kink);
    the choice of hyper-parameters on private data; statistics that a task takes from the data before
    training.

    *Accounting.* Within factors of 1 +- 10^-60 in probability, what is released is made from a continuous
    Gaussian of variance sigma^2 - 8 around the sampled sum, without a further look at the data. So the
    accountants of the Poisson-sampled Gaussian apply, at a noise that lacks those 8. Proof. Let x be Gaussian
    around a whole number m with variance a (each value by itself), and y a whole number near x, drawn with
    probability proportional to exp(-(y - x)^2 / 2b). By Poisson summation these weights add up to
    sqrt(2 pi b), within a factor of 1 +- 2.1 exp(-2 pi^2 b), whatever x. So within that factor the
    probability of y is the density there of a Gaussian of variance a + b around m: y is discrete Gaussian,
    within such a factor (Peikert 2010, "An efficient and parallel Gaussian sampler for lattices", Theorem
    3.1). At b = 8 that is 1 +- 10^-67 a value. A sum of shares of variance 16 or more is one discrete
    Gaussian within a factor as small (Kairouz, Liu and Steinke 2021, Proposition 14). An example that joins
    moves m by a vector no longer than the sensitivity; which one depends on the others' draws, in which
    losses are jointly convex.

    `epsilon` is the budget of the planned run and sets the noise; a `noise_multiplier` given instead sets the
    noise. `test_seed` fixes noise and sampling: then nothing is private.
    """

    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    tolerated: float = 0.1
    roster: str | None = None
    test_seed: int | None = None
    unit: Literal["example"] = "example"
    against: ClassVar[str] = "a server that follows the protocol"

    def __post_init__(self) -> None:
        require_budget(self.epsilon, self.delta, self.noise_multiplier, self.test_seed)
        check.real("privacy.tolerated", self.tolerated, low=0.0, below=1.0)
        if self.roster is not None:
            check.text("privacy.roster", self.roster)

    def terms(
        self, size: int, cohort: int, rounds: int, *, clip: float, rate: float, examples: int
    ) -> "StepTerms":
        """What all parties agree on for sums of `size` values from `cohort` clients in each of `rounds`.

        `clip` bounds a gradient, `rate` is the chance of an example to join a round, `examples` what a client
        holds, by public knowledge. Raises ConfigError where no bits hold the sum.
        """
        check.whole("the size of a gradient", size, 1)
        check.whole("cohort", cohort, 1)
        noise = self.noise_multiplier
        if noise is None:
            assert self.epsilon is not None
            noise = noise_for(self.epsilon, self.delta, "poisson", rate, rounds, "add_remove")
        honest, step = honest_of(cohort, self.tolerated), clip / (_FINE * math.sqrt(size))
        least = ((noise * _sensitivity(size)) ** 2 + _ROUNDED) / honest
        share = sampled_variance(max(_LEAST_SHARE, least))
        batch = rate * cohort * examples
        longest, chance = _most(batch) * clip / step, WRAPS - _CROWDED
        bits = 1 + math.ceil(math.log2(reach(longest, cohort * float(share), size, chance) + cohort))
        if bits > MOST_BITS:
            raise ConfigError(
                f"a sum over {batch:.3g} examples of {size} values takes {bits} bits, and there are "
                f"{MOST_BITS}: set a smaller trainer.sampling_rate, or a larger privacy.epsilon"
            )
        return StepTerms(size, cohort, honest, bits, step, share, rate, batch)


@dataclass(frozen=True)
class StepTerms:
    """The public terms of a run: what a client sends, and how the server reads the sum.

    `size` values in a gradient, sent as residues modulo 2^bits; `cohort` clients are asked, and at least
    `honest` of them add noise that nobody knows; `step` is the grid's in units of the gradient, `share` the
    variance of one client's noise in steps squared, `rate` the chance of an example to join, `batch` how many
    do on average, which divides the sum.
    """

    size: int
    cohort: int
    honest: int
    bits: int
    step: float
    share: Fraction
    rate: float
    batch: float

    @property
    def kept(self) -> int:
        """Values that are sent: all."""
        return self.size

    @property
    def modulus(self) -> int:
        return 1 << self.bits

    @property
    def multiplier(self) -> float:
        """The least noise on the sum over its sensitivity: that of the continuous Gaussian behind it."""
        return math.sqrt(self.honest * self.share - _ROUNDED) / _sensitivity(self.size)

    def release(self, rounds: int) -> Gaussian:
        """What so many rounds cost, for the accountant; under `add_remove`."""
        return Gaussian(self.multiplier, "poisson", self.rate, rounds, "add_remove")

    def encode(self, total: NDArray[Any], rng: np.random.Generator, secret: Secret) -> NDArray[np.uint32]:
        """A client's residues: a sum of clipped gradients, float64 (size,), to uint32 (size,) below 2^bits.

        `rng` is public, the round's. Raises ValueError on another shape or type, or what is not finite.
        """
        if total.shape != (self.size,) or total.dtype != np.float64 or not np.isfinite(total).all():
            raise ValueError(f"a sum of clipped gradients is finite float64 ({self.size},)")
        whole = self._rounded(total, seed.draw(rng)) + discrete_gaussian(self.size, self.share, secret)
        return (whole & self.modulus - 1).astype(np.uint32)

    def decode(
        self, total: NDArray[np.integer[Any]], replies: int, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """The step of gradient descent at learning rate 1, float32 (size,): the mean gradient, negative.

        From the sum of so many replies, integers (size,) modulo 2^bits; divided by the public batch, a lost
        reply counting as zero. Raises FedappError and DecodeError as `lifted`.
        """
        whole = lifted(total, self.size, self.bits, replies, self.honest, self.cohort)
        x = np.float64(-self.step / self.batch) * whole
        return rotated_back(x, seed.draw(rng)).astype(np.float32)

    def _rounded(self, total: NDArray[np.float64], turn: bytes) -> NDArray[np.int64]:
        """To the nearest steps; by no secret coin, so that neighbouring batches differ by whole numbers."""
        return np.rint(rotated(total / self.step, turn)).astype(np.int64)


def _most(batch: float) -> int:
    """So many examples join a round at most, but with chance `_CROWDED`, where `batch` do on average.

    Their count is binomial, and above its mean a Poisson count is the likelier to be as large. Source:
    Anderson and Samuels 1967, "Some inequalities among binomial and Poisson probabilities".
    """
    from scipy.stats import poisson  # takes half a second to import

    return int(poisson.isf(_CROWDED, batch))


def _sensitivity(size: int) -> float:
    """In steps: the clip norm, and by how much rounding may move values beside it."""
    return (_FINE + _SLACK) * math.sqrt(size)
