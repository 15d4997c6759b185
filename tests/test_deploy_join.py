"""`fedapp client` by its command line: it connects where all is in order; else it says what is not."""

import datetime
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedapp.deploy import certificates, client, link
from fedapp.errors import FedappError
from fedapp.privacy.ledger import Ledger

Broken = Callable[[Path, pytest.MonkeyPatch], Any]
NOW = datetime.datetime.now(datetime.UTC)


def answering(at: datetime.datetime) -> Mock:
    """A server that answers at some time, by its own clock."""
    answer = httpx.Response(200, headers={"date": format_datetime(at, usegmt=True)})
    answer.elapsed = datetime.timedelta(0)
    return Mock(return_value=answer)


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Called where a node would connect to its server, which is there; the node then is interrupted."""
    found = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(link, "Link", found)
    monkeypatch.setattr(client, "_begin_log", Mock())
    monkeypatch.setattr(httpx, "get", answering(datetime.datetime.now(datetime.UTC)))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All that a node needs."""
    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "node.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    )
    (tmp_path / "node.key").chmod(0o600)
    (tmp_path / "ca.pem").write_bytes(certificates.pem(certificates.authority().certificate))
    (tmp_path / "table.csv").write_text("age\n3\n")
    (tmp_path / "data.yaml").write_text(f"data: {tmp_path / 'table.csv'}\n")
    Ledger(tmp_path / "ledger.db", new=True).set_limit("data", "example", 8, 1e-5)
    return tmp_path


def joined(folder: Path, *more: str) -> None:
    files = ("--data-config", f"{folder}/data.yaml", "--ledger", f"{folder}/ledger.db")
    client.main(["--server", "127.0.0.1:8443", "--folder", str(folder), *files, *more])


def test_a_node_connects_where_all_is_in_order(folder: Path, connected: Mock) -> None:
    joined(folder)
    assert connected.call_args.args[:2] == ("127.0.0.1:8443", (folder / "ca.pem").read_bytes())


BROKEN: dict[str, tuple[Broken, str]] = {
    "data": (lambda at, _: (at / "table.csv").unlink(), r"table\.csv' does not exist on this machine"),
    "key": (lambda at, _: (at / "node.key").chmod(0o644), r"node\.key can be read by others"),
    "certificate": (lambda at, _: (at / "ca.pem").write_text("none"), r"CA certificate .* cannot be read"),
    "ledger": (lambda at, _: (at / "ledger.db").unlink(), "there is no ledger"),
    "room": (
        lambda _, patch: patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6)),
        "has 1 MB left",
    ),
    "reach": (
        lambda _, patch: patch.setattr(httpx, "get", Mock(side_effect=httpx.ConnectError("refused"))),
        r"127\.0\.0\.1:8443 cannot be reached \(refused\)",
    ),
    "clock": (
        lambda _, patch: patch.setattr(httpx, "get", answering(NOW - datetime.timedelta(hours=1))),
        "clock is .* s ahead of the server's",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_one_thing_that_is_not_in_order_is_told_before_anything_is_connected(
    broken: str, folder: Path, connected: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, said = BROKEN[broken]
    spoil(folder, monkeypatch)
    with pytest.raises(FedappError, match=said):
        joined(folder)
    connected.assert_not_called()


def test_a_policy_that_is_none_is_told(folder: Path, connected: Mock) -> None:
    (folder / "policy.yaml").write_text("tasks: digits\n")
    with pytest.raises(FedappError, match="policy"):
        joined(folder, "--policy", f"{folder}/policy.yaml")
    connected.assert_not_called()


@contextmanager
def folder_held(folder: Path) -> Iterator[None]:
    """As another process holds it."""
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    yield
    os.close(held)


def test_no_two_nodes_share_a_folder(folder: Path, connected: Mock) -> None:
    with folder_held(folder), pytest.raises(FedappError, match="another process"):
        joined(folder)
    connected.assert_not_called()


def test_a_ledger_without_a_limit_is_told(
    folder: Path, connected: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "ledger.db").unlink()
    Ledger(folder / "ledger.db", new=True)
    joined(folder)
    connected.assert_called_once()
    assert "sets no limit for 'data'" in caplog.text
