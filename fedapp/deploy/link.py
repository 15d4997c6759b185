"""A node's connection to its server: Flower's fleet API over TLS, each request signed by the node's key."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import fab_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedapp.deploy.activity import Activity
from fedapp.deploy.objects import deliver, fetch, post
from fedapp.deploy.preflight import clock
from fedapp.errors import FedappError

_BUSY = (429, 500, 502, 503, 504)  # of a server, or of a proxy before it, that will be back
# Seconds. Who gives no sign for twice _BEAT is gone; a beat may be _OFTEN old when the link is cut, and the
# first after it takes _AGAIN and a call's five seconds more: a cut of half a minute leaves nine more.
_BEAT, _OFTEN, _AGAIN = 25.0, 5.0, 1.0
_SHORTEST, _LONGEST = 0.2, 5.0  # seconds between tries; doubles
_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


class Refused(FedappError):  # noqa: N818
    """The server does not take this node, or this request of it."""


class Over(Exception):  # noqa: N818
    """The run that a request speaks of is not running any more."""


class Link:
    """What a node asks of its server. A server that cannot be reached is asked again until it answers.

    Raises Refused where the server says no, and Over where a run has ended.
    """

    def __init__(
        self,
        server: str,
        ca: bytes | None,
        key: EllipticCurvePrivateKey,
        registers: bool,
        said: Callable[[str], None],
        activity: Activity,
    ) -> None:
        """`ca` is None for plain HTTP, which goes to this machine only; `registers` without the operator.

        `activity` counts each request.
        """
        self._said, self._registers = said, registers
        self._key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            server,
            ca is None,
            ca,
            [
                activity,
                RuntimeVersionHttpInterceptor("SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        self._node = Node()
        self._closed = threading.Event()
        self._lost: float | None = None  # since when, by time.monotonic
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def open(self) -> int:
        """Say that this node is there, and go on saying so; returns its number."""
        if self._registers:
            self._ask(self._client.RegisterNode, RegisterNodeFleetRequest(public_key=self._key))
        request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=_BEAT)
        self._node = Node(node_id=self._ask(self._client.ActivateNode, request).node_id)
        self._beats.start()
        return int(self._node.node_id)

    def close(self) -> None:
        """Say that this node goes, if somebody hears it."""
        self._closed.set()
        try:
            if self._node.node_id:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, RuntimeError):
            pass
        self._client.close()

    def receive(self) -> Message | None:
        """The next message with all that it carries; None if there is none yet.

        The server holds the question until there is one; where it is ending it does not, and this waits.
        """
        begun = time.monotonic()
        answer = self._ask(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            if time.monotonic() - begun < _SHORTEST:
                self._closed.wait(_SHORTEST)
            return None
        tree, run = answer.message_object_trees[0], answer.messages_list[0].metadata.run_id
        try:
            contents = fetch(self._post, self._node, run, tree)
            message = cast(Message, inflate_object_from_contents(tree.object_id, contents))
        except (Over, ObjectPullError) as error:
            self._said(f"a message of run {run} could not be fetched ({error}): left out")
            self._confirm(run, tree.object_id)
            return None
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def confirm(self, message: Message) -> None:
        """Tell that a message is in safe hands: until then it is handed out again."""
        self._confirm(message.metadata.run_id, message.metadata.message_id)

    def send(self, reply: Message, seconds: float) -> int:
        """Send a reply that took so many seconds to make; returns how many bytes it has."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run = reply.metadata.run_id
        with no_object_id_recompute():
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            for last in (False, True):  # a session that a broken link left behind is opened anew
                answer = self._ask(self._client.PushMessages, request)
                parts = get_all_nested_objects(reply), answer.objects_to_push
                try:
                    return deliver(self._post, self._node, run, answer.session_id, *parts)
                except ObjectPushError as error:
                    if last:
                        raise Refused(f"the server did not take a reply ({error})") from error
        raise AssertionError("the last try returns, or raises")

    def run(self, number: int) -> Run:
        """What the server says of a run. Raises Over."""
        request = GetRunRequest(node=self._node, run_id=number)
        return run_from_proto(self._ask(self._client.GetRun, request).run)

    def bundle(self, run: Run) -> bytes:
        """The code that a run sends to its nodes."""
        request = GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run.run_id)
        return fab_from_proto(self._ask(self._client.GetFab, request).fab).content

    def _confirm(self, run: int, name: str) -> None:
        request = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=name)
        with suppress(Over):
            self._ask(self._client.ConfirmMessageReceived, request)

    def _post(self, name: str, body: bytes) -> bytes:
        """Send, or ask for, many objects at once."""
        return self._ask(lambda content: post(self._client, f"/v1/fleet/{name}", content), body)

    def _ask(self, call: Callable[[_Request], _Answer], request: _Request) -> _Answer:
        """One request; tried again until the server answers."""
        pause = _SHORTEST
        while True:
            try:
                answer = call(request)
            except httpx.HTTPStatusError as error:
                if (why := _passing(error.response)) is None:
                    raise _refusal(error.response) from error
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            else:
                self._back()
                return answer
            if self._lost is None:
                self._lost = time.monotonic()
                self._said(f"the server does not answer ({why}): trying on")
            if self._closed.wait(pause):
                raise Refused("the node is ending")
            pause = min(2 * pause, _LONGEST)

    def _back(self) -> None:
        if self._lost is not None:
            self._said(f"the server is there again after {time.monotonic() - self._lost:.0f} s")
            self._lost = None

    def _beat(self) -> None:
        """Tell the server now and then that this node lives; a beat that is lost is made up by the next."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_BEAT)
        pause = _OFTEN
        while not self._closed.wait(pause):
            try:
                self._client.SendNodeHeartbeat(request)
                pause = _OFTEN
            except (httpx.HTTPError, RuntimeError):
                pause = _AGAIN


def _passing(response: httpx.Response) -> str | None:
    """What is in the way for now; None where the answer is meant."""
    if response.status_code in _BUSY:
        return f"{response.status_code}: {_detail(response)}"
    return clock(response) if response.status_code == 401 else None


def _detail(response: httpx.Response) -> str:
    """What the server says of an answer that is no success."""
    told = FlowerError.from_json(response.text)
    if told is not None:
        return told.public_details or told.message
    try:
        return str(response.json()["detail"])[:200]
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:200]


def _refusal(response: httpx.Response) -> Exception:
    """What an answer of the server that is no success means."""
    if response.status_code == 403:
        return Over("the run is over")
    if response.status_code == 401:
        return Refused(
            "the server does not know this node's key: ask the operator to register the public half "
            "(a key that was unregistered can never return: make a new one)"
        )
    return Refused(f"the server refused ({response.status_code}): {_detail(response)}")
