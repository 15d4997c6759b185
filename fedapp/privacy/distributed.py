"""Distributed differential privacy: each client adds a share of integer noise, the server sees only sums."""

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
from fedapp.privacy.accounting import noise_for, spent_by
from fedapp.privacy.discrete import discrete_gaussian, sampled_variance
from fedapp.privacy.integer_sum import honest_of, lifted, reach
from fedapp.privacy.mechanism import require_budget
from fedapp.privacy.release import SharedGaussian
from fedapp.privacy.secret import Secret

MOST_BITS = 24
_RAISED, _DOUBLED = 1.05, 2.0  # what rounding may do to the noise: where bits are ours to choose; where given
_LEAST_SHARE = 0.25  # Kairouz et al. 2021 bound what sums of discrete Gaussians lack from here on


@dataclass(frozen=True)
class DistributedGaussian:
    """One client is protected from the server too, which learns no more than a noised sum.

    A client keeps the values at public random places, clips, rotates and rounds them to whole steps, adds its
    share of discrete Gaussian noise, and sends the residues modulo 2^bits. Secure aggregation adds them.

    *Formal guarantees.* The sequence of sums over the run is (epsilon, delta)-DP. Adjacency: one client's
    updates are replaced by any others, in a cohort of fixed size. Released: each round's sum modulo 2^bits,
    so all that follows from it (the mean, every model). Sensitivity: twice the norm bound after rounding,
    which each client verifies on its integers, so no floating-point error enters it; the noise is
    `noise_multiplier` times that bound. Steps, modulus, places, rotation and divisor are public, and none
    depends on an update. Sampling assumed: none; the server may know who takes part. Against: a server that
    follows the protocol and sees only the sum, together with clients that tell it their noise; all who leave
    and all who collude are at most the `tolerated` share of the cohort, and the other shares alone carry the
    stated noise. With a `roster` the server need not follow the protocol: it learns nothing else from clients
    whose nodes have one, whatever it sends (see `fedapp.secagg`), and of each round that was planned one sum,
    as long as they remember which they answered; what a ledger bounds is bounded beyond that. What sums of
    discrete Gaussians lack of one is accounted. Not covered: the secure aggregation itself (whoever sees
    single replies sees one share of noise, which is little); without a roster, a server that adds replies of
    fewer clients or invents clients; with it, a cohort that the server picked for more colluders than
    tolerated; clients that omit their noise beyond the tolerated share; how long rounding and drawing noise
    take; tails beyond 20 deviations, cut at a chance below 2^-250 a draw; the choice of hyper-parameters on
    private data.

    `epsilon` is the budget of the planned run and sets the noise; a `noise_multiplier` given instead sets
    the noise of the sum over the clip norm. `clip` bounds a whole update; of a share `keep` of its values,
    sqrt(keep) of that. `bits` for each kept value: null takes the fewest at which rounding raises the noise
    by at most 5 %. `test_seed` fixes the noise: then nothing is private.
    Source: Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning
    with secure aggregation", Algorithms 1 and 2; the noise is a multiple of the bound after rounding here.
    """

    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    clip: float = 1.0
    keep: float = 1.0
    bits: int | None = None
    tolerated: float = 0.1
    roster: str | None = None
    test_seed: int | None = None
    unit: Literal["client"] = "client"
    against: ClassVar[str] = "a server that follows the protocol"

    def __post_init__(self) -> None:
        require_budget(self.epsilon, self.delta, self.noise_multiplier, self.test_seed)
        check.real("privacy.clip", self.clip, low=1e-6, high=1e6)
        check.real("privacy.keep", self.keep, above=0.0, high=1.0)
        check.real("privacy.tolerated", self.tolerated, low=0.0, below=1.0)
        if self.roster is not None:
            check.text("privacy.roster", self.roster)
        if self.bits is not None:
            check.whole("privacy.bits", self.bits, 1, MOST_BITS)

    def terms(self, size: int, cohort: int, rounds: int) -> "Terms":
        """What all parties agree on for updates of `size` values from `cohort` clients in each of `rounds`.

        Raises ConfigError where the bits do not hold the noise.
        """
        if self.noise_multiplier is not None:
            return self._at(self.noise_multiplier, size, cohort)
        assert self.epsilon is not None
        noise = noise_for(self.epsilon, self.delta, "none", 1.0, rounds, "replace")  # the Gaussian's: less
        while (over := self._at(noise, size, cohort).epsilon(rounds, self.delta) / self.epsilon) > 1:
            noise *= max(1.001, over**0.5)  # epsilon falls no faster than the noise's square rises
        return self._at(noise, size, cohort)

    def _at(self, noise: float, size: int, cohort: int) -> "Terms":
        check.whole("the size of an update", size, 1)
        check.whole("cohort", cohort, 1)
        kept = max(1, round(self.keep * size))
        clip = self.clip * math.sqrt(kept / size)
        honest = honest_of(cohort, self.tolerated)
        tried, raised = ((self.bits,), _DOUBLED) if self.bits else (range(1, MOST_BITS + 1), _RAISED)
        for bits in tried:
            steps = _steps(noise, bits, kept, cohort, honest)
            if steps > 0 and _rounded(steps, kept) <= (raised * steps) ** 2:
                most = math.floor(_rounded(steps, kept))
                share = sampled_variance(max(_LEAST_SHARE, noise**2 * most / honest))
                return Terms(size, kept, cohort, honest, bits, clip, clip / steps, most, share)
        raise ConfigError(
            f"privacy.bits={self.bits or MOST_BITS} makes noise of {noise:g} clip norms more than {raised} "
            f"times as large on {kept} values of {cohort} clients: set more bits, or a smaller privacy.keep"
        )


