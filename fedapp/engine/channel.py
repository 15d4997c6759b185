"""A pipe between two processes that takes each large piece of bytes once."""

import io
import pickle
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from fedapp.engine.arena import Arena
from fedapp.stages import TRANSFER, WAIT

LEAST, MOST = 1 << 12, 1 << 27  # bytes: of a piece that is remembered, and of all pieces together

Parts = Sequence[bytes | memoryview]


class Channel:
    """Carries requests one way, and to each one answer back, in order; the next request need not wait for it.

    Both ends remember large bytes objects that crossed; one that crossed before, in either direction, is
    named instead. The end that `asks` has the other forget those that were used longest ago, and forgets them
    itself when that request is answered: answers that come before may still name them.

    Of an `arena`, where large pieces lie that many are to read, the end that asks writes and the other reads.
    """

    def __init__(self, pipe: Connection, arena: Arena | None = None, asks: bool = False) -> None:
        self.pipe, self._arena, self._asks = pipe, arena, asks
        self._room = _room(pipe)
        self._pieces = dict[int, bytes]()  # at the end that asks: first those that were used longest ago
        self._names = dict[int, int]()  # by id, which is unique while the piece is remembered
        self._size, self._next = 0, 0 if asks else 1  # each end gives every other name
        self._leaving = deque[dict[int, bytes]]()  # by request that is not answered: what is forgotten by it
        self._begun, self._held = 0, deque[Parts]()  # requests so far; those that the pipe has no room for

    def send(self, thing: object) -> None:
        """As Connection.send; raises OSError where the other end is gone."""
        new, body = list[int](), io.BytesIO()
        with TRANSFER:
            pickler = pickle.Pickler(body, pickle.HIGHEST_PROTOCOL)
            pickler.persistent_id = (  # type: ignore[method-assign]
                lambda one: self._name(one, new) if type(one) is bytes and len(one) >= LEAST else None
            )
            pickler.dump(thing)
            places = {name: self._put(self._pieces[name]) for name in new}
            told = [(name, place, len(self._pieces[name])) for name, place in places.items()]
            crossing = [self._pieces[name] for name, place in places.items() if place is None]
            leaving = self._outworn() if self._asks else {}
            head = pickle.dumps((told, list(leaving)))
            parts = [head + body.getbuffer(), *crossing]  # one write wakes the other end once
        if self._asks:
            self._begun += 1
            self._leaving.append(leaving)
            # Who works on another request may be about to write its answer, and will not read before.
            if len(self._leaving) > 1 and sum(map(len, parts)) > self._room:
                self._held.append(parts)
                return
        self._write(parts)

    def receive(self) -> Any:
        """As Connection.recv; raises EOFError or OSError where the other end is gone."""
        with WAIT:
            body = io.BytesIO(self.pipe.recv_bytes())
        with TRANSFER:
            told, gone = pickle.load(body)
            for name, place, size in told:
                self._remember(name, self._got(place, size))
            unpickler = pickle.Unpickler(body)
            unpickler.persistent_load = self._recall  # type: ignore[method-assign]
            thing = unpickler.load()
            for name in gone:
                self._forget(name)
        if self._asks:
            if self._arena is not None:
                self._arena.read(self._reader(self._begun - len(self._leaving)))
            self._leaving.popleft()
            if self._held:
                with suppress(OSError):  # gone by now: the next answer, which does not come, says so
                    self._write(self._held.popleft())
        return thing

    def close(self) -> None:
        self.pipe.close()
        if self._asks and self._arena is not None:
            for request in range(self._begun - len(self._leaving), self._begun):
                self._arena.read(self._reader(request))

    def _reader(self, request: int) -> tuple[int, int]:
        """Who reads what is written for a request: who answers it has read that."""
        return id(self), request

    @WAIT
    def _write(self, parts: Parts) -> None:
        """Waits for the other end to read it."""
        for part in parts:
            self.pipe.send_bytes(part)

    def _put(self, piece: bytes) -> int | None:
        """Where the other end finds a piece; None if it crosses the pipe."""
        if self._arena is None or not self._asks:
            return None
        return self._arena.put(piece, self._reader(self._begun))

    def _got(self, place: int | None, size: int) -> bytes:
        if place is None:
            return self.pipe.recv_bytes()
        assert self._arena is not None
        return self._arena.get(place, size)

    def _name(self, piece: bytes, new: list[int]) -> int:
        name = self._names.get(id(piece))
        if name is None:
            name, self._next = self._next, self._next + 2
            self._remember(name, piece)
            new.append(name)
        self._recall(name)
        return name

    def _recall(self, name: int) -> bytes:
        if name not in self._pieces:
            return next(pieces[name] for pieces in self._leaving if name in pieces)
        self._pieces[name] = piece = self._pieces.pop(name)
        return piece

    def _remember(self, name: int, piece: bytes) -> None:
        self._pieces[name], self._names[id(piece)] = piece, name
        self._size += len(piece)

    def _forget(self, name: int) -> bytes:
        piece = self._pieces.pop(name)
        del self._names[id(piece)]
        self._size -= len(piece)
        return piece

    def _outworn(self) -> dict[int, bytes]:
        """What is too much to remember, by name; those used longest ago."""
        leaving = dict[int, bytes]()
        while self._size > MOST:
            name = next(iter(self._pieces))
            leaving[name] = self._forget(name)
        return leaving


def _room(pipe: Connection) -> int:
    """Bytes that a pipe takes though nobody reads: not all that the system says, which counts its own too."""
    with socket.fromfd(pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
        return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4
