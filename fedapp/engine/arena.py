"""Memory that the server shares with its workers: what several of them are to read is written once."""

import os
from collections.abc import Hashable
from typing import NamedTuple

LEAST = 1 << 16  # bytes of what is worth a place; less crosses a pipe in one go


class _Place(NamedTuple):
    start: int
    piece: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.piece)


class Arena:
    """A file in memory without a name, opened before the workers are forked: it ends with the last of them.

    A place is free again once all readers that were told of it have read it; whoever is told of the same
    object until then is told of the same place.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("fedapp")
        self._told = dict[Hashable, list[_Place]]()  # by reader, what it may not have read

    def put(self, piece: bytes, reader: Hashable) -> int | None:
        """Where the reader finds the piece; None where it is small, or there is no memory."""
        if len(piece) < LEAST:
            return None
        lying = [place for places in self._told.values() for place in places]
        place = next((place for place in lying if place.piece is piece), None)
        if place is None:
            place = _Place(_gap(lying, len(piece)), piece)
            try:
                if os.pwrite(self._file, piece, place.start) < len(piece):
                    return None
            except OSError:
                return None
        self._told.setdefault(reader, []).append(place)
        return place.start

    def get(self, start: int, size: int) -> bytes:
        """What lies there; in a worker."""
        return os.pread(self._file, size, start)

    def read(self, reader: Hashable) -> None:
        """This reader has all that it was told of, or will never ask for it."""
        self._told.pop(reader, None)

    def close(self) -> None:
        os.close(self._file)


def _gap(lying: list[_Place], size: int) -> int:
    """The first start of so many free bytes."""
    start = 0
    for place in sorted(lying, key=lambda place: place.start):
        if start + size <= place.start:
            break
        start = max(start, place.end)
    return start
