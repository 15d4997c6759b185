"""`fedapp server|client backup|restore`: all that they must not lose, in one file; and `fedapp client
forget`: what a node kept of the data goes, and what they have spent stays.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fedapp.deploy import files, keys, preflight
from fedapp.deploy.backup import CLIENT, LEDGER, SERVER, put, save, unpacked
from fedapp.errors import FedappError
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.ledger_backup import bring_back
from fedapp.report.folder import alone


def server(arguments: Sequence[str]) -> None:
    """`fedapp server backup|restore`. Raises FedappError."""
    given = _parser("server", keys.FOLDER).parse_args(arguments)
    folder = given.folder.expanduser().resolve()
    if given.command == "backup":
        _told_of(given.file, save(SERVER, folder, given.file))
        return
    with unpacked(SERVER, given.file, folder, given.force) as (new, made):
        held = sorted(path.name for path in new.iterdir())
        aside = put(new, folder)
    _told_back(folder, held, made, aside)
    print("nodes that were shut out since then are let in again: see `fedapp nodes list`")


def client(arguments: Sequence[str]) -> None:
    """`fedapp client backup|restore|forget`. Raises FedappError."""
    given = _parser("client", preflight.FOLDER).parse_args(arguments)
    folder = given.folder.expanduser().resolve()
    ledger = (given.ledger or folder / LEDGER).expanduser().resolve()
    there = ledger.exists()
    if given.command != "restore" and given.ledger and not there:
        raise FedappError(f"there is no ledger {ledger}: correct the path")
    if given.command == "forget":
        forget(folder, Ledger(ledger) if there else None)
        if not there:
            print(f"no ledger is at {ledger}: where there is one elsewhere, --ledger names it")
        return
    if given.command == "backup":
        _told_of(given.file, save(CLIENT, folder, given.file, ledger if there else None))
        if not there:
            print(f"no ledger is in it: there is none at {ledger}, and --ledger names another place")
        return
    with unpacked(CLIENT, given.file, folder, given.force) as (new, made):
        held = sorted(path.name for path in new.iterdir())
        said = _restore_ledger(new, folder, ledger, given.keep_ledger)
        aside = put(new, folder)
    _told_back(folder, held, made, aside)
    print(said)


def forget(folder: Path, ledger: Ledger | None = None) -> None:
    """Remove what a node kept of its runs, all of which its data made; what they have spent stays.

    With it go the replies that a ledger kept. Key and log stay.
    """
    if not folder.is_dir():
        raise FedappError(f"{folder} is no client's folder: name it with --folder")
    with alone(folder):
        found = [path for path in folder.glob(f"{CLIENT.database}*") if path.is_file()]
        for path in found:
            path.unlink()
        replies = ledger.forget() if ledger else 0
    print(
        f"{folder / CLIENT.database} is removed: runs that go on begin anew here. Key and ledger stay"
        if found
        else f"nothing is kept in {folder}"
    )
    if replies:
        print(f"the ledger's {replies} kept replies are removed; what was spent stays")


def _restore_ledger(new: Path, folder: Path, ledger: Path, keep: bool) -> str:
    """Bring the ledger back to its place, before anything else is; returns what to say of it.

    One that is there stays the same file, which others may have open, and only grows.
    """
    copy = new / LEDGER
    if ledger.exists():
        if copy.exists() and not keep:
            bring_back(copy, ledger)
        copy.unlink(missing_ok=True)
        if ledger.is_relative_to(folder):
            inside = new / ledger.relative_to(folder)
            inside.parent.mkdir(parents=True, exist_ok=True)
            os.link(ledger, inside)
        return f"the ledger is {ledger}; no client may run elsewhere with a copy of it"
    if not copy.exists():
        return "there is no ledger"
    place = new / ledger.relative_to(folder) if ledger.is_relative_to(folder) else ledger
    place.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(place) as partial:
        partial.write(copy.read_bytes())
    if place != copy:
        copy.unlink()
    return f"the ledger {ledger} is as old as the backup: what was spent since then it does not count"


def _told_of(file: Path, names: Sequence[str]) -> None:
    print(f"{file} holds {', '.join(names)}; whoever reads it has the keys")


def _told_back(folder: Path, names: Sequence[str], made: str, aside: Path | None) -> None:
    print(f"{folder} is as it was on {made}: {', '.join(names)}")
    if aside is not None:
        print(f"what was there is in {aside}")


def _parser(of: str, folder: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"fedapp {of}")
    commands = parser.add_subparsers(dest="command", required=True)
    backup = commands.add_parser("backup", help=f"write all that the {of} must not lose to one file")
    restore = commands.add_parser("restore", help="bring a folder back from a backup")
    every = [backup, restore]
    for command in (backup, restore):
        command.add_argument("file", type=Path, help="the backup")
    restore.add_argument("--force", action="store_true", help="put aside what is in the folder")
    if of == "client":
        every.append(commands.add_parser("forget", help="remove what a node kept of its runs"))
        for command in every:
            command.add_argument("--ledger", type=Path, help=f"the ledger (FOLDER/{LEDGER})")
        restore.add_argument("--keep-ledger", action="store_true", help="leave the ledger as it is")
    for command in every:
        command.add_argument("--folder", type=Path, default=folder, help="the folder (%(default)s)")
    return parser
