"""A codec for each group of layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout, Packet, Slot, State
from fedapp.codec.layers import require_whole, size
from fedapp.codec.packet import from_bytes, to_bytes
from fedapp.codec.varint import Reader, varint
from fedapp.errors import ConfigError, DecodeError


@dataclass(frozen=True)
class PerLayer:
    """Codes each group of layers by a codec of its own; `rules` maps patterns of layer names to codecs.

    A layer belongs to the first pattern that matches its name (shell patterns: `*`, `?`, `[abc]`; capitals
    count), or to `rest`. The layers of a group lie end to end in a vector and a layout of their own, so a
    codec sees its group as it would a model.

    float32 (size,) <-> uint8 (bytes,): for each group its length, the type of its body, its header with
    its length, its body. State: each group's, under its number.

    Raises ConfigError where no layer is left for a pattern, since that is a slip of the pen.
    """

    rules: tuple[tuple[str, Codec], ...]
    rest: Codec

    def __post_init__(self) -> None:
        given = self.rules
        rules = tuple((str(k), v) for k, v in given.items()) if isinstance(given, Mapping) else given
        if not isinstance(rules, tuple):
            raise ConfigError(f"codec.rules must map patterns of layer names to codecs, got {given!r}")
        object.__setattr__(self, "rules", rules)
        for pattern, codec in (*self.rules, ("rest", self.rest)):
            if not (hasattr(codec, "encode") and hasattr(codec, "decode")):
                raise ConfigError(f"codec.rules: {pattern} must name a codec, got {codec!r}: give a _target_")

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_whole(x, layout)
        body, after = b"", dict[str, NDArray[Any]]()
        for index, (codec, slots) in self._groups(layout).items():
            own = {key.partition(".")[2]: v for key, v in state.items() if key.startswith(f"{index}.")}
            values = np.concatenate([x[_span(slot)] for slot in slots])
            packet, own_after = codec.encode(values, _alone(slots), own, rng)
            kind, data = to_bytes(packet)
            body += varint(len(data)) + bytes([kind]) + data
            after |= {f"{index}.{key}": v for key, v in own_after.items()}
        return Packet(np.frombuffer(body, np.uint8)), after

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.uint8 or packet.header:
            raise DecodeError("packet does not hold groups of layers")
        reader, decoded = Reader(packet.body.data), []
        for codec, slots in self._groups(layout).values():
            group = _alone(slots)
            length, kind = reader.varint(len(packet.body)), reader.take(1)[0]
            values = codec.decode(from_bytes(kind, reader.take(length)), group)
            if values.shape != (group.size,) or values.dtype != np.float32:
                raise DecodeError(f"packet holds {values.dtype} {values.shape}, not {group.size} float32")
            decoded += [(slot, values[_span(part)]) for slot, part in zip(slots, group.slots, strict=True)]
        reader.end()
        x = np.zeros(layout.size, np.float32)
        for slot, part in decoded:
            x[_span(slot)] = part
        return x

    def _groups(self, layout: Layout) -> dict[int, tuple[Codec, list[Slot]]]:
        """The groups that have layers, by the number of their rule; that of `rest` comes last."""
        patterns = [pattern for pattern, _ in self.rules]
        groups: dict[int, tuple[Codec, list[Slot]]] = {}
        for index, codec in enumerate([*(codec for _, codec in self.rules), self.rest]):
            slots = [slot for slot in layout.slots if _first(slot.name, patterns) == index]
            if slots:
                groups[index] = codec, slots
            elif index < len(patterns):
                names = [slot.name for slot in layout.slots]
                raise ConfigError(
                    f"codec.rules: no layer is left for {patterns[index]!r} in this model "
                    f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}): "
                    f"correct the pattern, move it up or leave it out"
                )
        return groups


def _first(name: str, patterns: list[str]) -> int:
    """The number of the first pattern that matches, or that of `rest`."""
    return next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), len(patterns))


def _span(slot: Slot) -> slice:
    return slice(slot.offset, slot.offset + size(slot))


def _alone(slots: list[Slot]) -> Layout:
    """The same layers as a model of their own."""
    return Layout.of((slot.name, slot.shape) for slot in slots)
