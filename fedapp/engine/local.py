"""The local engine: a Flower Grid whose nodes live in resident worker processes on this machine."""

import gc
import multiprocessing.connection
import os
import time
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedapp import check
from fedapp.assignment import SECONDS, part_in
from fedapp.engine.arena import Arena
from fedapp.engine.grid import stream
from fedapp.engine.heap import keep_freed_memory
from fedapp.engine.states import States
from fedapp.engine.timeline import Answer, Timeline
from fedapp.engine.worker import TEST, Worker
from fedapp.exact_sum import ExactSum
from fedapp.fold import Fold, Folded
from fedapp.records import size_of
from fedapp.stages import CLOCK, TRANSFER, WAIT

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
    """Pushes messages to idle workers, largest client first; each node's Context lives here.

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
        self._app, self._sizes, self._fold = app, sizes, fold
        self._seconds, self._sending, self._client_timeout = seconds, sending, client_timeout
        self.timeline = None if seconds is None else Timeline(self._seconds_of)
        self._contexts = States(self.partitions, self._context)
        self._queue: list[Message] = []
        self._tests, self._tested = list[Message](), list[Message]()  # not begun; what others came to
        self._arena = Arena() if workers and hasattr(os, "memfd_create") else None  # on Linux
        self._workers = [Worker(app, fold, slot, self._arena) for slot in range(workers)]

    def _context(self, node: int) -> Context:
        config: dict[str, bool | float | int | str] = {
            "partition-id": self.partitions[node],
            "num-partitions": len(self._sizes),
        }
        return Context(1, node, config, RecordDict(), {})

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
                insort(self._queue, message, key=self.timeline.due)
            else:
                insort(self._queue, message, key=lambda message: -self._size_of(message))
        if self.timeline is None:
            self._dispatch(tests=False)  # before the next ones are made
        return ids

    def _size_of(self, message: Message) -> int:
        return self._sizes[self.partitions[message.metadata.dst_node_id]]

    def in_order(self, messages: list[Message]) -> list[Message]:
        """The messages as they are best pushed: those to the largest clients first."""
        return sorted(messages, key=lambda message: -self._size_of(message))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that are there; waits a moment for the first one.

        What is not among `message_ids` belongs to a round that timed out: it is not begun, or not returned.
        """
        wanted = set(message_ids)
        self._queue = [message for message in self._queue if message.metadata.message_id in wanted]
        if self.timeline is not None:
            return self._pull_next(self.timeline, wanted)
        replies = [self._delivered(answer) for answer in self._work_done(_WAIT)]
        self._dispatch()
        return [reply for reply in replies if reply.metadata.reply_to_message_id in wanted]

    def _pull_next(self, timeline: Timeline, wanted: set[str]) -> list[Message]:
        """The reply that is due next, if it is there."""
        timeline.keep(wanted)
        for pause in (0.0, _WAIT):
            for answer in self._work_done(pause):
                timeline.done(answer, self._sending_of(answer[0]))
            self._dispatch()
            if (due := timeline.next()) is not None:
                return [self._delivered(due)]
        return []

    def test(self, contents: Iterable[RecordDict]) -> None:
        """Have workers that no client needs test the model: each takes one of these after the other."""
        self._tests += [Message(content, next(iter(self.partitions)), TEST) for content in contents]

    @WAIT
    def tested(self, timeout: float) -> list[Message]:
        """What tests came to since this was asked last, those that failed too; waits for all of them."""
        until = time.monotonic() + timeout
        while self._tests or any(worker.tests for worker in self._workers):
            self._work_done(_WAIT)  # what clients still send belongs to a round that is over
            if time.monotonic() >= until:
                break
        done, self._tested = self._tested, []
        return done

    def _work_done(self, pause: float) -> list[Answer]:
        """Give idle workers work, and take what others have done; waits so many seconds for the first one."""
        self._dispatch()
        busy = {worker.channel.pipe: worker for worker in self._workers if worker.given}
        ready = multiprocessing.connection.wait(list(busy), pause)
        came = [self._receive(worker) for pipe, worker in busy.items() if pipe in ready]
        done = [answer for answer in came if answer is not None]
        done += [self._give_up(worker) for worker in busy.values() if self._overdue(worker)]
        self._tested += [reply for reply, _ in done if reply.metadata.message_type == TEST]
        return [answer for answer in done if answer[0].metadata.message_type != TEST]

    def _overdue(self, worker: Worker) -> bool:
        """Whether the client that a worker works for has had its time, which passes in fact."""
        if self._client_timeout is None or not worker.at_work:
            return False
        return time.monotonic() - worker.began > self._client_timeout

    def _give_up(self, worker: Worker) -> Answer:
        """The answer of a client whose time is over, in its place; it keeps what it had."""
        asked = worker.given.popleft()
        assert asked is not None
        self._replace(worker)
        log(
            ERROR,
            "the client of partition %s was ended after %.1f s of a %s message: "
            "where clients may take longer, set engine.client_timeout above %g",
            self.partitions[asked.metadata.dst_node_id],
            time.monotonic() - worker.began,
            asked.metadata.message_type,
            self._client_timeout,
        )
        error = Error(ErrorCode.CLIENT_APP_CRASHED, f"engine.client_timeout={self._client_timeout:g} is over")
        return Message(error, reply_to=asked), None

    def _delivered(self, answer: Answer) -> Message:
        """The reply, now that its node has sent it."""
        reply, context = answer
        if context is not None:
            self._contexts[reply.metadata.src_node_id] = context
        return reply

    def collect(self) -> Iterable[ExactSum | None]:
        """What all replies of a round add up to, by slot. Ends whoever is still at it: their time is over."""
        for worker in self._workers:
            if worker.at_work:
                worker.given.clear()
                self._replace(worker)
        return self._fold.collect() if self._fold else ()

    def _dispatch(self, tests: bool = True) -> None:
        """Give idle workers work, and busy ones the next message too, so that they need not wait for it."""
        for worker in list(self._workers):
            if worker.given:
                continue
            if (message := self._next(tests)) is None:
                break
            if not worker.process.is_alive():
                worker = self._replace(worker)
            worker.began = time.monotonic()
            self._give(worker, message)
        for worker in self._workers if self.timeline is None else ():
            if self._queue and worker.at_work and len(worker.given) == 1 and not self._answering():
                self._give(worker, self._queue.pop(0))

    def _next(self, tests: bool) -> Message | None:
        """What an idle worker is to do; what waits for another worker too, before tests."""
        if self._queue:
            return self._queue.pop(0)
        for worker in self._workers:
            if (waiting := worker.take_back()) is not None:
                return waiting
        return self._tests.pop(0) if tests and self._tests else None

    def _answering(self) -> bool:
        """Whether the node that is next in the queue still answers an earlier message."""
        node = self._queue[0].metadata.dst_node_id
        given = (message for worker in self._workers for message in worker.given)
        return any(message is not None and message.metadata.dst_node_id == node for message in given)

    def _give(self, worker: Worker, message: Message) -> None:
        node, content = message.metadata.dst_node_id, message.content
        fresh = None if content is worker.content else content
        worker.content = content
        with TRANSFER:
            test = message.metadata.message_type == TEST
            context = self._context(node) if test else self._contexts[node]
        with suppress(OSError):  # died this moment: the end of its pipe says so to the next pull
            worker.give(message, fresh, context)

    @TRANSFER
    def _receive(self, worker: Worker) -> Answer | None:
        """What a worker has done; None of a message that was taken back."""
        asked = worker.given.popleft()
        try:
            received = worker.channel.receive()
        except (EOFError, OSError):  # killed, for memory perhaps; the next dispatch replaces it
            worker.process.join()
            self._again(worker)
            if self._fold:
                self._fold.lost(worker.slot)
            if asked is None:
                return None
            partition = self.partitions[asked.metadata.dst_node_id]
            died = "a worker process died with exit code %s at the client of partition %s"
            log(ERROR, died, worker.process.exitcode, partition)
            error = Error(ErrorCode.CLIENT_APP_CRASHED, "its worker process died")
            return Message(error, reply_to=asked), None
        worker.began = time.monotonic()
        if asked is None:
            return None
        answer, context, told = received
        CLOCK.hear(told, worker.slot + 1, self.partitions[asked.metadata.dst_node_id])
        if self._fold:
            self._fold.arrived(worker.slot)
        if isinstance(answer, tuple):
            tally, size = answer
            return Folded(worker.slot, tally, size, asked), context
        reply = Message(answer, reply_to=asked)
        if self.timeline is not None and reply.has_content():
            for metrics in reply.content.metric_records.values():
                if SECONDS in metrics:  # the client's clock is simulated too
                    metrics[SECONDS] = self._seconds_of(asked)
        return reply, context

    def _replace(self, worker: Worker) -> Worker:
        worker.end()
        self._again(worker)
        if self._fold:
            self._fold.lost(worker.slot)
        self._workers[worker.slot] = Worker(self._app, self._fold, worker.slot, self._arena)
        return self._workers[worker.slot]

    def _again(self, worker: Worker) -> None:
        """What a worker was given and has not begun goes to others."""
        self._queue[:0] = filter(None, worker.given)
        worker.given.clear()

    def commit(self, finished: int, oldest: int) -> int:
        """Bring what nodes keep to the disk (`States.commit`); returns how many keep something."""
        self._contexts.commit(finished, oldest)
        return self.remembering

    @property
    def workers(self) -> int:
        """How many processes work."""
        return len(self._workers)

    @property
    def remembering(self) -> int:
        """How many nodes have a state on the disk."""
        return self._contexts.stored

    def close(self) -> None:
        """End the worker processes, and drop what was not committed of their states."""
        for worker in self._workers:
            worker.end()
        if self._arena is not None:
            self._arena.close()
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
