"""The ledger: what a client's data has spent, over all runs and apps, in one SQLite file on its own disk."""

import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from fedapp import check
from fedapp.errors import FedappError
from fedapp.privacy.filter import FILTER, UNITS, Unit, as_text, cost, epsilon
from fedapp.privacy.ledger_file import bring_up, opened
from fedapp.privacy.release import Release
from fedapp.transaction import at_once

_log = logging.getLogger("fedapp.ledger")


class BudgetSpent(FedappError):  # noqa: N818
    """One more release would pass a limit; nothing was written."""


class TwiceInRun(FedappError):  # noqa: N818
    """Another node brings these data into the run already; nothing was written."""


@dataclass(frozen=True)
class Limit:
    """The most that the data `id` may spend for one unit: epsilon at delta, ever."""

    id: str
    unit: Unit
    epsilon: float
    delta: float


class Ledger:
    """What data have spent. Several processes may use one file at once; each method is one transaction.

    Data have an id, which the person gives. Ids that overlap share one budget: the person says so
    (`overlap`), or the same content under two ids does; no id opens a new budget for data that have one.
    Of one budget a run gets replies of one node: two in one sum would move it further than two events say.

    A release is written, and synchronized to the disk, before `charge` returns, and only then may it be
    made: a crash at any point counts a release that was not made, never the other way round. To send one
    again, the very same bytes must be sent (`store`, `stored`); anything else is charged again.

    *Formal guarantees.* With a limit (epsilon, delta) for a unit, all releases that `charge` lets pass are
    together (epsilon, delta)-DP, though each is chosen in view of all earlier ones. Adjacency: one unit (an
    example, or all of the client's data) is replaced by one that contributes zero, which an add_remove and
    a replace release both bound. A client-level release bounds an example, too, once the client's
    contribution is taken as replaced by another; an example-level release bounds no client, and an
    unprotected one nothing: then epsilon is infinite. A Curve must bound both changes. How releases add up,
    and why this is a privacy filter: `fedapp.privacy.filter`. Against whom: each event names those that its
    mechanism holds against; all are added up. Not covered: a limit that is raised in view of releases (so
    without a limit set beforehand, `spent` is a figure and no guarantee), what a later refusal tells of
    secret draws (a client that a central run never drew is charged nothing, so to be refused may mean to have
    been drawn), a file that is deleted or set back to an older copy, content that differs in a byte under an
    id that the person calls another, and code that does not ask the ledger.
    """

    def __init__(self, path: Path | str, new: bool = False) -> None:
        """Open the ledger in a file, or make a new one. Raises FedappError where there is no ledger.

        A missing file is no empty ledger: a slip in its name would open a new budget. One that an earlier
        version wrote is brought up to date, and keeps all that it holds.
        """
        self._path = Path(path).expanduser()
        if not new and not self._path.is_file():
            raise FedappError(
                f"there is no ledger {self._path}: correct the path, or make it with fedapp ledger set-limit"
            )
        if new:
            try:
                self._path.touch(mode=0o600)  # fingerprints tell whether content was guessed right
            except OSError as error:
                raise FedappError(f"the ledger {self._path} cannot be made ({error})") from error
        with self._transaction() as db:
            bring_up(db, self._path, new)

    def charge(
        self,
        data_id: str,
        unit: Unit | None,
        releases: Sequence[Release],
        run_id: int,
        server_round: int,
        purpose: str = "train",
        *,
        mechanism: str | None = None,
        adversary: str | None = None,
        fingerprint: str | None = None,
        once: bool = False,
        node: int = 0,
    ) -> None:
        """Write releases down before they are made; returns once they are on the disk.

        unit: who each release protects. mechanism: by which choice of `privacy`. adversary: against whom. All
        three None, with no releases, say that the data leave unprotected.
        fingerprint: of the content, which warns of content known under another id.
        once: these releases stand for all rounds of the run, and are written down at the first that asks; a
        round that comes again, or after a later one, is none that they stand for.
        node: who is to reply. Raises BudgetSpent where a limit would be passed, TwiceInRun where another
        node replied; nothing is written then.
        """
        if len({not given for given in (unit, releases, mechanism, adversary)}) > 1:
            raise ValueError(
                "an unprotected release has no unit, noise, mechanism nor adversary; any other one has all"
            )
        written: list[str | None] = [as_text(release) for release in releases] or [None]
        named = mechanism or "none", adversary or "nobody"
        with self._transaction() as db:
            budget = _budget(db, data_id)
            if fingerprint is not None:
                _recognize(db, data_id, fingerprint)
                budget = _budget(db, data_id)
            run = _run(run_id, node)
            _require_one_node(db, data_id, budget, run)
            for text in written:
                covered = once and _charged(db, data_id, text, run, purpose)
                if covered and server_round > _answered(db, data_id, run, purpose):
                    continue
                db.execute(
                    "INSERT INTO events (id, unit, release, mechanism, adversary, run, round, purpose, time) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (data_id, unit, text, *named, run, server_round, purpose, time.time()),
                )
            for limit in _limits(db, budget):
                would = _spent(db, budget, limit.unit, limit.delta)
                if would > limit.epsilon:
                    raise BudgetSpent(
                        f"one more release would spend epsilon {would:.3g} of the {limit.unit}-level limit "
                        f"of {limit.epsilon:g} at delta {limit.delta:g} that {limit.id} has: let it rest, "
                        f"ask the run for more noise, or raise it with fedapp ledger set-limit"
                    )

    def spent(self, data_id: str, delta: float = 1e-5) -> dict[Unit, float]:
        """Epsilon at `delta`, for each unit, of all releases of these data and of what overlaps with them."""
        check.real("delta", delta, above=0.0, below=1.0)
        with self._transaction() as db:
            budget = _find(db, data_id)
            return {unit: _spent(db, budget, unit, delta) for unit in UNITS}

    def set_limit(self, data_id: str, unit: Unit, epsilon: float, delta: float) -> None:
        """Set the most that these data may ever spend. Set it once: what was released does not come back."""
        check.choice("unit", unit, UNITS)
        check.real("epsilon", epsilon, above=0.0)
        check.real("delta", delta, above=0.0, below=1.0)
        with self._transaction() as db:
            _budget(db, data_id)
            db.execute("REPLACE INTO limits VALUES (?, ?, ?, ?)", (data_id, unit, epsilon, delta))

    def overlap(self, one: str, other: str) -> None:
        """Say that two ids name overlapping data: from now on, and for what was, they share one budget."""
        with self._transaction() as db:
            _join(db, _budget(db, one), _budget(db, other))

    def budgets(self) -> list[list[str]]:
        """The ids, those that share a budget together."""
        with self._transaction() as db:
            rows = db.execute("SELECT id, budget FROM data ORDER BY id").fetchall()
        return [[i for i, b in rows if b == budget] for budget in dict.fromkeys(b for _, b in rows)]

    def limits(self, data_id: str) -> list[Limit]:
        """Every limit that binds these data: theirs, and those of what overlaps with them."""
        with self._transaction() as db:
            return _limits(db, _find(db, data_id))

    def count(self, data_id: str) -> int:
        """How many releases are written down of these data and of what overlaps with them."""
        with self._transaction() as db:
            found = db.execute(f"SELECT COUNT(*) FROM events WHERE {_OF}", (_find(db, data_id),))
            return int(found.fetchone()[0])

    def mechanisms(self, data_id: str) -> list[tuple[str, str, int]]:
        """The releases that `count` counts: by which mechanism, against whom, and how many."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT mechanism, adversary, COUNT(*) FROM events "
                f"WHERE {_OF} GROUP BY mechanism, adversary ORDER BY MIN(number)",
                (_find(db, data_id),),
            ).fetchall()
        return [(str(mechanism), str(adversary), int(many)) for mechanism, adversary, many in rows]

    def store(
        self, data_id: str, run_id: int, server_round: int, purpose: str, reply: bytes, *, node: int = 0
    ) -> None:
        """Keep a node's charged reply before it leaves, in place of that of an earlier round."""
        with self._transaction() as db:
            digest = sha256(reply).hexdigest()
            row = (data_id, _run(run_id, node), server_round, purpose, digest, reply)
            db.execute("REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?)", row)

    def stored(
        self, data_id: str, run_id: int, server_round: int, purpose: str, *, node: int = 0
    ) -> bytes | None:
        """The bytes that a node's reply of this round was; None where none was kept."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT digest, reply FROM replies WHERE id = ? AND run = ? AND round = ? AND purpose = ?",
                (data_id, _run(run_id, node), server_round, purpose),
            ).fetchone()
        return bytes(row[1]) if row is not None and sha256(row[1]).hexdigest() == row[0] else None

    def forget(self) -> int:
        """Remove every reply that was kept, and overwrite it; what was spent stays. Returns how many.

        Of which round each was is still known: one that asks again is charged again.
        """
        with self._transaction(secure_delete=True) as db:
            return db.execute("UPDATE replies SET digest = '', reply = x'' WHERE digest != ''").rowcount

    @contextmanager
    def _transaction(self, secure_delete: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection of its own, since none survives a fork; writers wait for each other."""
        try:
            with opened(self._path) as db:
                if secure_delete:
                    db.execute("PRAGMA secure_delete = ON")
                with at_once(db):
                    yield db
        except sqlite3.Error as error:
            raise FedappError(
                f"the ledger {self._path} cannot be used ({error}), and nothing is released without it: "
                "see that it is a ledger, may be written, and its disk has room"
            ) from error


