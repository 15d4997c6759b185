"""Simulated time: answers come in the order in which clients would send them, whoever computes them when."""

from collections.abc import Callable, Container
from itertools import count

from flwr.app import Context, Message

Answer = tuple[Message, Context | None]
"""A reply, and what its node keeps from then on; None where that is lost."""


class Timeline:
    """A clock that moves from one answer to the next, so that nobody waits, and workers change no order.

    A client that is sent a message at time t has its answer at t + `seconds`, and then sends it as long as
    `done` says; of those that answer at one time, the one that was sent its message first comes first. `now`
    is the time of the last answer, and never later than `until`. What is not waited for any more is dropped:
    its client was stopped, and keeps what it had.
    """

    def __init__(self, seconds: Callable[[Message], float]) -> None:
        self.now, self.until = 0.0, float("inf")
        self._seconds, self._count = seconds, count()
        self._due = dict[str, tuple[float, int]]()
        self._done = dict[str, Answer]()

    def sent(self, message: Message) -> None:
        """The client of this message begins now."""
        self._due[message.metadata.message_id] = self.now + self._seconds(message), next(self._count)

    def due(self, message: Message) -> tuple[float, int]:
        """What sorts messages by when they are answered."""
        return self._due[message.metadata.message_id]

    def done(self, answer: Answer, sending: float = 0.0) -> None:
        """Somebody has computed an answer; it comes when it is due, which is so many seconds later."""
        name = answer[0].metadata.reply_to_message_id
        if name in self._due:
            due, order = self._due[name]
            self._due[name], self._done[name] = (due + sending, order), answer

    def keep(self, wanted: Container[str]) -> None:
        """Drop what nobody waits for."""
        self._due = {name: due for name, due in self._due.items() if name in wanted}
        self._done = {name: answer for name, answer in self._done.items() if name in wanted}

    def next(self) -> Answer | None:
        """The next answer, to which the clock moves; None where nobody has computed it, or time is up."""
        first = min(self._due, key=self._due.__getitem__, default=None)
        if first is None:
            return None
        if self._due[first][0] > self.until:
            self.now = self.until
            return None
        if first not in self._done:
            return None
        self.now = self._due.pop(first)[0]
        return self._done.pop(first)
