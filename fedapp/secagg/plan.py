"""Who shares secrets with whom, and how many must answer: degree and threshold from the cohort's size."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from fedapp import check
from fedapp.errors import ConfigError

PRIVACY, COMPLETION = 2.0**-40, 2.0**-20
"""How likely a sparse graph may be to fail: to protect every client, to survive the planned dropouts."""


@dataclass(frozen=True)
class Graph:
    """A ring on which a position is joined to the nearest `degree` others; threshold shares open a secret."""

    cohort: int
    degree: int
    threshold: int

    def neighbours(self, position: int) -> list[int]:
        """The positions joined to this one, smallest first; everybody else on the complete graph."""
        if self.degree >= self.cohort - 1:
            return [other for other in range(self.cohort) if other != position]
        steps = range(1, self.degree // 2 + 1)
        return sorted((position + sign * step) % self.cohort for step in steps for sign in (-1, 1))


@dataclass(frozen=True)
class Plan:
    """What a cohort has to stand: shares of it that collude with the server, and that drop out.

    `least` is the fewest clients that may start, and that may be in a sum. Dropouts are counted over the
    stages after the advertisements; those who never advertise do not count at all, since the graph
    joins those who did.
    """

    least: int = 3
    colluding: float = 0.2
    dropouts: float = 0.3

    def __post_init__(self) -> None:
        check.whole("secagg.least", self.least, 3, 1 << 20)
        check.real("secagg.colluding", self.colluding, low=0.0, below=1.0)
        check.real("secagg.dropouts", self.dropouts, low=0.0, below=1.0)

    def graph(self, cohort: int, complete: bool = False) -> Graph:
        """The sparsest graph that stands the plan, complete unless that halves the messages.

        `complete` asks for that one: against a server that lies there is no other.

        Complete (up to 104 clients, with the defaults): the threshold is the least for which
        2 * threshold > neighbours + colluders, and both promises hold with certainty.

        Sparse (Bell et al. 2020, definition 3.1 and lemma 3.4, with exact tails for their bounds): with
        hypergeometric X colluders and Y survivors among a client's neighbours,

            cohort * P(X >= threshold) + cohort**2 / 2 * ((colluders + dropouts) / cohort)**degree <= 2**-40,
            cohort * P(Y < threshold) <= 2**-20.

        The first sums over clients whose secrets colluders could open, and over pairs of stretches of the
        ring, degree / 2 long each, whose loss would cut the honest survivors in two. Where no threshold
        stands the dropouts too, it still stands the colluders: who drops out then may cost the sum.
        """
        check.whole("secagg cohort", cohort, self.least, 1 << 20)
        return _graph(cohort, *self._counts(cohort), complete)

    def require(self, cohort: int, complete: bool = False) -> None:
        """Raise ConfigError where no threshold stands both the colluders and the dropouts."""
        graph, (colluders, dropouts) = self.graph(cohort, complete), self._counts(cohort)
        if graph.degree == cohort - 1 and graph.threshold > graph.degree - dropouts:
            raise ConfigError(
                f"no threshold stands {colluders} colluding clients and {dropouts} dropouts of {cohort}: "
                f"set secagg.dropouts or secagg.colluding lower"
            )

    def _counts(self, cohort: int) -> tuple[int, int]:
        """How many collude, and how many drop out."""
        colluders, dropouts = (math.floor(share * cohort + 1e-9) for share in (self.colluding, self.dropouts))
        return colluders, dropouts


@cache
def _graph(cohort: int, colluders: int, dropouts: int, complete: bool) -> Graph:
    others = cohort - 1
    for degree in () if complete else range(2, others // 2 + 1, 2):
        cut = cohort**2 / 2 * ((colluders + dropouts) / cohort) ** degree
        if cut > PRIVACY:
            continue
        from scipy.stats import hypergeom  # slow to import, and small cohorts do not come here

        opened = cohort * hypergeom.sf(np.arange(degree), others, colluders, degree)  # X >= 1, 2, ..., degree
        safe = np.flatnonzero(opened + cut <= PRIVACY)
        if len(safe):
            threshold = int(safe[0]) + 1
            if cohort * hypergeom.cdf(threshold - 1, others, others - dropouts, degree) <= COMPLETION:
                return Graph(cohort, degree, threshold)
    return Graph(cohort, others, (others + colluders) // 2 + 1)
