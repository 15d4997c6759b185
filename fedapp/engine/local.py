"""The local engine: a Flower Grid whose nodes live in resident worker processes on this machine."""

import gc
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedapp import check
from fedapp.assignment import SECONDS, part_in
from fedapp.engine.grid import stream
from fedapp.engine.heap import keep_freed_memory
from fedapp.engine.pool import Pool
from fedapp.engine.states import States
from fedapp.engine.timeline import Answer, Timeline
from fedapp.engine.worker import TEST
from fedapp.exact_sum import ExactSum
from fedapp.fold import Fold
from fedapp.records import METRICS, record_in, size_of
from fedapp.stages import WAIT

_WAIT = 0.05  # seconds that a pull waits for a reply before it returns with none


@dataclass(frozen=True)
class Local:
    """Workers are forked once, with torch imported and data loaded; each trains one client at a time."""

    workers: int | None = None
    state_mb: float = 128.0
    client_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            check.whole("engine.workers", self.workers, 1, 1024)
        check.real("engine.state_mb", self.state_mb, low=0.0)
        if self.client_timeout is not None:
            check.real("engine.client_timeout", self.client_timeout, above=0.0)

    @contextmanager
    def grid(
        self,
        app: ClientApp,
        sizes: Sequence[int],
        at_once: int,
        fold: Callable[[int], Fold] | None = None,
        file: Path | None = None,
        finished: int = 0,
        seconds: Callable[[int, int], float] | None = None,
        sending: Callable[[int, int], float] | None = None,
    ) -> Iterator["LocalGrid"]:
        """A running grid; node i + 2 holds partition i, of sizes[i] examples. Ends its processes.

        Where `fold` makes sums for so many workers, train replies come `Folded`. What nodes keep is as of the
        end of round `finished`, by that file (`States`). `seconds` is how long the client of a partition, and
        so many examples, trains; given that, time is simulated (`Timeline`). `sending` is how long it
        sends so many bytes.
        """
        workers = min(self.workers or len(os.sched_getaffinity(0)), at_once)
        of_time = seconds, sending, self.client_timeout
        # What is there now stays: the collector of cycles would look through all modules now and then, and
        # what it touches a forked worker no longer shares.
        gc.freeze()
        keep_freed_memory()
        grid = LocalGrid(app, sizes, workers, fold and fold(workers), *of_time)
        try:
            grid._contexts = States(grid.partitions, grid._context, self.state_mb * 1e6, file, finished)
            yield grid
        finally:
            grid.close()
            gc.unfreeze()


