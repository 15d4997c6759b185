"""Central differential privacy: a trusted server noises the sum of clipped updates."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import State
from fedapp.errors import ConfigError, DecodeError
from fedapp.privacy.accounting import noise_for
from fedapp.privacy.mechanism import Numbers, Plan, clipped, length, require_budget
from fedapp.privacy.release import Adjacency, Gaussian
from fedapp.privacy.secret import Secret, normal

CLIP, BIT = "clip-norm", "below-clip"


@dataclass(frozen=True)
class CentralGaussian:
    """Clients clip their updates to a norm of `clip`; the server clips again, and noises the sum.

    *Formal guarantees.* The models of all rounds together are (epsilon, delta)-DP. Adjacency and sampling:
    with sampling=poisson each client joins a round independently with the rate cohort / clients, by the
    operating system's randomness on the server, and one client is added or removed; with sampling=fixed a
    cohort of that size is drawn without replacement and one client is replaced. Sensitivity of the sum: the
    clip norm with poisson, twice that with fixed. Released: the noised sum of each round, over the public
    expected cohort size, so every model that follows, but not who was drawn, how many replied, or what came:
    the log, rounds.jsonl and summary.json name such counts and belong to the server. The noise has standard
    deviation noise multiplier times clip norm. Lost and refused replies count as zero, and every client
    weighs the same. Against: observers of the models; with sampling=poisson other clients among them, all
    together, since their draws tell nothing of this one's. With sampling=fixed K clients who pool their draws
    know this one's chance in each round, which is at most cohort / (clients - K), so the more of them, the
    larger epsilon is. The *server is trusted*: it sees every update. Not covered: timing, the choice of
    hyper-parameters on private data, and floating-point noise, which is not exactly Gaussian.

    With network=trusted nobody watches it, neither who sends nor what; `packet_bytes` hides lengths all the
    same: all packets are padded to it, and an update that does not fit counts as zero. With network=untrusted
    the guarantee holds against who watches the network, too, and sees the models, but reads no contents: that
    takes transport encryption, for an update is noised at the server only. Who takes part is seen then.
    So cohorts have a set size, the seed draws them, nothing is amplified, and the noise is set as that of
    `LocalGaussian`: one client's data are replaced by any other (twice the clip norm), in the most rounds
    that the public draws give one client. All packets have one size: the codec must be one whose step is
    public before the rounds and whose codes have one length, so every update fits, and what lies beyond the
    codes is cut to them. Not covered either way: that a client fails, declines or leaves, which a reply shows
    by its size or by not coming; and when it comes.

    With `quantile` the clip norm follows that quantile of the updates' norms: each client sends, beside the
    update, whether its norm is below the clip, as +1/2 or -1/2, and the server adds noise of standard
    deviation `bit_noise` to their sum, half of which one client can move. The update's own noise grows such
    that both together cost what the noise multiplier says. The clip norm is public then. Source: Andrew et
    al. 2021, "Differentially private learning with adaptive clipping", Theorem 1 and Algorithm 1; without a
    quantile: McMahan et al. 2018, "Learning differentially private recurrent language models".
    """

    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    clip: float = 1.0
    quantile: float | None = None
    clip_rate: float = 0.2
    bit_noise: float | None = None
    network: str = "trusted"
    packet_bytes: int | None = None
    test_seed: int | None = None
    plan: Plan | None = None
    unit: Literal["client"] = "client"

    def __post_init__(self) -> None:
        require_budget(self.epsilon, self.delta, self.noise_multiplier, self.test_seed)
        check.real("privacy.clip", self.clip, above=0.0, high=1e6)
        if self.quantile is not None:
            check.real("privacy.quantile", self.quantile, above=0.0, below=1.0)
        check.real("privacy.clip_rate", self.clip_rate, above=0.0, high=10.0)
        if self.bit_noise is not None:
            check.real("privacy.bit_noise", self.bit_noise, above=0.0, high=1e6)
        check.choice("privacy.network", self.network, ("trusted", "untrusted"))
        if self.packet_bytes is not None:
            check.whole("privacy.packet_bytes", self.packet_bytes, 128, 2**31)

    @cached_property
    def noise(self) -> float:
        """What the accountants count: standard deviation of the noise on the sum over the clip norm.

        Raises ConfigError where the noise on bits leaves nothing of it for updates.
        """
        assert self.plan is not None
        plan, noise = self.plan, self.noise_multiplier
        if noise is None:
            assert self.epsilon is not None
            one = self._release(1.0, max(1, plan.rounds), max(1, plan.most))
            of = one.sampling, one.rate, one.count, one.adjacency
            noise = noise_for(self.epsilon, self.delta, *of)
        if self.quantile is not None and self.bit_noise is not None and 2 * self.bit_noise <= noise:
            raise ConfigError(
                f"privacy.bit_noise={self.bit_noise:g} spends more than noise multiplier {noise:.4g} allows: "
                f"set privacy.bit_noise above {noise / 2:.4g}"
            )
        return noise

    @cached_property
    def _noises(self) -> tuple[float, float]:
        """On the sum of updates, over the clip norm; and on the sum of bits."""
        if self.quantile is None:
            return self.noise, 0.0
        assert self.plan is not None
        bits = max(self.plan.cohort / 20, self.noise) if self.bit_noise is None else self.bit_noise
        return (self.noise**-2 - (2 * bits) ** -2) ** -0.5, bits

    @property
    def seen(self) -> bool:
        """Whether others than the server see who takes part, and how much each sends."""
        return self.network == "untrusted"

    @property
    def against(self) -> str:
        return "observers of the models and of the network" if self.seen else "observers of the models"

    def releases(self, rounds: int, participations: int) -> tuple[Gaussian, ...]:
        return (self._release(self.noise, rounds, participations),)

    def _release(self, noise: float, rounds: int, participations: int) -> Gaussian:
        assert self.plan is not None
        if self.seen:
            return Gaussian(noise, "none", 1.0, participations, "replace")
        adjacency: Adjacency = "add_remove" if self.plan.sampling == "poisson" else "replace"
        return Gaussian(noise, self.plan.sampling, self.plan.rate, rounds, adjacency)

    def terms(self, state: Numbers) -> Numbers:
        return {CLIP: float(state.get(CLIP, self.clip))}

    def on_client(
        self, update: NDArray[np.float32], terms: Numbers, state: State, secret: Secret
    ) -> tuple[NDArray[np.float32], Numbers, State]:
        norm = terms[CLIP]
        side = {} if self.quantile is None else {BIT: 0.5 if length(update) <= norm else -0.5}
        return clipped(update, norm), side, {}

    def on_reply(
        self, update: NDArray[np.float32], side: Numbers, terms: Numbers
    ) -> tuple[NDArray[np.float32], Numbers]:
        """Clipped again: a decoded update may be longer than what was encoded, and a client may lie."""
        if self.quantile is not None and side.get(BIT) not in (-0.5, 0.5):
            raise DecodeError(f"{BIT} is 0.5 or -0.5, this client says {side.get(BIT)!r}")
        return clipped(update, terms[CLIP]), side

    def on_server(
        self, total: NDArray[np.float64], side: Numbers, replies: int, state: Numbers, secret: Secret
    ) -> tuple[NDArray[np.float64], Numbers]:
        """The noised sum over the public cohort size, never over who replied; and the next clip norm."""
        assert self.plan is not None
        (noise, bit_noise), norm = self._noises, self.terms(state)[CLIP]
        mean = (total + noise * norm * normal(len(total), secret)) / self.plan.cohort
        if self.quantile is None:
            return mean, state
        bits = side.get(BIT, 0.0) + bit_noise * float(normal(1, secret)[0])
        below = bits / self.plan.cohort + 0.5
        return mean, {CLIP: norm * math.exp(-self.clip_rate * (below - self.quantile))}
