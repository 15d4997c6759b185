"""The downlink: what the server sends for its weights, and what a node makes of it.

All versions of the weights that nodes ever hold lie on one lattice around the initial model, which both ends
make from the seed (`fedapp.lattice`). So any two of them differ by integers, which are coded without loss: a
node is sent the difference to the version that it holds, a newcomer the difference to the initial model, and
all end bit-identical.

server:  weights - version now -> quantize -> next version -> difference to what a node holds -> entropy-code
client:  decode -> levels it holds + difference -> initial + step * levels   (`receive`, a Flower client mod)

What the quantizer takes off a version, the server's own weights keep and later versions tell: that is error
feedback. Updates are trained weights minus the version, and step the server's own weights (Philippenko and
Dieuleveut 2021, "Preserved central model for faster bidirectional compression in distributed settings").
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import Mod
from numpy.typing import NDArray

from fedapp import check
from fedapp.lattice import COARSEST, FINEST, Version, first, peak_exponent, quantized, short
from fedapp.records import ARRAYS, CONFIG, array_record, brought_by, record_in
from fedapp.vector import array_of, buffers_of, layout_of, ravel, record_with, unravel, values
from fedapp.version_packet import VersionPacket, code_of, crc_of, levels_of

VERSION, INITIAL, HOLDS = "version", "initial", "holds"
DOWNLINK, AT, LEVELS = "downlink", "at", "levels"  # what a node keeps, beside another initial model
NOTHING = -1  # what a node holds where another initial model grew from the seed
_DEPTH = 20  # how far exponents go below that of the longest way
_AT_ONCE = 2**26  # values that are coded at one time, which take some 20 bytes each
_ALONE = 2**18  # values that are coded before threads would have begun
_READY = 2**26  # levels that the server has at hand, two bytes each, or four where one is beyond that


@dataclass(frozen=True)
class Plain:
    """Weights go out in float32, as plain Flower sends them."""


@dataclass(frozen=True)
class Coded:
    """Weights go out as differences on a lattice.

    rate: bits per parameter to a node that holds the version before. Steps are powers of two, so that all
    versions share one lattice: a round takes up to half more, or a third less.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        check.real("downlink.rate", self.rate, above=0.0, high=12.0)


# --- the server's end --------------------------------------------------------------------------------------


