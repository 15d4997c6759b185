"""Simulated time: answers come in the order in which clients would send them, whoever computes them when."""

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
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
        self._due, self._done = dict[str, tuple[float, int]](), dict[str, Answer]()
        self._order = list[tuple[tuple[float, int], str]]()  # a heap of what is due, and of what was

    def sent(self, message: Message) -> None:
        """The client of this message begins now."""
        self._comes(message.metadata.message_id, self.now + self._seconds(message), next(self._count))

    def due(self, message: Message) -> tuple[float, int]:
        """What sorts messages by when they are answered."""
        return self._due[message.metadata.message_id]

    def done(self, answer: Answer, sending: float = 0.0) -> None:
        """Somebody has computed an answer; it comes when it is due, which is so many seconds later."""
        name = answer[0].metadata.reply_to_message_id
        if name in self._due:
            due, order = self._due[name]
            self._done[name] = answer
            if sending:
                self._comes(name, due + sending, order)

    def drop(self, names: Iterable[str]) -> None:
        """Nobody waits for the answers to these messages any more."""
        for name in names:
            self._due.pop(name, None)
            self._done.pop(name, None)

    def next(self) -> Answer | None:
        """The next answer, to which the clock moves; None where nobody has computed it, or time is up."""
        while self._order and self._due.get(self._order[0][1]) != self._order[0][0]:
            heappop(self._order)
        if not self._order:
            return None
        (due, _), first = self._order[0]
        if due > self.until:
            self.now = self.until
            return None
        if first not in self._done:
            return None
        self.now = self._due.pop(first)[0]
        return self._done.pop(first)

    def _comes(self, name: str, due: float, order: int) -> None:
        self._due[name] = due, order
        heappush(self._order, (self._due[name], name))
