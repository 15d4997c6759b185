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
_AT_ONCE = 2**16  # symbols whose codes are placed together, in the processor's cache


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
        bits, lanes = _write(_by_lane(symbols), lengths)
        header = b"".join(varint(v) for v in (len(x), most, len(escapes) // 4))
        header += pack_bits(lengths.astype(np.uint8), 4).tobytes()
        header += lanes.astype("<u2").tobytes()
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


def _canonical(lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Codes, as the first of 64 bits: by length, then by symbol, each begins where the one before ends."""
    share = np.where(lengths > 0, 1 << (_LONGEST - lengths), 0)  # of all strings of 15 bits
    order = np.argsort(lengths, kind="stable")
    first = np.zeros(len(lengths), np.uint64)
    first[order] = np.cumsum(share[order]) - share[order]
    return first << np.uint64(64 - _LONGEST)


def _lanes(count: int) -> int:
    return -(-count // _LANE)


def _by_lane(symbols: NDArray[np.int32]) -> NDArray[np.int32]:
    """Symbol i goes to lane i mod L; lane after lane."""
    lanes = _lanes(len(symbols))
    return np.concatenate([symbols[:0], *(symbols[lane::lanes] for lane in range(lanes))])


def _write(symbols: NDArray[np.int32], lengths: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
    """The codes one behind the other, most significant bit first, and how many bits each lane takes."""
    lanes = _lanes(len(symbols))
    if np.count_nonzero(lengths) < 2:
        return b"", np.zeros(lanes, np.int64)  # a constant takes no bit
    code, taken = _canonical(lengths), lengths.astype(np.uint8)[symbols]
    sizes = len(symbols) // lanes + (np.arange(lanes) < len(symbols) % lanes)
    of_lanes: NDArray[np.int64] = np.add.reduceat(taken, np.cumsum(sizes) - sizes, dtype=np.int64)
    words, at = np.zeros(int(of_lanes.sum()) // 32 + 2, np.uint64), 0
    for start in range(0, len(symbols), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        end = at + np.cumsum(taken[part], dtype=np.int64)
        begin = end - taken[part]
        word = begin >> 5
        spread = code[symbols[part]] >> (begin & 31).astype(np.uint64)  # over its word and the next
        first = np.flatnonzero(np.diff(word, prepend=-1))
        sums = np.add.reduceat(spread, first)  # no bit is set twice
        words[word[first]] |= sums >> np.uint64(32)
        words[word[first] + 1] |= sums & np.uint64(0xFFFFFFFF)
        at = int(end[-1])
    return words.astype(">u4").tobytes()[: (at + 7) // 8], of_lanes


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
