"""Stages in a row, and the memory that makes a lossy codec lose nothing in the long run."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Codec, Layout, Packet, State, encode_known
from fedapp.codec.entropy import Ans
from fedapp.codec.huffman import Huffman
from fedapp.codec.prune import TopK
from fedapp.codec.quantize import DeadZone
from fedapp.codec.varint import Reader, varint
from fedapp.codec.zstd import Zstd
from fedapp.errors import ConfigError


@dataclass(frozen=True)
class Identity:
    """No compression: the update itself, float32."""

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        return Packet(x), {}

    def encode_known(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        return Packet(x, known=x), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        return packet.body


@dataclass(frozen=True)
class Chain:
    """Codecs applied one after the other, each to the body of the one before; undone in reverse order."""

    stages: tuple[Codec, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("codec.stages must name at least one stage, got none: use codec=identity")
        object.__setattr__(self, "stages", tuple(self.stages))

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        header, after = b"", dict[str, NDArray[Any]]()
        for index, stage in enumerate(self.stages):
            own = {key.partition(".")[2]: v for key, v in state.items() if key.startswith(f"{index}.")}
            packet, own_after = stage.encode(x, layout, own, rng)
            header += varint(len(packet.header)) + packet.header
            after |= {f"{index}.{key}": v for key, v in own_after.items()}
            x = packet.body
        return Packet(x, header), after

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        reader = Reader(packet.header)
        headers = [reader.take(reader.varint(len(packet.header))) for _ in self.stages]
        reader.end()
        body = packet.body
        for stage, header in zip(reversed(self.stages), reversed(headers), strict=True):
            body = stage.decode(Packet(body, header), layout)
        return body


@dataclass(frozen=True)
class ErrorFeedback:
    """Adds what earlier rounds lost to the update before encoding, and remembers what this one loses.

    State: `residual`, float32 (size,). But for float32 rounding, what was sent and the residual together are
    the sum of the updates.

    A reply that is lost, late or refused costs what its packet held and no more: the residual stays what it
    is when a packet arrives, and nothing is sent twice. A client that fails before it replies loses its new
    update and keeps the residual it had. A deployed client sends its reply before Flower stores the context:
    if it dies between the two, the older residual comes again and the newer never does, and the sum is off by
    their difference. A node that restarts owes nothing any more.

    Under local and example-level differential privacy the residual holds noised values only, so sending it
    later is post-processing. Under central and distributed differential privacy it must be off: the residual
    would pass the clip. Source: Karimireddy et al. 2019, "Error feedback fixes SignSGD", Algorithm 2.
    """

    codec: Codec

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        owed = x + state["residual"] if "residual" in state else x
        inner = {key.partition(".")[2]: v for key, v in state.items() if key.startswith("codec.")}
        packet, after = encode_known(self.codec, owed, layout, inner, rng)
        known = self.codec.decode(packet, layout) if packet.known is None else packet.known
        after = {"residual": owed - known, **{f"codec.{key}": v for key, v in after.items()}}
        return replace(packet, known=known), after

    encode_known = encode

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        return self.codec.decode(packet, layout)


def with_feedback(codec: Codec, feedback: bool) -> Codec:
    """The codec itself, or inside error feedback: what every builder of conf/codec/ ends with."""
    if not isinstance(feedback, bool):
        raise ConfigError(
            f"codec.feedback must be true or false, or auto where codec=default, got {feedback!r}: "
            f"set codec.feedback=true, for example"
        )
    return ErrorFeedback(codec) if feedback else codec


def pipeline(keep: float = 1.0, step: float = 2.0, offset: float = 0.38, feedback: bool = False) -> Codec:
    """Prune, quantize, entropy-code: the stages behind `codec=default` and `codec=topk`."""
    check.real("codec.keep", keep, above=0.0, high=1.0)
    prune = (TopK(keep),) if keep != 1.0 else ()
    return with_feedback(Chain((*prune, DeadZone(step, offset), Ans())), feedback)


_ENTROPY: dict[str, tuple[Codec, ...]] = {
    "none": (),
    "ans": (Ans(),),
    "huffman": (Huffman(),),
    "zstd": (Zstd(),),
}


def staged(stage: Codec, prune: Codec | None = None, entropy: str = "none", feedback: bool = False) -> Codec:
    """One stage, pruning before it and an entropy coder behind it: the family of codecs in conf/codec/."""
    check.choice("codec.entropy", entropy, tuple(_ENTROPY))
    chain = Chain((*(() if prune is None else (prune,)), stage, *_ENTROPY[entropy]))
    return with_feedback(chain, feedback)
