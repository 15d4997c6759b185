"""Memory that workers share with the server."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapp.engine.arena import LEAST, Arena


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena()
    yield made
    made.close()


def piece(value: int, size: int = LEAST) -> bytes:
    return bytes([value]) * size


def found(arena: Arena, one: bytes, reader: str) -> bool:
    start = arena.put(one, reader)
    assert start is not None
    return arena.get(start, len(one)) == one


def test_what_two_are_to_read_is_written_once(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    one, written = piece(1), list[int]()
    write = os.pwrite

    def counted(file: int, data: bytes, start: int) -> int:
        written.append(len(data))
        return write(file, data, start)

    monkeypatch.setattr(os, "pwrite", counted)
    assert arena.put(one, "a") == arena.put(one, "b") == 0
    assert written == [LEAST]
    arena.read("a")
    assert arena.put(one, "c") == 0  # b may not have read it
    arena.read("b")
    arena.read("c")
    assert arena.put(one, "a") == 0
    assert written == [LEAST] * 2  # by then it might have been written over


def test_small_pieces_have_no_place(arena: Arena) -> None:
    assert arena.put(piece(1, LEAST - 1), "a") is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=40))
def test_nothing_is_written_over_before_it_is_read(steps: list[tuple[int, int, bool]]) -> None:
    """Readers are told of pieces, and read what they were told at some later time."""
    arena, told = Arena(), dict[int, list[tuple[int, bytes]]]()
    for number, (reader, size, reads) in enumerate(steps):
        one = piece(number, size * LEAST)
        start = arena.put(one, reader)
        assert start is not None
        told.setdefault(reader, []).append((start, one))
        if reads:
            for start, one in told.pop(reader):
                assert arena.get(start, len(one)) == one
            arena.read(reader)
    for places in told.values():
        for start, one in places:
            assert arena.get(start, len(one)) == one
    arena.close()


def test_places_are_used_again(arena: Arena) -> None:
    for number in range(100):
        for reader in ("a", "b"):
            assert found(arena, piece(number, 3 * LEAST), reader)
            arena.read(reader)
    assert os.fstat(arena._file).st_size == 3 * LEAST


@pytest.mark.parametrize("room", [0, LEAST])
def test_where_memory_is_full_there_is_no_place(
    arena: Arena, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes, start: int) -> int:
        if not room:
            raise OSError("no space")
        return room

    monkeypatch.setattr(os, "pwrite", full)
    assert arena.put(piece(1, 2 * LEAST), "a") is None
    assert not arena._told
