"""One way to send a round's messages and take replies as they come, on any Flower Grid."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

_SHORTEST, _LONGEST = 0.001, 0.5  # seconds between polls; doubles while nothing comes


def stream(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Push the messages, yield each reply as it arrives; stops when all are there or time is up.

    Flower's own `send_and_receive` returns one list at the end, and polls every 3 s in a deployment.
    """
    longest = getattr(grid, "longest_pause", _LONGEST)
    waiting = set(grid.push_messages(messages))
    deadline, pause = time.monotonic() + timeout, _SHORTEST
    while waiting and time.monotonic() < deadline:
        replies = list(grid.pull_messages(waiting))
        for reply in replies:
            if reply.metadata.reply_to_message_id in waiting:  # each message is answered once
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
        pause = _SHORTEST if replies else min(2 * pause, longest)
        if waiting and not replies:
            time.sleep(pause)
