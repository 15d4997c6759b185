"""Zstandard: a general compressor, for what repeats rather than what is merely small."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State
from fedapp.errors import DecodeError


@dataclass(frozen=True)
class Zstd:
    """A Zstandard frame of the levels' bytes. int32 (n,) <-> uint8 (bytes,); no header.

    Levels are folded to 0, -1, 1, -2, ... = 0, 1, 2, 3, ... and sent as four planes of bytes, lowest first:
    the upper planes are all but empty and cost next to nothing. `effort` is zstd's level, 1 to 22.
    Source: Collet and Kucherawy 2021, RFC 8878. The frame depends on the version of the library; every
    version decodes it.
    """

    effort: int = 3

    def __post_init__(self) -> None:
        check.whole("codec.effort", self.effort, 1, 22)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        if x.dtype != np.int32:
            raise TypeError(f"entropy coding takes int32 levels, got {x.dtype}: put a quantizer before it")
        folded = (x << 1 ^ x >> 31).astype("<i4")
        planes = np.ascontiguousarray(folded.view(np.uint8).reshape(-1, 4).T)
        frame = zstandard.ZstdCompressor(level=self.effort).compress(planes.tobytes())
        return Packet(np.frombuffer(frame, np.uint8)), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.uint8 or packet.header:
            raise DecodeError("packet is not one Zstandard frame")
        frame = packet.body.tobytes()
        try:
            size = zstandard.frame_content_size(frame)  # the library allocates what it claims
            if not 0 <= size <= 4 * layout.size or size % 4:
                raise DecodeError(f"packet's Zstandard frame claims {size} bytes for {layout.size} levels")
            planes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise DecodeError("packet's Zstandard frame is broken") from error
        if len(planes) != size:
            raise DecodeError("packet's Zstandard frame is shorter than it claims")
        folded = np.frombuffer(planes, np.uint8).reshape(4, -1).T.copy().view("<u4").reshape(-1)
        level: NDArray[np.int32] = (folded >> 1 ^ -(folded & 1)).astype("<u4").view("<i4").astype(np.int32)
        return level
