"""Codecs: how one flat float32 vector becomes bytes and comes back.

Every stage, `Chain` and `ErrorFeedback` are `Codec`s. A stage turns an array into a `Packet`: a short
header of its own and a body, which is again an array. `Chain` hands the body on, so that a pipeline such
as prune -> quantize -> entropy-code is three small stages, and only the last body travels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

State = Mapping[str, NDArray[Any]]
"""What a codec remembers between rounds; lives in the client's `Context.state`."""


@dataclass(frozen=True)
class Slot:
    """Where one array of the model lies in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Layout:
    """The arrays of a model in the order of the flat vector; both ends derive it from the model."""

    slots: tuple[Slot, ...]
    size: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> "Layout":
        """Of arrays with these names and shapes, end to end."""
        slots, offset = [], 0
        for name, shape in shapes:
            slots.append(Slot(name, tuple(shape), offset))
            offset += prod(shape)
        return cls(tuple(slots), offset)


@dataclass(frozen=True)
class Packet:
    """What a stage made: `header` is its side information, `body` (1-d) is what the next stage codes.

    `known` is what `decode` makes of it, where the encoder was asked (`encode_known`) and could say.
    """

    body: NDArray[Any]
    header: bytes = field(default=b"")
    known: NDArray[Any] | None = field(default=None, compare=False, repr=False)


class Codec(Protocol):
    """Encodes on the client, decodes on the server; `decode` needs no memory of the client.

    `encode` takes a 1-d array `x`, the model's layout, this codec's state and public randomness, and
    returns the packet with the next state. `decode` returns what the server may believe of `x`, and
    raises `DecodeError` on anything that `encode` cannot have made for this layout.
    """

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]: ...

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]: ...


class Knowing(Codec, Protocol):
    """A codec that knows what `decode` makes of a packet sooner than by decoding it."""

    def encode_known(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]: ...


def encode_known(
    codec: Codec, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
) -> tuple[Packet, State]:
    """As `encode`; the packet also has what `decode` makes of it, bit for bit, where the codec can say."""
    encode = cast(Knowing, codec).encode_known if hasattr(codec, "encode_known") else codec.encode
    return encode(x, layout, state, rng)