@dataclass(frozen=True)
class Terms:
    """The public terms of a run: what a client sends, and how the server reads the sum.

    `size` values in an update, of which `kept` are sent as residues modulo 2^bits; `cohort` clients are
    asked, and at least `honest` of them add noise that nobody knows; `clip` bounds the norm of what is kept,
    `step` is the grid's in units of the update, `most` bounds the squared norm after rounding, in steps
    squared, and so is `share`, the variance of one client's noise.
    """

    size: int
    kept: int
    cohort: int
    honest: int
    bits: int
    clip: float
    step: float
    most: int
    share: Fraction

    @property
    def modulus(self) -> int:
        return 1 << self.bits

    @property
    def noise(self) -> float:
        """Standard deviation of the least noise on a kept value of the sum, in units of the update."""
        return self.step * math.sqrt(self.honest * self.share)

    @property
    def multiplier(self) -> float:
        """That noise over the clip norm."""
        return self.noise / self.clip

    def release(self, rounds: int) -> SharedGaussian:
        """What so many rounds cost, for the accountant; more shares than `honest` are post-processing."""
        noise = math.sqrt(self.honest * self.share / self.most)
        return SharedGaussian(noise, self.kept, self.honest, float(self.share), rounds)

    def epsilon(self, rounds: int, delta: float) -> float:
        return spent_by((self.release(rounds),), delta).epsilon

    def encode(self, update: NDArray[Any], rng: np.random.Generator, secret: Secret) -> NDArray[np.uint32]:
        """A client's residues: float (size,) to uint32 (kept,) below 2^bits; `rng` is public, the round's.

        An update that is not finite counts as zero, for an error would tell. Values are rounded up or down at
        random without bias, and all again while their norm exceeds the bound: at least 39 % of tries succeed
        (Kairouz et al. 2021, Proposition 22), almost all where many values are kept.
        """
        if update.shape != (self.size,):
            raise ValueError(f"the update has shape {update.shape}, the terms are for ({self.size},)")
        places, turn = self._public(rng)
        x = update[places].astype(np.float64)
        if not np.isfinite(update).all():
            x[:] = 0
        x *= self.clip / max(math.sqrt(x @ x), self.clip) / self.step
        x = rotated(x, turn)
        whole = _round(x, secret)
        while whole @ whole > self.most:
            whole = _round(x, secret)
        whole += discrete_gaussian(self.kept, self.share, secret)
        return (whole & self.modulus - 1).astype(np.uint32)

    def decode(
        self, total: NDArray[np.integer[Any]], replies: int, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """The mean update, float32 (size,), from the sum of so many replies, integers (kept,) modulo 2^bits.

        Unbiased for the mean of the clipped updates over the public cohort, a lost reply counting as zero:
        what is kept is scaled by size / kept. Raises FedappError where fewer replied than carry the noise,
        or more than were asked; DecodeError on another shape or type.
        """
        places, turn = self._public(rng)
        whole = lifted(total, self.kept, self.bits, replies, self.honest, self.cohort)
        x = np.float64(self.step * self.size / self.kept / self.cohort) * whole
        mean = np.zeros(self.size, np.float32)
        mean[places] = rotated_back(x, turn)
        return mean

    def _public(self, rng: np.random.Generator) -> tuple[NDArray[np.bool_], bytes]:
        """The round's places and the seed of its rotation."""
        places, turn = seed.draw(rng), seed.draw(rng)
        return seed.places(places, self.size, self.kept), turn


# --- how fine the grid is ----------------------------------------------------------------------------------


def _steps(noise: float, bits: int, kept: int, cohort: int, honest: int) -> float:
    """How many steps the clip norm may have for the sum to fit; 0 where not even none fits."""
    low, high = 0.0, 2.0**bits
    for _ in range(50):
        middle = (low + high) / 2
        fits = _reach(middle, noise, kept, cohort, honest) < 2 ** (bits - 1)
        low, high = (middle, high) if fits else (low, middle)
    return low


def _reach(steps: float, noise: float, kept: int, cohort: int, honest: int) -> float:
    """What no coordinate of the sum exceeds, but with chance `WRAPS`, whatever the updates.

    They may all be the same, and all shares may arrive; rounding moves each by less than one step.
    """
    share = max(_LEAST_SHARE, noise**2 * _rounded(steps, kept) / honest)
    share = 1.002 * share + 1 / 64  # or less: see `sampled_variance`
    return reach(cohort * steps, cohort * share, kept) + cohort


def _rounded(steps: float, kept: int) -> float:
    """The bound on the squared norm after rounding a norm of so many steps.

    Source: Kairouz et al. 2021, Proposition 22, with beta = exp(-1/2).
    """
    root = math.sqrt(kept)
    return min((steps + root) ** 2, steps**2 + kept / 4 + steps + root / 2)


# --- rounding ----------------------------------------------------------------------------------------------


def _round(x: NDArray[np.float64], secret: Secret) -> NDArray[np.int64]:
    """Each value to a neighbouring integer, its mean kept within 2^-32."""
    down = np.floor(x)
    return down.astype(np.int64) + (np.frombuffer(secret(4 * len(x)), "<u4") < (x - down) * 2.0**32)
