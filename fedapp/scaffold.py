"""Control variates: clients whose data differ are steered to where all of them go, and send only what is new.

Part of a client's update is its own and comes again each round, since its data pull elsewhere than others'
do. Both ends remember what the client last said of its update: the client's control. In training the client
is steered: by the way that all went, less its control. What it then sends is its update, less the steering
and less its control: its news, which takes fewer bits than an update.

server:  sum of controls + sum of news -> mean; tells a client in which round its news last counted
client:  control as of that round -> steered training -> update - steering - control = news -> codec

Sources: Karimireddy et al. 2020, "SCAFFOLD: Stochastic controlled averaging for federated learning",
Algorithm 1, option II; that news alone are sent, compressed: Huang, Li and Li 2023, "Stochastic controlled
averaging for federated learning with communication compression" (SCALLION). Two things are otherwise here.
The way of all is that from the weights which a client received last to those of now, so it costs no bytes.
And controls are per unit of learning rate, which changes from round to round. Where packets are small, two
things more help: half of what a packet lost is in the news after it, and controls fade by a tenth.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout
from fedapp.codec.packet import decode_update
from fedapp.errors import FedappError
from fedapp.records import array_record, config_record, load_state, round_of, store_state, told_each
from fedapp.vector import layout_of, ravel, record_of, unravel

COUNTED = "counted"  # the round in which a client's news last counted, 0 for none
STEERED = "steered"  # what training shall add to the weights on its way
KEPT = "control"
FORGOTTEN = "this node does not remember what it sent in the round that the server counted last"
LOST, FADE = np.float32(0.5), 0.9
"""How much of what a packet lost comes again, and what is left of a control from one packet to the next."""


@dataclass(frozen=True)
class Course:
    """What both ends know of all rounds: how far each goes, and how controls fade.

    pace: the learning rate, as a share of the first one. share: of the clients, those in a cohort. A control
    fades by a tenth from one time that its client takes part to the next, on average.
    """

    pace: Callable[[int], float]
    share: float = 1.0

    def faded(self, since: int, now: int) -> float:
        """What is left of a control."""
        return float(FADE ** (self.share * (now - since)))


class Scaffold(FedAvg):
    """Flower's FedAvg, of clients that are steered by control variates."""


# --- the client's end --------------------------------------------------------------------------------------


class ForgottenError(FedappError):
    """A node was restarted, and lost what it kept."""


class Control:
    """One client's control variate in one round, and how training is steered by it."""

    def __init__(self, message: Message, context: Context, codec: Codec, course: Course) -> None:
        """What the node remembers; tells training how it is steered. Raises ForgottenError."""
        config, arrays = config_record(message.content), array_record(message.content)
        self._round, self._counted = round_of(message), int(str(config[COUNTED]))
        layout = layout_of(arrays)
        self._received = ravel(arrays, layout)
        self._control = self._steered = self._expected = np.zeros(layout.size, np.float32)
        if self._counted:
            self._recall(load_state(context, KEPT), codec, layout, course)
        steered = unravel(self._steered, layout, arrays)
        message.content[STEERED] = record_of(steered)

    def _recall(self, kept: Mapping[str, NDArray[Any]], codec: Codec, layout: Layout, course: Course) -> None:
        settled, last = kept["rounds"].tolist() if kept else (0, 0)
        if self._counted not in (settled, last):
            raise ForgottenError(FORGOTTEN)
        now, pace = self._round, course.pace
        self._control = kept["control"]
        if self._counted == last:
            arrived = decode_update(kept["packet"].tobytes(), codec, layout)
            fresh = arrived / np.float32(pace(last))
            self._control = np.float32(course.faded(settled, last)) * self._control + fresh
        way = np.float32(pace(now) / sum(map(pace, range(last, now)))) * (self._received - kept["received"])
        own = np.float32(pace(now)) * self._control
        self._steered = way - own
        self._expected = np.float32(course.faded(self._counted, now)) * own
        if self._counted == last:
            self._expected = self._expected - LOST * (kept["news"] - arrived)

    def news(self, update: NDArray[np.float32]) -> NDArray[np.float32]:
        """What of an update the server does not expect, and of the one before has not been told."""
        self._news = update - self._steered - self._expected
        return self._news

    def keep(self, context: Context, packet: bytes) -> None:
        """Remember what the packet says of the news; it matters once the server tells that it counted."""
        rounds = np.array([self._counted, self._round])
        state = {"rounds": rounds, "control": self._control, "received": self._received, "news": self._news}
        store_state(context, KEPT, {**state, "packet": np.frombuffer(packet, np.uint8)})


