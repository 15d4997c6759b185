"""Backups: one moment, whole, for the owner's eyes; what comes back, and that no spent budget does."""

import errno
import fcntl
import io
import json
import os
import shutil
import sqlite3
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedapp.deploy import backup, backup_cli, files, keys
from fedapp.deploy.memory import Kept, Memory
from fedapp.errors import FedappError
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.ledger_backup import bring_back
from fedapp.privacy.release import Gaussian

NOISED = Gaussian(2.0, "none", 1.0, 1, "add_remove")


def charge(path: Path, times: int = 1, data_id: str = "a", fingerprint: str | None = None) -> None:
    for at in range(times):
        Ledger(path, new=True).charge(
            data_id, "example", [NOISED], 7, at,
            mechanism="example", adversary="the server too", fingerprint=fingerprint,
        )  # fmt: skip


def server_folder(folder: Path) -> Path:
    """A server's folder with a database, whose last rows are in its log only, and with runs."""
    keys.init(folder, ["a"])
    with closing(sqlite3.connect(folder / "state.db", isolation_level=None)) as db:
        db.executescript("PRAGMA journal_mode=WAL; CREATE TABLE nodes (id); INSERT INTO nodes VALUES (1);")
    for name in ("7/rounds.jsonl", "7/checkpoint/begun.jsonl", "7/checkpoint/round-000002.safetensors"):
        path = folder / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "runs/7/.summary.json.partial").write_text("half")
    (folder / "runs/8").symlink_to(folder / "runs/7")
    (folder / "runs/9").symlink_to(folder / keys.TOKEN)
    (folder / "log").mkdir()
    (folder / "log/server.log").write_text("a line")
    (folder / "address").write_text("https://127.0.0.1:1")
    return folder


def client_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    keys.node(folder / "node.key")
    (folder / "ca.pem").write_text("ca")
    (folder / "node.log").write_text("a line")
    memory = Memory(folder / "node.sqlite")
    memory.answer(b"reply", Kept(7, 7, 1, b"context"))
    memory.close()
    charge(folder / "ledger.db", 2)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files but databases, which a copy may hold in other pages."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.suffix not in (".db", ".sqlite")}


def releases(path: Path) -> int:
    return Ledger(path).count("a")


def server(*words: object) -> None:
    backup_cli.server([str(word) for word in words])


def client(*words: object) -> None:
    backup_cli.client([str(word) for word in words])


# A server


def test_a_servers_folder_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = server_folder(tmp_path / "server"), tmp_path / "backup.tar"
    with closing(sqlite3.connect(folder / "state.db", isolation_level=None)) as db:
        db.execute("INSERT INTO nodes VALUES (2)")  # a server that runs, with a row that is in its log only
        assert b"nodes" in (folder / "state.db").read_bytes()
        server("backup", file, "--folder", folder)
    assert file.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(folder / "log")
    server("restore", file, "--folder", tmp_path / "new")
    new = tmp_path / "new"
    left_out = {"address", "runs/7/.summary.json.partial"}
    assert content(new) == {k: v for k, v in content(folder).items() if k not in left_out}
    assert new.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in new.glob("*.key")} == {
        "ca.key": 0o600, "server.key": 0o600
    }  # fmt: skip
    with closing(sqlite3.connect(new / "state.db")) as db:
        assert db.execute("SELECT id FROM nodes").fetchall() == [(1,), (2,)]
    assert (new / "runs/8").resolve() == new / "runs/7"  # not the old server's
    assert not (new / "runs/9").is_symlink()  # links out of the runs stay behind
    keys.check(new)
    said = capsys.readouterr().out
    assert "ca.key, ca.pem, operator.token, runs, server.key, server.pem, state.db" in said
    assert keys.token(folder / keys.TOKEN) not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "new", "server"]


def test_what_grows_is_copied_last_and_what_was_begun_after_what_was_finished(tmp_path: Path) -> None:
    folder, file = server_folder(tmp_path / "server"), tmp_path / "backup.tar"
    server("backup", file, "--folder", folder)
    with tarfile.open(file) as archive:
        names = [name for name in archive.getnames() if name.startswith("runs/7")]
    assert [Path(name).name for name in names] == ["round-000002.safetensors", "rounds.jsonl", "begun.jsonl"]


