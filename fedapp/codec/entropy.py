"""Integers become bytes at their empirical entropy."""

from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout, Packet, State
from fedapp.codec.varint import Reader, varint
from fedapp.errors import DecodeError

_AT_ONCE = 2**16
MOST = 255  # the largest magnitude that gets a row of its own in the table


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
    if left or (_tally(symbols, len(counts)) != counts).any():
        raise DecodeError("packet's entropy-coded part does not match its table")
    return symbols


def _tally(symbols: NDArray[np.int32], kinds: int) -> NDArray[np.int64]:
    """How many there are of each; part by part, since numpy makes an int64 of each symbol."""
    parts = (symbols[start : start + _AT_ONCE] for start in range(0, len(symbols), _AT_ONCE))
    counts = np.zeros(kinds, np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=kinds)
    return counts


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
        symbols, counts, most, escapes = split_levels(x, row=2.2)  # about a byte a count
        header = b"".join(varint(int(v)) for v in (len(x), most, *counts))
        body = escapes + encode_symbols(symbols, counts)
        return Packet(np.frombuffer(body, np.uint8), header), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.uint8:
            raise DecodeError("packet's body is not bytes")
        table, data = Reader(packet.header), Reader(packet.body.tobytes())
        size = table.varint(layout.size)
        most = table.varint(MOST)
        counts = np.array([table.varint(size) for _ in range(2 * most + 2)], np.int64)
        table.end()
        if counts.sum() != size:
            raise DecodeError(f"packet's table counts {counts.sum()} symbols, its header says {size}")
        escapes = data.take(4 * int(counts[-1]))
        return join_levels(decode_symbols(data.rest(), counts), most, escapes)


def split_levels(x: NDArray[Any], row: float) -> tuple[NDArray[np.int32], NDArray[np.int64], int, bytes]:
    """Symbols 0..2K+1 of int32 levels -K..K and of an escape, their counts, K, the escaped levels as bytes.

    K is chosen so that its rows of the table, `row` bytes for a level and its negative, and escapes (four
    bytes and a code word each) are smallest together.
    """
    if x.dtype != np.int32:
        raise TypeError(f"entropy coding takes int32 levels, got {x.dtype}: put a quantizer before it")
    magnitude = np.abs(x)
    rows = np.bincount(np.minimum(magnitude, MOST + 1), minlength=MOST + 2)
    beyond = len(x) - np.cumsum(rows)[: MOST + 1]  # how many are above K
    most = int(np.argmin(row * np.arange(MOST + 1) + 5.5 * beyond)) if len(x) else 0
    escaped = magnitude > most
    symbols = np.where(escaped, 2 * most + 1, x + most).astype(np.int32)
    return symbols, np.bincount(symbols, minlength=2 * most + 2), most, x[escaped].astype("<i4").tobytes()


def join_levels(symbols: NDArray[np.int32], most: int, escapes: bytes) -> NDArray[np.int32]:
    """Undo `split_levels`, in place; raises DecodeError where the number of escapes does not fit."""
    level = symbols
    level -= np.int32(most)
    escaped = level > most
    if 4 * np.count_nonzero(escaped) != len(escapes):
        raise DecodeError("packet does not hold the levels that it escapes")
    level[escaped] = np.frombuffer(escapes, "<i4")
    return level
