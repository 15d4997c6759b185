"""How much of a request is read, and how one is refused: plain ASGI, so that streams stay streams."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.types import ASGIApp, Message, Receive, Scope, Send

QUESTION = 1 << 16  # bytes of a request that may be held, and be asked again
_LINGER, _LINGER_S = 1 << 20, 1.0  # bytes, seconds of a body that nobody reads
_BODY_S, _SLOWEST = 60.0, 1 << 10  # seconds between two pieces of a body; bytes in each second beyond so many
_AT_ONCE = 4  # of the largest bodies
_Parsed = TypeVar("_Parsed")
_log = logging.getLogger("fedapp.server")


class Refused(Exception):  # noqa: N818
    """A request that is not let through: its HTTP status, and why, in words for who asked."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


_REASONS = {
    400: "malformed",
    401: "credentials",
    403: "forbidden",
    404: "path",
    408: "timeout",
    413: "size",
    503: "busy",
}


class Refusals:
    """One log line a refusal, at most 20 in 10 seconds; a count stands for the others.

    `counts` has all of them by reason: a few words, whoever is refused what.
    """

    def __init__(self, most: int = 20, seconds: float = 10.0) -> None:
        self._most, self._seconds = most, seconds
        self._since, self._told = 0.0, 0
        self.counts = Counter[str]()

    def tell(self, who: str, what: str, why: str, status: int | None = None) -> None:
        """Log it. No header and no body is in any of the three. `status` None: there was no request yet."""
        self.counts["handshake" if status is None else _REASONS.get(status, "other")] += 1
        at = time.monotonic()
        if at - self._since > self._seconds:
            if self._told > self._most:
                _log.warning("refused %d more requests", self._told - self._most)
            self._since, self._told = at, 0
        self._told += 1
        if self._told <= self._most:
            _log.warning("refused %s: %s: %s", who, what, why)


class Bodies:
    """How many bytes of bodies are held at one time: of each sender one largest body, of all four.

    Counted is what a request says that it brings, before it is read; small ones are not counted.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, Counter[bytes]()

    @contextmanager
    def room(self, who: bytes, headers: Mapping[bytes, bytes]) -> Iterator[None]:
        """Hold room for a request's body; Refused, 503, where there is none now."""
        length = headers.get(b"content-length", b"")
        chunked = self._most if b"transfer-encoding" in headers else 0
        size = min(int(length), self._most) if length.isdigit() else chunked
        if size <= QUESTION:
            yield
            return
        if self._held[who] + size > self._most or self._held.total() + size > _AT_ONCE * self._most:
            raise Refused(503, "too many bodies come at one time: ask again later")
        self._held[who] += size
        try:
            yield
        finally:
            self._held[who] -= size
            self._held += Counter()  # drops who holds nothing


class Answer:
    """What goes back to whom, and whether it has begun."""

    def __init__(self, send: Send, who: str = "") -> None:
        self._send, self.who, self.status, self.size = send, who, 0, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.size += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refused: Refused, receive: Receive) -> None:
        """Answer, and hang up; before that drop some of what still comes, so that the answer arrives."""
        if self.status:  # too late for another answer
            return
        body = json.dumps({"detail": refused.why}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await self({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": True})
        with suppress(TimeoutError):
            await asyncio.wait_for(_dropped(receive), _LINGER_S)
        await self({"type": "http.response.body", "body": b""})


async def _dropped(receive: Receive) -> None:
    left, more = _LINGER, True
    while more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        more = message.get("more_body", False)


async def through(app: ASGIApp, scope: Scope, receive: Receive, send: Send, most: int) -> None:
    """Ask the app, reading at most so many bytes of the body. Raises Refused, 413 or 408."""
    length = headers_of(scope).get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
        raise Refused(413, f"{int(length)} bytes, and the most is {most}: `fedapp server --max-body` sets it")
    body = _Body(receive, most)
    refused: Refused | None = None

    async def counted() -> Message:
        nonlocal refused
        if not body.more:
            return await receive()  # when the other end leaves
        try:
            return await body.piece()
        except Refused as why:
            refused, body.more = why, False
            return {"type": "http.disconnect"}

    async def unless_refused(message: Message) -> None:
        if refused is None:
            await send(message)

    try:
        await app(scope, counted, unless_refused)
    except Exception:
        if refused is None:
            raise
    if refused is not None:
        raise refused


async def ask(app: ASGIApp, scope: Scope, body: bytes) -> list[Message]:
    """The app's whole answer to a small request; the scope is copied, for apps write into it."""
    messages: list[Message] = []
    given = False
    over = asyncio.Event()

    async def replayed() -> Message:
        nonlocal given
        if given:
            await over.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def kept(message: Message) -> None:
        messages.append(message)

    copy: dict[str, Any] = {**scope, "state": dict(scope.get("state", {}))}
    try:
        await app(copy, replayed, kept)
    finally:
        over.set()
    return messages


def content_of(messages: list[Message]) -> bytes:
    """The body of a whole answer."""
    return b"".join(message.get("body", b"") for message in messages)


async def body_of(receive: Receive, most: int) -> bytes:
    body, whole = _Body(receive, most), bytearray()
    while body.more:
        whole += (await body.piece()).get("body", b"")
    return bytes(whole)


class _Body:
    """A request's body, piece by piece, as long as its sender sends; `more` says whether there is more."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._begun = receive, most, time.monotonic()
        self.got, self.more = 0, True

    async def piece(self) -> Message:
        """The next piece. Raises Refused, 408 or 413."""
        try:
            message = await asyncio.wait_for(self._receive(), _BODY_S)
        except TimeoutError as error:
            raise Refused(408, f"no data for {_BODY_S:.0f} s") from error
        self.got += len(message.get("body", b""))
        if self.got > self._most:
            raise Refused(413, f"more than {self._most} bytes: `fedapp server --max-body` sets it")
        self.more = message.get("more_body", False)
        if self.more and time.monotonic() - self._begun > _BODY_S + self.got / _SLOWEST:
            raise Refused(408, f"slower than {_SLOWEST} bytes a second")
        return message


def parsed(kind: type[_Parsed], data: bytes) -> _Parsed:
    """A message of protobuf; Refused, 400, where the bytes are none."""
    try:
        return kind.FromString(data)  # type: ignore[attr-defined,no-any-return]
    except DecodeError as error:
        raise Refused(400, "the request cannot be read") from error


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    return dict(reversed(scope["headers"]))  # of several, the first, as in Flower's app
