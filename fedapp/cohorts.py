"""Who takes part in the rounds of a run, and in how many of them one client does at most."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedapp.errors import ConfigError
from fedapp.facts import Facts
from fedapp.privacy.mechanism import Plan
from fedapp.privacy.release import Sampling
from fedapp.privacy.secret import Secret
from fedapp.selection import Poisson, Selection, Uniform

_COUNTED = 10**8  # draws, of each client in each round: half a minute or more, on server and clients


@dataclass(frozen=True)
class Cohorts:
    """The cohorts of all rounds.

    in_round: clients whose updates make a round. at_once: clients that train at one time; some may come too
    late. by_answers: there are no cohorts, and whoever is free is asked. hidden: nobody but the server may
    see who is drawn, on which noise counts. secret: what a round is drawn by, of the run's seed where it may
    be known.
    """

    clients: int
    in_round: int
    at_once: int
    rounds: int
    sampling: Sampling
    selection: Selection
    by_answers: bool
    hidden: bool
    secret: Callable[[int], Secret]

    def draw(self, server_round: int, nodes: int, facts: Sequence[Facts] = ()) -> list[int]:
        """Who is drawn for a round: of so many nodes, by partition; what the selection asks is in `facts`."""
        drawn_by = self.secret(server_round)
        return self.selection.draw(facts or [Facts()] * nodes, min(self.at_once, nodes), drawn_by)

    @cached_property
    def most(self) -> int:
        """The most rounds that any one client takes part in.

        Counted over public draws; all rounds, where draws are secret or do not decide alone. Raises
        ConfigError where there are too many draws to count.
        """
        everyone = self.in_round == self.clients and self.sampling == "fixed"
        alike = isinstance(self.selection, (Uniform, Poisson))
        if everyone or not alike or self.hidden or self.by_answers:
            return self.rounds
        if self.rounds * self.clients > _COUNTED:
            raise ConfigError(
                f"rounds={self.rounds} with clients={self.clients} are too many to count how often each is "
                f"drawn, which sets the noise: set rounds={_COUNTED // self.clients} or fewer, or leave "
                f"cohort out"
            )
        drawn = Counter(i for r in range(1, self.rounds + 1) for i in self.draw(r, self.clients))
        return max(drawn.values(), default=0)

    @property
    def plan(self) -> Plan:
        """What the accounting needs of it."""
        return Plan(self.sampling, self.in_round, self.clients, self.rounds, self.most)


class Cohort:
    """What a strategy sees of the grid when it samples: the clients of this round, and no others."""

    def __init__(self, nodes: Collection[int]) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes
