"""Everything one run is made of, checked before anything starts."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from logging import WARNING
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.clientapp.typing import Mod
from flwr.supercore import log
from torch import nn

from fedapp import combinations, model_checks
from fedapp.assignment import Deadline, Workloads
from fedapp.ckks import SLOTS, Ckks
from fedapp.codec import Codec
from fedapp.codec.chain import Identity
from fedapp.codec.feedback import AutoFeedback
from fedapp.cohorts import Cohorts
from fedapp.downlink import Plain, receive
from fedapp.facts import speed_of
from fedapp.fedbuff import FedBuff
from fedapp.fold import Fold
from fedapp.privacy.accounting import spent_by
from fedapp.privacy.central import CentralGaussian
from fedapp.privacy.discrete import discrete_gaussian
from fedapp.privacy.distributed import Terms
from fedapp.privacy.distributed_example import StepTerms
from fedapp.privacy.example import ExamplePrivacy, releases
from fedapp.privacy.local import LocalGaussian
from fedapp.privacy.mechanism import Mechanism
from fedapp.privacy.none import NoPrivacy
from fedapp.privacy.release import Release, Sampling, Spent
from fedapp.privacy.secret import COHORT, Secret, source
from fedapp.public_rng import Use, public_rng
from fedapp.scaffold import Control, Controls, Course, Scaffold
from fedapp.secagg.run import SecureRun
from fedapp.secagg.wire import Summed
from fedapp.selection import BySize, Poisson, PowerOfChoice, Uniform
from fedapp.settings import Settings
from fedapp.speeds import Seconds, Stragglers
from fedapp.tasks import Data
from fedapp.tasks.classification import held_out
from fedapp.training import DpSgd, Sgd, has_bfloat16, scheduled
from fedapp.wire import Recall, Wire


@dataclass(frozen=True)
class Job(Settings):
    """One run: the same on the server and on every client, since each composes it from the same YAML."""

    said: str | None = field(init=False, default=None)  # how updates are coded, where that was left open

    def __post_init__(self) -> None:
        super().__post_init__()
        self._decide_sampling()
        combinations.check_whole_cohorts(self)
        combinations.check_selection(self)
        combinations.check_assignment(self)
        combinations.check_privacy(self)
        combinations.check_aggregation(self)
        combinations.check_steering(self)
        combinations.check_bound(self)
        self._tell_what_they_need()
        self._decide_codec()

    def _decide_sampling(self) -> None:
        """`sampling` and `selection` say the same of who is drawn."""
        combinations.check_sampling(self)
        alike = isinstance(self.selection, Uniform)
        poisson = isinstance(self.selection, Poisson) or self.sampling == "poisson"
        poisson |= self.hides_cohorts and alike and self.sampling == "auto"
        object.__setattr__(self, "sampling", "poisson" if poisson else "fixed")
        if poisson:
            object.__setattr__(self, "selection", Poisson())

    def _tell_what_they_need(self) -> None:
        """Trainer and mechanism learn of the run what their accounting needs."""
        if isinstance(self.trainer, DpSgd) and isinstance(self.privacy, ExamplePrivacy):
            trainer = replace(self.trainer, privacy=self.privacy, rounds=max(1, self.cohorts.most))
            object.__setattr__(self, "trainer", trainer)
        elif isinstance(self.privacy, (LocalGaussian, CentralGaussian)):
            object.__setattr__(self, "privacy", replace(self.privacy, plan=self.cohorts.plan))

    @property
    def hides_cohorts(self) -> bool:
        """Whether noise counts on nobody but the server seeing who takes part."""
        return isinstance(self.privacy, CentralGaussian) and not self.privacy.seen

    @property
    def answers_at_most(self) -> int:
        """The most rounds that a client answers, however often it is asked.

        Where the noise is its own it declines more than the public draws give it. Shares of noise it does not
        count, nor, under `example`, rounds where no budget was given.
        """
        counts = isinstance(self.privacy, LocalGaussian)
        counts |= isinstance(self.privacy, ExamplePrivacy) and self.privacy.epsilon is not None
        return self.cohorts.most if counts else self.rounds

    @cached_property
    def cohorts(self) -> Cohorts:
        """Who takes part in which round; to be asked once sampling and selection are decided."""
        return Cohorts(
            clients=self.clients,
            in_round=self.in_round,
            at_once=self.at_once,
            rounds=self.rounds,
            sampling=cast(Sampling, self.sampling),
            selection=self.selection,
            by_answers=isinstance(self.strategy, FedBuff),
            hidden=self.hides_cohorts,
            secret=self._drawn_by,
        )

    def _drawn_by(self, server_round: int) -> Secret:
        """The operating system's randomness where amplification counts on it, else the seed's."""
        if isinstance(self.privacy, CentralGaussian) and self.hides_cohorts:
            return source(self.privacy.test_seed, COHORT, server_round)
        return self.public_rng(server_round, 0, Use.COHORT).bytes

    def _decide_codec(self) -> None:
        """Both ends get the same: none where only sums are seen, else what `codec.feedback=auto` comes to."""
        if isinstance(self.aggregation, Ckks):
            object.__setattr__(self, "codec", Identity())
            said = f"Homomorphic aggregation takes the codec's place: {SLOTS} values in a ciphertext"
            object.__setattr__(self, "said", said)
        elif isinstance(self.privacy, Summed):
            object.__setattr__(self, "codec", Identity())
        elif isinstance(self.codec, AutoFeedback):
            privacy = f"privacy={self.choices['privacy']}" if self.privacy.unit else None
            codec, said = self.codec.decide(self.in_round, self.clients, privacy, self.steers)
            object.__setattr__(self, "codec", codec)
            object.__setattr__(self, "said", said)

    @property
    def in_round(self) -> int:
        """How many clients' updates make a round."""
        return self.strategy.buffer if isinstance(self.strategy, FedBuff) else self.cohort or self.clients

    @property
    def at_once(self) -> int:
        """How many clients train at one time, those among them that may come too late."""
        if isinstance(self.strategy, FedBuff):
            return self.strategy.concurrency or self.clients
        return min(self.clients, math.ceil(round(self.in_round * self.over_selection, 6)))

    @property
    def timed(self) -> bool:
        """Whether clients have simulated speeds."""
        return isinstance(self.speeds, Stragglers)

    @property
    def seconds(self) -> Seconds | None:
        """Simulated seconds that the client of a partition, with so many examples, trains.

        None where time is not simulated. Asynchronous rounds need an order of answers: without speeds it is
        that of the messages.
        """
        at_once = (lambda partition, examples: 0.0) if isinstance(self.strategy, FedBuff) else None
        return self._times(int(getattr(self.trainer, "epochs", 1))) or at_once

    @property
    def speed(self) -> Callable[[int], int]:
        """Examples a second that a simulated client trains on; of this CPU where speeds are real."""
        times = self._times(epochs=1)
        return (lambda partition: int(1 / times(partition, 1))) if times else (lambda partition: self._speed)

    @cached_property
    def _speed(self) -> int:
        return speed_of(self.task, self.task.model(self.seed))  # on the CPU: this may be the server

    def _times(self, epochs: int) -> Seconds | None:
        return self.speeds.times(self.clients, epochs, self.public_rng(0, 0, Use.SPEED))

    @property
    def sending(self) -> Seconds | None:
        """Simulated seconds that the client of a partition sends so many bytes; None: no time."""
        return self.speeds.links(self.clients, self.public_rng(0, 0, Use.LINK))

    @property
    def checkpointed(self) -> float | None:
        """Seconds between checkpoints: 0 under privacy, where each round that is repeated costs some."""
        return 0.0 if self.checkpoint is not None and self.privacy.unit else self.checkpoint

    @property
    def mechanism(self) -> Mechanism | None:
        """Client-level privacy of updates that a codec encodes, if that is what was chosen."""
        return self.privacy if isinstance(self.privacy, (LocalGaussian, CentralGaussian)) else None

    @cached_property
    def secure(self) -> SecureRun | None:
        """Secure aggregation, where only sums are to be seen."""
        return SecureRun(self, self.privacy) if isinstance(self.privacy, Summed) else None

    @property
    def terms(self) -> Terms | StepTerms | None:
        """How secure aggregation codes updates; None without it."""
        return None if self.secure is None else self.secure.terms

    @property
    def coded_by(self) -> str:
        """What makes bytes of an update."""
        if self.secure is not None:
            return "secure aggregation"
        return "ckks" if isinstance(self.aggregation, Ckks) else str(self.choices["codec"])

    @property
    def wire_codec(self) -> Codec | None:
        """None where weights come back as plain Flower sends them."""
        plain = isinstance(self.codec, Identity) and isinstance(self.downlink, Plain) and not self.mechanism
        buffered = isinstance(self.strategy, FedBuff)  # which adds updates of different weights
        updates = buffered or self.steers or self.assigns or self.norm_bound is not None
        return None if plain and not updates else self.codec

    @property
    def assigns(self) -> bool:
        """Whether clients are asked for parts of their work."""
        return isinstance(self.assignment, Deadline)

    @property
    def steers(self) -> bool:
        """Whether control variates steer the clients' training."""
        return isinstance(self.strategy, Scaffold)

    @property
    def course(self) -> Course:
        """What control variates count on, of all rounds."""
        assert isinstance(self.trainer, Sgd)
        schedule, rounds = self.trainer.schedule, max(1, self.rounds)
        return Course(lambda now: scheduled(1.0, schedule, (now - 1) / rounds), self.in_round / self.clients)

    @property
    def recall(self) -> Recall | None:
        """Brings what a client remembers of itself, where clients are steered."""
        return partial(Control, codec=self.codec, course=self.course) if self.steers else None

    def wire(self) -> Wire:
        """The strategy behind the wire."""
        workloads = None
        if isinstance(self.assignment, Deadline) and self.deadline is not None:
            workloads = Workloads(self.assignment, self.deadline)
        return Wire(
            self.strategy,
            self.wire_codec,
            self.mechanism,
            uniform=self.privacy.unit is not None,
            controls=Controls(self.clients, self.course) if self.steers else None,
            workloads=workloads,
            bound=self.norm_bound,
        )

    @property
    def fold(self) -> Callable[[int], Fold] | None:
        """Makes sums for so many workers; None where a strategy needs more than sums, or others make them.

        And where not all count that answer, or as many examples as they say, which a worker does not know.
        """
        wire, sums = self.wire(), self.secure is not None or isinstance(self.aggregation, Ckks)
        some = self.over_selection > 1 or self.deadline is not None or self.timed
        some |= isinstance(self.selection, (BySize, PowerOfChoice))
        if wire.reader is None or not wire.streams or sums or some:
            return None
        return partial(Fold, wire.reader, self.initial)

    @cached_property
    def receive(self) -> Mod:
        """The client's end of a coded downlink."""
        return receive(self.initial)

    @cached_property
    def torch_device(self) -> torch.device:
        """Where models train. On CUDA by kernels that give the same bits each time, of float32's precision.

        Clipping adds up other products than those whose norms it took, so they may differ by rounding
        only: the 10 bits of TF32 would let an example's gradient be longer than the clip norm.
        """
        chosen = self.device
        if chosen == "auto":
            chosen = "cuda" if torch.cuda.is_available() else "cpu"
        if chosen == "cuda":
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
        return torch.device(chosen)

    @cached_property
    def initial(self) -> ArrayRecord:
        """The weights that the seed gives, the same on server and clients."""
        return ArrayRecord(self.task.model(self.seed).state_dict())

    @cached_property
    def model(self) -> nn.Module:
        """The one resident model of this process; weights are copied into it in place."""
        return self.new_model()

    def new_model(self) -> nn.Module:
        """A model where it trains, its convolutions laid out in memory as the trainer wants them."""
        model = self.task.model(self.seed).to(self.torch_device)
        last = isinstance(self.trainer, Sgd) and self.trainer.channels_last
        return model.to(memory_format=torch.channels_last) if last else model

    def prepare(self) -> None:
        """Do once what every worker would do again, and refuse a model that the trainer cannot train."""
        model = self.task.model(self.seed)
        model_checks.check_model(self, model)
        model_checks.check_padding(self)
        if isinstance(self.trainer, Sgd) and self.trainer.bfloat16 and not has_bfloat16(self.torch_device):
            log(WARNING, "trainer.bfloat16=true: this processor has none, so it takes many times as long")
        if self.privacy.unit is not None:
            self.spent(self.rounds, self.cohorts.most)  # finds the noise, and imports accountants
        if self.secure is not None:
            self.secure.check()
            t = self.secure.terms
            discrete_gaussian(1, t.share, os.urandom)  # compiled once, for all workers
            said = (
                f"Secure aggregation takes the codec's place: {t.bits} bits for {t.kept} of {t.size} values"
            )
            object.__setattr__(self, "said", said)

    def spent(self, rounds: int, participations: int) -> Spent | None:
        """What so many rounds cost, where a client took part in so many; None where nothing is private.

        Epsilon of client-level privacy in the central model is that of all rounds, whoever took part.
        """
        if self.privacy.delta is None:
            return None
        return spent_by(self.releases(rounds, participations), self.privacy.delta)

    def releases(self, rounds: int, participations: int) -> tuple[Release, ...]:
        """What so many rounds release of a client that took part in so many; nothing if unprotected."""
        if isinstance(self.trainer, DpSgd):
            return releases(self.trainer.history(participations))
        if self.terms is not None:
            return (self.terms.release(participations),)
        return () if self.mechanism is None else self.mechanism.releases(rounds, participations)

    def split(self, data: Data, partition: int) -> tuple[Data, Data]:
        """A client's examples: what it trains on, and what it holds out, where clients test; by the seed."""
        if self.evaluate != "clients" or not len(data):
            return data, data.at(np.empty(0, np.int64))
        rng = self.public_rng(0, partition, Use.HELD_OUT)
        train, test = held_out(data.y.numpy(), self.held_out, rng)
        return data.at(train), data.at(test)

    @property
    def note(self) -> str | None:
        """What a reader of the results must know."""
        if self.test_seeded:
            return "privacy.test_seed fixes the noise, so nothing is private and epsilon is null"
        return None

    @property
    def test_seeded(self) -> bool:
        """Whether a test seed fixes the noise: what is released is then not private, and costs nothing."""
        return not isinstance(self.privacy, NoPrivacy) and self.privacy.test_seed is not None

    def public_rng(self, server_round: int, partition: int, use: Use) -> np.random.Generator:
        """Public randomness of one client in one round."""
        return public_rng(self.seed, server_round, partition, use)
