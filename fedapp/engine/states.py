"""What the nodes of the local engine keep between messages: in memory up to a limit, beyond it on disk."""

import sqlite3
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, RecordDict

from fedapp.engine.pieces import Pieces, digest_of, names_in, put_back
from fedapp.errors import ConfigError
from fedapp.records import as_bytes, from_bytes
from fedapp.report.folder import make_folder

_SCHEMA = """
CREATE TABLE IF NOT EXISTS states (
    node INTEGER NOT NULL, round INTEGER NOT NULL, crc INTEGER NOT NULL, state BLOB NOT NULL,
    PRIMARY KEY (node, round));
CREATE TABLE IF NOT EXISTS pieces (digest BLOB PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS uses (
    node INTEGER NOT NULL, round INTEGER NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY (node, round, digest)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS users ON uses (digest);
CREATE TRIGGER IF NOT EXISTS gone AFTER DELETE ON states BEGIN
    DELETE FROM uses WHERE node = OLD.node AND round = OLD.round; END;
CREATE TRIGGER IF NOT EXISTS unused AFTER DELETE ON uses
    WHEN NOT EXISTS (SELECT 1 FROM uses WHERE digest = OLD.digest) BEGIN
    DELETE FROM pieces WHERE digest = OLD.digest; END"""
_OUTDATED = """
DELETE FROM states WHERE rowid IN (
    SELECT older.rowid FROM states AS older JOIN states AS newer
    ON newer.node = older.node AND newer.round > older.round AND newer.round <= ?)"""


class States(Mapping[int, Context]):
    """The Context of each node. States used least recently go to an SQLite file once there is no room.

    `room` is in bytes, of states in memory; `file` is where states last that `commit` wrote: one that no
    process has committed is gone when the process ends, however it ends. Without a file what does not fit
    goes to a file of SQLite's own, which has no name. `fresh` makes the Context of a node that kept nothing.

    Large arrays that many states share count once, in memory and on disk (`Pieces`).

    A row holds a node's state from some round on: what is used after round r is written as of r + 1, so that
    to go back to r is to drop later rows. Raises ConfigError where the disk is full or the file is damaged.
    """

    def __init__(
        self,
        nodes: Iterable[int],
        fresh: Callable[[int], Context],
        room: float = float("inf"),
        file: Path | None = None,
        finished: int = 0,
    ) -> None:
        """Begin after round `finished`: what the file holds of later rounds is dropped."""
        self._nodes, self._fresh, self._room, self._file = list(nodes), fresh, room, file
        self._cache = OrderedDict[int, Context]()  # the last one was used last
        self._pieces, self._changed, self._finished = Pieces(), set[int](), finished
        self._opened: sqlite3.Connection | None = None  # once there is something on disk
        self._on_disk: set[int] = set()  # nodes that have rows
        if file is not None and file.exists():
            with self._disk() as db:
                db.execute("DELETE FROM states WHERE round > ?", (finished,))
                for node, crc, state in db.execute("SELECT node, crc, state FROM states"):
                    _require_whole(node, crc == zlib.crc32(state))
                    self._on_disk.add(node)

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, node: int) -> Context:
        if node not in self._cache:
            context = self._fresh(node)
            if node in self._on_disk:
                context.state = self._read(node)
            self._keep(node, context)
        self._cache.move_to_end(node)
        return self._cache[node]

    def __setitem__(self, node: int, context: Context) -> None:
        if node in self._on_disk or any(context.state.values()):  # what keeps nothing is as good as fresh
            self._changed.add(node)
        self._keep(node, context)

    @property
    def stored(self) -> int:
        """How many nodes have a state on the disk."""
        return len(self._on_disk)

    def commit(self, finished: int, oldest: int) -> None:
        """Bring to the disk, in one transaction, what changed until the end of round `finished`.

        Rows that only states of before round `oldest` need are deleted.
        """
        if self._file is None:
            return
        for node in sorted(self._changed):
            self._write(node, self._cache[node])
        if self._opened is not None:
            with self._disk() as db:
                db.execute(_OUTDATED, (oldest,))
                db.execute("COMMIT")
        self._changed.clear()
        self._finished = finished

    def close(self) -> None:
        """Let go of the file; what was not committed is dropped."""
        if self._opened is not None:
            self._opened.close()

    def _keep(self, node: int, context: Context) -> None:
        before = self._cache.pop(node, None)
        self._cache[node] = context
        self._pieces.hold(context.state)
        if before is not None:
            self._pieces.drop(before.state)
        while self._pieces.bytes > self._room and len(self._cache) > 1:
            oldest, context = next(iter(self._cache.items()))
            if oldest in self._changed:
                self._write(oldest, context)
                self._changed.discard(oldest)
            del self._cache[oldest]
            self._pieces.drop(context.state)

    def _write(self, node: int, context: Context) -> None:
        named, pieces = self._pieces.named(context.state)
        state, at = as_bytes(named), (node, self._finished + 1)
        with self._disk() as db:
            db.execute("DELETE FROM states WHERE node = ? AND round = ?", at)
            for digest, data in pieces.items():
                if not db.execute("SELECT 1 FROM pieces WHERE digest = ?", (digest,)).fetchone():
                    db.execute("INSERT INTO pieces VALUES (?, ?)", (digest, data))
                db.execute("INSERT INTO uses VALUES (?, ?, ?)", (*at, digest))
            db.execute("INSERT INTO states VALUES (?, ?, ?, ?)", (*at, zlib.crc32(state), state))
        self._on_disk.add(node)

    def _read(self, node: int) -> RecordDict:
        with self._disk() as db:
            crc, state = db.execute(
                "SELECT crc, state FROM states WHERE node = ? ORDER BY round DESC LIMIT 1", (node,)
            ).fetchone()
            _require_whole(node, crc == zlib.crc32(state))
            found = from_bytes(state)
            for record, name, array in names_in(found):
                piece = self._pieces.known(array.data)
                if piece is None:
                    row = db.execute("SELECT data FROM pieces WHERE digest = ?", (array.data,)).fetchone()
                    _require_whole(node, row is not None and digest_of(row[0]) == array.data)
                    piece = bytes(row[0])
                put_back(record, name, array, piece)
        return found

    @contextmanager
    def _disk(self) -> Iterator[sqlite3.Connection]:
        """The open transaction. Not before the workers are forked: none of them may share a connection."""
        try:
            if self._opened is None:
                if self._file is not None:
                    make_folder(self._file.parent)
                self._opened = sqlite3.connect(self._file or "", isolation_level=None)
                self._opened.execute("PRAGMA page_size = 65536")  # states are large
                self._opened.execute("PRAGMA synchronous = EXTRA")  # as in the ledger
                self._opened.executescript(_SCHEMA)
                self._opened.execute("BEGIN IMMEDIATE")
            elif not self._opened.in_transaction:
                self._opened.execute("BEGIN IMMEDIATE")
            yield self._opened
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"cannot keep what clients remember in {self._file or 'a temporary file'} ({error}): "
                "free space there"
            ) from error


def _require_whole(node: int, whole: bool) -> None:
    if not whole:
        raise ConfigError(f"what node {node} remembers is damaged on the disk: begin a new run")
