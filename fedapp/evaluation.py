"""How well a model does: on the server's test set, or on what clients held out, and how that spreads."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedapp.client_app import load
from fedapp.engine.grid import stream
from fedapp.engine.local import TEST, LocalGrid
from fedapp.errors import DataError, FedappError
from fedapp.fedbuff import FedBuff
from fedapp.job import Job
from fedapp.records import ARRAYS, CONFIG, METRICS
from fedapp.tasks import EVALUATION_BATCH, Score, means


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


class ServerTest:
    """The test on the server's own test set. Raises DataError where the task has none.

    On the local engine all workers, idle between rounds, test a part each. Batches are the same whoever tests
    them, so accuracy and loss are, to the bit. On CUDA workers always do: this process does not touch it, or
    those that are forked later could not.
    """

    def __init__(self, job: Job, grid: Grid) -> None:
        data = job.task.test_data()
        if data is None:
            raise DataError(
                "evaluate=server needs a test set and the task has none: set evaluate=clients or none"
            )
        self._job, self._grid, self._data = job, grid, data
        workers = grid.workers if isinstance(grid, LocalGrid) else 0
        batches = -(-len(data) // EVALUATION_BATCH)
        parts = max(1, min(batches, workers))
        self._ends = dict(pairwise(batches * part // parts for part in range(parts + 1)))  # by first batch
        at_work = isinstance(job.strategy, FedBuff)  # its clients train between rounds too
        self._aside = workers > 0 and (job.torch_device.type == "cuda" or (parts > 1 and not at_work))

    def __call__(self, arrays: ArrayRecord, node: int) -> Evaluated:
        """Test these weights; workers do it in the name of this node."""
        if self._aside:
            scores = self._by_workers(arrays, node)
        else:
            load(self._job, arrays)
            scores = self._job.task.scores(self._job.model, self._data)
        found = means(scores)
        return Evaluated(found["accuracy"], found["loss"])

    def _by_workers(self, arrays: ArrayRecord, node: int) -> list[Score]:
        """Each worker tests a part, and another one that of one which died; FedappError if it dies too."""
        found = dict[int, list[Score]]()
        for _ in range(2):
            left = {first: end for first, end in self._ends.items() if first not in found}
            configs = [ConfigRecord({"first": first, "end": end}) for first, end in left.items()]
            contents = [RecordDict({ARRAYS: arrays, CONFIG: config}) for config in configs]
            messages = [Message(content, node, TEST) for content in contents]
            for reply in stream(self._grid, messages, self._job.round_timeout):
                if reply.has_content():
                    told = cast(Mapping[str, Any], reply.content.metric_records[METRICS])
                    first = cast(int, reply.content.config_records[CONFIG]["first"])
                    found[first] = list(map(Score, *(told[name] for name in Score._fields)))
        if len(found) < len(self._ends):
            raise FedappError("the model could not be tested; the log says why")
        return [score for first in self._ends for score in found[first]]