class Downlink:
    """The version of the weights that nodes shall hold, and which version each of them does hold."""

    def __init__(self, coded: Coded, initial: ArrayRecord) -> None:
        self._rate = coded.rate
        self._layout = layout_of(initial)
        self._initial = ravel(initial, self._layout)
        self._go_on(first(self._layout))
        # Versions that some node may hold, as ways from the initial model: exponent and levels of the latest,
        # exponent and code of others, and of those whose code was asked for.
        self._ready = dict[int, tuple[int, NDArray[np.int16 | np.int32]]]()
        self._codes = {0: (COARSEST, code_of(self._now.levels, self._layout))}
        self._lock = Lock()
        # Of the last step onto the lattice: its exponent, and what an eighth of it took of all bytes.
        self._exponent: int | None = None
        self._share: float | None = None
        self._held: dict[int, int] = {}  # by node; at first each holds version 0
        self._sent: dict[int, int] = {}  # by node, the version that it was sent and has not answered
        self._weights = initial
        # Of the version now: the code of the way to it from the one before, by the exponent, and what nodes
        # that hold another one are sent, by that.
        self._step = dict[int, bytes]()
        self._made = dict[int, ArrayRecord]()

    def nearest_first(self, messages: Iterable[Message]) -> list[Message]:
        """Those to nodes that hold the latest version come first: what they need is made soonest."""
        return sorted(messages, key=lambda m: -self._held.get(m.metadata.dst_node_id, 0))

    def send(self, weights: ArrayRecord, messages: Iterable[Message]) -> Iterator[Message]:
        """The messages; instead of weights they hold what their nodes need to make this version of them.

        Each as soon as it is ready: what others need is made after it, or beside it.
        """
        if weights is not self._weights:
            self._publish(weights)
        messages = list(messages)
        held_by = {m.metadata.dst_node_id: self._held.get(m.metadata.dst_node_id, 0) for m in messages}
        made = self._make([held for held in dict.fromkeys(held_by.values()) if held not in self._made])
        contents: dict[tuple[int, int], RecordDict] = {}  # and are told the same beside
        for message in messages:
            node = message.metadata.dst_node_id
            held, told = held_by[node], id(message.content)
            while held not in self._made:
                base, arrays = next(made)
                self._made[base] = arrays
            self._sent[node] = self._now.number
            if (held, told) not in contents:
                contents[held, told] = RecordDict({**message.content, ARRAYS: self._made[held]})
            message.content = contents[held, told]
            yield message
        self._made.pop(NOTHING, None)  # it holds a model

    def _make(self, bases: Collection[int]) -> Iterator[tuple[int, ArrayRecord]]:
        """What nodes that hold these versions are sent, in this order: one for all that hold the same."""
        values = max(1, self._layout.size)
        threads = min(len(os.sched_getaffinity(0)), len(bases), _AT_ONCE // values) or 1
        if threads == 1 or len(bases) * values < _ALONE:
            yield from zip(bases, map(self._arrays, bases), strict=True)
            return
        with ThreadPoolExecutor(threads) as pool:  # the coder runs without Python's lock
            yield from zip(bases, pool.map(self._arrays, bases), strict=True)

    def again(self, reply: Message) -> bool:
        """Note what the node holds; whether it could make nothing of its message, and another may help."""
        node, said = reply.metadata.src_node_id, _said(reply)
        sent = self._sent.pop(node, None)
        if sent is None:  # it has left, or all nodes have started anew
            return said is not None
        if said is None:
            if reply.has_content():
                self._held[node] = sent
            return False
        tried = self._held.get(node, 0)
        if tried == NOTHING:
            return False
        self._held[node] = NOTHING if tried == 0 else said if said in self._versions else 0
        return True

    def leave(self, node: int) -> None:
        """Take note of a node that has left: if it comes back, it is sent the way from the initial model."""
        self._held.pop(node, None)
        self._sent.pop(node, None)

    def state(self, partitions: Mapping[int, int], weights: ArrayRecord) -> dict[str, Any]:
        """The version now, those that nodes hold, and which partition's node holds which."""
        ways = [(version, *self._coded(version)) for version in sorted(self._versions)]
        return {
            "now": [self._now.number, self._now.exponent, self._now.levels],
            "versions": [[v, e, np.frombuffer(code, np.uint8)] for v, e, code in ways],
            "held": _pairs((partitions[node], v) for node, v in self._held.items() if node in partitions),
            "sent": _pairs((partitions[node], v) for node, v in self._sent.items() if node in partitions),
            "published": weights is self._weights,
            "exponent": self._exponent,
            "share": self._share,
        }

    def restore(self, state: Mapping[str, Any], nodes: Mapping[int, int], weights: ArrayRecord) -> None:
        """Go on from what `state` returned, with other weights of the same values; `nodes` by partition.

        A node that is not among them holds nothing yet.
        """
        self._go_on(Version(*state["now"]))
        self._codes = {v: (exponent, code.tobytes()) for v, exponent, code in state["versions"]}
        self._ready.clear()
        self._exponent, self._share = state["exponent"], state["share"]
        held, sent = (np.array(state[name], np.int64).reshape(-1, 2).tolist() for name in ("held", "sent"))
        self._held = {nodes[partition]: v for partition, v in held if partition in nodes}
        self._sent = {nodes[partition]: v for partition, v in sent if partition in nodes}
        self._weights = weights if state["published"] else ArrayRecord()

    def _go_on(self, version: Version) -> None:
        """This is the version now; its weights are known to nodes by their CRC."""
        self._now, self._reached = version, version.weights(self._initial)
        self._crc = crc_of(self._reached)

    def _publish(self, record: ArrayRecord) -> None:
        """Make the next version: as much of what this one lacks as the rate allows."""
        self._weights = record
        self._made.clear()
        self._step = {}
        weights = ravel(record, self._layout)
        lacks = weights - self._reached
        if not lacks.any():
            return
        way = weights - self._initial
        finest = max(peak_exponent(way) - _DEPTH, FINEST)
        begin = self._now.exponent if self._exponent is None else self._exponent
        number, terms = self._now.number + 1, (self._layout, self._rate, begin, finest)
        try:
            exponent, levels, code, self._share = quantized(lacks, *terms, self._share)
            self._go_on(self._now.plus(number, exponent, levels))
            self._exponent, self._step = exponent, {exponent: code}
        except OverflowError:  # after ever finer steps a long way: all nodes start anew
            exponent, levels, *_ = quantized(way, *terms)
            self._go_on(first(self._layout).plus(number, exponent, levels))
            self._exponent = exponent
            self._held.clear()
            self._sent.clear()
        kept = {0, *self._held.values(), *self._sent.values()}
        exponent, levels = self._now.minus(first(self._layout))
        self._ready = {v: way for v, way in self._ready.items() if v in kept}
        self._ready[number] = exponent, short(levels)
        for old in sorted(self._ready, reverse=True)[_READY // max(1, self._layout.size) :]:
            self._coded(old)
            del self._ready[old]
        self._codes = {v: way for v, way in self._codes.items() if v in kept or v == number}

    @property
    def _versions(self) -> Set[int]:
        """Those that some node may hold, by number."""
        return self._ready.keys() | self._codes.keys()

    def _coded(self, number: int) -> tuple[int, bytes]:
        """The way to a version from the initial model: exponent, and code of levels."""
        with self._lock:
            if number not in self._codes:
                exponent, levels = self._ready[number]
                self._codes[number] = exponent, code_of(levels, self._layout)
            return self._codes[number]

    def _decoded(self, number: int) -> Version:
        """A version that some node holds."""
        if number in self._ready:
            exponent, levels = self._ready[number]
            return Version(number, exponent, levels.astype(np.int32))
        exponent, code = self._codes[number]
        return Version(number, exponent, levels_of(code, self._layout))

    def _arrays(self, held: int) -> ArrayRecord:
        """What a message to a node that holds this version says."""
        based_on = 0
        if held > 0:
            with suppress(OverflowError):  # too far apart for one step: from the initial model it is not
                exponent, levels = self._now.minus(self._decoded(held))
                known = self._step.get(exponent) if held == self._now.number - 1 else None
                based_on, code = held, known or code_of(levels, self._layout)
        if not based_on:
            exponent, code = self._coded(self._now.number)
        packet = VersionPacket(self._crc, exponent, based_on, self._now.number, code)
        arrays = {VERSION: packet.to_array()}
        arrays |= {INITIAL: Array(self._initial)} if held == NOTHING else {}
        arrays |= buffers_of(self._weights, self._layout)
        return record_with(arrays)


def _pairs(pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Int64 (n, 2): in a checkpoint an array, since text of so many numbers takes long."""
    return np.array(list(pairs), np.int64).reshape(-1, 2)


def _said(reply: Message) -> int | None:
    """The version that a node holds, where it says that it could make nothing of its message."""
    config = brought_by(reply, CONFIG, ConfigRecord)
    said = None if config is None else config.get(HOLDS)
    return said if isinstance(said, int) else None


# --- the client's end --------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """A version as a node makes it: number and checksum of its weights, what the node keeps, the weights."""

    number: int
    crc: int
    holds: ArrayRecord
    floats: dict[str, Array]


def receive(initial: ArrayRecord) -> Mod:
    """The client mod: replaces a coded version in a message by its weights; `initial` is the seed's model.

    What this node holds stays in `context.state["downlink"]`. A node that can make nothing of the message
    says what it holds, and does nothing else. Where one process serves many nodes, each version is decoded
    once: all nodes come to the same one, whatever they held.
    """
    layout = layout_of(initial)
    like, fresh = ravel(initial, layout), first(layout)
    last: _Made | None = None

    def made(version: Version, kept: ArrayRecord) -> _Made:
        weights = version.weights(values(kept[INITIAL]) if INITIAL in kept else like)
        at = array_of(np.array([version.number, version.exponent]))
        holds = record_with({**kept, AT: at, LEVELS: array_of(short(version.levels))})
        floats = {name: array_of(one) for name, one in unravel(weights, layout, initial).items()}
        return _Made(version.number, crc_of(weights), holds, floats)

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        nonlocal last
        arrays = array_record(message.content)
        kept = record_in(context.state, DOWNLINK, ArrayRecord) or ArrayRecord()
        if INITIAL in arrays:
            kept = record_with({INITIAL: arrays[INITIAL]})
        held, exponent = values(kept[AT]).tolist() if AT in kept else (0, COARSEST)
        packet = VersionPacket.read(arrays[VERSION])
        if packet.based_on not in (0, held):
            return _holding(held, message)
        now = None if INITIAL in kept else last
        if now is None or (now.number, now.crc) != (packet.number, packet.crc):
            base = fresh
            if packet.based_on:
                base = Version(held, exponent, values(kept[LEVELS]).astype(np.int32))
            now = made(packet.onto(base, layout), kept)
            if now.crc != packet.crc:
                return _holding(0, message)
            if INITIAL not in kept:
                last = now
        context.state[DOWNLINK] = now.holds
        weights = {name: now.floats[name] if name in now.floats else arrays[name] for name in initial}
        message.content = RecordDict({**message.content, ARRAYS: record_with(weights)})
        return call_next(message, context)

    return mod


def _holding(number: int, message: Message) -> Message:
    """The reply of a node that can make nothing of its message, and says which version it holds."""
    return Message(RecordDict({CONFIG: ConfigRecord({HOLDS: number})}), reply_to=message)
