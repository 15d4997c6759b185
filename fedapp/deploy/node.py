"""A participant's node: it asks the server for work, has one process a run do it, and sends the replies.

Only the installed fedapp touches the data: a run whose bundle holds another one, which nobody vouches for, is
declined, and no bundle is ever run. The process that works sees neither the server nor the key; this one
never imports torch.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedapp.deploy.activity import Activity
from fedapp.deploy.bundle import difference
from fedapp.deploy.frames import context_of, message_of, of_context, of_message, round_of
from fedapp.deploy.link import Link, Over, Refused
from fedapp.deploy.memory import Kept, Memory
from fedapp.deploy.starting import experiment, overrides_of
from fedapp.records import CKKS, SECAGG

_ASKED = 5.0  # seconds from one question whether a run goes on to the next, while its process works
_log = logging.getLogger("fedapp.client")
Config = Mapping[str, bool | int | float | str]
Signers = Collection[Ed25519PublicKey]


def serve(link: Link, memory: Memory, config: Config, activity: Activity, signers: Signers = ()) -> None:
    """Work for the server until this process is interrupted. Raises Refused where it takes no more."""
    node = Node(link, memory, config, activity, signers)
    try:
        node.catch_up()
        while True:
            message = link.receive()
            if message is None:
                node.tidy()
            else:
                node.take(message)
    finally:
        node.close()


class Node:
    """The runs that a node takes part in, each with a process of its own once it works.

    `signers` vouch for code that differs from the installed one.
    """

    def __init__(
        self, link: Link, memory: Memory, config: Config, activity: Activity, signers: Signers = ()
    ) -> None:
        self._link, self._memory, self._config, self._activity = link, memory, config, activity
        self._signers = signers
        self._id = link.open()
        self._runs = dict[int, _Run]()
        self._tidied = time.monotonic()
        _log.info("connected as node %d; waiting for work", self._id)

    def close(self) -> None:
        for run in self._runs.values():
            run.end()
        self._link.close()

    def catch_up(self) -> None:
        """Send the reply, or do the work, that was left when this node ended last time."""
        if (reply := self._memory.unsent()) is not None:
            _log.info("sending the reply that had not left")
            self._send(message_of(reply), 0.0)
        if (message := self._memory.in_work()) is not None:
            _log.info("going on with the message that was not answered")
            self._work(message_of(message), message)

    def take(self, message: Message) -> None:
        """Do what a message asks, and answer it."""
        data = of_message(message)
        new = self._memory.receive(data, message.metadata.message_id)
        self._link.confirm(message)
        if new:
            self._work(message, data)

    def tidy(self) -> None:
        """End the processes of runs that are over, looked at now and then."""
        if time.monotonic() < self._tidied + _ASKED:
            return
        self._tidied = time.monotonic()
        for number in list(self._runs):
            if not self._goes_on(number):
                self._runs.pop(number).end()
                _log.info("run %d is over", number)

    def _work(self, message: Message, data: bytes) -> None:
        number, begun = message.metadata.run_id, time.monotonic()
        try:
            at = round_of(message)
            with self._activity.work(message.metadata.message_type, at):
                run = self._runs.get(number) or self._join(number, at)
                found = run.work(data, lambda: self._goes_on(number))
        except Over:
            _log.info("run %d is over: its message is left", number)
            self._memory.drop()
            if number in self._runs:
                self._runs.pop(number).end()
            return
        took = time.monotonic() - begun
        if isinstance(found, Error):
            reply, after = of_message(Message(found, reply_to=message)), None
        else:
            reply, after = found[0], Kept(run.experiment, number, at, found[1])
        self._memory.answer(reply, after)
        sent = self._send(message_of(reply), took)
        what = message.metadata.message_type
        _log.info("run %d%s: %s took %.2f s, %s", number, f" round {at}" if at else "", what, took, sent)

    def _send(self, reply: Message, seconds: float) -> str:
        size = 0
        try:
            size = self._link.send(reply, seconds)
            said = f"sent {size} bytes" if size else "and the server needs its reply no more"
            said = f"declined: {reply.error.reason}" if reply.has_error() else said
        except Over:
            said = "the run was over before the reply was ready"
        except Refused as refused:
            said = str(refused)
        self._activity.reply(reply, taken=size > 0)
        self._memory.sent()  # not where this process was interrupted: then the next one sends it
        return said

    def _goes_on(self, number: int) -> bool:
        try:
            self._link.run(number)
        except Over:
            return False
        return True

    def _join(self, number: int, at: int) -> "_Run":
        """Look at a run for the first time: is its code the installed one? Raises Over."""
        info = self._link.run(number)
        said = difference(self._link.bundle(info), self._signers)
        overrides = overrides_of(info)
        origin = experiment(number, overrides)
        kept = self._memory.context(origin, number, at)
        context = Context(
            run_id=number,
            node_id=self._id,
            node_config=dict(self._config),
            state=RecordDict() if kept is None else _state(context_of(kept), number),
            run_config={"overrides": overrides},
        )
        _log.info("run %d: %s", number, overrides or "default settings")
        run = self._runs[number] = _Run(context, said, origin)
        return run


def _state(kept: Context, number: int) -> RecordDict:
    """What a run begins with. A round's secrets stay in the run that they were made in.

    Else a server, by beginning another, would have the same masks once more, or both of a client's opened.
    """
    if kept.run_id != number:
        for name in {SECAGG, CKKS} & kept.state.keys():
            del kept.state[name]
    return kept.state


class _Run:
    """One run on this node: who the node is in it, and the process that works."""

    def __init__(self, context: Context, declined: str | None, origin: int) -> None:
        self._context, self._declined, self.experiment = of_context(context), declined, origin
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def work(self, message: bytes, goes_on: Callable[[], bool]) -> tuple[bytes, bytes] | Error:
        """The reply to a message and the context after it, or why there is none. Raises Over."""
        if self._declined is not None:
            said = f"this node runs its own fedapp only, and the run's is another one: {self._declined}"
            return Error(ErrorCode.INVALID_FAB, said)
        pipe = self._pipe or self._start()
        try:
            pipe.send_bytes(message)
            while not pipe.poll(_ASKED):
                if not goes_on():
                    raise Over
            reply, context = pipe.recv_bytes(), pipe.recv_bytes()
        except (EOFError, OSError):
            code = self.end()
            _log.warning(
                "the process that worked ended with code %s; the next message begins with a new one", code
            )
            return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the client failed; its own log says why")
        self._context = context
        return reply, context

    def end(self) -> int | None:
        """End the process; returns its exit code."""
        if self._pipe is not None:
            self._pipe.close()
        self._pipe, process, self._process = None, self._process, None
        if process is None:
            return None
        process.kill()
        return process.wait()

    def _start(self) -> Connection:
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "fedapp.deploy.executor", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=dict(os.environ),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        threading.Thread(target=_take_over, args=(self._process.stdout,), daemon=True).start()
        self._pipe.send_bytes(self._context)
        return self._pipe


def _take_over(output: IO[bytes]) -> None:
    """Write what a process says into this node's log, which rotates."""
    levels = logging.getLevelNamesMapping()
    with output:
        for line in output:
            said = line.decode(errors="replace").rstrip()
            level, _, rest = said.partition(" ")
            _log.log(levels.get(level, logging.INFO), "%s", rest if level in levels else said)
