"""Homomorphic aggregation: the server adds up ciphertexts that it cannot read, and one node opens the sum.

    key      the key holder: a fresh secret key for the round, and what encrypts under it      (a query)
    train    every node of the cohort: its update times its weight, encrypted
    open     the key holder: the sum, decrypted; the server divides it by the sum of weights   (a query)

The scheme is CKKS (Cheon, Kim, Kim and Song 2017, "Homomorphic encryption for arithmetic of approximate
numbers") as TenSEAL and SEAL implement it, at 128 bits of security: ring dimension 4096, 2048 values in a
ciphertext, about 30 bytes a value. It takes the codec's place.

*Formal guarantees.* The server learns each round's sum and the clients' weights, but no update, as long as
it follows the protocol and the key holder keeps the key and what it opens to itself: the two together read
everything, and so does a server that has the key holder open one client's ciphertext. The key holder learns
the sums. Nothing is said of what a sum tells; that is differential privacy's part.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec.layers import require_finite
from fedapp.errors import ConfigError, DecodeError, FedappError
from fedapp.records import CKKS, METRICS, WEIGHT, array_record, config_record, record_in
from fedapp.replies import metrics_of, refuse, weight_of
from fedapp.stages import DECODE, ENCODE
from fedapp.vector import layout_of, update_of

_DEGREE, _MODULI, _SCALE = 4096, (54, 54), 30  # at most 109 bits of moduli are secure; sums stay below 2^22
SLOTS = _DEGREE // 2


@dataclass(frozen=True)
class Open:
    """The server reads each update, as privacy and codec leave it."""


@dataclass(frozen=True)
class Ckks:
    """The server reads sums alone; the node of partition `key_holder` opens them: it must always be there."""

    key_holder: int = 0

    def __post_init__(self) -> None:
        check.whole("aggregation.key_holder", self.key_holder, 0)
        if importlib.util.find_spec("tenseal") is None:
            raise ConfigError(
                "aggregation=ckks needs TenSEAL: pip install -e '.[ckks]', or set aggregation=open"
            )


# --- numbers -----------------------------------------------------------------------------------------------


def keys() -> tuple[bytes, bytes]:
    """A secret key, and what encrypts under it and adds: about 185 and 123 kilobytes."""
    import tenseal

    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, _DEGREE, -1, list(_MODULI))
    context.global_scale = 2.0**_SCALE
    without = {"save_galois_keys": False, "save_relin_keys": False}
    secret = context.serialize(save_secret_key=True, **without)
    return secret, context.serialize(save_secret_key=False, **without)


def encrypt(values: NDArray[Any], public: bytes) -> list[bytes]:
    """Ciphertexts of `SLOTS` values each, the last one of fewer. Raises FedappError beyond the range."""
    import tenseal

    if not np.abs(values).max(initial=0) < 2.0**20:
        raise FedappError("an update times its weight must stay below 2^20 to be encrypted")
    context = tenseal.context_from(public)
    parts = (values[start : start + SLOTS] for start in range(0, len(values), SLOTS))
    return [tenseal.ckks_vector(context, part.tolist()).serialize() for part in parts]


class EncryptedSum:
    """The running sum of `size` values under one key."""

    def __init__(self, public: bytes, size: int) -> None:
        import tenseal

        self._context, self._size = tenseal.context_from(public), size
        self._parts: list[Any] = []

    def add(self, ciphertexts: list[bytes]) -> None:
        """Raises DecodeError, and leaves the sum as it was."""
        import tenseal

        sizes = [min(SLOTS, self._size - start) for start in range(0, self._size, SLOTS)]
        try:
            new = [tenseal.ckks_vector_from(self._context, one) for one in ciphertexts]
            if [one.size() for one in new] != sizes:
                raise DecodeError("the ciphertexts are not of this model")
            self._parts = (
                [one + old for one, old in zip(new, self._parts, strict=True)] if self._parts else new
            )
        except DecodeError:
            raise
        except Exception as error:  # whatever SEAL says of bytes that are none of its own
            raise DecodeError(f"the ciphertexts cannot be read: {error}") from error

    def serialize(self) -> list[bytes]:
        return [part.serialize() for part in self._parts]


def decrypt(ciphertexts: list[bytes], secret: bytes) -> NDArray[np.float64]:
    """The values, off by about 1e-5 for each addition."""
    import tenseal

    context = tenseal.context_from(secret)
    return np.concatenate([tenseal.ckks_vector_from(context, one).decrypt() for one in ciphertexts])


# --- the client's end --------------------------------------------------------------------------------------


@ENCODE
def answer_key(message: Message, context: Context) -> Message:
    """The key holder makes a key for the round, and forgets the one before."""
    secret, public = keys()
    context.state[CKKS] = ConfigRecord({"secret": secret})
    return Message(RecordDict({CKKS: ConfigRecord({"public": public})}), reply_to=message)


@DECODE
def answer_open(message: Message, context: Context) -> Message:
    """The key holder opens one sum, and then has no key any more."""
    if CKKS not in context.state:
        raise FedappError("this node holds no key: a key opens one sum")
    secret = config_record(context.state, CKKS)["secret"]
    del context.state[CKKS]
    assert isinstance(secret, bytes)
    values = decrypt(_bytes(message.content, "values"), secret).astype("<f4")
    return Message(RecordDict({CKKS: ConfigRecord({"values": [values.tobytes()]})}), reply_to=message)


def encrypted(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """The client mod in the place of `wire.compress`: the update times its weight, as ciphertexts."""
    (public,), received = _bytes(message.content, "public"), array_record(message.content)
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    metrics = metrics_of(reply, (WEIGHT,))
    update = update_of(received, array_record(reply.content))
    require_finite(update, layout_of(received))
    values = encrypt(update.astype(np.float64) * int(str(metrics[WEIGHT])), public)
    reply.content = RecordDict({CKKS: ConfigRecord({"values": values}), METRICS: metrics})
    return reply


# --- the server's end --------------------------------------------------------------------------------------


class CkksSum:
    """The sum of one round. FedappError from any part but `take`: the round is lost.

    `exchange` sends messages and yields replies; `uniform` refuses replies that weigh anything but 1.
    """

    def __init__(
        self,
        holder: int,
        nodes: list[int],
        size: int,
        uniform: bool,
        exchange: Callable[[list[Message]], Iterator[Message]],
    ) -> None:
        self._holder, self._nodes, self._size = holder, nodes, size
        self._uniform, self._exchange = uniform, exchange
        self._weight = self._count = 0

    def begin(self) -> dict[int, RecordDict]:
        """What each node must be told beside the weights."""
        (public,) = self._ask("key", ConfigRecord(), "public")
        self._sum = EncryptedSum(public, self._size)
        told = RecordDict({CKKS: ConfigRecord({"public": [public]})})
        return dict.fromkeys(self._nodes, told)

    def take(self, reply: Message) -> None:
        """One reply with ciphertexts; one that is refused counts as none."""
        try:
            weight = weight_of(metrics_of(reply, (WEIGHT,)), self._uniform)
            if weight:
                self._sum.add(_bytes(reply.content, "values"))
        except (DecodeError, KeyError) as error:
            refuse(reply, error)
            return
        self._weight, self._count = self._weight + weight, self._count + 1

    def mean(self) -> tuple[NDArray[np.float64], int]:
        """The weighted mean, float64 (size,), and of how many."""
        if not self._weight:
            raise FedappError("no client of the round sent an update that could be added")
        (data,) = self._ask("open", ConfigRecord({"values": self._sum.serialize()}), "values")
        values = np.frombuffer(data, "<f4").astype(np.float64)
        if len(values) != self._size or not np.isfinite(values).all():
            raise FedappError("the key holder's sum is not one of this model")
        return values / self._weight, self._count

    def _ask(self, action: str, record: ConfigRecord, field: str) -> list[bytes]:
        asked = Message(RecordDict({CKKS: record}), self._holder, f"{MessageType.QUERY}.{action}")
        for reply in self._exchange([asked]):
            if not reply.has_error():
                return _bytes(reply.content, field)
        raise FedappError("the key holder did not answer: the round is lost")


def _bytes(content: RecordDict, field: str) -> list[bytes]:
    record = record_in(content, CKKS, ConfigRecord)
    found = None if record is None else record.get(field)
    if isinstance(found, bytes):
        return [found]
    if not isinstance(found, list) or not found or not all(isinstance(one, bytes) for one in found):
        raise DecodeError(f"the message holds no {field} of homomorphic aggregation")
    return [one for one in found if isinstance(one, bytes)]
