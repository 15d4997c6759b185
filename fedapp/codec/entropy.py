"""Integers become bytes at their empirical entropy."""

from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout, Packet, State
from fedapp.codec.varint import Reader, varint
from fedapp.errors import DecodeError

_MOST = 255  # the largest magnitude that gets a row of its own in the table


def encode_symbols(symbols: NDArray[np.int32], counts: NDArray[np.int64]) -> bytes:
    """ANS-code symbols 0..len(counts)-1 with the model of their counts (Duda 2013, arXiv:1311.2540)."""
    coder = constriction.stream.stack.AnsCoder()
    if np.count_nonzero(counts) > 1:  # a constant sequence carries no information
        coder.encode_reverse(symbols, _model(counts))
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def decode_symbols(data: bytes, counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Undo `encode_symbols`; the number of symbols is the sum of the counts."""
    if np.count_nonzero(counts) <= 1:
        if data:
            raise DecodeError("packet has bytes behind a constant sequence")
        return np.full(int(counts.sum()), int(np.argmax(counts)), np.int32)
    if len(data) % 4:
        raise DecodeError("packet's entropy-coded part is not whole words")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, "<u4").astype(np.uint32))
        symbols: NDArray[np.int32] = coder.decode(_model(counts), int(counts.sum()))
        left = coder.num_words()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the coder is compiled code: a panic is no Exception
        raise DecodeError("packet's entropy-coded part is broken") from error
    if left or (np.bincount(symbols, minlength=len(counts)) != counts).any():
        raise DecodeError("packet's entropy-coded part does not match its table")
    return symbols


def _model(counts: NDArray[np.int64]) -> Any:
    return constriction.stream.model.Categorical(counts.astype(np.float32), perfect=False)


@dataclass(frozen=True)
class Ans:
    """Asymmetric numeral systems with the packet's own histogram. int32 (n,) <-> uint8 (bytes,).

    Header: n, K, the counts of levels -K..K and of escapes, all varints. K is chosen so that table and
    escapes together are smallest. Body: escaped levels (int32 each), then the ANS words. The lossless
    stage is within 1 % of the empirical entropy beside this header and four bytes an escape.
    """

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        if x.dtype != np.int32:
            raise TypeError(f"entropy coding takes int32 levels, got {x.dtype}: put a quantizer before it")
        most = _table_reach(np.abs(x))
        escaped = np.abs(x) > most
        symbols = np.where(escaped, 2 * most + 1, x + most).astype(np.int32)
        counts = np.bincount(symbols, minlength=2 * most + 2)
        header = b"".join(varint(int(v)) for v in (len(x), most, *counts))
        body = x[escaped].astype("<i4").tobytes() + encode_symbols(symbols, counts)
        return Packet(np.frombuffer(body, np.uint8), header), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.uint8:
            raise DecodeError("packet's body is not bytes")
        table, data = Reader(packet.header), Reader(packet.body.tobytes())
        size = table.varint(layout.size)
        most = table.varint(_MOST)
        counts = np.array([table.varint(size) for _ in range(2 * most + 2)], np.int64)
        table.end()
        if counts.sum() != size:
            raise DecodeError(f"packet's table counts {counts.sum()} symbols, its header says {size}")
        escapes = np.frombuffer(data.take(4 * int(counts[-1])), "<i4")
        level = decode_symbols(data.rest(), counts) - np.int32(most)
        level[level > most] = escapes
        return level


def _table_reach(magnitude: NDArray[np.int32]) -> int:
    """The K that makes table (about a byte a row) and escapes (four bytes and a code word) smallest."""
    if not len(magnitude):
        return 0
    rows = np.bincount(np.minimum(magnitude, _MOST + 1), minlength=_MOST + 2)
    beyond = len(magnitude) - np.cumsum(rows)[: _MOST + 1]  # how many are above K
    return int(np.argmin(2.2 * np.arange(_MOST + 1) + 5.5 * beyond))