# --- the server's end --------------------------------------------------------------------------------------


class Controls:
    """What the server remembers of its clients' controls: their sum, and whose news are in it since when.

    That is one model and two numbers a client, since a mean is all that is asked of controls. All begin anew
    where the sum cannot be right any more: a node forgot what it sent, or weighs other than before.
    """

    def __init__(self, clients: int, course: Course) -> None:
        self._clients, self._course = clients, course
        self._forget()

    def _forget(self) -> None:
        self._wrong, self._at = False, 0
        self._sum: NDArray[np.float64] = np.zeros(1)  # weight times control, in paces
        self._counted: dict[int, tuple[int, int]] = {}  # by node: when it last counted, and its weight

    def tell(self, messages: list[Message]) -> list[Message]:
        """The messages, each of which says when its node last counted; those that say the same share it."""
        if self._wrong:
            self._forget()
        return told_each(messages, lambda node: {COUNTED: self._counted.get(node, (0, 0))[0]})

    def begin_anew(self) -> None:
        """Forget all control variates before the next round: what they stand for was not added."""
        self._wrong = True

    def hear(self, reply: Message) -> None:
        """Take note of a node that forgot."""
        self._wrong |= reply.has_error() and reply.error.reason == FORGOTTEN

    def leave(self, node: int) -> None:
        """Take note of a node that has left; the one that takes its place remembers nothing."""
        self._wrong |= node in self._counted

    def mean(self, server_round: int, news: NDArray[np.float64], weights: Mapping[int, int]) -> Any:
        """The mean update, float64 like `news`, the sum of what came from nodes of these weights.

        It takes the news of those who are here and the controls of all, who may be more: unbiased, as SAGA's
        mean is (Defazio, Bach and Lacoste-Julien 2014). Clients not seen yet have controls of zero, and weigh
        as others do in the mean.
        """
        here, pace = sum(weights.values()), self._course.pace(server_round)
        self._sum = self._course.faded(self._at, server_round) * self._sum
        known = {node: weight for node, (_, weight) in self._counted.items()}
        everybody = self._clients * sum(known.values()) / max(1, len(known))
        mean = news / here + (pace * self._sum / everybody if known else 0.0)
        self._wrong |= any(known.get(node, weight) != weight for node, weight in weights.items())
        self._sum, self._at = self._sum + news / pace, server_round
        self._counted |= {node: (server_round, weight) for node, weight in weights.items()}
        return mean

    def state(self, partitions: Mapping[int, int]) -> dict[str, Any]:
        """All that the next mean depends on, by partition."""
        counted = [[partitions[node], *told] for node, told in self._counted.items() if node in partitions]
        return {"sum": self._sum, "at": self._at, "counted": counted, "wrong": self._wrong}

    def restore(self, state: Mapping[str, Any], nodes: Mapping[int, int]) -> None:
        """Go on from what `state` returned; `nodes` by partition, without those that remember nothing."""
        self._sum, self._at, self._wrong = state["sum"], state["at"], state["wrong"]
        self._counted = {nodes[p]: (at, weight) for p, at, weight in state["counted"] if p in nodes}
        self._wrong |= len(self._counted) < len(state["counted"])
