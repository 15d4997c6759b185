"""A ledger kept in a second place, and brought back where that forgets nothing that was spent."""

import sqlite3
from pathlib import Path

from fedapp.errors import FedappError
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.ledger_file import opened
from fedapp.transaction import at_once

_TABLES = "data", "fingerprints", "limits", "events", "replies"
_HELD = {  # what a budget follows from
    "releases": "SELECT * FROM {0}.events",
    "limits": "SELECT * FROM {0}.limits",
    "fingerprints": "SELECT * FROM {0}.fingerprints",
    "overlaps": "SELECT one.id, other.id FROM {0}.data AS one JOIN {0}.data AS other USING (budget)",
}


def bring_back(copy: Path, ledger: Path) -> None:
    """Make a ledger what its copy is, in one transaction; others that use it wait meanwhile.

    A ledger only grows, so the copy must hold all that the ledger holds: an older one would count too
    little. Raises FedappError where it lacks any of it, with nothing written. A reply that only the ledger
    kept is gone, which costs its release once more.
    """
    for path in (copy, ledger):
        Ledger(path)  # of the same version, and whole enough
    try:
        with opened(ledger) as db:
            db.execute("ATTACH ? AS copy", (str(copy),))
            with at_once(db):
                _require_all(db, ledger)
                for table in _TABLES:
                    db.execute(f"DELETE FROM main.{table}")
                    db.execute(f"INSERT INTO main.{table} SELECT * FROM copy.{table}")
    except sqlite3.Error as error:
        raise FedappError(
            f"the ledger {ledger} cannot be brought back ({error}): nothing is changed"
        ) from error


def _require_all(db: sqlite3.Connection, ledger: Path) -> None:
    """Raise FedappError where the copy lacks any of what the ledger holds."""
    for what, rows in _HELD.items():
        own, copied = rows.format("main"), rows.format("copy")
        (lacking,) = db.execute(f"SELECT COUNT(*) FROM ({own} EXCEPT {copied})").fetchone()
        if lacking:
            raise FedappError(
                f"the ledger {ledger} has {lacking} {what} that the backup lacks, so this would count less "
                "than was spent: --keep-ledger restores the rest and leaves the ledger as it is"
            )
