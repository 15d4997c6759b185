"""Secure aggregation of one run: how updates are coded, what it has to stand, who may take part."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context

from fedapp import combinations
from fedapp.dp_step import DpStep
from fedapp.errors import ConfigError, FedappError
from fedapp.privacy.distributed import DistributedGaussian, Terms
from fedapp.privacy.distributed_example import StepTerms
from fedapp.secagg import Client, Identity, Plan, Server
from fedapp.secagg.roster import MADE, make, read_identity, read_roster
from fedapp.secagg.wire import Summed
from fedapp.vector import layout_of

if TYPE_CHECKING:
    from fedapp.job import Job


class SecureRun:
    """What server and clients agree on for all rounds of a job, each from its own settings."""

    def __init__(self, job: "Job", privacy: Summed) -> None:
        self._job, self._privacy = job, privacy

    @cached_property
    def terms(self) -> Terms | StepTerms:
        """How an update becomes numbers with a share of the noise, and the sum an update."""
        job = self._job
        size, most = layout_of(job.initial).size, max(1, job.cohorts.most)
        if isinstance(self._privacy, DistributedGaussian):
            return self._privacy.terms(size, job.in_round, most)
        dp = job.trainer
        assert isinstance(dp, DpStep)
        return self._privacy.terms(
            size,
            job.in_round,
            most,
            clip=dp.max_grad_norm,
            rate=dp.sampling_rate,
            examples=dp.examples_per_client,
        )

    @property
    def plan(self) -> Plan:
        """What it has to stand: one client that colludes at least.

        A sum of fewer than carry the noise is not to be opened: the server must not see it either.
        """
        tolerated, least = self._privacy.tolerated, max(combinations.LEAST, self.terms.honest)
        return Plan(least, colluding=max(tolerated, 1 / self._job.in_round), dropouts=tolerated)

    @property
    def signed(self) -> bool:
        """Whether clients sign what they say."""
        return self._privacy.roster is not None

    @cached_property
    def identities(self) -> tuple[Identity, ...]:
        """Of the clients of a simulation, by partition, where it is to make them; else none."""
        return make(self._job.clients) if self._privacy.roster == MADE else ()

    @cached_property
    def roster(self) -> frozenset[bytes]:
        """Whose signatures count at the server. Raises ConfigError where its file cannot be read."""
        if self._privacy.roster is None:
            return frozenset()
        return self.identities[0].roster if self.identities else read_roster(Path(self._privacy.roster))

    def check(self) -> None:
        """Refuse a cohort that cannot stand what it has to; said here, before a round is lost."""
        cohort = self._job.in_round
        try:
            self.plan.require(cohort, complete=bool(self.roster))
        except ConfigError as error:
            raise ConfigError(
                f"privacy.tolerated={self._privacy.tolerated:g} of {cohort} clients: "
                f"{str(error).partition(':')[0]}: "
                f"set privacy.tolerated lower, or a larger cohort"
            ) from error

    def server(self, nodes: list[int], number: int) -> Server:
        """The server's end of a round with these nodes."""
        return Server(nodes, self.terms.kept, self.terms.modulus, number, self.plan, roster=self.roster)

    def client(self, context: Context, partition: int) -> Client:
        """A node's end; FedappError where the run signs and the node does not, or the other way."""
        own = self._identity(context, partition)
        if (own is None) == self.signed:
            said = "a run signs" if own is None else "this node signs, and the run does not"
            raise FedappError(f"{said}: set privacy.roster, and give every node roster= and signing-key=")
        given = self.terms.kept, self.terms.modulus, self.plan
        if own is None:
            return Client(*given)
        return Client(*given, signing_key=own.signing_key, roster=own.roster)

    def _identity(self, context: Context, partition: int) -> Identity | None:
        """Who a node is and whom it knows: from its own files, where it was given any; never from the run."""
        roster, key = (context.node_config.get(name) for name in ("roster", "signing-key"))
        if roster is not None or key is not None:
            if roster is None or key is None:
                raise ConfigError("a roster goes with a signing key: give the node roster= and signing-key=")
            return read_identity(Path(str(key)), Path(str(roster)))
        return self.identities[partition] if self.identities else None
