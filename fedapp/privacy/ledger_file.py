"""The file of a ledger: its tables, how it is brought up to their version, and how it is opened."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fedapp.errors import FedappError

_VERSION = 2
_SCHEMA = """
CREATE TABLE data (id TEXT PRIMARY KEY, budget INTEGER NOT NULL);
CREATE TABLE fingerprints (id TEXT NOT NULL, fingerprint TEXT NOT NULL, PRIMARY KEY (id, fingerprint));
CREATE TABLE limits (
    id TEXT NOT NULL, unit TEXT NOT NULL, epsilon REAL NOT NULL, delta REAL NOT NULL, PRIMARY KEY (id, unit));
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, unit TEXT, release TEXT,
    adversary TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, purpose TEXT NOT NULL,
    time REAL NOT NULL, mechanism TEXT NOT NULL);
CREATE TABLE replies (
    id TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, purpose TEXT NOT NULL, digest TEXT NOT NULL,
    reply BLOB NOT NULL, PRIMARY KEY (id, run, purpose));
"""
# Version 1 wrote no mechanism, and "server" of one that may have to follow the protocol, or where none helps.
_SINCE_1 = """
ALTER TABLE events ADD COLUMN mechanism TEXT NOT NULL DEFAULT 'unknown';
UPDATE events SET mechanism = 'none', adversary = 'nobody' WHERE release IS NULL;
UPDATE events SET mechanism = 'central_gaussian', adversary = 'observers of the models'
    WHERE adversary = 'observers';
UPDATE events SET adversary = 'a server that follows the protocol' WHERE adversary = 'server';
"""


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a ledger, whose commits are on the disk once they return."""
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as db:
        # EXTRA synchronizes the folder as well once the journal is deleted, which is what commits:
        # with FULL, a power cut could bring the journal back, and undo what was released since.
        db.execute("PRAGMA synchronous = EXTRA")
        db.execute("PRAGMA fullfsync = ON")  # on macOS a plain fsync stops short of the disk
        db.execute("PRAGMA journal_mode = DELETE")
        yield db


def bring_up(db: sqlite3.Connection, path: Path, new: bool) -> None:
    """Make the file a ledger of this version, in the transaction that is open.

    new: an empty one becomes a ledger. Raises FedappError where it is something else.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    empty = not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    if new and empty:
        script = _SCHEMA
    elif version == 1:
        script = _SINCE_1
    elif version == _VERSION:
        return
    else:
        raise FedappError(f"{path} is no ledger of version {_VERSION}: give another file")
    for statement in script.split(";"):  # one by one, for a script would commit before it
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {_VERSION}")
