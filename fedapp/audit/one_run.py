"""The audit of any Gaussian mechanism from one run: draw canaries, score them, guess, count, bound."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.audit.bound import lower_bound

SIZE = 10.0  # norm of a canary over the clip norm: a clip that is missing shows tenfold
LEAST = 1000  # canaries that an audit takes: the bound of fewer is low whatever is broken
Release = Callable[[NDArray[np.bool_]], NDArray[Any]]
"""One run with the canaries that a mask (m,) includes: what came out along each of them, (steps, m).

Unit: the clip norm, which is what a canary that is in adds where it is drawn.
"""

_REPEATS = 20  # simulated audits, to choose the guesses and again to say what they show
_GRID = 10  # counts of guesses that are tried on either side


@dataclass(frozen=True)
class Claim:
    """What is claimed, and of which mechanism: (epsilon, delta) of so many steps of a sampled Gaussian.

    noise_multiplier: standard deviation of a step's noise over the clip norm. sampling_rate: of each step's
    sample; 1 where everybody joins. out: what a canary that is out adds where it is drawn, over the clip
    norm: 0 where the claim is about adding and removing, -1 where it is about replacing.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    out: float = 0.0

    def scores(self, released: NDArray[Any]) -> NDArray[np.float64]:
        """(m,) from (steps, m): the log-likelihood ratio of in against out, the best score there is."""
        x = released.astype(np.float64)
        ratio: NDArray[np.float64] = (self._likelihood(x, 1.0) - self._likelihood(x, self.out)).sum(0)
        return ratio

    def simulate(self, included: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
        """What the mechanism releases if it is what it says and nothing else gets in the way."""
        shape = self.steps, len(included)
        drawn = rng.random(shape) < self.sampling_rate
        return drawn * np.where(included, 1.0, self.out) + self.noise_multiplier * rng.standard_normal(shape)

    def _likelihood(self, x: NDArray[np.float64], added: float) -> NDArray[np.float64]:
        """Log-likelihood of x where a canary adds so much, less that where none does."""
        q = self.sampling_rate
        drawn = np.log(q) + added * (2 * x - added) / (2 * self.noise_multiplier**2)
        log: NDArray[np.float64] = np.logaddexp(np.log1p(-q) if q < 1 else -np.inf, drawn)
        return log


@dataclass(frozen=True)
class Guesses:
    """How many of the highest scores are guessed in, and of the lowest out; on the rest, no guess."""

    into: int
    out: int

    @property
    def total(self) -> int:
        return self.into + self.out

    def right(self, scores: NDArray[np.float64], included: NDArray[np.bool_]) -> int:
        """How many guesses are right."""
        ordered = included[np.argsort(scores, kind="stable")]
        return int(ordered[len(ordered) - self.into :].sum()) + int((~ordered[: self.out]).sum())


@dataclass(frozen=True)
class Finding:
    """What an audit found. Epsilons at the claim's delta; the bound holds with the given confidence."""

    claim: Claim
    canaries: int
    confidence: float
    guesses: Guesses
    right: int
    bound: float
    expected: tuple[float, float, float]  # of ideal audits: the 5 % quantile, the median, the 95 % quantile
    most: float  # the bound if all guesses had been right

    @property
    def passed(self) -> bool:
        """Whether the claim survives. It always does where not even `most` exceeds it."""
        return self.bound <= self.claim.epsilon


def audit(
    release: Release, claim: Claim, canaries: int, confidence: float, rng: np.random.Generator
) -> Finding:
    """Draw a fair coin a canary, run once, guess the coins from what was released, and bound epsilon.

    *Formal guarantees.* If the mechanism keeps the claim about one canary being in or out, the bound exceeds
    it with probability 1 - confidence at most, over the mechanism's own randomness and the coins, which `rng`
    must draw independently of it. How many guesses to make is chosen by simulating the claim, before anything
    is released, so nothing is chosen by its result and nothing needs correcting. Passing proves nothing.
    Source: Steinke, Nasr and Jagielski 2023, Algorithm 1 and Theorem 5.2.
    """
    guesses = choose(claim, canaries, confidence)
    included = rng.random(canaries) < 0.5
    right = guesses.right(claim.scores(release(included)), included)
    bounds = [_bound(claim, canaries, guesses.total, v, confidence) for v in (right, guesses.total)]
    return Finding(
        claim, canaries, confidence, guesses, right, bounds[0],
        expected(claim, canaries, guesses, confidence), bounds[1],
    )  # fmt: skip


@cache
def choose(claim: Claim, canaries: int, confidence: float) -> Guesses:
    """The guesses with the highest bound for the mean number of right ones, by simulation of the claim.

    Only such that could refute the claim if all of them were right, where there are any.
    """
    rng = np.random.default_rng(0)
    into, out = np.zeros(canaries + 1), np.zeros(canaries + 1)
    for _ in range(_REPEATS):
        included = rng.random(canaries) < 0.5
        ordered = included[np.argsort(claim.scores(claim.simulate(included, rng)))]
        into[1:] += np.cumsum(ordered[::-1]) / _REPEATS
        out[1:] += np.cumsum(~ordered) / _REPEATS
    counts = np.unique(np.geomspace(max(1, canaries // 200), canaries // 2, _GRID).astype(int)).tolist()
    pairs = [Guesses(a, b) for a in [0, *counts] for b in [0, *counts] if a + b]

    def shown(guesses: Guesses) -> tuple[bool, float]:
        right = int(into[guesses.into] + out[guesses.out])
        most = _bound(claim, canaries, guesses.total, guesses.total, confidence)
        return most > claim.epsilon, _bound(claim, canaries, guesses.total, right, confidence)

    return max(pairs, key=shown)


@cache
def expected(claim: Claim, canaries: int, guesses: Guesses, confidence: float) -> tuple[float, float, float]:
    """Quantiles 5, 50 and 95 % of the bound, over ideal audits of the claimed mechanism, by simulation."""
    rng, bounds = np.random.default_rng(1), []
    for _ in range(_REPEATS):
        included = rng.random(canaries) < 0.5
        right = guesses.right(claim.scores(claim.simulate(included, rng)), included)
        bounds.append(_bound(claim, canaries, guesses.total, right, confidence))
    low, median, high = np.quantile(bounds, (0.05, 0.5, 0.95)).tolist()
    return low, median, high


@cache
def _bound(claim: Claim, canaries: int, guesses: int, right: int, confidence: float) -> float:
    return lower_bound(canaries, guesses, right, claim.delta, confidence)
