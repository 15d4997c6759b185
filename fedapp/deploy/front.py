"""What stands before Flower's app on the network: who may ask what, and how much is read.

Flower's SuperLink serves three APIs on one port, and its node keys guard only one of them, after the whole
body is read. Here two listeners share the app: `Public` lets nodes with a registered key and the operator
through, before a byte of the body is read; `Private`, on the loopback address, lets the Runtime API through,
which its own secrets guard. Plain ASGI, so that streams stay streams.
"""

import asyncio
import hmac
import json
import logging
import time
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.common.constant import (
    HEARTBEAT_MAX_INTERVAL,
    HEARTBEAT_MIN_INTERVAL,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, PushMessagesRequest
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedapp.deploy.keys import fingerprint

_FLEET, _RUNTIME = "/v1/fleet/", "/v1/runtime/"
_HAS_IT = frozenset({"get-run", "get-fab", "pull-object", "confirm-message-received"})  # what a message holds
_NODES_OWN = _HAS_IT | {  # what a node asks; registering is the operator's
    *("activate-node", "deactivate-node", "send-node-heartbeat"),
    *("pull-messages", "push-messages", "push-object"),
}
_PULL, _PUSH, _ACTIVATE = (f"{_FLEET}{name}" for name in ("pull-messages", "push-messages", "activate-node"))
HOLD_S = 5.0  # a pull waits so long; clients give up after 30 s, and a signature is good for 300 s
_TASK_S = 2.0  # the longest that a task waits which nobody told of: one from before a restart
_SETTLE_S = 0.01  # pushes come in bursts: wait for the burst's end
_QUESTION = 1 << 16  # bytes of a request that may be held, and be asked again
_LINGER, _LINGER_S = 1 << 20, 1.0  # bytes, seconds of a body that nobody reads
_BODY_S = 60.0  # between two pieces of a body
_Request = TypeVar("_Request", ActivateNodeRequest, PushMessagesRequest)
_log = logging.getLogger("fedapp.server")


class Refused(Exception):  # noqa: N818
    """A request that is not let through: its HTTP status, and why, in words for who asked."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


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


class Refusals:
    """One log line a refusal, at most 20 in 10 seconds; a count stands for the others."""

    def __init__(self, most: int = 20, seconds: float = 10.0) -> None:
        self._most, self._seconds = most, seconds
        self._since, self._told = 0.0, 0

    def tell(self, who: str, what: str, why: str) -> None:
        """Log it. No header and no body is in any of the three."""
        at = time.monotonic()
        if at - self._since > self._seconds:
            if self._told > self._most:
                _log.warning("refused %d more requests", self._told - self._most)
            self._since, self._told = at, 0
        self._told += 1
        if self._told <= self._most:
            _log.warning("refused %s: %s: %s", who, what, why)


@dataclass
class Public:
    """The listener for everybody.

    `routes` are fedapp's own paths, `/fedapp/...`, behind the operator's token like Flower's Control API.
    Without `keyed` (loopback only) nodes bring keys that nobody registered. `max_body` is in bytes.
    """

    app: ASGIApp
    linkstate: Callable[[], LinkState]
    token: str
    pushes: Pushes
    routes: ASGIApp
    max_body: int
    keyed: bool = True
    refusals: Refusals = field(default_factory=Refusals)
    _handed: dict[bytes, list[Message]] = field(default_factory=dict)  # to a key, not known to have arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no WebSocket is offered
        what, answer = f"{scope['method']} {_printable(scope['path'])}", _Answer(send, _who(scope))
        try:
            await self._answered(scope, receive, answer)
        except Refused as refused:
            self.refusals.tell(answer.who, what, refused.why)
            await answer.refuse(refused, receive)
        else:
            if answer.status >= 400:
                self.refusals.tell(answer.who, what, f"answered {answer.status}")

    async def _answered(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        method, path = scope["method"], scope["path"]
        if path == "/health" and method == "GET":
            for message in await _ask(self.app, scope, b""):
                await answer(message)
        elif path.startswith(_FLEET) and method == "POST":
            key = await run_in_threadpool(self._node, path, _headers(scope))
            answer.who += f" ({fingerprint(key)})"
            if path.removeprefix(_FLEET) in _HAS_IT:
                self._handed.pop(key, None)
            if path == _ACTIVATE:
                await self._activate(key, receive, answer)
            elif path == _PUSH:
                await self._push(scope, receive, answer)
            elif path == _PULL:
                await self._pull(key, scope, receive, answer)
            elif path == f"{_FLEET}pull-object":
                await _hold(self.app, scope, receive, answer, self.pushes, _unavailable)
            else:
                await through(self.app, scope, receive, answer, self.max_body)
                if path == f"{_FLEET}push-object":
                    self.pushes.tell()
        elif path.startswith(("/v1/control/", "/fedapp/")):
            self._operator(_headers(scope))
            if not path.startswith(("/v1/control/list-", "/v1/control/stream-")):
                _log.info("operator at %s: %s", answer.who, _printable(path))
            own = path.startswith("/fedapp/")
            await through(self.routes if own else self.app, scope, receive, answer, self.max_body)
            if path.startswith("/v1/control/start-"):
                self.pushes.tasks.set()
        else:
            raise Refused(404, "there is nothing here")

    async def _activate(self, key: bytes, receive: Receive, answer: "_Answer") -> None:
        """Let a node in that says it is there: at once, even if it was killed and still counts as online.

        Flower would refuse it until then, and meanwhile give its work up for lost.
        """
        request = _parsed(ActivateNodeRequest, await _body(receive, _QUESTION))
        least, most = HEARTBEAT_MIN_INTERVAL, HEARTBEAT_MAX_INTERVAL
        number = await run_in_threadpool(self.linkstate().get_node_id_by_public_key, key)
        if request.public_key != key or number is None or not least <= request.heartbeat_interval <= most:
            raise Refused(401, "this is no request of this node")
        beat = self.linkstate().acknowledge_node_heartbeat
        if not await run_in_threadpool(beat, number, request.heartbeat_interval):
            raise Refused(401, "this node is registered no more")
        headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode())]
        await answer({"type": "http.response.start", "status": 200, "headers": headers})
        content = ActivateNodeResponse(node_id=number).SerializeToString()
        await answer({"type": "http.response.body", "body": content})

    async def _push(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Take a reply in the node's own name: Flower checks whose request it is, not whose reply."""
        body = await _body(receive, self.max_body)
        request = _parsed(PushMessagesRequest, body)
        if any(reply.metadata.src_node_id != request.node.node_id for reply in request.messages_list):
            raise Refused(403, "a reply in the name of another node")
        for message in await _ask(self.app, scope, body):
            await answer(message)
        self.pushes.tell()

    async def _pull(self, key: bytes, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Answer a node that asks for a message. Flower marks one as delivered once it is handed out, so an
        answer that a broken link swallowed is handed out again, until the node asks for what is in it."""
        if key in self._handed:
            await _body(receive, _QUESTION)
            for message in self._handed[key]:
                await answer(message)
            return

        def keep(messages: list[Message]) -> None:
            self._handed[key] = messages

        await _hold(self.app, scope, receive, answer, self.pushes, lambda body: not body, keep)

    def _node(self, path: str, headers: dict[bytes, bytes]) -> bytes:
        """The public key, in PEM, of the registered node that signed these headers."""
        if path.removeprefix(_FLEET) not in _NODES_OWN and self.keyed:
            raise Refused(404, "there is nothing here")
        try:
            pem = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
            signed = headers[TIMESTAMP_HEADER.encode()]
            age = (now() - datetime.fromisoformat(signed.decode("ascii"))).total_seconds()
            public = bytes_to_public_key(pem)
            if not uses_nist_ec_curve(public) or not verify_signature(public, signed, signature):
                raise Refused(401, "the signature is not of this key")
        except KeyError as error:
            raise Refused(401, "no node key: nodes join with the key of `fedapp keys node`") from error
        except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
            raise Refused(401, "the node's key, time or signature cannot be read") from error
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            raise Refused(401, f"signed {age:.0f} s ago by the node's clock: set that clock")
        if self.keyed and self.linkstate().get_node_id_by_public_key(pem) is None:
            raise Refused(401, "no node is registered with this key: send its public half to the operator")
        return pem

    def _operator(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(sha256(given.strip()).digest(), sha256(self.token.encode()).digest())
        if scheme.lower() != b"bearer" or not right:
            raise Refused(401, "this needs the operator's token")


@dataclass
class Private:
    """The listener on the loopback address, for SuperExec and the ServerApps: the Runtime API only."""

    app: ASGIApp
    pushes: Pushes
    max_body: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through; wake nodes that wait for what it pushed."""
        if scope["type"] != "http":
            return
        path, answer = scope["path"], _Answer(send)
        try:
            if not path.startswith(_RUNTIME):
                raise Refused(404, "there is nothing here")
            if path == f"{_RUNTIME}acquire-task":
                await self._acquire(scope, receive, answer)
            elif path == f"{_RUNTIME}pull-object":
                await _hold(self.app, scope, receive, answer, self.pushes, _unavailable)
            else:
                await through(self.app, scope, receive, answer, self.max_body)
        except Refused as refused:
            await answer.refuse(refused, receive)
        if path in (f"{_RUNTIME}push-messages", f"{_RUNTIME}push-object"):
            self.pushes.tell()
        elif path in (f"{_RUNTIME}create-task", f"{_RUNTIME}start-automation"):
            self.pushes.tasks.set()

    async def _acquire(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Ask for a task once there may be one: Flower takes 10 ms of a core to say that there is none."""
        tasks = self.pushes.tasks
        with suppress(TimeoutError):
            await asyncio.wait_for(tasks.wait(), _TASK_S)
        tasks.clear()
        await through(self.app, scope, receive, answer, _QUESTION)
        if answer.size:  # a task, and there may be more
            tasks.set()


class _Answer:
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
    length = _headers(scope).get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
        raise Refused(413, f"{int(length)} bytes, and the most is {most}: `fedapp server --max-body` sets it")
    got, more, refused = 0, True, None

    async def counted() -> Message:
        nonlocal got, more, refused
        if not more:
            return await receive()  # when the other end leaves
        try:
            message = await asyncio.wait_for(receive(), _BODY_S)
        except TimeoutError:
            message, refused = {"type": "http.disconnect"}, Refused(408, f"no data for {_BODY_S:.0f} s")
        got += len(message.get("body", b""))
        if got > most:
            message = {"type": "http.disconnect"}
            refused = Refused(413, f"more than {most} bytes: `fedapp server --max-body` sets it")
        more = message.get("more_body", False)
        return message

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


async def _hold(
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
    body = await _body(receive, _QUESTION)
    until = asyncio.get_running_loop().time() + HOLD_S
    left = asyncio.ensure_future(receive())  # after the body comes only that the other end has left
    try:
        while True:
            pushed = pushes.next
            messages = await _ask(app, scope, body)
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


async def _ask(app: ASGIApp, scope: Scope, body: bytes) -> list[Message]:
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


async def _body(receive: Receive, most: int) -> bytes:
    body, more = b"", True
    while more:
        try:
            message = await asyncio.wait_for(receive(), _BODY_S)
        except TimeoutError as error:
            raise Refused(408, f"no data for {_BODY_S:.0f} s") from error
        body += message.get("body", b"")
        if len(body) > most:
            raise Refused(413, f"more than {most} bytes for a question")
        more = message.get("more_body", False)
    return body


def _parsed(kind: type[_Request], body: bytes) -> _Request:
    try:
        return kind.FromString(body)  # type: ignore[no-any-return]
    except DecodeError as error:
        raise Refused(400, "the request cannot be read") from error


def _unavailable(body: bytes) -> bool:
    """Whether an answer says that an object is announced, and not here yet."""
    if len(body) > 8:
        return False
    answer = PullObjectResponse.FromString(body)
    return answer.object_found and not answer.object_available


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(reversed(scope["headers"]))  # of several, the first, as in Flower's app


def _who(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "unknown"


def _printable(text: str) -> str:
    return text[:100].encode("unicode_escape").decode()
