"""Canaries for client-level privacy: clients whose updates point along one weight each."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedapp.audit.one_run import SIZE, Claim
from fedapp.codec import State
from fedapp.exact_sum import ExactSum
from fedapp.job import Job
from fedapp.privacy.central import CLIP, CentralGaussian
from fedapp.privacy.distributed import DistributedGaussian, Terms
from fedapp.privacy.local import LocalGaussian
from fedapp.privacy.mechanism import Numbers
from fedapp.privacy.secret import CLIENT, SERVER, source
from fedapp.public_rng import Use


@dataclass(frozen=True)
class Central:
    """All rounds of a job whose every client is a canary, by both ends of its mechanism and its draws.

    An update is `SIZE` times as long as the clip norm. With sampling=poisson a canary that is out is no
    client; with sampling=fixed its update is the opposite. Released are the means of all rounds, to an
    untrusted network of those that each client is seen to take part in. Trainer, codec and strategy have no
    part: what they do is before the clip or after the noise.
    """

    job: Job
    privacy: CentralGaussian

    def claim(self) -> Claim:
        """Epsilon of all rounds, about one client."""
        plan = self.privacy.plan
        assert plan is not None
        spent = self.job.spent(self.job.rounds, plan.most)
        assert spent is not None
        rate = 1.0 if self.privacy.seen else plan.rate
        out = 0.0 if plan.sampling == "poisson" else -1.0
        return Claim(spent.epsilon, self.privacy.delta, self.privacy.noise, rate, plan.most, out)

    def __call__(self, included: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A `Release`: row t has the t-th mean of those to whom a client may have added."""
        privacy, m = self.privacy, len(included)
        kept: Numbers = {}
        assert privacy.plan is not None
        signs, times = np.where(included, 1.0, self.claim().out), np.zeros(m, np.int64)
        released = np.zeros((privacy.plan.most, m))
        for number in range(1, self.job.rounds + 1):
            total, sides, terms = ExactSum(m), Counter[str](), privacy.terms(kept)
            drawn = self.job.cohorts.draw(number, m)
            for j in drawn:
                if signs[j]:
                    secret = source(privacy.test_seed, CLIENT, number, j)
                    update = _along(j, m, signs[j] * SIZE * terms[CLIP])
                    sent, side, _ = privacy.on_client(update, terms, {}, secret)
                    sent, side = privacy.on_reply(sent, side, terms)
                    total.add(sent, 1)
                    sides.update(side)
            secret = source(privacy.test_seed, SERVER, number)
            mean, kept = privacy.on_server(total.total(), sides, total.weight, kept, secret)
            who = np.array(drawn) if privacy.seen else np.arange(m)
            released[times[who], who] = (mean * privacy.plan.cohort / terms[CLIP])[who]
            times[who] += 1
        return released


@dataclass(frozen=True)
class Local:
    """All rounds of a job whose every client is a canary, each by its own end of the mechanism.

    An update is `SIZE` times as long as the clip norm, and the opposite where the canary is out. Released is
    each client's every reply.
    """

    job: Job
    privacy: LocalGaussian

    def claim(self) -> Claim:
        """Epsilon of the client that takes part most often."""
        plan = self.privacy.plan
        assert plan is not None
        spent = self.job.spent(self.job.rounds, plan.most)
        assert spent is not None
        return Claim(spent.epsilon, self.privacy.delta, self.privacy.noise, 1.0, plan.most, -1.0)

    def __call__(self, included: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A `Release`: row t has each client's reply t; 0 where it was drawn less often than another."""
        privacy, clip = self.privacy, self.privacy.clip
        assert privacy.plan is not None
        signs, released = np.where(included, 1.0, -1.0), np.zeros((privacy.plan.most, len(included)))
        states, times = dict[int, State](), Counter[int]()
        for number in range(1, self.job.rounds + 1):
            for j in self.job.cohorts.draw(number, len(included)):
                secret = source(privacy.test_seed, CLIENT, number, j)
                update = _along(0, 1, signs[j] * SIZE * clip)
                sent, _, states[j] = privacy.on_client(update, {}, states.get(j, {}), secret)
                released[times[j], j] = sent[0] / clip
                times[j] += 1
        return released


@dataclass(frozen=True)
class Distributed:
    """All rounds of a job whose every client is a canary, by its own end of the mechanism and the server's.

    An update is `SIZE` times as long as the clip norm, and the opposite where the canary is out; all are as
    many values as there are clients. Released is the mean of all rounds, from the sum modulo 2^bits that
    secure aggregation would show. As many have dropped out, or told their noise, as are tolerated: those that
    are left are the canaries, and carry the least noise that is claimed.
    """

    job: Job
    privacy: DistributedGaussian

    @cached_property
    def terms(self) -> Terms:
        """Of a cohort of all clients."""
        return self.privacy.terms(self.job.clients, self.job.clients, self.job.rounds)

    @property
    def canaries(self) -> int:
        return self.terms.honest

    def claim(self) -> Claim:
        """Epsilon of all rounds, about one client."""
        spent, delta = self.terms.epsilon(self.job.rounds, self.privacy.delta), self.privacy.delta
        return Claim(spent, delta, self.terms.multiplier, 1.0, self.job.rounds, -1.0)

    def __call__(self, included: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A `Release`."""
        t, released = self.terms, []
        signs = np.where(included, 1.0, -1.0)
        for number in range(1, self.job.rounds + 1):
            total = np.zeros(t.kept, np.int64)
            for j, sign in enumerate(signs):
                secret = source(self.privacy.test_seed, CLIENT, number, j)
                update = _along(j, t.size, sign * SIZE * self.privacy.clip)
                total += t.encode(update, self.job.public_rng(number, 0, Use.SUM), secret)
            mean = t.decode(total % t.modulus, len(signs), self.job.public_rng(number, 0, Use.SUM))
            released.append(mean[: len(signs)].astype(np.float64) * t.cohort * t.kept / t.size / t.clip)
        return np.stack(released)


def _along(coordinate: int, size: int, length: float) -> NDArray[np.float32]:
    update = np.zeros(size, np.float32)
    update[coordinate] = length
    return update
