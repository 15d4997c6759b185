"""What goes wrong in a deployment, and what intruders try: told in a line, at no more cost than need be."""

import json
import logging
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supernode import node_auth_http_interceptor
from grids import Elsewhere, rounds_here, rounds_on
from safetensors.torch import load_file
from shell import Shell, free_port, wait
from test_deploy import SETTINGS, lines
from test_deploy_server import Key, Running, expire, grid, message, resident, running, signed, submit

from fedapp import config
from fedapp.client_app import client_app
from fedapp.deploy import bounded, disk, holding, keys, listener, memory, preflight
from fedapp.deploy.activity import Activity
from fedapp.deploy.address import Address
from fedapp.deploy.bounded import Bodies
from fedapp.deploy.link import Link, Refused
from fedapp.deploy.memory import Kept, Memory
from fedapp.errors import ConfigError, FedappError
from fedapp.privacy.ledger import Ledger

pytestmark = pytest.mark.filterwarnings(  # what flwr's own dependencies say of it
    "ignore:No path_separator found:DeprecationWarning", "ignore:GitWildMatchPattern:DeprecationWarning"
)

MOST = 4 << 20  # bytes of a body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for all tests in this process, which leave it as it is."""
    folder = tmp_path_factory.mktemp("faults") / "server"
    keys.init(folder, ["fed.example.org"])
    with running(folder, max_body=MOST) as found:
        yield found


@contextmanager
def linked(server: Running, key: Key, told: Any) -> Iterator[Link]:
    link = Link(server.access.server, (server.folder / keys.CA).read_bytes(), key, False, told, Activity())
    try:
        link.open()
        yield link
    finally:
        link.close()


# Clocks