def test_a_database_is_copied_as_it_is_at_one_moment(tmp_path: Path) -> None:
    """Two numbers are always equal in it, while somebody counts them up, one after the other."""
    source, over = tmp_path / "two.db", threading.Event()
    with closing(sqlite3.connect(source, isolation_level=None)) as db:
        db.executescript(
            "PRAGMA journal_mode=WAL; CREATE TABLE two (name PRIMARY KEY, n, pad BLOB);"
            "INSERT INTO two VALUES ('a', 0, zeroblob(60000)), ('b', 0, zeroblob(60000));"
        )

    def count() -> None:
        with closing(sqlite3.connect(source, isolation_level=None, timeout=60)) as db:
            while not over.is_set():
                db.execute("BEGIN IMMEDIATE")
                for name in "ab":
                    db.execute("UPDATE two SET n = n + 1, pad = randomblob(60000) WHERE name = ?", (name,))
                db.execute("COMMIT")

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for turn in range(20):
            copy = tmp_path / f"{turn}.db"
            backup._snapshot(source, copy)
            with closing(sqlite3.connect(copy)) as db:
                (a,), (b,) = db.execute("SELECT n FROM two ORDER BY name").fetchall()
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert a == b
    finally:
        over.set()
        thread.join()
    assert a > 0


def test_a_folder_that_is_not_empty_is_put_aside_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = server_folder(tmp_path / "server"), tmp_path / "backup.tar"
    server("backup", file, "--folder", folder)
    (folder / "more").write_text("new")
    before = content(folder)
    with pytest.raises(FedappError, match="not empty: name another --folder, or --force"):
        server("restore", file, "--folder", folder)
    assert content(folder) == before
    server("restore", file, "--folder", folder, "--force")
    assert not (folder / "more").exists()
    (aside,) = tmp_path.glob("server.before-*")
    assert content(aside) | {".lock": b""} == before | {".lock": b""}
    assert str(aside) in capsys.readouterr().out


def test_a_restore_that_fails_at_its_end_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = server_folder(tmp_path / "server"), tmp_path / "backup.tar"
    server("backup", file, "--folder", folder)
    before, rename = content(folder), os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name.startswith("."):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(FedappError, match=r"Input/output error.*nothing is changed"):
        server("restore", file, "--folder", folder, "--force")
    assert content(folder) == before | {".lock": b""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "server"]


def test_nothing_is_restored_while_a_server_runs(tmp_path: Path) -> None:
    folder, file = server_folder(tmp_path / "server"), tmp_path / "backup.tar"
    server("backup", file, "--folder", folder)
    with files.alone(folder), pytest.raises(FedappError, match="another server"):
        server("restore", file, "--folder", folder, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "server"]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def without_its_end(file: Path) -> None:
    """All but the last member, at its border."""
    with tarfile.open(file) as archive:
        last = archive.getmembers()[-1].offset
    os.truncate(file, last)


def damaged(file: Path) -> None:
    with tarfile.open(file) as archive:
        at = archive.getmember("state.db").offset_data
    with file.open("r+b") as opened:
        opened.seek(at + 4096)
        opened.write(b"\xff" * 4096)


def climbing(file: Path) -> None:
    with tarfile.open(file, "a") as archive:
        archive.addfile(tarfile.TarInfo("../climbed"), io.BytesIO())


def of_another_kind(file: Path) -> None:
    file.unlink()
    backup.save(backup.CLIENT, client_folder(file.parent / "client"), file)
    shutil.rmtree(file.parent / "client")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, "whole backup"),
        (without_its_end, "whole backup"),
        (damaged, "malformed"),
        (climbing, "whole backup"),
        (of_another_kind, "`fedapp client restore` takes it"),
        (lambda file: file.write_bytes(b"x" * 5000), "whole backup"),
        (lambda file: file.unlink(), "cannot be restored"),
    ],
)
def test_what_is_no_whole_backup_changes_nothing(
    tmp_path: Path, change: Callable[[Path], Any], said: str
) -> None:
    folder, file = server_folder(tmp_path / "server"), tmp_path / "backup.tar"
    server("backup", file, "--folder", folder)
    change(file)
    before, there = content(folder), {path.name for path in tmp_path.iterdir()}
    for words in (("--folder", folder, "--force"), ("--folder", tmp_path / "new")):
        with pytest.raises(FedappError, match=said):
            server("restore", file, *words)
    assert content(folder) | {".lock": b""} == before | {".lock": b""}
    assert {path.name for path in tmp_path.iterdir()} == there