class LocalGrid(Grid):
    """Pushes messages to a pool of workers, largest client first; each node's Context lives here.

    The thread that makes it also pulls from it: workers, which it forks in both, end with their thread.
    """

    longest_pause = 0.0  # a pull waits for replies itself; a pause after it would leave workers idle
    streams = True  # workers begin with the first message while others are made

    def __init__(
        self,
        app: ClientApp,
        sizes: Sequence[int],
        workers: int,
        fold: Fold | None = None,
        seconds: Callable[[int, int], float] | None = None,
        sending: Callable[[int, int], float] | None = None,
        client_timeout: float | None = None,
    ) -> None:
        # Message() reads the run from here, process-wide, outside Flower's own runtimes.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
        self.partitions = {SUPERLINK_NODE_ID + 1 + i: i for i in range(len(sizes))}
        self._sizes, self._fold, self._seconds, self._sending = sizes, fold, seconds, sending
        self.timeline = None if seconds is None else Timeline(self._seconds_of)
        self._contexts = States(self.partitions, self._context)
        self._tested = list[Message]()  # what tests came to
        self._early = list[Message]()  # replies that came while messages were made
        of_nodes = self.partitions, self._kept
        self._pool = Pool(app, fold, workers, *of_nodes, self.timeline is None, client_timeout)

    def _context(self, node: int) -> Context:
        config: dict[str, bool | float | int | str] = {
            "partition-id": self.partitions[node],
            "num-partitions": len(self._sizes),
        }
        return Context(1, node, config, RecordDict(), {})

    def _kept(self, message: Message) -> Context:
        """What the node of a message keeps; a test is in the name of one, and none of its business."""
        node = message.metadata.dst_node_id
        return self._context(node) if message.metadata.message_type == TEST else self._contexts[node]

    def _seconds_of(self, message: Message) -> float:
        """How long a client takes to answer; all but training takes no time."""
        assert self._seconds is not None
        partition = self.partitions[message.metadata.dst_node_id]
        train = message.metadata.message_type == MessageType.TRAIN
        return self._seconds(partition, self._sizes[partition]) * part_in(message).work if train else 0.0

    def _sending_of(self, reply: Message) -> float:
        """How long a client sends its answer."""
        if self._sending is None or reply.has_error():
            return 0.0
        return self._sending(self.partitions[reply.metadata.src_node_id], size_of(reply.content))

    def get_node_ids(self) -> Iterable[int]:
        return list(self.partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(uuid4().hex)
            message.metadata.__dict__["_message_id"] = ids[-1]
            if self.timeline is not None:
                self.timeline.sent(message)
                self._pool.add(message, self.timeline.due)
            else:
                self._pool.add(message, self._largest_first)
        if self.timeline is None:
            self._early += map(self._delivered, self._work_done(0.0, making=True))
            self._pool.dispatch(making=True)
        return ids

    def forget(self, message_ids: Collection[str]) -> None:
        """Nobody waits for replies to these any more: who has not begun them does not."""
        self._pool.drop(message_ids)
        if self.timeline is not None:
            self.timeline.drop(message_ids)

    def in_order(self, messages: list[Message]) -> list[Message]:
        """The messages as they are best pushed: where time is real those to the largest clients first."""
        return sorted(messages, key=self._largest_first) if self.timeline is None else messages

    def _largest_first(self, message: Message) -> int:
        return -self._sizes[self.partitions[message.metadata.dst_node_id]]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that are there; waits a moment for the first one.

        A reply to another message is dropped: it belongs to a round that timed out. In simulated time that of
        any message comes that is not forgotten.
        """
        if self.timeline is not None:
            return self._pull_next(self.timeline)
        # A pull for each reply must not look through all that are awaited.
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        replies, self._early = self._early, []
        replies += map(self._delivered, self._work_done(0.0 if replies else _WAIT))
        self._pool.dispatch()
        return [reply for reply in replies if reply.metadata.reply_to_message_id in wanted]

    def _pull_next(self, timeline: Timeline) -> list[Message]:
        """The reply that is due next, if it is there."""
        for pause in (0.0, _WAIT):
            for answer in self._work_done(pause):
                timeline.done(answer, self._sending_of(answer[0]))
            self._pool.dispatch()
            if (due := timeline.next()) is not None:
                return [self._delivered(due)]
        return []

    def test(self, contents: Iterable[RecordDict]) -> None:
        """Have workers that no client needs test the model: each takes one of these after the other."""
        self._pool.tests += [Message(content, next(iter(self.partitions)), TEST) for content in contents]

    @WAIT
    def tested(self, timeout: float) -> list[Message]:
        """What tests came to since this was asked last, those that failed too; waits for all of them."""
        until = time.monotonic() + timeout
        while self._pool.testing:
            self._work_done(_WAIT)  # what clients still send belongs to a round that is over
            if time.monotonic() >= until:
                break
        done, self._tested = self._tested, []
        return done

    def _work_done(self, pause: float, making: bool = False) -> list[Answer]:
        """What workers have done for clients; waits so many seconds for the first one (`Pool.done`)."""
        answers = list[Answer]()
        for asked, reply, context in self._pool.done(pause, making):
            if asked.metadata.message_type == TEST:
                self._tested.append(reply)
                continue
            if self.timeline is not None and reply.has_content():
                metrics = record_in(reply.content, METRICS, MetricRecord)
                if metrics is not None and SECONDS in metrics:  # the client's clock is simulated too
                    metrics[SECONDS] = self._seconds_of(asked)
            answers.append((reply, context))
        return answers

    def _delivered(self, answer: Answer) -> Message:
        """The reply, now that its node has sent it."""
        reply, context = answer
        if context is not None:
            self._contexts[reply.metadata.src_node_id] = context
        return reply

    def collect(self) -> Iterable[ExactSum | None]:
        """What all replies of a round add up to, by slot. Ends whoever is still at it: their time is over."""
        self._pool.stop()
        return self._fold.collect() if self._fold else ()

    def commit(self, finished: int, oldest: int) -> int:
        """Bring what nodes keep to the disk (`States.commit`); returns how many keep something."""
        self._contexts.commit(finished, oldest)
        return self.remembering

    @property
    def workers(self) -> int:
        """How many processes work."""
        return len(self._pool.workers)

    @property
    def remembering(self) -> int:
        """How many nodes have a state on the disk."""
        return self._contexts.stored

    def close(self) -> None:
        """End the worker processes, and drop what was not committed of their states."""
        self._pool.close()
        self._contexts.close()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return list(stream(self, messages, timeout if timeout is not None else float("inf")))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run
