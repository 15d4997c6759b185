"""The worker processes of the local engine, and the messages that they are given."""

import multiprocessing.connection
import os
import resource
import time
from bisect import insort
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from logging import ERROR
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore import log

from fedapp.engine.arena import Arena
from fedapp.engine.worker import Worker
from fedapp.fold import Fold, Folded
from fedapp.stages import CLOCK, TRANSFER

_FILES, _OTHERS = 5, 256  # that this process opens for a worker; and for all else


class Done(NamedTuple):
    """What was asked, the reply, and what its node keeps from then on; None where that is lost."""

    asked: Message
    reply: Message
    context: Context | None


class Pool:
    """Workers that answer messages, one after the other; who dies is replaced, which costs one reply.

    `context` finds what a node keeps, when its message is given to a worker. With `ahead` a busy worker is
    given the next message too, so that it need not wait for it; an idle one takes it back.
    """

    def __init__(
        self,
        app: ClientApp,
        fold: Fold | None,
        workers: int,
        partitions: Mapping[int, int],
        context: Callable[[Message], Context],
        ahead: bool,
        client_timeout: float | None = None,
    ) -> None:
        self._app, self._fold, self._partitions, self._context = app, fold, partitions, context
        self._ahead, self._client_timeout = ahead, client_timeout
        self.queue, self.tests = list[Message](), list[Message]()  # not begun
        _allow_files(_FILES * workers)
        self._arena = Arena() if workers and hasattr(os, "memfd_create") else None  # on Linux
        self.workers = [Worker(app, fold, slot, self._arena) for slot in range(workers)]

    def add(self, message: Message, key: Callable[[Message], Any]) -> None:
        """Put a message into the queue, which this key sorts."""
        insort(self.queue, message, key=key)

    def drop(self, names: Container[str]) -> None:
        """Drop of what is not begun the messages of these ids."""
        self.queue = [message for message in self.queue if message.metadata.message_id not in names]
        for worker in self.workers:
            if worker.waiting is not None and worker.waiting.metadata.message_id in names:
                worker.take_back()

    @property
    def testing(self) -> bool:
        """Whether there are tests that nobody has done."""
        return bool(self.tests) or any(worker.tests for worker in self.workers)

    def dispatch(self, making: bool = False) -> None:
        """Give workers what there is to do; tests to those that no client needs.

        While messages are `making` clients may need them yet. And nobody is forked, here and in `done`:
        threads that make them may hold locks.
        """
        for worker in list(self.workers):
            if worker.given:
                continue
            alive = worker.process.is_alive()
            if making and not alive:
                continue
            if (message := self._next(tests=not making)) is None:
                break
            worker = worker if alive else self._replace(worker)
            worker.began = time.monotonic()
            self._give(worker, message)
        # The worker of the largest client gets the least: what waits behind it is taken back last.
        for worker in reversed(self.workers) if self._ahead else ():
            if self.queue and worker.at_work and len(worker.given) == 1 and not self._answering():
                self._give(worker, self.queue.pop(0))

    def done(self, pause: float, making: bool = False) -> list[Done]:
        """Dispatch, and take what workers have done; waits so many seconds for the first one."""
        self.dispatch(making)
        busy = {worker.channel.pipe: worker for worker in self.workers if worker.given}
        ready = multiprocessing.connection.wait(list(busy), pause)
        came = [self._receive(worker, making) for pipe, worker in busy.items() if pipe in ready]
        late = [self._give_up(worker) for worker in busy.values() if not making and self._overdue(worker)]
        return [one for one in came if one is not None] + late

    def stop(self) -> None:
        """End whoever is at work for a client: its time is over."""
        for worker in self.workers:
            if worker.at_work:
                worker.given.clear()
                self._replace(worker)

    def _next(self, tests: bool) -> Message | None:
        """What an idle worker is to do; what waits for another worker too, before tests."""
        if self.queue:
            return self.queue.pop(0)
        for worker in self.workers:
            if (waiting := worker.take_back()) is not None:
                return waiting
        return self.tests.pop(0) if tests and self.tests else None

    def _answering(self) -> bool:
        """Whether the node that is next in the queue still answers an earlier message."""
        node = self.queue[0].metadata.dst_node_id
        given = (message for worker in self.workers for message in worker.given)
        return any(message is not None and message.metadata.dst_node_id == node for message in given)

    def _give(self, worker: Worker, message: Message) -> None:
        fresh = None if message.content is worker.content else message.content
        worker.content = message.content
        with TRANSFER:
            context = self._context(message)
        with suppress(OSError):  # died this moment: the end of its pipe says so to the next pull
            worker.give(message, fresh, context)

    @TRANSFER
    def _receive(self, worker: Worker, making: bool) -> Done | None:
        """What a worker has done; None of a message that was taken back, or of a death to be heard later."""
        asked = worker.given.popleft()
        try:
            received = worker.channel.receive()
        except (EOFError, OSError):  # killed, for memory perhaps
            if making:
                worker.given.appendleft(asked)  # a pipe ends more than once
                return None
            worker.process.join()
            code = worker.process.exitcode
            self._replace(worker)
            if asked is None:
                return None
            partition = self._partitions[asked.metadata.dst_node_id]
            log(
                ERROR,
                "a worker process died with exit code %s at the client of partition %s",
                code,
                partition,
            )
            return _crashed(asked, "its worker process died")
        worker.began = time.monotonic()
        if asked is None:
            return None
        answer, context, told = received
        CLOCK.hear(told, worker.slot + 1, self._partitions[asked.metadata.dst_node_id])
        if self._fold:
            self._fold.arrived(worker.slot)
        if isinstance(answer, tuple):
            tally, size = answer
            return Done(asked, Folded(worker.slot, tally, size, asked), context)
        return Done(asked, Message(answer, reply_to=asked), context)

    def _overdue(self, worker: Worker) -> bool:
        """Whether the client that a worker works for has had its time, which passes in fact."""
        if self._client_timeout is None or not worker.at_work:
            return False
        over = time.monotonic() - worker.began > self._client_timeout
        return over and not worker.channel.pipe.poll()

    def _give_up(self, worker: Worker) -> Done:
        """The answer of a client whose time is over, in its place; it keeps what it had."""
        asked = worker.given.popleft()
        assert asked is not None
        self._replace(worker)
        log(
            ERROR,
            "the client of partition %s was ended after %.1f s of a %s message: "
            "where clients may take longer, set engine.client_timeout above %g",
            self._partitions[asked.metadata.dst_node_id],
            time.monotonic() - worker.began,
            asked.metadata.message_type,
            self._client_timeout,
        )
        return _crashed(asked, f"engine.client_timeout={self._client_timeout:g} is over")

    def close(self) -> None:
        """End the worker processes."""
        for worker in self.workers:
            worker.end()
        if self._arena is not None:
            self._arena.close()

    def _replace(self, worker: Worker) -> Worker:
        """Another worker in its place; what it was given and has not begun goes to others."""
        worker.end()
        self.queue[:0] = filter(None, worker.given)
        worker.given.clear()
        if self._fold:
            self._fold.lost(worker.slot)
        self.workers[worker.slot] = Worker(self._app, self._fold, worker.slot, self._arena)
        return self.workers[worker.slot]


def _crashed(asked: Message, why: str) -> Done:
    """The answer of a client whose worker has ended, in its place."""
    return Done(asked, Message(Error(ErrorCode.CLIENT_APP_CRASHED, why), reply_to=asked), None)


def _allow_files(more: int) -> None:
    """Let this process open so many files more, as far as the hard limit goes: the soft one may be low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = more + _OTHERS if hard == resource.RLIM_INFINITY else min(more + _OTHERS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
