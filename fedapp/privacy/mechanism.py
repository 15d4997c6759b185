"""Client-level differential privacy: what a mechanism is, and what the mechanisms share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import State
from fedapp.errors import ConfigError
from fedapp.privacy.release import Release, Sampling
from fedapp.privacy.secret import Secret

Numbers = Mapping[str, float]
"""A few named numbers that cross the wire, or that the server keeps from round to round."""


@dataclass(frozen=True)
class Plan:
    """What the accounting needs of a run: public numbers, fixed before it starts.

    sampling: how cohorts are drawn. cohort, clients: expected size, and of how many. rounds: all of the run;
    most: those that one client takes part in at most.
    """

    sampling: Sampling
    cohort: int
    clients: int
    rounds: int
    most: int

    @property
    def rate(self) -> float:
        """The expected share of clients in a round."""
        return self.cohort / self.clients


class Mechanism(Protocol):
    """Client-level differential privacy, with its two ends. Frozen: what lasts goes in and comes out.

    `terms` is what clients are told in a round, beside the weights. `on_client` makes of an update, float32
    (size,), what may leave the client, a few numbers beside it, and the state that it keeps; it raises
    ConfigError where that would pass the budget. `packet_bytes` is the one size of all packets, None where
    sizes tell nothing. `on_reply` bounds what one client can add, whatever it sent; raises DecodeError.
    `on_server` makes the mean of their exact sum, float64 (size,). `releases` says what a run has released,
    for the accountants.
    """

    @property
    def unit(self) -> Literal["client"]: ...
    @property
    def test_seed(self) -> int | None: ...
    @property
    def packet_bytes(self) -> int | None: ...
    def terms(self, state: Numbers) -> Numbers: ...
    def on_client(
        self, update: NDArray[np.float32], terms: Numbers, state: State, secret: Secret
    ) -> tuple[NDArray[np.float32], Numbers, State]: ...
    def on_reply(
        self, update: NDArray[np.float32], side: Numbers, terms: Numbers
    ) -> tuple[NDArray[np.float32], Numbers]: ...
    def on_server(
        self, total: NDArray[np.float64], side: Numbers, replies: int, state: Numbers, secret: Secret
    ) -> tuple[NDArray[np.float64], Numbers]: ...
    def releases(self, rounds: int, participations: int) -> tuple[Release, ...]: ...


def clipped(x: NDArray[np.float32], norm: float) -> NDArray[np.float32]:
    """x, scaled to have at most this Euclidean norm, also after rounding to float32; x itself where it has.

    A vector that is not finite becomes zero: how training failed must not show.
    """
    found = length(x)
    if found <= norm:
        return x
    if not np.isfinite(found):
        return np.zeros_like(x)
    wide, factor = x.astype(np.float64), norm / found  # float32 times a tiny factor may round up for ever
    while length(scaled := (wide * factor).astype(np.float32)) > norm:
        factor *= 1 - 2.0**-24
    return scaled


def length(x: NDArray[np.float32]) -> float:
    """The Euclidean norm, in float64."""
    wide = x.astype(np.float64)
    return float(np.sqrt(wide @ wide))


def require_budget(
    epsilon: float | None, delta: float, noise_multiplier: float | None, test_seed: int | None
) -> None:
    """Refuse a privacy budget that is none: raises ConfigError with the value, the bound and the repair."""
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError(
            f"set exactly one of privacy.epsilon and privacy.noise_multiplier (the other null), "
            f"got {epsilon!r} and {noise_multiplier!r}"
        )
    if epsilon is not None:
        check.real("privacy.epsilon", epsilon, low=0.01, high=1000.0)
    if noise_multiplier is not None:
        check.real("privacy.noise_multiplier", noise_multiplier, low=0.01, high=1e4)
    check.real("privacy.delta", delta, low=1e-15, below=0.1)
    if test_seed is not None:
        check.whole("privacy.test_seed", test_seed, 0, 2**63 - 1)
