"""What the rounds of a run have cost, and whether one more is within the budget."""

from collections import Counter
from dataclasses import dataclass

from fedapp.fedbuff import FedBuff
from fedapp.job import Job
from fedapp.privacy.begun import Begun
from fedapp.privacy.release import Release, Spent


@dataclass(frozen=True)
class Budget:
    """The budget of a job, and what was begun of it; a round that a crash made it repeat counts each time."""

    job: Job
    begun: Begun

    @property
    def spent(self) -> Spent | None:
        """What all rounds so far have cost; where clients spend by themselves, who took part most often."""
        return None if self.job.test_seeded else self.job.spent(*self._charged)

    @property
    def releases(self) -> tuple[Release, ...]:
        """What `spent` is computed from; nothing where nothing is private."""
        return () if self.job.test_seeded else self.job.releases(*self._charged)

    @property
    def _charged(self) -> tuple[int, int]:
        """Rounds that were begun, and in how many of them who took part most often did."""
        return self.begun.rounds, max(self.begun.took_part.values(), default=0)

    def repeated(self, finished: int) -> int:
        """Private rounds that were begun, beyond those that were finished, which are charged all the same."""
        private = self.job.privacy.unit is not None and not self.job.test_seeded
        return self.begun.rounds - finished if private else 0

    def ends(self, finished: int) -> bool:
        """Whether one more round would pass it; noise is set for all of a run that nothing stops."""
        epsilon: float | None = getattr(self.job.privacy, "epsilon", None)
        as_planned = not self.repeated(finished) and not self.begun.moved
        if as_planned or self.job.test_seeded or epsilon is None or finished == self.job.rounds:
            return False
        # Of cohorts that are drawn in secret, all cost the same.
        clients, free = self.job.clients, isinstance(self.job.strategy, FedBuff)
        cohort = range(clients) if free else self.job.cohorts.draw(finished + 1, clients)
        most = max((self.begun.took_part + Counter(cohort)).values(), default=0)
        would = self.job.spent(self.begun.rounds + 1, most)
        return would is not None and would.epsilon > epsilon
