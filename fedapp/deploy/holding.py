"""Answers that wait until there is something to answer: nodes need not ask all the time."""

import asyncio
from collections.abc import Callable

from flwr.proto.message_pb2 import PullObjectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedapp.deploy.bounded import QUESTION, ask, body_of, content_of

HOLD_S = 5.0  # a pull waits so long; clients give up after 30 s, and a signature is good for 300 s
SETTLE_S = 0.01  # pushes come in bursts: wait for the burst's end


class Bell:
    """Wakes those who wait for something. Take `next` before asking, then wait for it."""

    def __init__(self) -> None:
        self.next = asyncio.Event()
        self.over = False  # the server ends, and nobody waits any more

    def ring(self, over: bool = False) -> None:
        """Wake all who wait."""
        self.over = self.over or over
        self.next.set()
        self.next = asyncio.Event()


class Pushes:
    """What there may be to fetch: messages for nodes, parts of these, whole replies for ServerApps, tasks."""

    def __init__(self) -> None:
        self.messages, self.parts, self.replies = Bell(), Bell(), Bell()
        self.tasks = asyncio.Event()  # set: there may be a task that nobody has acquired
        self.tasks.set()

    def end(self) -> None:
        """Let nobody wait any more."""
        for bell in (self.messages, self.parts, self.replies):
            bell.ring(over=True)
        self.tasks.set()


async def hold(
    app: ASGIApp,
    scope: Scope,
    receive: Receive,
    send: Send,
    bell: Bell,
    empty: Callable[[bytes], bool],
    keep: Callable[[list[Message]], None] | None = None,
    seconds: float | None = None,
    most: int = QUESTION,
) -> None:
    """Answer when there is something to answer, at the latest after so many seconds, or `HOLD_S`.

    The app is asked again only where its former answer was empty, and not once the other end has left.
    An answer that is not empty goes to `keep` before it is sent. Raises Refused where the question has more
    than `most` bytes.
    """
    body = await body_of(receive, most)
    until = asyncio.get_running_loop().time() + (HOLD_S if seconds is None else seconds)
    left = asyncio.ensure_future(receive())  # after the body comes only that the other end has left
    try:
        while True:
            pushed = bell.next
            messages = await ask(app, scope, body)
            is_empty = messages[0]["status"] == 200 and empty(content_of(messages))
            remaining = until - asyncio.get_running_loop().time()
            if not is_empty or remaining <= 0 or bell.over:
                break
            waiting = asyncio.ensure_future(pushed.wait())
            try:
                await asyncio.wait({waiting, left}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if left.done():
                return
            await asyncio.sleep(SETTLE_S)
        if keep is not None and not is_empty and messages[0]["status"] == 200:
            keep(messages)
        for message in messages:
            await send(message)
    finally:
        left.cancel()


def nothing(body: bytes) -> bool:
    """Whether an answer says that there is nothing to fetch."""
    return not body


def unavailable(body: bytes) -> bool:
    """Whether an answer says that an object is announced, and not here yet."""
    if len(body) > 8:
        return False
    answer = PullObjectResponse.FromString(body)
    return answer.object_found and not answer.object_available
