"""What a node keeps on its own disk: the message it works on, its context in each run, the last reply."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedapp.errors import ConfigError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS inbox (only INTEGER PRIMARY KEY CHECK (only = 1), message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, context BLOB NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (only INTEGER PRIMARY KEY CHECK (only = 1), reply BLOB NOT NULL)"""
_KEPT = 20  # runs; the ones used last


class Memory:
    """The message in work, the reply that has not left, and a context for each run.

    A message is written down before the work begins. Its reply and the context after it are written together,
    before the reply leaves. So a node that was killed works once more on a message that it has not answered,
    or sends the same reply again, and its context never counts a message twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + _SCHEMA)

    def close(self) -> None:
        self._db.close()

    def receive(self, message: bytes) -> None:
        """Write down the message that is worked on now."""
        with self._explained():
            self._db.execute("INSERT OR REPLACE INTO inbox VALUES (1, ?)", (message,))

    def answer(self, run: int, context: bytes | None, reply: bytes) -> None:
        """Write down a reply and the context after it, in one step; the message is done."""
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                if context is not None:
                    row = str(run), context, time.time()
                    self._db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?)", row)
                    self._db.execute(
                        "DELETE FROM runs WHERE run NOT IN (SELECT run FROM runs ORDER BY used DESC LIMIT ?)",
                        (_KEPT,),
                    )
                self._db.execute("INSERT OR REPLACE INTO outbox VALUES (1, ?)", (reply,))
                self._db.execute("DELETE FROM inbox")
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def drop(self) -> None:
        """Forget the message in work: its run is over."""
        with self._explained():
            self._db.execute("DELETE FROM inbox")

    def sent(self) -> None:
        """The reply has left."""
        with self._explained():
            self._db.execute("DELETE FROM outbox")

    def in_work(self) -> bytes | None:
        """The message that was not answered, if any."""
        return self._one("SELECT message FROM inbox")

    def unsent(self) -> bytes | None:
        """The reply that may not have left, if any."""
        return self._one("SELECT reply FROM outbox")

    def context(self, run: int) -> bytes | None:
        """The context in a run, if this node took part in it."""
        return self._one("SELECT context FROM runs WHERE run = ?", str(run))

    def _one(self, query: str, *values: str) -> bytes | None:
        with self._explained():
            row = self._db.execute(query, values).fetchone()
        return None if row is None else bytes(row[0])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"{self._path} cannot be used ({error}): make room on the disk, or see who owns the folder"
            ) from error
