"""What the nodes of the local engine keep between messages: in memory up to a limit, beyond it on disk."""

import sqlite3
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedapp.errors import ConfigError
from fedapp.report.folder import make_folder

_SCHEMA = """
CREATE TABLE IF NOT EXISTS states (
    node INTEGER NOT NULL, round INTEGER NOT NULL, crc INTEGER NOT NULL, state BLOB NOT NULL,
    PRIMARY KEY (node, round))"""
_OUTDATED = """
DELETE FROM states WHERE rowid IN (
    SELECT older.rowid FROM states AS older JOIN states AS newer
    ON newer.node = older.node AND newer.round > older.round AND newer.round <= ?)"""
_PROTO = type(recorddict_to_proto(RecordDict()))


class States(Mapping[int, Context]):
    """The Context of each node. States used least recently go to an SQLite file once there is no room.

    `room` is in bytes, of states in memory; `file` is where states last that `commit` wrote: one that no
    process has committed is gone when the process ends, however it ends. Without a file what does not fit
    goes to a file of SQLite's own, which has no name. `fresh` makes the Context of a node that kept nothing.

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
        self._cache: OrderedDict[int, tuple[Context, int]] = OrderedDict()  # the last one was used last
        self._bytes, self._changed, self._finished = 0, set[int](), finished
        self._opened: sqlite3.Connection | None = None  # once there is something on disk
        self._on_disk: set[int] = set()  # nodes that have rows
        if file is not None and file.exists():
            with self._disk() as db:
                db.execute("DELETE FROM states WHERE round > ?", (finished,))
                for node, crc, state in db.execute("SELECT node, crc, state FROM states"):
                    _require_whole(node, crc, state)
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
        return self._cache[node][0]

    def __setitem__(self, node: int, context: Context) -> None:
        if node in self._on_disk or _size(context):  # what keeps nothing is as good as fresh
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
            self._write(node, self._cache[node][0])
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
        _, before = self._cache.pop(node, (None, 0))
        size = _size(context)
        self._cache[node] = context, size
        self._bytes += size - before
        while self._bytes > self._room and len(self._cache) > 1:
            oldest, (context, size) = next(iter(self._cache.items()))
            if oldest in self._changed:
                self._write(oldest, context)
                self._changed.discard(oldest)
            del self._cache[oldest]
            self._bytes -= size

    def _write(self, node: int, context: Context) -> None:
        state = recorddict_to_proto(context.state).SerializeToString()
        with self._disk() as db:
            row = node, self._finished + 1, zlib.crc32(state), state
            db.execute("INSERT OR REPLACE INTO states (node, round, crc, state) VALUES (?, ?, ?, ?)", row)
        self._on_disk.add(node)

    def _read(self, node: int) -> RecordDict:
        with self._disk() as db:
            found = db.execute(
                "SELECT crc, state FROM states WHERE node = ? ORDER BY round DESC LIMIT 1", (node,)
            ).fetchone()
        _require_whole(node, *found)
        return recorddict_from_proto(_PROTO.FromString(found[1]))

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
                self._opened.execute("BEGIN IMMEDIATE")
                self._opened.execute(_SCHEMA)
            elif not self._opened.in_transaction:
                self._opened.execute("BEGIN IMMEDIATE")
            yield self._opened
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"cannot keep what clients remember in {self._file or 'a temporary file'} ({error}): "
                "free space there"
            ) from error


def _size(context: Context) -> int:
    return sum(record.count_bytes() for record in context.state.values())


def _require_whole(node: int, crc: int, state: bytes) -> None:
    if zlib.crc32(state) != crc:
        raise ConfigError(f"what node {node} remembers is damaged on the disk: begin a new run")
