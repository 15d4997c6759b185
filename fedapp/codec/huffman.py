"""Canonical Huffman codes: whole bits a symbol, and nothing to send but the lengths of the codes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout, Packet, State
from fedapp.codec.bits import pack_bits, unpack_bits
from fedapp.codec.entropy import MOST, join_levels, split_levels
from fedapp.codec.varint import Reader, varint
from fedapp.errors import DecodeError

_LONGEST = 15  # bits of a code: its length fits half a byte, and every code a table of 2**15 entries
_LANE = 1024  # symbols; their codes take less than 2**16 bits


@dataclass(frozen=True)
class Huffman:
    """Huffman codes of at most 15 bits with the packet's own histogram. int32 (n,) <-> uint8 (bytes,).

    Symbols are dealt in turn to lanes of up to 1024, coded one lane behind the other, and decoded one row of
    all lanes at a time. Header: n, K and the number of escapes as varints, lengths of the codes of levels
    -K..K and of an escape (half a byte each), lengths of the lanes in bits (two bytes each). Body: escaped
    levels (int32 each), then the codes. At least a bit a symbol: below that `Ans` is much smaller.
    Source: Huffman 1952, "A method for the construction of minimum-redundancy codes"; Larmore and Hirschberg
    1990, "A fast algorithm for optimal length-limited Huffman codes" (package-merge).
    """

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        symbols, counts, most, escapes = split_levels(x, row=1.0)
        lengths = code_lengths(counts)
        spent = lengths * (np.count_nonzero(lengths) > 1)  # a constant takes no bit
        code = (_canonical(lengths) | spent << 16)[_by_lane(symbols)]  # one gather for both
        bits, ends = _write(code & 0xFFFF, code >> 16), _ends(len(x), code >> 16)
        header = b"".join(varint(v) for v in (len(x), most, len(escapes) // 4))
        header += pack_bits(lengths.astype(np.uint8), 4).tobytes()
        header += np.diff(ends, prepend=0).astype("<u2").tobytes()
        return Packet(np.frombuffer(escapes + bits, np.uint8), header), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        if packet.body.dtype != np.uint8:
            raise DecodeError("packet's body is not bytes")
        table, data = Reader(packet.header), Reader(packet.body.tobytes())
        count = table.varint(layout.size)
        most = table.varint(MOST)
        escapes = data.take(4 * table.varint(count))
        lengths = unpack_bits(np.frombuffer(table.take(most + 1), np.uint8), 2 * most + 2, 4)
        ends = np.cumsum(np.frombuffer(table.take(2 * _lanes(count)), "<u2"), dtype=np.int64)
        table.end()
        return join_levels(_read(data.rest(), count, lengths, ends), most, escapes)


def code_lengths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of the best prefix code of at most 15 bits; 0 for what never occurs.

    Package-merge: 15 times, sort symbols and packages together and pair them into the next packages. The
    cheapest 2m - 2 of the last list make the code: a symbol's is as long as it is met on the way back.
    """
    used = np.flatnonzero(counts)
    used = used[np.argsort(counts[used], kind="stable")]
    lengths = (counts > 0).astype(np.int64)
    if len(used) < 2:
        return lengths
    weight, packages, lists = counts[used], counts[:0], []
    for _ in range(_LONGEST):
        both = np.concatenate([weight, packages])
        order = np.argsort(both, kind="stable")
        lists.append(order < len(used))  # where the symbols are
        both = both[order][: len(both) // 2 * 2]
        packages = both[::2] + both[1::2]
    lengths[used], take = 0, 2 * len(used) - 2
    for is_symbol in reversed(lists):
        met = int(is_symbol[:take].sum())
        lengths[used[:met]] += 1
        take = 2 * (take - met)
    return lengths


def _canonical(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes in the order of their lengths, then of their symbols: each begins where the one before ends."""
    share = np.where(lengths > 0, 1 << (_LONGEST - lengths), 0)  # of all strings of 15 bits
    order = np.argsort(lengths, kind="stable")
    first = np.zeros_like(share)
    first[order] = np.cumsum(share[order]) - share[order]
    return first >> (_LONGEST - lengths)


def _lanes(count: int) -> int:
    return -(-count // _LANE)


def _by_lane(symbols: NDArray[np.int32]) -> NDArray[np.int32]:
    """Symbol i goes to lane i mod L; lane after lane."""
    lanes = max(1, _lanes(len(symbols)))
    full = len(symbols) // lanes * lanes
    rows = symbols[:full].reshape(-1, lanes).T
    longer = len(symbols) - full  # so many lanes have one symbol more
    if not longer:
        return rows.reshape(-1)
    head = np.concatenate([rows[:longer], symbols[full:, None]], axis=1)
    return np.concatenate([head.reshape(-1), rows[longer:].reshape(-1)])


def _ends(count: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each lane ends, in bits."""
    lanes = _lanes(count)
    sizes = count // max(1, lanes) + (np.arange(lanes) < count % max(1, lanes))
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[np.cumsum(sizes)]


def _write(codes: NDArray[np.int64], lengths: NDArray[np.int64]) -> bytes:
    """The codes one behind the other, most significant bit first."""
    end = np.cumsum(lengths)
    if not lengths.any():
        return b""
    total = int(end[-1])
    word, place = np.divmod(end - lengths, 32)
    spread = codes.astype(np.uint64) << (64 - place - lengths).astype(np.uint64)  # over its word and the next
    first = np.flatnonzero(np.diff(word, prepend=-1))
    sums = np.add.reduceat(spread, first)  # no bit is set twice
    words = np.zeros(total // 32 + 2, np.uint64)
    words[word[first]] = sums >> np.uint64(32)
    words[word[first] + 1] |= sums & np.uint64(0xFFFFFFFF)
    return words.astype(">u4").tobytes()[: (total + 7) // 8]


def _read(data: bytes, count: int, lengths: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.int32]:
    """Undo `_write` for lanes that end at these bits; raises DecodeError where codes or lanes do not fit."""
    total = int(ends[-1]) if len(ends) else 0
    if len(data) != (total + 7) // 8 or (total % 8 and data[-1] & (0xFF >> total % 8)):
        raise DecodeError("packet's Huffman-coded part is not as long as its lanes")
    used = np.flatnonzero(lengths)
    if len(used) < 2:
        if total or len(used) != min(count, 1):
            raise DecodeError("packet's table does not fit a constant sequence")
        return np.full(count, used.sum(), np.int32)
    order = used[np.argsort(lengths[used], kind="stable")]
    share = 1 << (_LONGEST - lengths[order].astype(np.int64))
    if share.sum() != 1 << _LONGEST:
        raise DecodeError("packet's table is no Huffman code")
    table = np.repeat((order << 4 | lengths[order]).astype(np.int16), share)  # by the next 15 bits
    byte = np.frombuffer(data + bytes(2 * _LANE), np.uint8).astype(
        np.int32
    )  # no lane reads further than this
    window = byte[:-2] << 16 | byte[1:-1] << 8 | byte[2:]
    place, symbols = np.concatenate([np.zeros(1, np.int64), ends[:-1]]), np.empty(count, np.int32)
    for start in range(0, count, len(ends)):
        row = symbols[start : start + len(ends)]
        at = place[: len(row)]
        code = table[window[at >> 3] >> (9 - (at & 7)) & 0x7FFF]
        row[:] = code >> 4
        at += code & 15
    if (place != ends).any():
        raise DecodeError("packet's Huffman-coded part does not end where its lanes do")
    return symbols
