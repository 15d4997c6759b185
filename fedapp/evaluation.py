"""How well a model does: on the server's test set, or on what clients held out, and how that spreads."""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedapp.cohorts import Cohort
from fedapp.engine.local import LocalGrid
from fedapp.errors import DataError, FedappError
from fedapp.exchange import Exchange
from fedapp.fedbuff import FedBuff
from fedapp.job import Job
from fedapp.models import load
from fedapp.places import Places
from fedapp.records import ARRAYS, CONFIG, config_record, metric_record
from fedapp.stages import EVALUATE
from fedapp.tasks import EVALUATION_BATCH, Score, means
from fedapp.wire import Wire


class Evaluated(NamedTuple):
    """What a test came to; the fields of a `Round` and of the summary. Accuracies are from 0 to 1."""

    accuracy: float | None = None  # where clients test: the mean over all examples
    loss: float | None = None
    clients_mean: float | None = None  # accuracy, where each client counts the same
    clients_worst: float | None = None  # and that of the worst tenth of clients, at least one
    clients_tested: int | None = None  # how many had examples to test on, and answered


def over_clients(means: Mapping[str, Any]) -> Evaluated:
    """A test by clients: the strategy's means, and how the accuracies of all of them spread."""
    accuracies = means["accuracies"]
    worst = np.sort(accuracies)[: max(1, len(accuracies) // 10)]
    return Evaluated(
        means["accuracy"], means["loss"], float(np.mean(accuracies)), float(worst.mean()), len(accuracies)
    )


@dataclass(frozen=True)
class ClientTest:
    """The test by clients, each on its own data."""

    wire: Wire
    exchange: Exchange
    places: Places

    @EVALUATE
    def told(self, number: int, arrays: ArrayRecord, nodes: Collection[int]) -> list[Message]:
        """What these nodes say of the weights, in order of their partitions."""
        messages = list(
            self.wire.configure_evaluate(number, arrays, ConfigRecord(), cast(Grid, Cohort(nodes)))
        )
        return sorted(self.exchange.send(arrays, messages), key=self.places.of)

    @EVALUATE
    def of_all(self, number: int, arrays: ArrayRecord) -> Evaluated:
        """What a test by all of them comes to."""
        means = self.wire.aggregate_evaluate(number, self.told(number, arrays, self.places.nodes.values()))
        return over_clients(means) if means else Evaluated()


class ServerTest:
    """The test on the server's own test set. Raises DataError where the task has none.

    Where it goes on `beside` the next round nobody waits for it: on the local engine workers that have no
    client to train test a part each; on Flower's grids, whose nodes are elsewhere, a thread of this process
    does. Batches are the same whoever tests them, so accuracy and loss are, to the bit. On CUDA workers
    always do: this process does not touch it, or those that are forked later could not.
    """

    def __init__(self, job: Job, grid: Grid) -> None:
        data = job.task.test_data()
        if data is None:
            raise DataError(
                "evaluate=server needs a test set and the task has none: set evaluate=clients or none"
            )
        self._job, self._data, self._arrays, self._found = job, data, job.initial, dict[int, list[Score]]()
        self._number = 0  # of tests begun
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[Evaluated] | None = None
        self._workers = grid if isinstance(grid, LocalGrid) else None
        batches = -(-len(data) // EVALUATION_BATCH)
        parts = max(1, min(batches, self._workers.workers if self._workers else 1))
        self._ends = dict(pairwise(batches * part // parts for part in range(parts + 1)))  # by first batch
        if self._workers is None:
            self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        elif job.torch_device.type != "cuda" and (parts == 1 or isinstance(job.strategy, FedBuff)):
            self._workers = None  # too little to share, or all of them are always at work

    @property
    def beside(self) -> bool:
        """Whether a test goes on by itself, until its end is asked for."""
        return self._workers is not None or self._thread is not None

    def begin(self, arrays: ArrayRecord) -> None:
        """Test these weights."""
        self._arrays, self._found, self._number = arrays, {}, self._number + 1
        if self._thread is not None:
            # Made by this thread: to make one takes the generator that nodes in this process draw from.
            self._running = self._thread.submit(self._here, self._model)
        elif self._workers is not None:
            self._ask(self._workers)

    def end(self) -> Evaluated:
        """What the test came to that was begun last; waits for it."""
        return self.rest() if self._workers is None else self._by_workers(self._workers)

    def rest(self) -> Evaluated:
        """The same without workers."""
        return self._here(self._model) if self._running is None else self._running.result()

    def _here(self, model: nn.Module) -> Evaluated:
        load(model, self._arrays)
        return _evaluated(self._job.task.scores(model, self._data))

    @cached_property
    def _model(self) -> nn.Module:
        """Of nobody else: on a grid in this process clients train the job's, while a thread tests."""
        if self._thread is None:
            return self._job.model
        return self._job.new_model()

    def _ask(self, grid: LocalGrid) -> None:
        """Have workers test each part that nobody has tested."""
        left = {first: end for first, end in self._ends.items() if first not in self._found}
        told = {"test": self._number}
        configs = [ConfigRecord({"first": first, "end": end, **told}) for first, end in left.items()]
        grid.test([RecordDict({ARRAYS: self._arrays, CONFIG: config}) for config in configs])

    def _by_workers(self, grid: LocalGrid) -> Evaluated:
        """What each part came to; one whose worker dies is tested again, FedappError if another dies too."""
        for last in (False, True):
            for reply in grid.tested(self._job.round_timeout):
                if not reply.has_content():
                    continue
                told = cast(Mapping[str, Any], metric_record(reply.content))
                config = config_record(reply.content)
                if config["test"] == self._number:  # not of one that took too long
                    first = cast(int, config["first"])
                    self._found[first] = list(map(Score, *(told[name] for name in Score._fields)))
            if len(self._found) == len(self._ends):
                return _evaluated([score for first in self._ends for score in self._found[first]])
            if not last:
                self._ask(grid)
        raise FedappError("the model could not be tested; the log says why")


def _evaluated(scores: list[Score]) -> Evaluated:
    found = means(scores)
    return Evaluated(found["accuracy"], found["loss"])