def test_a_full_disk_leaves_no_half_of_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = server_folder(tmp_path / "server")

    def full(self: tarfile.TarFile, info: tarfile.TarInfo, file: Any = None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(FedappError, match=r"No space left.*disk has room"):
        server("backup", tmp_path / "backup.tar", "--folder", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["server"]


def test_no_file_is_replaced_by_a_backup(tmp_path: Path) -> None:
    folder = server_folder(tmp_path / "server")
    before = content(folder)
    with pytest.raises(FedappError, match="exists"):
        server("backup", folder / "state.db", "--folder", folder)
    with pytest.raises(FedappError, match="no server's folder"):
        server("backup", tmp_path / "b.tar", "--folder", tmp_path / "nowhere")
    assert content(folder) == before


# A client


def test_a_clients_folder_comes_back_with_its_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, new = client_folder(tmp_path / "client"), tmp_path / "b.tar", tmp_path / "new"
    client("backup", file, "--folder", folder)
    client("restore", file, "--folder", new)
    assert content(new) == {k: v for k, v in content(folder).items() if k != "node.log"}
    memory = Memory(new / "node.sqlite")
    assert (memory.unsent(), memory.context(7, 7, 2)) == (b"reply", b"context")
    memory.close()
    assert releases(new / "ledger.db") == 2
    assert (new / "ledger.db").stat().st_mode & 0o777 == 0o600
    assert "as old as the backup" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["client/ledger.db", "elsewhere/ledger.db"])
def test_a_ledger_that_has_spent_more_is_never_set_back(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, ledger = client_folder(tmp_path / "client"), tmp_path / "b.tar", tmp_path / place
    ledger.parent.mkdir(exist_ok=True)
    if ledger != folder / "ledger.db":
        (folder / "ledger.db").rename(ledger)
    words = "--folder", folder, "--ledger", ledger
    client("backup", file, *words)
    charge(ledger)
    before, key = ledger.read_bytes(), (folder / "node.key").read_bytes()
    with pytest.raises(FedappError, match=r"has 1 releases that the backup lacks.*--keep-ledger"):
        client("restore", file, *words, "--force")
    assert ledger.read_bytes() == before
    assert not list(tmp_path.glob("*.before-*"))
    (folder / "node.key").write_text("lost")
    client("restore", file, *words, "--force", "--keep-ledger")
    assert (folder / "node.key").read_bytes() == key
    assert releases(ledger) == 3
    assert not list(folder.glob("ledger.db")) or ledger == folder / "ledger.db"
    assert str(ledger) in capsys.readouterr().out


def test_a_ledger_that_lags_behind_its_backup_is_brought_forward(tmp_path: Path) -> None:
    folder, file = client_folder(tmp_path / "client"), tmp_path / "b.tar"
    ledger = folder / "ledger.db"
    shutil.copy(ledger, tmp_path / "older.db")
    Ledger(ledger).set_limit("a", "example", 8.0, 1e-5)
    charge(ledger)
    Ledger(ledger).store("a", 7, 2, "train", b"reply")
    client("backup", file, "--folder", folder)
    spent = Ledger(ledger).spent("a")
    shutil.copy(tmp_path / "older.db", ledger)
    with ledger.open("rb") as opened:  # as another process may have it
        client("restore", file, "--folder", folder, "--force")
        assert os.fstat(opened.fileno()).st_ino == ledger.stat().st_ino
    assert Ledger(ledger).spent("a") == spent
    assert len(Ledger(ledger).limits("a")) == 1
    assert Ledger(ledger).stored("a", 7, 2, "train") == b"reply"
    charge(ledger)  # and the numbers go on
    assert releases(ledger) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (lambda path: Ledger(path).set_limit("a", "client", 1.0, 1e-5), "1 limits that"),
        (lambda path: Ledger(path).overlap("a", "b"), "2 overlaps that"),
        (lambda path: charge(path, fingerprint="f"), "1 releases that"),
    ],
)
def test_limits_and_overlaps_are_not_lost_either(
    tmp_path: Path, more: Callable[[Path], None], said: str
) -> None:
    ledger, copy = tmp_path / "ledger.db", tmp_path / "copy.db"
    charge(ledger, 2)
    charge(ledger, 1, "b")
    shutil.copy(ledger, copy)
    more(ledger)
    before = ledger.read_bytes()
    with pytest.raises(FedappError, match=said):
        bring_back(copy, ledger)
    assert ledger.read_bytes() == before
    bring_back(ledger, copy)  # the other way round nothing is lost
    assert Ledger(copy).spent("a") == Ledger(ledger).spent("a")


