"""A resident worker process of the local engine: it takes a message, lets the app answer it, and waits."""

import multiprocessing
import os
import signal
import traceback
from collections import deque
from copy import copy
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedapp.engine.arena import Arena
from fedapp.engine.channel import Channel
from fedapp.fold import Fold, as_it_is
from fedapp.orphan import end_with
from fedapp.stages import CLOCK, OTHER

TEST = "query.test"  # asks a worker to test for the server: no client's work, though in the name of a node


class Worker:
    """One resident process and the messages it is given: it works on the first, the next one waits there.

    It begins a message with a ticket, of which there is one for each. Who takes the ticket of a message that
    waits has taken the message back: None is in its place until the worker has passed over it.

    To be made in a thread that lives as long as the run: on Linux the worker ends with it (`end_with`).
    """

    def __init__(self, app: ClientApp, fold: Fold | None, slot: int, arena: Arena | None = None) -> None:
        # Forked, so that modules and data are shared pages. CUDA does not survive a fork, and workers are
        # replaced at any time: the parent never touches it.
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._tickets = os.pipe()
        os.set_blocking(self._tickets[0], False)
        arguments = (theirs, ours, self._tickets[0], app, fold, slot, arena, os.getpid())
        self.process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.slot, self.channel = slot, Channel(ours, arena, asks=True)
        self.given = deque[Message | None]()
        self.began = 0.0  # when the first became that, by `time.monotonic`
        self.content: RecordDict | None = None  # what this worker received last, so that it is sent once

    @property
    def tests(self) -> bool:
        """Whether it tests the model for the server, and no client works here."""
        at = self.given[0] if self.given else None
        return at is not None and at.metadata.message_type == TEST

    @property
    def at_work(self) -> bool:
        """Whether a client works here."""
        return bool(self.given) and self.given[0] is not None and not self.tests

    def give(self, message: Message, fresh: RecordDict | None, context: Context) -> None:
        """Send it a message, its content apart: `fresh` unless it is that of the message before."""
        self.given.append(message)
        os.write(self._tickets[1], b"1")
        envelope = copy(message)
        envelope.content = RecordDict()
        self.channel.send((envelope, fresh, context))

    @property
    def waiting(self) -> Message | None:
        """The message behind the one that it works on; the worker may have begun it."""
        return self.given[1] if len(self.given) > 1 else None

    def take_back(self) -> Message | None:
        """The message that waits, if one does and the worker has not begun it."""
        waiting = self.waiting
        if waiting is None or not _taken(self._tickets[0]):
            return None
        self.given[1] = None
        return waiting

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.channel.close()
        for end in self._tickets:
            os.close(end)


def _taken(tickets: int) -> bool:
    """Whether there was a ticket; nobody else has it now."""
    try:
        return bool(os.read(tickets, 1))
    except BlockingIOError:
        return False


def _work(
    pipe: Connection,
    parents: Connection,
    tickets: int,
    app: ClientApp,
    fold: Fold | None,
    slot: int,
    arena: Arena | None,
    parent: int,
) -> None:
    """A worker's life: take a message, let the app answer it, send the reply with the node's Context.

    With it go the seconds of its stages; what sending takes is told with the next.
    """
    end_with(parent)
    parents.close()  # this process has a copy, which would keep the pipe open after the parent's death
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    channel, content = Channel(pipe, arena), RecordDict()
    CLOCK.begin(CLOCK.traced)
    while True:
        try:
            message, fresh, context = channel.receive()
        except (EOFError, OSError):  # the parent is gone
            return
        content = content if fresh is None else fresh
        message.content = content
        if not _taken(tickets):
            channel.send(None)
            continue
        with OTHER:
            try:
                reply = app(message, context)
            except Exception:
                traceback.print_exc()
                error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "see the log")
                reply = Message(error, reply_to=message)
        answer = fold.add(slot, message, reply) if fold else as_it_is(reply)
        channel.send((answer, context, CLOCK.tell()))
