"""What a node keeps on its disk: the message it works on, the last reply, its context in each experiment."""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedapp.errors import ConfigError
from fedapp.transaction import at_once

_SCHEMA = """
CREATE TABLE IF NOT EXISTS inbox (only INTEGER PRIMARY KEY CHECK (only = 1), message BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS newest (only INTEGER PRIMARY KEY CHECK (only = 1), name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS contexts (
    experiment TEXT NOT NULL, round INTEGER NOT NULL, run TEXT NOT NULL,
    context BLOB NOT NULL, used REAL NOT NULL,
    PRIMARY KEY (experiment, round));
CREATE TABLE IF NOT EXISTS outbox (only INTEGER PRIMARY KEY CHECK (only = 1), reply BLOB NOT NULL)"""
_PASSING = sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR  # errors of a disk, not of what is on it
_PAUSE = 2.0  # seconds from one try to write to the next
_KEPT = 40  # contexts; the ones used last
_ROUNDS = 3  # of them in one experiment: a server that was gone may ask for its last rounds once more
_REACHED = "SELECT coalesce(max(round), 0) FROM contexts WHERE experiment = ? AND run = ?"
_NEWEST = """
SELECT context FROM contexts WHERE experiment = ? AND (run = ? OR round < ?)
ORDER BY run = ? DESC, round DESC LIMIT 1"""
_FORGET = """
DELETE FROM contexts WHERE experiment = ? AND round NOT IN (
    SELECT round FROM contexts WHERE experiment = ? ORDER BY round DESC LIMIT ?)"""
_FORGET_OTHERS = """
DELETE FROM contexts WHERE rowid NOT IN (SELECT rowid FROM contexts ORDER BY used DESC LIMIT ?)"""
_log = logging.getLogger("fedapp.client")


@dataclass(frozen=True)
class Kept:
    """A node's context after a message of a round; 0: of the one that its run is in, or about to begin.

    Stages of secure aggregation do not say which that is.
    """

    experiment: int
    run: int
    round: int
    context: bytes


class Memory:
    """The message in work, the reply that has not left, and the contexts of an experiment's last rounds.

    A message is written down before the work begins. Its reply and the context after it are written together,
    before the reply leaves. So a node that was killed works once more on a message that it has not answered,
    or sends the same reply again, and its context never counts a message twice. While the disk takes nothing,
    what writes waits.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + _SCHEMA)

    def close(self) -> None:
        self._db.close()

    def receive(self, message: bytes, name: str) -> bool:
        """Write down the message that is worked on now; False if it is the newest one once more."""
        with self._explained():
            newest = self._db.execute("SELECT name FROM newest").fetchone()
        if newest == (name,):
            return False

        def write() -> None:
            self._db.execute("INSERT OR REPLACE INTO inbox VALUES (1, ?)", (message,))
            self._db.execute("INSERT OR REPLACE INTO newest VALUES (1, ?)", (name,))

        self._whole(write)
        return True

    def answer(self, reply: bytes, after: Kept | None = None) -> None:
        """Write down a reply and the context after it, in one step; the message is done.

        What was kept of later rounds of the experiment is gone, for they are played again.
        """

        def write() -> None:
            if after is not None:
                own, run = str(after.experiment), str(after.run)
                at = after.round or self._db.execute(_REACHED, (own, run)).fetchone()[0]
                self._db.execute("DELETE FROM contexts WHERE experiment = ? AND round > ?", (own, at))
                row = own, at, run, after.context, time.time()
                self._db.execute("INSERT OR REPLACE INTO contexts VALUES (?, ?, ?, ?, ?)", row)
                self._db.execute(_FORGET, (own, own, _ROUNDS))
                self._db.execute(_FORGET_OTHERS, (_KEPT,))
            self._db.execute("INSERT OR REPLACE INTO outbox VALUES (1, ?)", (reply,))
            self._db.execute("DELETE FROM inbox")

        self._whole(write)

    def drop(self) -> None:
        """Forget the message in work: its run is over."""
        self._whole(lambda: self._db.execute("DELETE FROM inbox"))

    def sent(self) -> None:
        """The reply has left."""
        self._whole(lambda: self._db.execute("DELETE FROM outbox"))

    def in_work(self) -> bytes | None:
        """The message that was not answered, if any."""
        return self._one("SELECT message FROM inbox")

    def unsent(self) -> bytes | None:
        """The reply that may not have left, if any."""
        return self._one("SELECT reply FROM outbox")

    def context(self, experiment: int, run: int, at: int) -> bytes | None:
        """What a run kept last; of a new one, what others kept before a round. None if there is nothing.

        A run never goes back: who may have it masked a second time, or unmasked, learns what was masked.
        """
        return self._one(_NEWEST, str(experiment), str(run), at, str(run))

    def _one(self, query: str, *values: str | int) -> bytes | None:
        with self._explained():
            row = self._db.execute(query, values).fetchone()
        return None if row is None else bytes(row[0])

    def _whole(self, write: Callable[[], object]) -> None:
        """All that is written, or nothing; where the disk is full, tried until there is room, and said."""
        waits = False
        while True:
            try:
                with self._explained(), at_once(self._db):
                    write()
            except ConfigError as error:
                if getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF not in _PASSING:
                    raise
                if not waits:
                    _log.error("%s; nothing is lost, and this node waits for it", error)
                waits = True
                time.sleep(_PAUSE)
            else:
                break
        if waits:
            _log.warning("%s takes what is written again: this node goes on", self._path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"{self._path} cannot be used ({error}): make room on the disk, or see who owns the folder"
            ) from error
