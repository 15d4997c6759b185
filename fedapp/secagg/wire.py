"""Secure aggregation in Flower's messages: what a node answers, and a round's sum on the server."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import Mod
from numpy.typing import NDArray

from fedapp.errors import DecodeError, FedappError
from fedapp.privacy.distributed import DistributedGaussian, Terms
from fedapp.privacy.distributed_example import DistributedExample, StepTerms
from fedapp.records import SECAGG, UPDATE, array_record, record_in
from fedapp.replies import refuse
from fedapp.secagg.client import Client
from fedapp.secagg.record import Record, whole
from fedapp.secagg.server import Server
from fedapp.stages import DECODE
from fedapp.vector import update_of

Summed = DistributedGaussian | DistributedExample
"""The kinds of privacy that take it."""


# --- the client's end --------------------------------------------------------------------------------------


def answer(client: Client, stage: str, message: Message, context: Context) -> Message:
    """The reply of one stage, all but `mask`; its state stays in `context.state`."""
    act = {
        "advertise": client.advertise, "share": client.share,
        "confirm": client.confirm, "unmask": client.unmask,
    }[stage]  # fmt: skip
    reply, state = act(_read(message.content), _state(context))
    context.state[SECAGG] = ConfigRecord({**state})
    return Message(_content(reply), reply_to=message)


def masked(
    client: Client, encode: Callable[[NDArray[Any]], NDArray[np.uint32]], number: int, rounds: int
) -> Mod:
    """The client mod in the place of `wire.compress`: only masked values leave the client.

    `encode` makes whole numbers below the modulus of what was trained: an update, float32 (size,), or the sum
    that a trainer made in the place of trained weights. Sessions are rounds, by their `number`, and later
    ones only: so there are no more sums than the `rounds` that the noise was set for, whatever a server asks.
    """

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        asked, received = _read(message.content), array_record(message.content)
        if (session := whole(asked, "session")) != number or not 1 <= number <= rounds:
            raise FedappError(
                f"secure aggregation: session {session} in round {number} is none of this run's: "
                f"there is one in each of its rounds, 1 to {rounds}"
            )
        client.expects_values(asked, _state(context))  # a second training would be charged, and lost
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        trained = array_record(reply.content)
        values = encode(trained[UPDATE].numpy() if UPDATE in trained else update_of(received, trained))
        record, state = client.mask(asked, _state(context), values)
        context.state[SECAGG] = ConfigRecord({**state})
        reply.content = _content(record)
        return reply

    return mod


def _state(context: Context) -> Record:
    return _record(record_in(context.state, SECAGG, ConfigRecord) or ConfigRecord())


# --- the server's end --------------------------------------------------------------------------------------


class SecureSum:
    """The sum of one round; what does not come, or is refused, is a dropout.

    `exchange` sends messages and yields replies; `rng` is the public randomness that clients encode with.
    RoundLost from any part, or FedappError where nobody is left: nothing was unmasked.
    """

    def __init__(
        self,
        server: Server,
        terms: Terms | StepTerms,
        rng: np.random.Generator,
        exchange: Callable[[list[Message]], Iterator[Message]],
    ) -> None:
        self._server, self._terms, self._rng, self._exchange = server, terms, rng, exchange

    def begin(self) -> dict[int, RecordDict]:
        """Keys and shares go round; what each node that is left must be told beside the weights."""
        self._ask("advertise", self._server.advertise())
        self._ask("share", self._server.share())
        return {node: _content(record) for node, record in self._server.mask().items()}

    def take(self, reply: Message) -> None:
        """One reply with masked values, or with any stage's record; one that is refused is a dropout."""
        try:
            if reply.has_error():
                raise DecodeError(reply.error.reason or "the client failed")
            self._server.take(reply.metadata.src_node_id, _read(reply.content))
        except DecodeError as error:
            refuse(reply, error)

    def mean(self) -> tuple[NDArray[np.float32], int]:
        """The mean over the public cohort, float32 (size,), and of how many it is."""
        if self._server.signed:
            self._ask("confirm", self._server.confirm())
        self._ask("unmask", self._server.unmask())
        total, count = self._server.total(), len(self._server.alive)
        with DECODE:
            return self._terms.decode(total, count, self._rng), count

    def _ask(self, stage: str, records: dict[int, Record]) -> None:
        messages = [
            Message(_content(record), node, f"{MessageType.QUERY}.{stage}")
            for node, record in records.items()
        ]
        for reply in self._exchange(messages):
            self.take(reply)


def _content(record: Record) -> RecordDict:
    return RecordDict({SECAGG: ConfigRecord({**record})})


def _read(content: RecordDict) -> Record:
    record = record_in(content, SECAGG, ConfigRecord)
    if record is None:
        raise DecodeError("the message holds no record of secure aggregation")
    return _record(record)


def _record(config: ConfigRecord) -> Record:
    return {name: value for name, value in config.items() if isinstance(value, (int, bytes))}
