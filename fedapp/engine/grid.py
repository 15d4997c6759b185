"""One way to send a round's messages and take replies as they come, on any Flower Grid."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedapp.stages import TRANSFER, WAIT

_SHORTEST, _LONGEST = 0.001, 0.5  # seconds between polls; doubles while nothing comes


def stream(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Push the messages, yield each reply as it arrives; stops when all are there or time is up.

    Flower's own `send_and_receive` returns one list at the end, and polls every 3 s in a deployment.
    """
    longest = getattr(grid, "longest_pause", _LONGEST)
    with TRANSFER:
        waiting = set(grid.push_messages(messages))
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        for reply in _next(grid, waiting, deadline, longest):
            if reply.metadata.reply_to_message_id in waiting:  # each message is answered once
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply


@WAIT
def _next(grid: Grid, waiting: set[str], deadline: float, longest: float) -> list[Message]:
    """The replies that come first; none if time is up."""
    pause = _SHORTEST
    while not (replies := list(grid.pull_messages(waiting))) and time.monotonic() < deadline:
        pause = min(2 * pause, longest)
        time.sleep(pause)
    return replies