@contextmanager
def clock(seconds: float) -> Iterator[None]:
    """A node's clock that is ahead by so much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "time", SimpleNamespace(time=lambda: time.time() + seconds))
        patch.setattr(node_auth_http_interceptor, "now", lambda: now() + timedelta(seconds=seconds))
        yield


@pytest.mark.parametrize(("seconds", "said"), [(60, "6[01] s ahead of"), (-400, "(399|400) s behind")])
def test_a_wrong_clock_is_told_before_a_node_starts(server: Running, seconds: float, said: str) -> None:
    where = Address.of(server.access.server), (server.folder / keys.CA).read_bytes()
    preflight.reach(*where)
    with clock(seconds), pytest.raises(ConfigError, match=f"clock is {said}.*timedatectl"):
        preflight.reach(*where)


def test_a_clock_that_goes_wrong_later_is_told_and_costs_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(holding, "HOLD_S", 0.2)
    key, node_id = server.node()
    wrong, told = ExitStack(), list[str]()

    def said(text: str) -> None:
        told.append(text)
        wrong.close()  # it is set right

    with grid(server, tmp_path / "app") as pushing, linked(server, key, said) as link, wrong:
        (sent,) = pushing.push_messages([message(node_id)])
        wrong.enter_context(clock(400))
        asked = link.receive()
        assert asked is not None
        assert asked.metadata.message_id == sent
        wrong.enter_context(clock(-400))
        link.send(Message(RecordDict(), reply_to=asked), 0.1)
        assert [reply.has_content() for reply in pushing.pull_messages([sent])] == [True]
    assert "ahead of the server's" in told[0]
    assert "there again" in told[1]
    assert "behind the server's" in told[2]


def test_a_key_that_is_not_registered_is_no_matter_of_clocks(server: Running) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(Refused, match="does not know this node's key"), linked(server, key, print):
        pass


# Certificates


def test_a_node_says_what_is_wrong_with_a_certificate_and_goes_on_with_the_new_one(tmp_path: Path) -> None:
    for name in ("server", "other"):
        keys.init(tmp_path / name, ["a"])
    told = list[str]()
    with running(tmp_path / "server") as server, ThreadPoolExecutor(1) as thread:
        key, _ = server.node()
        expire(server.folder)
        server.listening.outer.config.ssl.load_cert_chain(  # type: ignore[union-attr]
            server.folder / keys.CERTIFICATE, server.folder / keys.KEY
        )
        where = Address.of(server.access.server)
        for name, said in (("server", "has expired: tell the operator"), ("other", "another CA vouches")):
            with pytest.raises(ConfigError, match=said):
                preflight.reach(where, (tmp_path / name / keys.CA).read_bytes())

        def join() -> None:
            with linked(server, key, told.append):
                pass

        joining = thread.submit(join)
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.1)
        keys.renew(server.folder)
        server.listening.renew()
        joining.result(20)
    assert "certificate has expired" in told[0]
    assert "there again" in told[1]


# Disks


def test_a_full_disk_makes_a_node_wait_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept, slept = Memory(tmp_path / "node.sqlite"), list[float]()

    def limit(pages: int) -> None:
        kept._db.execute(f"PRAGMA max_page_count = {pages}")  # then SQLite finds that the disk is full

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert (kept.in_work(), kept.unsent(), kept.context(1, 1, 9)) == (b"asked", None, None)
        if len(slept) == 3:
            limit(1 << 20)

    kept.receive(b"asked", "first")
    limit(1)
    monkeypatch.setattr(memory, "time", SimpleNamespace(time=time.time, sleep=sleep))
    with caplog.at_level(logging.WARNING, "fedapp.client"):
        kept.answer(bytes(1 << 20), Kept(1, 1, 1, bytes(1 << 20)))
    assert (kept.in_work(), kept.unsent(), kept.context(1, 1, 9)) == (None, bytes(1 << 20), bytes(1 << 20))
    assert len(slept) == 3
    full, again = (record.getMessage() for record in caplog.records)
    assert "full): make room on the disk" in full
    assert "goes on" in again
    kept.close()


def test_a_disk_that_is_read_only_is_not_waited_for(tmp_path: Path) -> None:
    kept = Memory(tmp_path / "node.sqlite")
    kept._db.execute("PRAGMA query_only = 1")
    with pytest.raises(ConfigError, match="cannot be used"):
        kept.receive(b"asked", "first")
    kept.close()


def test_a_full_disk_at_the_server_makes_all_wait_and_loses_nothing(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key, node_id = server.node()
    question = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
    beat = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=30).SerializeToString()
    told = list[str]()
    with (
        grid(server, tmp_path / "app") as pushing,
        linked(server, key, told.append) as link,
        caplog.at_level(logging.WARNING, "fedapp.server"),
        ThreadPoolExecutor() as threads,
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "RESERVE", 1 << 60)
            answer = server.post("/v1/fleet/pull-messages", question, signed(key))
            assert answer.status_code == 503
            assert "disk is full" in answer.json()["detail"]
            assert (
                server.post("/v1/fleet/pull-messages", question).status_code == 401
            )  # strangers learn nothing
            assert server.post("/v1/fleet/send-node-heartbeat", beat, signed(key)).status_code == 200
            with pytest.raises(FedappError, match="disk is full"):
                submit(server, tmp_path / "app")
            with server.access.control() as client:
                assert client.ListRuns(ListRunsRequest()).run_dict
            going = threads.submit(lambda: list(pushing.push_messages([message(node_id)])))
            coming = threads.submit(link.receive)
            time.sleep(1)
            assert not going.done()
            assert not coming.done()
        (sent,) = going.result(20)
        asked = coming.result(20) or link.receive()
        assert asked is not None
        assert asked.metadata.message_id == sent
    assert "503: the server's disk is full" in told[0]
    said = [record.getMessage() for record in caplog.records if "the disk of" in record.getMessage()]
    assert len(said) == 2
    assert "runs wait until" in said[0]
    assert "runs go on" in said[1]


# Replies


def test_replies_that_come_twice_or_late_or_to_nothing_change_nothing(
    server: Running, tmp_path: Path
) -> None:
    key, node_id = server.node()
    content = RecordDict({"config": ConfigRecord({"a": 2})})
    with grid(server, tmp_path / "app") as pushing, linked(server, key, print) as link:
        (sent,) = pushing.push_messages([message(node_id)])
        asked = link.receive()
        assert asked is not None
        link.confirm(asked)
        reply = Message(content, reply_to=asked)
        assert link.send(reply, 0.1) > 0
        assert link.send(reply, 0.1) == 0  # the same bytes
        assert link.send(Message(RecordDict(), reply_to=asked), 0.1) == 0  # others
        (found,) = pushing.pull_messages([sent])
        assert found.content == content
        assert link.send(Message(content, reply_to=asked), 0.1) == 0  # as to a round that is over
        assert not any(again.has_content() for again in pushing.pull_messages([sent]))

        forged = message(node_id)  # to a message that was never sent
        forged.metadata.__dict__["_message_id"] = "0" * 64
        assert link.send(Message(content, reply_to=forged), 0.1) == 0

        short = message(node_id)  # to one that nobody waits for any more
        short.metadata.ttl = 0.5
        pushing.push_messages([short])
        asked = link.receive()
        assert asked is not None
        time.sleep(0.6)
        assert link.send(Message(content, reply_to=asked), 0.1) == 0


class Declining(Elsewhere):
    """A grid of nodes that have another fedapp."""

    def pull_messages(self, message_ids: Any) -> Any:
        said = "it is fedapp 9.9.9, and 0.1.0 is installed here"
        return [Message(Error(ErrorCode.INVALID_FAB, said), reply_to=self._waiting.pop())]


def test_another_version_everywhere_ends_the_run_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    job = config.job(config.compose("task=digits model=logistic privacy=none clients=2 rounds=2"))
    job.prepare()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(FedappError, match="none of 2 clients returned an update; the log says why"),
    ):
        rounds_on(job, Declining(client_app(lambda _: job), [11, 12]))
    assert "reply of node 11 refused: it is fedapp 9.9.9, and 0.1.0 is installed here" in caplog.text


# Bodies and heads


def test_of_bodies_one_sender_holds_one_and_all_hold_four() -> None:
    bodies, whole = Bodies(MOST), {b"content-length": b"%d" % MOST}
    small, chunked = {b"content-length": b"65536"}, {b"transfer-encoding": b"chunked"}
    with ExitStack() as held:
        for who in (b"a", b"b", b"c", b"d"):
            held.enter_context(bodies.room(who, whole if who != b"b" else chunked))
        for who in (b"a", b"e"):
            with pytest.raises(bounded.Refused, match="too many bodies") as refused, bodies.room(who, whole):
                pass
            assert refused.value.status == 503
            with bodies.room(who, small):  # a sign of life
                pass
    with bodies.room(b"e", whole), bodies.room(b"a", whole):
        pass
    assert not bodies._held


@pytest.mark.parametrize("who", ["nodes", "strangers"])
def test_many_large_bodies_at_once_take_bounded_memory(server: Running, who: str) -> None:
    count, over = 24, threading.Event()
    headers = [signed(server.node()[0]) if who == "nodes" else {} for _ in range(count)]
    before = resident()

    def body() -> Iterator[bytes]:
        for _ in range(MOST // (1 << 16) - 1):
            yield bytes(1 << 16)
        over.wait(30)
        yield bytes(1 << 16)

    def push(given: dict[str, str]) -> int:
        given = given | {"content-length": str(MOST)}
        try:
            return server.post("/v1/fleet/push-messages", body(), given).status_code
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return 0  # the server hung up while this was sending

    with ThreadPoolExecutor(count) as threads:
        try:
            pushed = [threads.submit(push, given) for given in headers]
            time.sleep(4)
            grown = resident() - before
        finally:
            over.set()
        statuses = [one.result() for one in pushed]
    assert grown < 4 * 4 * MOST  # copies of four, where all that were sent are 24
    assert not {200, 500} & set(statuses)
    if who == "strangers":
        assert set(statuses) <= {0, 401}
    else:
        assert 1 <= statuses.count(400) <= 4  # they were read, and are no protobuf


def opened(server: Running) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", server.listening.public), 20)
    return server.trust.wrap_socket(plain, server_hostname="localhost")


def closed(secure: ssl.SSLSocket, drip: bytes, pause: float, most: float) -> bool:
    """Whether the server hangs up while bytes go on coming, within so many seconds."""
    until = time.monotonic() + most
    secure.settimeout(pause)
    while time.monotonic() < until:
        try:
            if drip:
                secure.sendall(drip)
            if not secure.recv(1 << 12):
                return True
        except TimeoutError:
            continue
        except (ssl.SSLError, OSError):
            return True
    return False


@pytest.mark.parametrize(
    ("first", "drip"),
    [(b"", b""), (b"GET /", b"a"), (b"", b"\r\n")],
    ids=["silent", "slow", "empty lines"],
)
def test_who_does_not_say_what_it_asks_is_hung_up_on(
    server: Running,
    first: bytes,
    drip: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(listener, "_HEAD_S", 0.5)
    for begun in (b"", b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"):
        with caplog.at_level(logging.WARNING, "fedapp.server"), opened(server) as secure:
            if begun:
                secure.sendall(begun)
                assert secure.recv(1 << 12).startswith(b"HTTP/1.1 200")
                if not drip:
                    continue  # idle connections are kept for a while
            secure.sendall(first)
            assert closed(secure, drip, 0.1, 5)
        assert "no whole head within" in caplog.text
        caplog.clear()


def test_an_answer_may_take_longer_than_a_head(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_HEAD_S", 0.2)
    monkeypatch.setattr(holding, "HOLD_S", 0.8)
    key, node_id = server.node()
    begun = time.monotonic()
    assert not server.pull(key, node_id).messages_list
    assert time.monotonic() - begun > 0.7


def test_a_head_without_end_is_not_kept(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    before, sent = resident(), 0
    with opened(server) as secure, caplog.at_level(logging.WARNING, "fedapp.server"):
        secure.sendall(b"GET /health HTTP/1.1\r\n")
        with suppress(OSError):  # it hangs up
            while sent < 64 << 20:
                secure.sendall(b"a: " + b"b" * (1 << 16) + b"\r\n")
                sent += 1 << 16
    assert sent < 16 << 20
    assert resident() - before < 16 << 20
    assert "its head has more than 65536 bytes" in caplog.text


@pytest.mark.parametrize("path", ["push-messages", "get-run"])
def test_a_body_that_trickles_in_is_given_up(
    server: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "_BODY_S", 0.4)
    key, _ = server.node()

    def slow() -> Iterator[bytes]:
        for _ in range(100):
            yield b"a"
            time.sleep(0.1)

    begun = time.monotonic()
    answer = server.post(f"/v1/fleet/{path}", slow(), signed(key) | {"content-length": "100"})
    assert (answer.status_code, "slower than" in answer.json()["detail"]) == (408, True)
    assert time.monotonic() - begun < 5


# Whole processes


class Deployed:
    """`fedapp server --insecure`, and clients with ledgers; each on a disk of its own, where that can be."""

    def __init__(self, shell: Shell) -> None:
        self.shell, self.port, self.disks = shell, free_port(), list[Path]()
        self.clients: list[subprocess.Popen[bytes]] = []
        server = self._place(".fedapp/server")
        self.logs = {server: shell._log()}  # what each prints, by its folder
        process = shell.start(f"fedapp server --insecure --port {self.port}")
        wait(lambda: "register a node" in self.logs[server].read_text(), process)

    def _place(self, name: str) -> Path:
        folder = self.shell.home / name
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=2g,mode=700", "none", str(folder)]
        if os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            self.disks.append(folder)
        return folder

    def join(self, partition: int, of: int = 2) -> Path:
        """One more client, which waits for work; returns its folder."""
        folder = self._place(f"client{len(self.clients)}")
        keys.node(folder / "node.key")
        Ledger(folder / "ledger.db", new=True)
        (folder / "data.yaml").write_text(f"partition-id: {partition}\nnum-partitions: {of}\n")
        given = f"--folder {folder} --data-config {folder}/data.yaml --ledger {folder}/ledger.db"
        self.logs[folder] = self.shell._log()
        client = self.shell.start(f"fedapp client --server 127.0.0.1:{self.port} --insecure {given}")
        self.clients.append(client)
        wait(lambda: "waiting for work" in self.logs[folder].read_text(), client)
        return folder

    def leave(self, folder: Path, left: int | None) -> None:
        """Leave so many bytes of a disk; None: all that it had."""
        used = sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))
        size = 2 << 30 if left is None else used + left
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    def close(self) -> None:
        self.shell.close()
        for folder in self.disks:
            subprocess.run(["umount", str(folder)], check=False)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """One for both tests: what the first leaves is two clients that wait for work."""
    found = Deployed(Shell(tmp_path_factory.mktemp("deployed")))
    try:
        yield found
    finally:
        found.close()


def charged(ledger: Path) -> list[list[tuple[int, str | None]]]:
    """Round and unit of each release that a ledger holds, run by run."""
    found: dict[str, list[tuple[int, str | None]]] = {}
    with closing(sqlite3.connect(ledger)) as db:
        for run, at, unit in db.execute("SELECT run, round, unit FROM events ORDER BY number"):
            found.setdefault(run, []).append((at, unit))
    return sorted(found.values(), key=str)


@contextmanager
def paused(client: subprocess.Popen[bytes]) -> Iterator[None]:
    """A client that is slow: what works for it stands still, and the node itself does not."""
    works = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split()
    for work in works:
        os.kill(int(work), signal.SIGSTOP)
    try:
        yield
    finally:
        for work in works:
            os.kill(int(work), signal.SIGCONT)


@pytest.mark.slow
def test_two_runs_at_once_wait_for_their_last_node_and_end_as_each_does_alone(deployed: Deployed) -> None:
    """Both clients serve both, and write each round down once; a third that comes under way stands by."""
    folders, place = [deployed.join(0)], deployed.shell.home / ".fedapp/server/runs"
    settings = "task=digits model=logistic codec.rate=0.5 clients=2 rounds=12"
    deployed.shell.run(f"fedapp submit -m --detach {settings} privacy=none,example", 120)
    first = deployed.clients[0]
    wait(lambda: len(list(place.glob("*/config.yaml"))) == 2, first)
    assert not list(place.glob("*/rounds.jsonl"))  # both wait
    folders.append(deployed.join(1))
    wait(lambda: "round 4: train took" in deployed.logs[folders[0]].read_text(), first)
    with paused(first):
        third = deployed.join(1)
        assert not list(place.glob("*/summary.json"))
    wait(lambda: len(list(place.glob("*/summary.json"))) == 2, first)
    for run in place.iterdir():
        assert [(r["replies"], r["failures"]) for r in lines(run)] == [(2, 0)] * 12
    (unprotected,) = (s for s in place.glob("*/summary.json") if json.loads(s.read_text())["epsilon"] is None)
    alone = rounds_here(config.job(config.compose(f"{settings} privacy=none")))[0].arrays
    together = load_file(unprotected.with_name("model.safetensors"))
    assert all(torch.equal(value, together[name]) for name, value in alone.to_torch_state_dict().items())
    for folder in folders:
        assert charged(folder / "ledger.db") == [
            [(at, unit) for at in range(1, 13)] for unit in ("example", None)
        ]
        trained = [line for line in deployed.logs[folder].read_text().splitlines() if "train took" in line]
        assert len({line.split("run ")[1].split()[0] for line in trained[:6]}) == 2, "one after the other"
    assert "train took" not in deployed.logs[third].read_text()
    assert charged(third / "ledger.db") == []
    gone = deployed.clients.pop()
    gone.send_signal(signal.SIGTERM)
    assert gone.wait(30) == 0


@pytest.mark.slow
def test_a_missed_deadline_costs_one_reply_and_full_disks_cost_time(deployed: Deployed) -> None:
    shell, log = deployed.shell, deployed.shell._log()
    server, slow, client, *_ = deployed.logs
    before = len(deployed.logs[slow].read_text())

    def said(text: str, path: Path, begin: int = 0) -> None:
        wait(lambda: text in path.read_text()[begin:], submitted, 120)

    submitted = shell.start(f"fedapp submit {SETTINGS} rounds=12 trainer.epochs=40 deadline=45 run_dir=late")
    said("round 2: train took", deployed.logs[slow], before)
    with paused(deployed.clients[0]):
        said("1 of 2 nodes did not answer in time", log)
        time.sleep(2)
    said("the server needs its reply no more", deployed.logs[slow], before)
    if len(deployed.disks) >= 3:
        said("round 4: train took", deployed.logs[client], before)
        deployed.leave(client, 0)
        said("make room on the disk", deployed.logs[client])
        deployed.leave(client, None)
        said("this node goes on", deployed.logs[client])
        deployed.leave(server, 40 << 20)
        said("runs wait until", deployed.logs[server])
        deployed.leave(server, None)
        said("runs go on", deployed.logs[server])
    assert submitted.wait(180) == 0
    rounds = [(r["replies"], r["failures"]) for r in lines(shell.home / "late")]
    assert sorted(rounds) == [(1, 1)] + [(2, 0)] * 11
    missed = rounds.index((1, 1)) + 1
    assert f"round {missed}: 1 of 2 nodes did not answer in time" in log.read_text()


@pytest.mark.slow
def test_who_starts_late_joins_a_run_and_who_starts_with_a_new_key_has_its_place_again(shell: Shell) -> None:
    deployed = Deployed(shell)
    try:
        folders = [deployed.join(place, of=3) for place in range(2)]
        log = shell._log()
        settings = "task=digits model=logistic privacy=none codec.feedback=true trainer.epochs=10"
        submitted = shell.start(f"fedapp submit {settings} clients=3 begin_with=2 rounds=60 run_dir=late")

        def newest(said: str) -> None:
            log = deployed.logs[folders[-1]]
            wait(lambda: re.search(said, log.read_text()) is not None, submitted)

        for place, leaves in ((2, None), (1, deployed.clients[1])):
            wait(lambda: "round 4: train took" in deployed.logs[folders[0]].read_text(), submitted)
            with paused(deployed.clients[0]):  # so a round goes on while it starts
                if leaves is not None:
                    leaves.send_signal(signal.SIGTERM)
                    assert leaves.wait(30) == 0
                folders.append(deployed.join(place, of=3))
            newest(r"run \d+: ")  # it is asked
            with paused(deployed.clients[0]):  # and answers in the same round, however long that takes it
                newest("query took")
            newest("train took")
        assert submitted.wait(300) == 0
    finally:
        deployed.close()
    replies = [r["replies"] for r in lines(shell.home / "late")]
    joined = replies.index(3)
    assert joined >= 5
    assert replies[:joined] == [2] * joined
    assert replies[-1] == 3
    said = log.read_text()
    assert re.search(rf"round {joined + 1}: node \d+ joins with partition 2", said)
    assert re.search(r"node \d+ takes over from node \d+, which has left, with partition 1", said)
