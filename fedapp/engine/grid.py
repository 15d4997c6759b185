"""One way to send a round's messages and take replies as they come, on any Flower Grid.

Each request carries a random nonce in Flower's `group_id`, which replies bring back: one from another time,
or to another request, is an error instead.
"""

import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from logging import WARNING

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore import log

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
    waiting = push(grid, messages, timeout, until)
    deadline = time.monotonic() + timeout
    try:
        while waiting and time.monotonic() < deadline and now(grid) < until:
            replies = []
            for reply in next_replies(grid, waiting.keys(), deadline, until):
                asked = waiting.pop(reply.metadata.reply_to_message_id, None)
                if asked is not None:  # each message is answered once
                    replies.append(answer(asked, reply))
            yield replies
    finally:
        forget(grid, waiting)


@TRANSFER
def push(
    grid: Grid, messages: Iterable[Message], timeout: float | None = None, until: float = float("inf")
) -> dict[str, Message]:
    """Give each message a nonce and push all; returns them by name, without those that the grid refused.

    Replies are waited for as in `arrivals`; the grid says for how long where there is no timeout. A grid that
    `streams` is given one by one what an iterator makes.
    """
    pushed, streams = dict[str, Message](), getattr(grid, "streams", False) and isinstance(messages, Iterator)
    try:
        for some in ([one] for one in messages) if streams else [list(messages)]:
            for message in some:
                message.metadata.__dict__["_group_id"] = secrets.token_hex(16)
                # It lives from here on, however long it was in making.
                message.metadata.created_at = time.time()
                if timeout is not None and _timeline(grid) is None:
                    message.metadata.ttl = max(0.0, min(timeout, until - now(grid))) + _GRACE
            names = grid.push_messages(some)  # empty ones, or none at all, of what is too large
            pushed |= {name: message for name, message in zip(names, some, strict=False) if name}
    except BaseException:  # nobody waits for the first ones where others cannot be made
        forget(grid, pushed)
        raise
    return pushed


def answer(asked: Message, reply: Message) -> Message:
    """The reply; an error in its place where it brings back another nonce, or is another node's."""
    same = reply.metadata.group_id == asked.metadata.group_id
    if reply.has_error() or (same and reply.metadata.src_node_id == asked.metadata.dst_node_id):
        return reply
    said = "it does not bring back the nonce of what was asked"
    log(WARNING, "reply of node %s refused: %s", reply.metadata.src_node_id, said)
    return Message(Error(ErrorCode.UNKNOWN, said), reply_to=asked)


@WAIT
def next_replies(
    grid: Grid, waiting: Collection[str], deadline: float, until: float = float("inf")
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


def forget(grid: Grid, names: Collection[str]) -> None:
    """Nobody waits for replies to these messages any more: a grid that can tell begins none of them."""
    if names and (told := getattr(grid, "forget", None)):
        told(names)


def now(grid: Grid) -> float:
    """Seconds on the grid's clock, which may be simulated."""
    timeline = _timeline(grid)
    return time.monotonic() if timeline is None else timeline.now


def _timeline(grid: Grid) -> Timeline | None:
    found = getattr(grid, "timeline", None)
    return found if isinstance(found, Timeline) else None
