"""Messages to nodes, and their replies: the bytes of both, the coded downlink, second tries."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedapp.downlink import Downlink
from fedapp.engine.grid import arrivals
from fedapp.engine.local import LocalGrid
from fedapp.fold import Folded
from fedapp.records import size_of
from fedapp.replies import drifted
from fedapp.stages import ENCODE, TRANSFER

TRIES = 2
"""More, of a message that its node cannot decode."""


@dataclass
class Traffic:
    """What crossed the wire: bytes of the serialized content of each message and each reply, and alarms."""

    uplink: int = 0
    downlink: int = 0
    drifted: int = 0  # replies that say so

    def sent(self, messages: Iterable[Message]) -> Iterator[Message]:
        """The messages, counted as they are taken to be sent."""
        sizes = dict[int, tuple[int, RecordDict]]()  # a broadcast's one content is measured once
        for message in messages:
            content = message.content
            if id(content) not in sizes:
                with TRANSFER:
                    sizes[id(content)] = size_of(content), content
            self.downlink += sizes[id(content)][0]
            yield message

    @TRANSFER
    def came(self, replies: list[Message]) -> None:
        """Count replies that have arrived, whatever becomes of them."""
        for reply in replies:
            if reply.has_content():
                self.uplink += reply.size if isinstance(reply, Folded) else size_of(reply.content)
                self.drifted += reply.tally.drift if isinstance(reply, Folded) else drifted(reply)


@dataclass
class Exchange:
    """Of a run: the grid, the coded downlink if there is one, and what crossed the wire so far.

    timeout: seconds that a reply may take. messages: those that carried weights, but for second tries.
    """

    grid: Grid
    downlink: Downlink | None
    timeout: float
    traffic: Traffic = field(default_factory=Traffic)
    messages: int = 0

    def ask(self, messages: Iterable[Message], until: float = float("inf")) -> Iterator[Message]:
        """Send messages as they are, yield the replies; times as in `arrivals`."""
        for replies in arrivals(self.grid, self.traffic.sent(messages), self.timeout, until):
            self.traffic.came(replies)
            yield from replies

    def send(
        self, arrays: ArrayRecord, messages: list[Message], until: float = float("inf")
    ) -> Iterator[Message]:
        """Send the weights, yield the replies; to a node that cannot decode at most `TRIES` times more."""
        self.messages += len(messages)
        for tries_left in reversed(range(TRIES + 1)):
            if self.downlink is not None:
                messages = self.downlink.nearest_first(messages)
            if isinstance(self.grid, LocalGrid):
                messages = self.grid.in_order(messages)
            asked, others = {message.metadata.dst_node_id: message for message in messages}, []
            for reply in self.ask(self.coded(arrays, messages), until):
                if self.undecoded(reply) and tries_left:
                    others.append(_anew(asked[reply.metadata.src_node_id]))
                else:
                    yield reply
            if not (messages := others):
                return

    def coded(self, arrays: ArrayRecord, messages: list[Message]) -> Iterable[Message]:
        """The messages, with what their nodes need to make these weights, each as soon as it is ready."""
        return messages if self.downlink is None else ENCODE.each(self.downlink.send(arrays, messages))

    def undecoded(self, reply: Message) -> bool:
        """Note what the node holds; whether it could not decode its message, and another one may help."""
        return self.downlink is not None and self.downlink.again(reply)


def _anew(message: Message) -> Message:
    """The same message, to be sent once more."""
    kind, group = message.metadata.message_type, message.metadata.group_id
    return Message(message.content, message.metadata.dst_node_id, kind, group_id=group)
