"""One way to send a round's messages and take replies as they come, on any Flower Grid."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedapp.engine.timeline import Timeline
from fedapp.stages import TRANSFER, WAIT

_SHORTEST, _LONGEST = 0.001, 0.5  # seconds between polls; doubles while nothing comes
_GRACE = 1.0  # seconds that a message outlives the wait for its reply: the last poll is still held by then


def stream(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Push the messages, yield each reply as it arrives; stops when all are there or time is up.

    Flower's own `send_and_receive` returns one list at the end, and polls every 3 s in a deployment.
    """
    for replies in arrivals(grid, messages, timeout):
        yield from replies


def arrivals(
    grid: Grid, messages: Iterable[Message], timeout: float, until: float = float("inf")
) -> Iterator[list[Message]]:
    """As `stream`, but those that arrive together.

    timeout: in seconds that really pass. until: a time on the grid's clock (`now`), which may be simulated.
    A message that nobody waits for any more has expired: no node is given it, and no reply to it is taken.
    """
    messages = list(messages)
    if _timeline(grid) is None:
        for message in messages:
            message.metadata.ttl = max(0.0, min(timeout, until - now(grid))) + _GRACE
    with TRANSFER:
        waiting = set(grid.push_messages(messages))
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline and now(grid) < until:
        replies = []
        for reply in next_replies(grid, waiting, deadline, until):
            if reply.metadata.reply_to_message_id in waiting:  # each message is answered once
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        yield replies


@WAIT
def next_replies(
    grid: Grid, waiting: set[str], deadline: float, until: float = float("inf")
) -> list[Message]:
    """The replies that come first; none if time is up, by `time.monotonic` or by the grid's clock."""
    pause, longest = _SHORTEST, getattr(grid, "longest_pause", _LONGEST)
    if (timeline := _timeline(grid)) is not None:
        timeline.until = until
    while (
        not (replies := list(grid.pull_messages(waiting)))
        and time.monotonic() < deadline
        and now(grid) < until
    ):
        pause = min(2 * pause, longest)
        time.sleep(pause)
    return replies


def now(grid: Grid) -> float:
    """Seconds on the grid's clock, which may be simulated."""
    timeline = _timeline(grid)
    return time.monotonic() if timeline is None else timeline.now


def _timeline(grid: Grid) -> Timeline | None:
    found = getattr(grid, "timeline", None)
    return found if isinstance(found, Timeline) else None
