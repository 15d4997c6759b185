"""Large arrays of many states, each held once however many states hold it.

All nodes that were sent the same version of a model keep the same levels; and nodes there may be thousands.
"""

from collections.abc import Iterator
from hashlib import blake2b

from flwr.app import Array, ArrayRecord, RecordDict

from fedapp.vector import record_with

LEAST = 1 << 12  # bytes of an array that is a piece, at least
_STYPE = "fedapp.piece:"


class Pieces:
    """The data of states in memory: each object is counted once, and large ones are pieces."""

    def __init__(self) -> None:
        self.bytes = 0
        self._uses = dict[int, int]()  # by id, which is unique while the piece is used
        self._digests, self._found = dict[int, bytes](), dict[bytes, bytes]()

    def hold(self, state: RecordDict) -> None:
        """A state more is in memory."""
        for data in _data(state):
            self._uses[id(data)] = uses = self._uses.get(id(data), 0) + 1
            self.bytes += len(data) if uses == 1 else 0

    def drop(self, state: RecordDict) -> None:
        """A state less."""
        for data in _data(state):
            self._uses[id(data)] -= 1
            if not self._uses[id(data)]:
                del self._uses[id(data)]
                self.bytes -= len(data)
                if (digest := self._digests.pop(id(data), None)) is not None:
                    self._found.pop(digest, None)

    def named(self, state: RecordDict) -> tuple[RecordDict, dict[bytes, bytes]]:
        """The state with digests in the place of its pieces, and those by their digests."""
        pieces, out = dict[bytes, bytes](), RecordDict({**state})
        for name, record in _arrays_in(state):
            arrays = dict[str, Array]()
            for key, array in record.items():
                arrays[key] = array
                if len(array.data) >= LEAST:
                    digest = self._digest(array.data)
                    pieces[digest] = array.data
                    arrays[key] = Array(array.dtype, array.shape, _STYPE + array.stype, digest)
            out[name] = record_with(arrays)
        return out, pieces

    def known(self, digest: bytes) -> bytes | None:
        """The piece, if a state in memory uses it."""
        return self._found.get(digest)

    def _digest(self, data: bytes) -> bytes:
        if (digest := self._digests.get(id(data))) is None:
            digest = digest_of(data)
            if id(data) in self._uses:
                self._digests[id(data)], self._found[digest] = digest, data
        return digest


def digest_of(data: bytes) -> bytes:
    """What a piece is known by."""
    return blake2b(data, digest_size=32).digest()


def names_in(state: RecordDict) -> Iterator[tuple[ArrayRecord, str, Array]]:
    """Where a state that `named` returned lacks its pieces: the record, the array's name, and the array."""
    for _, record in _arrays_in(state):
        for name, array in list(record.items()):
            if array.stype.startswith(_STYPE):
                yield record, name, array


def put_back(record: ArrayRecord, name: str, array: Array, data: bytes) -> None:
    """Give an array its piece."""
    record[name] = Array(array.dtype, array.shape, array.stype.removeprefix(_STYPE), data)


def _arrays_in(state: RecordDict) -> Iterator[tuple[str, ArrayRecord]]:
    return ((name, record) for name, record in state.items() if isinstance(record, ArrayRecord))


def _data(state: RecordDict) -> Iterator[bytes]:
    for _, record in _arrays_in(state):
        yield from (array.data for array in record.values())
