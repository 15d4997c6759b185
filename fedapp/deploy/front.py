"""What stands before Flower's app on the network: who may ask what, and how much is read.

Flower's SuperLink serves three APIs on one port, and its node keys guard only one of them, after the whole
body is read. Here two listeners share the app: `Public` lets nodes with a registered key and the operator
through, before a byte of the body is read; `fedapp.deploy.back` serves the third API to this machine. Plain
ASGI, so that streams stay streams.
"""

import hmac
import logging
from base64 import b64decode
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.common.constant import (
    HEARTBEAT_MAX_INTERVAL,
    HEARTBEAT_MIN_INTERVAL,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    Status,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.run_pb2 import GetRunRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.server.superlink.utils import check_abort
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
)
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedapp.deploy import objects
from fedapp.deploy.bounded import (
    QUESTION,
    Answer,
    Bodies,
    Refusals,
    Refused,
    ask,
    body_of,
    content_of,
    headers_of,
    parsed,
    through,
)
from fedapp.deploy.disk import Disk
from fedapp.deploy.holding import Pushes, hold, nothing, unavailable
from fedapp.deploy.keys import fingerprint
from fedapp.deploy.objects import Requests
from fedapp.deploy.quota import Quota

_FLEET = "/v1/fleet/"
_NODES_OWN = {  # what a node asks; registering is the operator's
    *("get-run", "get-fab", "pull-object", objects.PULL, "confirm-message-received"),
    *("activate-node", "deactivate-node", "send-node-heartbeat"),
    *("pull-messages", "push-messages", objects.ONE, objects.PUSH),
}
_OBJECTS = {f"{_FLEET}{name}" for name in (objects.PULL, objects.PUSH, objects.ONE)}
_PULL, _PUSH, _ACTIVATE = (f"{_FLEET}{name}" for name in ("pull-messages", "push-messages", "activate-node"))
_RUN = f"{_FLEET}get-run"
_ALWAYS = f"{_FLEET}send-node-heartbeat"  # on a full disk too
_log = logging.getLogger("fedapp.server")


class Over(Refused):
    """Each node hears it once of each run, having asked. Told as refusals are, it would hide intruders."""


