"""How much of its replies a node may leave in the server's memory."""

import threading
from dataclasses import dataclass
from hashlib import sha256
from typing import cast

from flwr.common.constant import Status
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.server.superlink.utils import check_abort
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from fedapp.deploy.bounded import Refused
from fedapp.deploy.state import State

PARTS = 1 << 16  # of one reply; one with a thousand arrays has some two thousand
MANY = 1 << 10  # replies that are remembered before it is looked which of them are over


@dataclass
class _Reply:
    """A reply that was announced: to what, what hangs on it, and how many bytes of that are here."""

    asked: str
    tree: bytes
    size: int = 0
    session: str = ""


class Quota:
    """Of each reply all parts together have at most `most` bytes, and nothing is added to it afterwards.

    Flower keeps whatever a registered node announces, of any size, and lets it announce more for the same
    reply. There is one reply for each message that the node was sent; it is counted until a ServerApp has it
    whole, or its run is over.
    """

    def __init__(self, most: int, state: LinkState) -> None:
        self._most, self._state, self._many = most, state, MANY
        self._replies = dict[int, dict[str, _Reply]]()  # by run and name
        self._sessions = dict[str, _Reply]()
        self._lock = threading.Lock()

    def announce(self, request: PushMessagesRequest) -> None:
        """See what a node wants to reply. Raises Refused."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise Refused(400, "one reply at a time")
        (message,), (tree,) = request.messages_list, request.message_object_trees
        if tree.object_id != message.metadata.message_id:
            raise Refused(400, "what comes with a reply is not its own")
        parts = sum(1 for _ in iterate_object_tree(tree))
        if parts > PARTS:
            raise Refused(413, f"a reply of {parts} parts, and the most is {PARTS}")
        kept = self._replies.get(message.metadata.run_id, {}).get(tree.object_id)
        if kept is not None and kept.tree != _digest(request):
            raise Refused(403, "this reply was announced already, with other parts")

    def opened(self, request: PushMessagesRequest, session: str) -> None:
        """Note that Flower took a reply, whose parts now come in this session."""
        (message,) = request.messages_list
        run, name = message.metadata.run_id, message.metadata.message_id
        with self._lock:
            if run not in self._replies:
                for other in [
                    one for one in self._replies if check_abort(one, [Status.FINISHED], self._state)
                ]:
                    for reply in self._replies.pop(other).values():
                        self._sessions.pop(reply.session, None)
                self._many = MANY
            if len(self._sessions) >= self._many:
                self._forget(run)
            announced = _Reply(message.metadata.reply_to_message_id, _digest(request))
            reply = self._replies.setdefault(run, {}).setdefault(name, announced)
            self._sessions.pop(reply.session, None)
            self._sessions[session], reply.session = reply, session

    def _forget(self, run: int) -> None:
        """Forget the replies that Flower takes nothing more of: delivered, and no part of them to come."""
        state = cast(State, self._state)  # `fedapp server` has no other
        awaited, coming = state.awaited(run), state.sessions
        replies = self._replies.get(run, {})
        for name, reply in list(replies.items()):
            if reply.asked not in awaited and reply.session not in coming:
                del replies[name]
                self._sessions.pop(reply.session, None)
        self._many = max(MANY, 2 * len(self._sessions))

    def store(self, part: PushObjectRequest) -> bool:
        """Keep a part of a reply; whether it is one that is wanted. Raises Refused, 413."""
        size = len(part.object_content)
        with self._lock:
            reply = self._sessions.get(part.session_id)
            if reply is None:
                return False
            if reply.size + size > self._most:
                raise Refused(
                    413, f"a reply of more than {self._most} bytes: `fedapp server --max-body` sets it"
                )
            stored = self._state.store_object(
                part.run_id, part.session_id, part.object_id, part.object_content
            )
            reply.size += size if stored else 0
            return stored


def _digest(request: PushMessagesRequest) -> bytes:
    return sha256(request.message_object_trees[0].SerializeToString(deterministic=True)).digest()
