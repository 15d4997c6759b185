"""FedBuff: what one asynchronous round is made of. The loop around it is in `fedapp.asynchronous`."""

from typing import Any

from flwr.serverapp.strategy import FedAvg

from fedapp import check


class FedBuff(FedAvg):
    """Buffered asynchronous aggregation.

    `concurrency` clients (None: all) train at any time. Once `buffer` updates are there, the server moves its
    weights by `server_learning_rate` times their mean, in which an update that was made from weights s steps
    old counts (1 + s) ** -`staleness_exponent` times: by default 1 / sqrt(1 + s). The mean is over the
    clients' examples, and is not divided by these factors, so that stale buffers make short steps.
    `max_staleness` drops what is older (None: nothing).

    Source: Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation", Algorithm 1,
    where all clients weigh the same, and the experiments for the factors.
    """

    def __init__(
        self,
        buffer: int = 5,
        concurrency: int | None = None,
        server_learning_rate: float = 1.0,
        staleness_exponent: float = 0.5,
        max_staleness: int | None = None,
        **sampling: Any,
    ) -> None:
        check.whole("strategy.buffer", buffer, 1)
        if concurrency is not None:
            check.whole("strategy.concurrency", concurrency, 1)
        check.real("strategy.server_learning_rate", server_learning_rate, above=0.0, high=1e6)
        check.real("strategy.staleness_exponent", staleness_exponent, low=0.0, high=10.0)
        if max_staleness is not None:
            check.whole("strategy.max_staleness", max_staleness, 0)
        super().__init__(**sampling)
        self.buffer, self.concurrency = buffer, concurrency
        self.server_learning_rate, self.staleness_exponent = server_learning_rate, staleness_exponent
        self.max_staleness = max_staleness

    def factor(self, staleness: int) -> float:
        """What an update counts that was made from weights so many steps old."""
        return float((1 + staleness) ** -self.staleness_exponent)