@dataclass
class Public:
    """The listener for everybody.

    `routes` are fedapp's own paths, `/fedapp/...`, behind the operator's token like Flower's Control API and
    `metrics`. Without `keyed` (loopback only) nodes bring keys that nobody registered. `max_body` is in
    bytes. `answered` counts answers by their status, whoever asked.
    """

    app: ASGIApp
    state: LinkState
    token: str
    pushes: Pushes
    routes: ASGIApp
    metrics: ASGIApp
    disk: Disk
    max_body: int
    keyed: bool = True
    refusals: Refusals = field(default_factory=Refusals)
    answered: Counter[int] = field(default_factory=Counter)
    ending: bool = False
    _handed: dict[bytes, list[Message]] = field(default_factory=dict)  # to a key, not known to have arrived

    def __post_init__(self) -> None:
        self._bodies, self._quota = Bodies(self.max_body), Quota(self.max_body, self.state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no WebSocket is offered
        what, answer = f"{scope['method']} {_printable(scope['path'])}", Answer(send, _who(scope))
        try:
            await self._answered(scope, receive, answer)
        except Over as over:
            await answer.refuse(over, receive)
        except Refused as refused:
            self.refusals.tell(answer.who, what, refused.why, refused.status)
            await answer.refuse(refused, receive)
        else:
            if answer.status >= 400 and not self.ending:  # then it is we who go
                self.refusals.tell(answer.who, what, f"answered {answer.status}", answer.status)
        finally:
            if answer.status:
                self.answered[answer.status] += 1

    async def _answered(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        method, path = scope["method"], scope["path"]
        if path == "/health" and method == "GET":
            said = PlainTextResponse("ending", 503) if self.ending else PlainTextResponse("ok")
            await said(scope, receive, answer)
        elif path.startswith(_FLEET) and method == "POST":
            key = await run_in_threadpool(self._node, path, headers_of(scope))
            answer.who += f" ({fingerprint(key)})"
            if path != _ALWAYS:
                self.disk.require()
            with self._bodies.room(key, headers_of(scope)):
                await self._of_node(key, path, scope, receive, answer)
        elif path == "/metrics":
            self._operator(headers_of(scope))
            await through(self.metrics, scope, receive, answer, QUESTION)
        elif path.startswith(("/v1/control/", "/fedapp/")):
            self._operator(headers_of(scope))
            if path.startswith("/v1/control/start-"):
                self.disk.require()
            if not path.startswith(("/v1/control/list-", "/v1/control/stream-")):
                _log.info("operator at %s: %s", answer.who, _printable(path))
            own = path.startswith("/fedapp/")
            with self._bodies.room(b"operator", headers_of(scope)):
                await through(self.routes if own else self.app, scope, receive, answer, self.max_body)
            if path.startswith("/v1/control/start-"):
                self.pushes.tasks.set()
        else:
            raise Refused(404, "there is nothing here")

    async def _of_node(self, key: bytes, path: str, scope: Scope, receive: Receive, answer: Answer) -> None:
        """Answer what a node asks."""
        if path == f"{_FLEET}confirm-message-received":
            self._handed.pop(key, None)
        if path == _ACTIVATE:
            await self._activate(key, receive, answer)
        elif path == _RUN:
            await self._run(scope, receive, answer)
        elif path == _PUSH:
            await self._push(scope, receive, answer)
        elif path == _PULL:
            await self._pull(key, scope, receive, answer)
        elif path in _OBJECTS:
            await self._objects(key, path, receive, answer)
        elif path == f"{_FLEET}pull-object":
            await hold(self.app, scope, receive, answer, self.pushes.parts, unavailable)
        else:
            await through(self.app, scope, receive, answer, self.max_body)

    async def _run(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        """Tell a node of a run; that one is over, before Flower, which would log it as an error."""
        body = await body_of(receive, QUESTION)
        number = parsed(GetRunRequest, body).run_id

        def over() -> bool:
            known = number in self.state.get_run_status({number})
            return known and check_abort(number, [Status.FINISHED], self.state) is not None

        if await run_in_threadpool(over):
            raise Over(403, "the run is over")
        for message in await ask(self.app, scope, body):
            await answer(message)

    async def _activate(self, key: bytes, receive: Receive, answer: Answer) -> None:
        """Let a node in that says it is there: at once, even if it was killed and still counts as online.

        Flower would refuse it until then, and meanwhile give its work up for lost.
        """
        request = parsed(ActivateNodeRequest, await body_of(receive, QUESTION))
        least, most = HEARTBEAT_MIN_INTERVAL, HEARTBEAT_MAX_INTERVAL
        number = await run_in_threadpool(self.state.get_node_id_by_public_key, key)
        if request.public_key != key or number is None or not least <= request.heartbeat_interval <= most:
            raise Refused(401, "this is no request of this node")
        beat = self.state.acknowledge_node_heartbeat
        if not await run_in_threadpool(beat, number, request.heartbeat_interval):
            raise Refused(401, "this node is registered no more")
        headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode())]
        await answer({"type": "http.response.start", "status": 200, "headers": headers})
        content = ActivateNodeResponse(node_id=number).SerializeToString()
        await answer({"type": "http.response.body", "body": content})

    async def _push(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        """Take a reply in the node's own name: Flower checks whose request it is, not whose reply."""
        body = await body_of(receive, self.max_body)
        request = parsed(PushMessagesRequest, body)
        if any(reply.metadata.src_node_id != request.node.node_id for reply in request.messages_list):
            raise Refused(403, "a reply in the name of another node")
        self._quota.announce(request)
        messages = await ask(self.app, scope, body)
        if messages[0]["status"] == 200:
            taken = parsed(PushMessagesResponse, content_of(messages))
            if taken.objects_to_push:
                await run_in_threadpool(self._quota.opened, request, taken.session_id)
            else:
                self.pushes.replies.ring()  # else when they are here
        for message in messages:
            await answer(message)

    async def _objects(self, key: bytes, path: str, receive: Receive, answer: Answer) -> None:
        """Hand out, or take, many parts of a node's messages at once."""
        state = self.state
        number = await run_in_threadpool(state.get_node_id_by_public_key, key)

        def allowed(asked: Requests) -> None:
            if any(request.node.node_id != number for request in asked):
                raise Refused(401, "this is no request of this node")
            for run in {request.run_id for request in asked}:
                if check_abort(run, [Status.PENDING, Status.STARTING, Status.FINISHED], state):
                    raise Refused(403, "the run does not run")

        bells, store = (self.pushes.parts, self.pushes.replies), self._quota.store
        await objects.serve(path, *bells, receive, answer, self.max_body, state, allowed, store)

    async def _pull(self, key: bytes, scope: Scope, receive: Receive, answer: Answer) -> None:
        """Answer a node that asks for a message: until it confirms that one, with the same.

        Flower marks a message as delivered once it is handed out, whatever becomes of link and node.
        """
        if key in self._handed:
            await body_of(receive, QUESTION)
            for message in self._handed[key]:
                await answer(message)
            return

        def keep(messages: list[Message]) -> None:
            self._handed[key] = messages

        await hold(self.app, scope, receive, answer, self.pushes.messages, nothing, keep)

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
        if self.keyed and self.state.get_node_id_by_public_key(pem) is None:
            raise Refused(401, "no node is registered with this key: send its public half to the operator")
        return pem

    def _operator(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(sha256(given.strip()).digest(), sha256(self.token.encode()).digest())
        if scheme.lower() != b"bearer" or not right:
            raise Refused(401, "this needs the operator's token")


def _who(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "unknown"


def _printable(text: str) -> str:
    return text[:100].encode("unicode_escape").decode()
