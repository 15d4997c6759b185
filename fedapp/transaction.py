"""One transaction of SQLite: all that is written, or nothing."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_once(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the only right to write, and commit at the end; for a connection without an isolation level."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk may have ended it
            db.execute("ROLLBACK")
        raise
