"""What is released of private data: noised sums, and what their accounting needs to know of them.

The caller gives noise over the clip norm C; sensitivities are known here alone. One unit that comes or goes
(add_remove) moves a sum by C; one that is replaced (replace) moves it by 2C.
"""

from dataclasses import dataclass
from typing import Literal

from fedapp import check
from fedapp.errors import ConfigError

Sampling = Literal["none", "poisson", "fixed"]
Adjacency = Literal["add_remove", "replace"]

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *map(float, range(11, 65)),
    *(72.0, 80.0, 96.0, 112.0, 128.0, 192.0, 256.0, 512.0, 1024.0),
)
"""Orders of Renyi divergence at which curves are kept; ledgers on disk compose at them, so they stay."""

LEAST_NOISE, MOST_NOISE = 0.01, 1e7


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise on a sum of clipped vectors, released `count` times.

    `noise` is the noise's standard deviation over the clip norm C (not over the sensitivity). `sampling` says
    who is in a sum: `none` everyone, or the adversary knows who; `poisson` each unit independently with
    probability `rate`; `fixed` a uniform subset of a set size, drawn without replacement, `rate` its share.
    Raises ConfigError on values out of range and on `fixed` with `add_remove`.
    """

    noise: float
    sampling: Sampling
    rate: float
    count: int
    adjacency: Adjacency

    def __post_init__(self) -> None:
        check.real("privacy.noise_multiplier", self.noise, low=LEAST_NOISE, high=MOST_NOISE)
        check.choice("privacy.sampling", self.sampling, ("none", "poisson", "fixed"))
        check.choice("privacy.adjacency", self.adjacency, ("add_remove", "replace"))
        check.real("the sampling rate", self.rate, above=0.0, high=1.0)
        check.whole("the count of releases", self.count, 0)
        if self.sampling == "none" and self.rate != 1:
            raise ConfigError(
                f"the sampling rate must be 1 without sampling, got {self.rate}: set the rate to 1"
            )
        if self.sampling == "fixed" and self.adjacency == "add_remove":
            # A cohort of a fixed size has no neighbour with one unit fewer: another one takes the place.
            raise ConfigError(
                "privacy.sampling=fixed has no add_remove guarantee: set privacy.adjacency=replace, "
                "or privacy.sampling=poisson"
            )

    @property
    def multiplier(self) -> float:
        """Noise over the sensitivity."""
        return self.noise if self.adjacency == "add_remove" else self.noise / 2


@dataclass(frozen=True)
class SharedGaussian:
    """Shares of discrete Gaussian noise on a sum of vectors of whole numbers, released `count` times.

    `noise` is the standard deviation of all shares together over the bound on a vector's norm. A vector has
    so many `values`; so many `shares` of the noise are unknown, each of that `variance`. One vector is
    replaced, and nobody is sampled. Raises ConfigError on values out of range.
    """

    noise: float
    values: int
    shares: int
    variance: float
    count: int
    adjacency: Literal["replace"] = "replace"

    def __post_init__(self) -> None:
        check.real("the noise", self.noise, low=LEAST_NOISE, high=MOST_NOISE)
        check.whole("the size of a vector", self.values, 1)
        check.whole("the count of shares", self.shares, 1)
        check.real("the variance of a share", self.variance, above=0.0)
        check.whole("the count of releases", self.count, 0)
        check.choice("privacy.adjacency", self.adjacency, ("replace",))


@dataclass(frozen=True)
class Curve:
    """Any other mechanism, by the Renyi divergence of one release at each of ORDERS, released `count` times.

    The divergence is under the adjacency of the releases it is composed with; infinity where none is known.
    So ledgers hold what distributed_gaussian released before there was SharedGaussian.
    """

    mechanism: str
    rdp: tuple[float, ...]
    count: int

    def __post_init__(self) -> None:
        check.whole("the count of releases", self.count, 0)
        if len(self.rdp) != len(ORDERS) or not all(value >= 0 for value in self.rdp):
            raise ConfigError(
                f"the curve of {self.mechanism} must hold {len(ORDERS)} values of at least 0, one for each "
                f"order, got {len(self.rdp)} values from {min(self.rdp, default=0)}: compute it at ORDERS"
            )


Release = Gaussian | SharedGaussian | Curve


@dataclass(frozen=True)
class Spent:
    """An upper bound on epsilon, and by whose computation."""

    epsilon: float
    accountant: str
