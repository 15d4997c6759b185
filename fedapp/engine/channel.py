"""A pipe between two processes that takes each large piece of bytes once."""

import io
import pickle
from collections import OrderedDict
from multiprocessing.connection import Connection
from typing import Any

from fedapp.engine.arena import Arena
from fedapp.stages import TRANSFER, WAIT

LEAST, MOST = 1 << 12, 1 << 27  # bytes: of a piece that is remembered, and of all pieces together


class Channel:
    """Carries objects by turns, one there, one back. Both ends remember large bytes objects that crossed.

    A piece that crossed before, in either direction, is named instead. Since they take turns, both ends know
    the same pieces, and forget the same ones: those that were used longest ago.

    Of an `arena`, where large pieces lie that many are to read, one end `writes` and the other reads.
    """

    def __init__(self, pipe: Connection, arena: Arena | None = None, writes: bool = False) -> None:
        self.pipe, self._arena, self._written = pipe, arena, arena if writes else None
        self._pieces = OrderedDict[int, bytes]()
        self._names = dict[int, int]()  # by id, which is unique while the piece is remembered
        self._size, self._next = 0, 0

    def send(self, thing: object) -> None:
        """As Connection.send; raises OSError where the other end is gone."""
        new, body = list[int](), io.BytesIO()
        with TRANSFER:
            pickler = pickle.Pickler(body, pickle.HIGHEST_PROTOCOL)
            pickler.persistent_id = lambda piece: self._name(piece, new)  # type: ignore[method-assign]
            pickler.dump(thing)
            places = {name: self._put(self._pieces[name]) for name in new}
            told = [(name, place, len(self._pieces[name])) for name, place in places.items()]
        with WAIT:  # for the other end to read it
            self.pipe.send_bytes(pickle.dumps(told) + body.getbuffer())  # one write wakes the other end once
            for name, place in places.items():
                if place is None:
                    self.pipe.send_bytes(self._pieces[name])
        self._forget()

    def receive(self) -> Any:
        """As Connection.recv; raises EOFError or OSError where the other end is gone."""
        with WAIT:
            body = io.BytesIO(self.pipe.recv_bytes())
        if self._written is not None:
            self._written.read(self)  # who answers has read all that it was sent
        with TRANSFER:
            for name, place, size in pickle.load(body):
                self._remember(name, self._got(place, size))
            unpickler = pickle.Unpickler(body)
            unpickler.persistent_load = self._recall  # type: ignore[method-assign]
            thing = unpickler.load()
        self._forget()
        return thing

    def close(self) -> None:
        self.pipe.close()
        if self._written is not None:
            self._written.read(self)

    def _put(self, piece: bytes) -> int | None:
        """Where the other end finds a piece; None if it crosses the pipe."""
        return None if self._written is None else self._written.put(piece, self)

    def _got(self, place: int | None, size: int) -> bytes:
        if place is None:
            return self.pipe.recv_bytes()
        assert self._arena is not None
        return self._arena.get(place, size)

    def _name(self, piece: object, new: list[int]) -> int | None:
        if type(piece) is not bytes or len(piece) < LEAST:
            return None
        name = self._names.get(id(piece))
        if name is None:
            name = self._next
            self._remember(name, piece)
            new.append(name)
        self._pieces.move_to_end(name)
        return name

    def _recall(self, name: int) -> bytes:
        self._pieces.move_to_end(name)
        return self._pieces[name]

    def _remember(self, name: int, piece: bytes) -> None:
        self._pieces[name], self._names[id(piece)] = piece, name
        self._size, self._next = self._size + len(piece), name + 1

    def _forget(self) -> None:
        """Both ends do so after the same message, with the same pieces in the same order."""
        while self._size > MOST:
            _, piece = self._pieces.popitem(last=False)
            del self._names[id(piece)]
            self._size -= len(piece)