_OF = "id IN (SELECT id FROM data WHERE budget = ?)"


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder, as hexadecimal digits."""
    whole = sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as content:
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            digest = sha256()
            while block := content.read(1 << 20):
                digest.update(block)
        whole.update(name.encode() + b"\0" + digest.digest())
    return whole.hexdigest()


def _find(db: sqlite3.Connection, data_id: str) -> int | None:
    row = db.execute("SELECT budget FROM data WHERE id = ?", (data_id,)).fetchone()
    return None if row is None else int(row[0])


def _budget(db: sqlite3.Connection, data_id: str) -> int:
    """The budget of an id; a new one for a new id."""
    if (found := _find(db, data_id)) is not None:
        return found
    (new,) = db.execute("SELECT COALESCE(MAX(budget), 0) + 1 FROM data").fetchone()
    db.execute("INSERT INTO data VALUES (?, ?)", (data_id, new))
    return int(new)


def _recognize(db: sqlite3.Connection, data_id: str, content: str) -> None:
    """Content that is known under another id makes the two share one budget."""
    known = {i for (i,) in db.execute("SELECT id FROM fingerprints WHERE fingerprint = ?", (content,))}
    if data_id in known:
        return
    earlier = db.execute("SELECT COUNT(*) FROM fingerprints WHERE id = ?", (data_id,)).fetchone()[0]
    if earlier:
        _log.warning(
            "the content of %s has changed: its budget goes on, and pays for the new content", data_id
        )
    db.execute("INSERT INTO fingerprints VALUES (?, ?)", (data_id, content))
    for other in sorted(known):
        _log.warning("%s has the same content as %s: they share one budget", data_id, other)
        _join(db, _budget(db, data_id), _budget(db, other))


def _run(run_id: int, node: int) -> str:
    """A run as a node sees it."""
    return f"{run_id}/{node}"


def _require_one_node(db: sqlite3.Connection, data_id: str, budget: int, run: str) -> None:
    """Raise TwiceInRun where another node of this run has replied from the budget."""
    of_run = f"{run.partition('/')[0]}/*"
    row = db.execute(
        f"SELECT id FROM events WHERE {_OF} AND run GLOB ? AND run != ?", (budget, of_run, run)
    ).fetchone()
    if row is not None:
        same = f"{data_id} are" if row[0] == data_id else f"{data_id} overlap with {row[0]}, which is"
        raise TwiceInRun(
            f"the data {same} in this run through another node: take one of the two out, or give "
            "other data an id of their own (data-id in the node's data config)"
        )


def _charged(db: sqlite3.Connection, data_id: str, text: str | None, run: str, purpose: str) -> bool:
    found = db.execute(
        "SELECT 1 FROM events WHERE id = ? AND release IS ? AND run = ? AND purpose = ?",
        (data_id, text, run, purpose),
    )
    return found.fetchone() is not None


def _answered(db: sqlite3.Connection, data_id: str, run: str, purpose: str) -> int:
    """The last round that these data have answered in a run; 0 before the first."""
    row = db.execute(
        "SELECT round FROM replies WHERE id = ? AND run = ? AND purpose = ?", (data_id, run, purpose)
    ).fetchone()
    return 0 if row is None else int(row[0])


def _join(db: sqlite3.Connection, one: int, other: int) -> None:
    db.execute("UPDATE data SET budget = ? WHERE budget = ?", (min(one, other), max(one, other)))


def _limits(db: sqlite3.Connection, budget: int | None) -> list[Limit]:
    rows = db.execute(f"SELECT id, unit, epsilon, delta FROM limits WHERE {_OF} ORDER BY id, unit", (budget,))
    return [Limit(*row) for row in rows]


def _spent(db: sqlite3.Connection, budget: int | None, unit: Unit, delta: float) -> float:
    """Epsilon of everything that is written down under a budget."""
    total, rows = np.zeros(len(FILTER)), db.execute(
        f"SELECT unit, release, COUNT(*) FROM events WHERE {_OF} GROUP BY unit, release", (budget,)
    ).fetchall()  # fmt: skip
    for protects, text, times in rows:
        total += times * cost(text, protects, unit)
    return epsilon(total, delta) if rows else 0.0
