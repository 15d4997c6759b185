"""Answers that wait until there is something to answer: nodes need not ask all the time."""

import asyncio
from collections.abc import Callable

from flwr.proto.message_pb2 import PullObjectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedapp.deploy.bounded import QUESTION, ask, body_of

HOLD_S = 5.0  # a pull waits so long; clients give up after 30 s, and a signature is good for 300 s
_SETTLE_S = 0.01  # pushes come in bursts: wait for the burst's end


class Pushes:
    """Tells those who wait that something was pushed. Take `next` before asking, then wait for it."""

    def __init__(self) -> None:
        self.next = asyncio.Event()
        self.over = False  # the server ends, and nobody waits any more
        self.tasks = asyncio.Event()  # set: there may be a task that nobody has acquired
        self.tasks.set()

    def tell(self, over: bool = False) -> None:
        """Wake all who wait."""
        self.over = self.over or over
        if over:
            self.tasks.set()
        self.next.set()
        self.next = asyncio.Event()


async def hold(
    app: ASGIApp,
    scope: Scope,
    receive: Receive,
    send: Send,
    pushes: Pushes,
    empty: Callable[[bytes], bool],
    keep: Callable[[list[Message]], None] | None = None,
) -> None:
    """Answer when there is something to answer, at the latest after `HOLD_S`.

    The app is asked again only where its former answer was empty, and not once the other end has left.
    An answer that is not empty goes to `keep` before it is sent.
    """
    body = await body_of(receive, QUESTION)
    until = asyncio.get_running_loop().time() + HOLD_S
    left = asyncio.ensure_future(receive())  # after the body comes only that the other end has left
    try:
        while True:
            pushed = pushes.next
            messages = await ask(app, scope, body)
            content = b"".join(message.get("body", b"") for message in messages)
            is_empty = messages[0]["status"] == 200 and empty(content)
            remaining = until - asyncio.get_running_loop().time()
            if not is_empty or remaining <= 0 or pushes.over:
                break
            waiting = asyncio.ensure_future(pushed.wait())
            try:
                await asyncio.wait({waiting, left}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if left.done():
                return
            await asyncio.sleep(_SETTLE_S)
        if keep is not None and not is_empty and messages[0]["status"] == 200:
            keep(messages)
        for message in messages:
            await send(message)
    finally:
        left.cancel()


def unavailable(body: bytes) -> bool:
    """Whether an answer says that an object is announced, and not here yet."""
    if len(body) > 8:
        return False
    answer = PullObjectResponse.FromString(body)
    return answer.object_found and not answer.object_available