def test_a_client_without_a_ledger_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = client_folder(tmp_path / "client")
    (folder / "ledger.db").unlink()
    client("backup", tmp_path / "b.tar", "--folder", folder)
    assert "no ledger is in it" in capsys.readouterr().out
    with pytest.raises(FedappError, match="there is no ledger"):
        client("backup", tmp_path / "c.tar", "--folder", folder, "--ledger", tmp_path / "none.db")
    client("restore", tmp_path / "b.tar", "--folder", tmp_path / "new")
    assert "there is no ledger" in capsys.readouterr().out


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """As a client that runs holds its folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def test_forget_removes_what_was_kept_and_neither_key_nor_what_was_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = client_folder(tmp_path / "client")
    memory = Memory(folder / "node.sqlite")  # with a write-ahead log beside it
    memory.receive(b"message", "name")
    assert (folder / "node.sqlite-wal").exists()
    ledger, reply = Ledger(folder / "ledger.db"), b"an update" * 100
    ledger.charge("ward", None, [], 7, 1, node=1)
    ledger.store("ward", 7, 1, "train", reply, node=1)
    spent, before = ledger.spent("ward"), content(folder)
    with held(folder), pytest.raises(FedappError, match="another process"):
        client("forget", "--folder", folder)
    assert memory.in_work() == b"message"
    assert reply[:50] in (folder / "ledger.db").read_bytes()
    client("forget", "--folder", folder)
    assert "the ledger's 1 kept replies are removed" in capsys.readouterr().out
    memory._db.close()
    assert not list(folder.glob("node.sqlite*"))
    after = content(folder)
    for name in ("node.sqlite-wal", "node.sqlite-shm"):
        del before[name]
    assert after == before
    assert (ledger.stored("ward", 7, 1, "train", node=1), ledger.spent("ward")) == (None, spent)
    assert reply[:50] not in (folder / "ledger.db").read_bytes()
    client("forget", "--folder", folder, "--ledger", folder / "ledger.db")
    assert "nothing is kept" in capsys.readouterr().out
    with pytest.raises(FedappError, match="there is no ledger"):
        client("forget", "--folder", folder, "--ledger", tmp_path / "none.db")
    with pytest.raises(FedappError, match="no client's folder"):
        client("forget", "--folder", tmp_path / "nowhere")


def test_nothing_is_restored_while_a_client_runs(tmp_path: Path) -> None:
    folder, file = client_folder(tmp_path / "client"), tmp_path / "b.tar"
    client("backup", file, "--folder", folder)
    with held(folder), pytest.raises(FedappError, match="another process"):
        client("restore", file, "--folder", folder, "--force")
    assert not list(tmp_path.glob("*.before-*"))


def test_a_backup_says_when_it_was_made(tmp_path: Path) -> None:
    folder, file = client_folder(tmp_path / "client"), tmp_path / "b.tar"
    client("backup", file, "--folder", folder)
    with tarfile.open(file) as archive:
        member = archive.extractfile(archive.getnames()[-1])
        assert member is not None
        assert set(json.load(member)) == {"of", "made"}
        assert {info.uid for info in archive} == {0}
