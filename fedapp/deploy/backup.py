"""Backups: all that a server or a node must not lose as one file, whole or not at all, both ways."""

import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedapp.deploy import files, keys
from fedapp.errors import FedappError
from fedapp.report.folder import alone

_MANIFEST = "backup.json"  # the last member: where it is missing, the file is not whole
LEDGER = "ledger.db"
# What grows while it is copied comes last, in this order: no state is then newer than the rounds beside it,
# and no private round is finished that was not begun. A run that goes on can only take rounds back.
_GROWING = {"rounds.jsonl": 1, "begun.jsonl": 2}


@dataclass(frozen=True)
class Kind:
    """What belongs to a backup: files, a database and a folder of runs, of those that are there.

    `hold` keeps who works with the folder away, and fails where he is there already.
    """

    name: str
    files: tuple[str, ...]
    database: str
    hold: Callable[[Path], AbstractContextManager[None]]
    runs: str | None = None


_KEYS = keys.CA, keys.CA_KEY, keys.CERTIFICATE, keys.KEY, keys.TOKEN
SERVER = Kind("server", _KEYS, "state.db", files.alone, "runs")
CLIENT = Kind(
    "client", ("node.key", "node.key.pub", "ca.pem", "data.yaml", "policy.yaml"), "node.sqlite", alone
)


def save(kind: Kind, folder: Path, file: Path, ledger: Path | None = None) -> list[str]:
    """Write a backup, mode 0600, whole or not at all; returns the names of what is in it.

    Server or client may go on meanwhile: of each database it holds one moment.
    """
    if file.exists():
        raise FedappError(f"{file} exists: name a file that does not")
    if not any((folder / name).exists() for name in kind.files):
        raise FedappError(f"{folder} is no {kind.name}'s folder: name it with --folder")
    databases = {kind.database: folder / kind.database} | ({LEDGER: ledger} if ledger else {})
    try:
        with (
            files.whole(file) as partial,
            tempfile.TemporaryDirectory(dir=file.absolute().parent) as room,
            tarfile.open(fileobj=partial, mode="w") as archive,
        ):
            for name, path in databases.items():
                if path.exists():
                    _snapshot(path, Path(room, name))
                    _add(archive, Path(room, name), name)
            for name in kind.files:
                _add(archive, folder / name, name)
            if kind.runs is not None:
                _add_runs(archive, folder / kind.runs)
            names = sorted({name.split("/")[0] for name in archive.getnames()})
            made = json.dumps({"of": kind.name, "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"})
            Path(room, _MANIFEST).write_text(made)
            _add(archive, Path(room, _MANIFEST), _MANIFEST)
    except (OSError, sqlite3.Error) as error:
        raise FedappError(f"{file} cannot be written ({error}): see that its disk has room") from error
    return names


@contextmanager
def unpacked(kind: Kind, file: Path, folder: Path, force: bool) -> Iterator[tuple[Path, str]]:
    """A backup in a new folder beside the one that it is to become, and when it was made.

    Nobody runs in `folder` meanwhile. Raises FedappError where it holds anything, unless `force`.
    """
    full = folder.exists() and any(folder.iterdir())
    if full and not force:
        raise FedappError(f"{folder} is not empty: name another --folder, or --force to put it aside")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))  # mode 0700
    try:
        with kind.hold(folder) if full else nullcontext():
            yield new, _unpack(kind, file, new)
    except (OSError, sqlite3.Error) as error:
        raise FedappError(f"{folder} cannot be restored ({error}): nothing is changed there") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def put(new: Path, folder: Path) -> Path | None:
    """Let `new` become the folder; returns where what was there is now."""
    aside = None
    if folder.exists() and any(folder.iterdir()):
        aside = folder.with_name(f"{folder.name}.before-{datetime.now():%Y%m%d-%H%M%S}")
        os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        if aside is not None:
            os.rename(aside, folder)
        raise
    return aside


def _unpack(kind: Kind, file: Path, into: Path) -> str:
    """Unpack a backup; returns when it was made."""
    try:
        with tarfile.open(file) as archive:
            member = archive.extractfile(_MANIFEST)
            told = json.load(member) if member is not None else {}
            if told["of"] != kind.name:
                raise FedappError(f"{file} is of a {told['of']}: `fedapp {told['of']} restore` takes it")
            archive.extractall(into, filter="data")
            made = str(told["made"])
        (into / _MANIFEST).unlink()
        for database in into.glob(kind.database):
            with closing(sqlite3.connect(database)) as db:
                (found,) = db.execute("PRAGMA quick_check").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(f"{database.name}: {found}")
    except (OSError, tarfile.TarError, sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise FedappError(
            f"{file} cannot be restored ({error}): see that it is a whole backup, and that the disk has room"
        ) from error
    return made


def _snapshot(database: Path, to: Path) -> None:
    """Copy a database as it is at one moment, whoever writes to it."""
    source = f"{database.absolute().as_uri()}?mode=rw"  # and is not made where it is missing
    with closing(sqlite3.connect(source, uri=True, timeout=60)) as db, closing(sqlite3.connect(to)) as copy:
        db.backup(copy)


def _add_runs(archive: tarfile.TarFile, runs: Path) -> None:
    """Add all run folders; one that is a link to another one stays one."""
    found = [path for path in runs.rglob("*") if not path.name.startswith(".")]
    for path in sorted(found, key=lambda path: (_GROWING.get(path.name, 0), path)):
        name = f"{runs.name}/{path.relative_to(runs)}"
        if path.is_symlink():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, path.resolve().name
            if path.resolve().parent == runs:
                archive.addfile(info)
        elif path.is_file():
            _add(archive, path, name)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file under a name, as much of it as there is now; nothing where it is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        info, found = tarfile.TarInfo(name), os.fstat(file.fileno())
        info.size, info.mtime, info.mode = found.st_size, int(found.st_mtime), 0o600
        archive.addfile(info, file)
