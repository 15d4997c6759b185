"""The operator's side of a federation: keys, who is let through, what is read, held and brought back."""

import asyncio
import io
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from omegaconf import OmegaConf

from fedapp import server_app
from fedapp.deploy import (
    backup_cli,
    bounded,
    certificates,
    files,
    following,
    holding,
    keys,
    keys_cli,
    objects,
    quota,
    registry,
    starting,
    state,
)
from fedapp.deploy.address import from_here
from fedapp.deploy.control import Access
from fedapp.deploy.objects import deliver
from fedapp.deploy.runs import tar
from fedapp.deploy.server import Listening, Server
from fedapp.deploy.state import State
from fedapp.errors import ConfigError, FedappError

pytestmark = pytest.mark.filterwarnings(  # what flwr's own dependencies say of it
    "ignore:No path_separator found:DeprecationWarning", "ignore:GitWildMatchPattern:DeprecationWarning"
)

PROTOBUF = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
SECRET = b"s" * 32
ROOT = Path(__file__).parents[1]
Key = ec.EllipticCurvePrivateKey


@dataclass
class Running:
    """A server in this process, on loopback; what an operator and a node need to speak to it."""

    folder: Path
    listening: Listening

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.listening.public}"

    @property
    def access(self) -> Access:
        ca, token = self.folder / keys.CA, keys.token(self.folder / keys.TOKEN)
        return Access(f"127.0.0.1:{self.listening.public}", ca, token)

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.folder / keys.CA)

    def post(
        self, path: str, content: Any = b"", headers: dict[str, str] | None = None, timeout: float = 20
    ) -> httpx.Response:
        with httpx.Client(verify=self.trust, timeout=timeout) as client:
            return client.post(f"{self.url}{path}", content=content, headers=PROTOBUF | (headers or {}))

    def state(self) -> tuple[int, int]:
        """How many nodes and runs there are."""
        with self.access.control() as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
            return len(nodes), len(client.ListRuns(ListRunsRequest()).run_dict)

    def node(self) -> tuple[Key, int]:
        """A node that is registered and active."""
        key = ec.generate_private_key(ec.SECP384R1())
        pem = public_key_to_bytes(key.public_key())
        with self.access.control() as client:
            node_id = client.RegisterNode(RegisterNodeRequest(public_key=pem)).node_id
        request = ActivateNodeRequest(public_key=pem, heartbeat_interval=30)
        assert (
            self.post("/v1/fleet/activate-node", request.SerializeToString(), signed(key)).status_code == 200
        )
        return key, node_id

    def pull(self, key: Key, node_id: int) -> PullMessagesResponse:
        question = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
        answer = self.post("/v1/fleet/pull-messages", question, signed(key))
        assert answer.status_code == 200, answer.text
        found: PullMessagesResponse = PullMessagesResponse.FromString(answer.content)
        return found


def signed(key: Key, at: datetime | None = None) -> dict[str, str]:
    """The headers that a node sends."""
    stamp = (at or now()).isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: stamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, stamp.encode())).decode(),
    }


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Running]:
    """A server in a thread of its own, without the process that starts runs."""
    ready: Future[tuple[Listening, asyncio.AbstractEventLoop]] = Future()
    over = asyncio.Event()

    async def serve() -> Any:
        async with Server(folder, "127.0.0.1", 0, **settings).listening(SECRET) as listening:
            ready.set_result((listening, asyncio.get_running_loop()))
            await over.wait()

    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(asyncio.run, serve())
        wait({serving, ready}, return_when=FIRST_COMPLETED)
        listening, loop = ready.result() if ready.done() else serving.result()
        try:
            yield Running(folder, listening)
        finally:
            loop.call_soon_threadsafe(over.set)
            serving.result(20)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database: Flower takes seconds to make one."""
    folder = tmp_path_factory.mktemp("database")
    Server(folder, "127.0.0.1", insecure=True).check()
    with running(folder, insecure=True):
        pass
    return folder / "state.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Running]:
    """One for all tests that leave it as it is, but for nodes and runs."""
    folder = tmp_path_factory.mktemp("server") / "server"
    keys.init(folder, ["fed.example.org"])
    shutil.copy(database, folder)
    with running(folder) as found:
        yield found


# Keys


def test_keys_are_private_and_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "server"
    keys_cli.main(["init", "--host", "fed.example.org", "--host", "10.0.0.5", "--folder", str(folder)])
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {
        "ca.pem": 0o644, "ca.key": 0o600, "server.pem": 0o644, "server.key": 0o600, "operator.token": 0o600
    }  # fmt: skip
    assert folder.stat().st_mode & 0o777 == 0o700
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FedappError, match="--force"):
        keys.init(folder, ["fed.example.org"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    said = capsys.readouterr().out
    assert not any(line in said for path, text in before.items() for line in text.decode().splitlines()[1:-1])
    assert keys.token(folder / keys.TOKEN) not in said
    ends, hosts = keys.check(folder)
    assert hosts == ["fed.example.org", "localhost", "10.0.0.5", "127.0.0.1"]
    assert timedelta(days=364) < ends - datetime.now(UTC) < timedelta(days=366)
    keys.init(folder, ["fed.example.org"], force=True)
    assert all(path.read_bytes() != text for path, text in before.items())


def test_a_new_certificate_is_of_the_same_ca_and_for_the_same_hosts(tmp_path: Path) -> None:
    keys.init(tmp_path, ["fed.example.org"])
    before = (tmp_path / keys.CERTIFICATE).read_bytes()
    assert keys.renew(tmp_path, days=3) == ["fed.example.org", "localhost", "127.0.0.1"]
    assert (tmp_path / keys.CERTIFICATE).read_bytes() != before
    assert keys.check(tmp_path)[0] < datetime.now(UTC) + timedelta(days=4)


def test_a_given_ca_signs_and_its_key_is_not_copied(tmp_path: Path) -> None:
    keys.init(tmp_path / "own", ["a"])
    ca, ca_key = tmp_path / "own/ca.pem", tmp_path / "own/ca.key"
    keys.init(tmp_path / "server", ["b"], ca=ca, ca_key=ca_key)
    keys.check(tmp_path / "server")
    assert not (tmp_path / "server/ca.key").exists()
    keys.init(tmp_path / "other", ["a"])
    with pytest.raises(FedappError, match="is not the key of"):
        keys.init(tmp_path / "third", ["b"], ca=ca, ca_key=tmp_path / "other/ca.key")
    assert not (tmp_path / "third").exists()


def test_a_nodes_key_is_what_flower_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "node.key"
    keys_cli.main(["node", "--out", str(path)])
    line = capsys.readouterr().out.splitlines()[-1]
    key = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert path.stat().st_mode & 0o777 == 0o600
    pem = public_key_to_bytes(key.public_key())
    assert registry.public_key([line]) == registry.public_key(line.split()) == pem
    assert registry.public_key([f"{path}.pub"]) == pem
    with pytest.raises(FedappError, match="never leaves"):
        registry.public_key([str(path)])
    with pytest.raises(FedappError, match="exists"):
        keys.node(path)


def test_what_is_no_token_is_never_sent(tmp_path: Path) -> None:
    keys.init(tmp_path, ["a"])
    with pytest.raises(FedappError, match="no operator's token") as refused:
        keys.token(tmp_path / keys.KEY)
    assert (tmp_path / keys.KEY).read_text().splitlines()[1] not in str(refused.value)
    (tmp_path / keys.TOKEN).chmod(0o640)
    with pytest.raises(FedappError, match="chmod 600"):
        keys.token(tmp_path / keys.TOKEN)


def expire(folder: Path) -> None:
    """Put a certificate there that has ended."""
    authority = keys._read_authority(folder / keys.CA, folder / keys.CA_KEY)
    then = datetime.now(UTC) - timedelta(days=3)
    certificate, key = certificates.issue(authority, ["a"], timedelta(days=1), then)
    files.write(folder / keys.CERTIFICATE, certificates.pem(certificate))
    files.write(folder / keys.KEY, certificates.pem(key), secret=True)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda folder: (folder / "server.key").chmod(0o644), "chmod 600"),
        (lambda folder: (folder / "server.key").unlink(), "cannot read"),
        (lambda folder: (folder / "server.pem").write_text("x"), "no certificate"),
        (lambda folder: (folder / "ca.pem").unlink(), "cannot read"),
        (lambda folder: (folder / "operator.token").write_text("x"), "no operator's token"),
        (expire, "expired on"),
        (
            lambda folder: files.write(folder / "server.key", (folder / "ca.key").read_bytes(), True),
            "no pair",
        ),
    ],
)
def test_a_server_does_not_start_on_keys_that_are_not_in_order(
    tmp_path: Path, broken: Callable[[Path], Any], said: str
) -> None:
    keys.init(tmp_path, ["a"])
    Server(tmp_path).check()
    broken(tmp_path)
    with pytest.raises(FedappError, match=said):
        Server(tmp_path).check()


def test_insecure_is_for_this_machine_only(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "10.0.0.5", "fed.example.org", "::"):
        with pytest.raises(FedappError, match="--insecure"):
            Server(tmp_path, host, insecure=True).check()
    Server(tmp_path, "127.0.0.1", insecure=True).check()
    with running(tmp_path, insecure=True) as found:
        plain = Access(f"127.0.0.1:{found.listening.public}", None, keys.token(tmp_path / keys.TOKEN))
        with plain.control() as client:
            assert list(client.ListNodes(ListNodesRequest()).nodes_info) == []
        assert httpx.post(f"http://{plain.server}/v1/control/list-runs").status_code == 401
        key = ec.generate_private_key(ec.SECP384R1())  # a node that nobody registered registers itself
        request = RegisterNodeFleetRequest(
            public_key=public_key_to_bytes(key.public_key())
        ).SerializeToString()
        url = f"http://{plain.server}/v1/fleet/register-node"
        assert httpx.post(url, content=request, headers=PROTOBUF | signed(key)).status_code == 200
        assert httpx.post(url, content=request, headers=PROTOBUF).status_code == 401

        async def again() -> None:
            async with Server(tmp_path, "127.0.0.1", 0, insecure=True).listening(SECRET):
                pass

        with pytest.raises(FedappError, match="another server"):
            asyncio.run(again())


def test_a_port_in_use_and_a_full_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.init(tmp_path, ["a"])
    with socket.create_server(("127.0.0.1", 0)) as taken:

        async def start() -> None:
            async with Server(tmp_path, "127.0.0.1", taken.getsockname()[1]).listening(SECRET):
                pass

        with pytest.raises(FedappError, match="cannot listen on"):
            asyncio.run(start())
    monkeypatch.setattr("fedapp.deploy.server.LEAST_DISK", 1 << 60)
    with pytest.raises(FedappError, match="free 1 GB"):
        Server(tmp_path).check()


# Intruders


STRANGER = [
    ("POST", "/v1/control/list-runs", 401),
    ("POST", "/v1/control/register-node", 401),
    ("POST", "/v1/control/start-run", 401),
    ("POST", "/v1/control/stream-logs", 401),
    ("GET", "/fedapp/runs/1/folder", 401),
    ("GET", "/metrics", 401),
    ("POST", "/v1/runtime/acquire-task", 404),
    ("POST", "/v1/runtime/push-messages", 404),
    ("POST", "/v1/fleet/register-node", 404),
    ("POST", "/v1/fleet/unregister-node", 404),
    ("POST", "/v1/fleet/pull-messages", 401),
    ("POST", "/v1/fleet/%2e%2e/control/list-runs", 404),
    ("POST", "/V1/CONTROL/list-runs", 404),
    ("POST", "//v1/control/list-runs", 404),
    ("GET", "/docs", 404),
    ("GET", "/openapi.json", 404),
]


def test_a_stranger_is_refused_and_changes_nothing(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    before = server.state()
    with caplog.at_level(logging.WARNING, "fedapp.server"), httpx.Client(verify=server.trust) as client:
        for method, path, status in STRANGER:
            request = client.build_request(method, server.url, headers=PROTOBUF)
            request.url = request.url.copy_with(raw_path=path.encode())
            assert client.send(request).status_code == status, path
        for wrong in ("Bearer x", f"Basic {server.access.token}", "Bearer", server.access.token[:-1]):
            headers = PROTOBUF | {"Authorization": wrong}
            assert client.post(f"{server.url}/v1/control/list-runs", headers=headers).status_code == 401
        assert client.get(f"{server.url}/health").status_code == 200
    assert server.state() == before
    lines = [record.getMessage() for record in caplog.records if record.name == "fedapp.server"]
    assert len(lines) == len(STRANGER) + 4
    assert all("127.0.0.1:" in line for line in lines)
    assert not any(server.access.token[:-1] in line for line in lines)


def test_the_operator_is_told_when_the_token_is_wrong(server: Running) -> None:
    wrong = Access(server.access.server, server.access.ca, "x" * 43)
    with wrong.control() as client, pytest.raises(FedappError, match="operator's token"):
        client.ListRuns(ListRunsRequest())
    with pytest.raises(FedappError, match="operator's token"):
        wrong.fetch(1, Path("none"))
    assert not Path("none").exists()


def test_the_runtime_is_on_the_private_listener_only_behind_its_secret(server: Running) -> None:
    url = f"http://127.0.0.1:{server.listening.private}"
    request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString()
    assert httpx.post(f"{url}/v1/runtime/acquire-task", content=request, headers=PROTOBUF).status_code == 401
    assert httpx.post(f"{url}/v1/runtime/push-messages", headers=PROTOBUF).status_code == 401
    for path in ("/v1/control/list-runs", "/v1/fleet/pull-messages", "/fedapp/runs/1/folder", "/docs"):
        assert httpx.post(f"{url}{path}", headers=PROTOBUF).status_code == 404


def test_a_run_is_acquired_at_once_and_idle_asking_is_slow(server: Running, tmp_path: Path) -> None:
    with grid(server, tmp_path / "app"), runtime(server) as client:
        request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
        client.AcquireTask(request)  # told by the first one that there may be more
        began = time.monotonic()
        assert not client.AcquireTask(request).token
        assert time.monotonic() - began > 1
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(client.AcquireTask, request)
            time.sleep(0.3)
            submit(server, tmp_path / "app")
            submitted = time.monotonic()
            assert asked.result().token
            assert time.monotonic() - submitted < 1


def test_only_a_registered_key_with_a_fresh_signature_is_a_node(server: Running) -> None:
    key, node_id = server.node()
    question = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()

    def refused(headers: dict[str, str]) -> str:
        answer = server.post("/v1/fleet/pull-messages", question, headers)
        assert answer.status_code == 401
        return str(answer.json()["detail"])

    other = ec.generate_private_key(ec.SECP384R1())
    assert "no node key" in refused({})
    assert "no node is registered" in refused(signed(other))
    assert "cannot be read" in refused(signed(key) | {TIMESTAMP_HEADER: "yesterday"})
    assert "not of this key" in refused(signed(key) | {TIMESTAMP_HEADER: now().isoformat()})
    assert "set that clock" in refused(signed(key, now() - timedelta(seconds=310)))
    assert "set that clock" in refused(signed(key, now() + timedelta(seconds=10)))
    stranger = {FLEET_HTTP_PUBLIC_KEY_HEADER: signed(other)[FLEET_HTTP_PUBLIC_KEY_HEADER]}
    assert "not of this key" in refused(signed(key) | stranger)
    _, another = server.node()  # a node that gives itself out as another one
    as_other = PullMessagesRequest(node=Node(node_id=another)).SerializeToString()
    assert server.post("/v1/fleet/pull-messages", as_other, signed(key)).status_code == 401
    with server.access.control() as client:
        client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
    assert "no node is registered" in refused(signed(key))


def test_clients_refuse_a_wrong_ca_and_an_expired_certificate(tmp_path: Path) -> None:
    keys.init(tmp_path / "server", ["a"])
    keys.init(tmp_path / "other", ["a"])
    expire(tmp_path / "server")
    token = keys.token(tmp_path / "server/operator.token")
    with running(tmp_path / "server") as server:
        for ca in ("server", "other"):
            access = Access(server.access.server, tmp_path / ca / keys.CA, token)
            with access.control() as client, pytest.raises(FedappError, match="CERTIFICATE_VERIFY_FAILED"):
                client.ListNodes(ListNodesRequest())


def test_plain_http_to_the_tls_port_is_refused_and_told(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fedapp.server"), pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health")
    assert "TLS handshake: http request" in caplog.text


def serial(server: Running) -> int:
    with (
        socket.create_connection(("127.0.0.1", server.listening.public)) as plain,
        server.trust.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        der = secure.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def test_a_renewed_certificate_is_taken_without_a_break(tmp_path: Path, database: Path) -> None:
    keys.init(tmp_path, ["a"])
    shutil.copy(database, tmp_path)
    with running(tmp_path) as server:
        renewed(server)


def renewed(server: Running) -> None:
    before = serial(server)
    with httpx.Client(verify=server.trust) as client:
        assert client.get(f"{server.url}/health").status_code == 200
        keys.renew(server.folder)
        server.listening.renew()
        assert client.get(f"{server.url}/health").status_code == 200  # on the connection from before
    after = serial(server)
    assert after != before
    expire(server.folder)
    server.listening.renew()  # refused: the old one stays
    assert serial(server) == after


# Bodies


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pieces(total: int, sent: list[int]) -> Iterator[bytes]:
    piece = bytes(1 << 16)
    for _ in range(total // len(piece)):
        sent.append(len(piece))
        yield piece


@pytest.mark.parametrize("who", ["stranger", "node", "operator"])
def test_a_body_of_a_gigabyte_is_not_read(tmp_path: Path, database: Path, who: str) -> None:
    keys.init(tmp_path, ["a"])
    shutil.copy(database, tmp_path)
    with running(tmp_path, max_body=1 << 20) as server:
        path, headers = "/v1/fleet/push-object", {}
        if who == "node":
            headers = signed(server.node()[0])
        elif who == "operator":
            path, headers = "/v1/control/start-run", {"Authorization": f"Bearer {server.access.token}"}
        expected = 401 if who == "stranger" else 413
        before, sent = resident(), list[int]()
        told = headers | {"content-length": str(1 << 30)}  # said beforehand
        for given in (told, headers):  # or in chunks, without a word
            try:
                answer = server.post(path, pieces(1 << 30, sent), given)
            except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
                continue  # the server hung up while we were sending
            assert answer.status_code == expected
        assert sum(sent) < 64 << 20
        assert resident() - before < 50 << 20
        assert server.state()[1] == 0


# Messages


APP = {
    "pyproject.toml": """[project]
name = "quiet"
version = "1.0.0"
description = ""
license = {text = "Apache-2.0"}
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "quiet:app"
clientapp = "quiet:app"
""",
    "quiet.py": "",
}


def submit(server: Running, folder: Path) -> None:
    with server.access.control() as client:
        client.StartRun(StartRunRequest(fab=Fab(content=build_fab_from_disk(folder))))


def runtime(server: Running) -> RuntimeHttpClient:
    """What SuperExec asks with."""
    methods = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperExec"),
        SuperExecAuthHttpInterceptor(master_secret=SECRET, protected_methods=methods),
    ]
    address = f"127.0.0.1:{server.listening.private}"
    return RuntimeHttpClient.from_server_address(address, True, None, interceptors)


@contextmanager
def grid(server: Running, folder: Path) -> Iterator[HttpGrid]:
    """The grid that a ServerApp has, for a run that was submitted and acquired."""
    folder.mkdir()
    for name, text in APP.items():
        (folder / name).write_text(text)
    submit(server, folder)
    with runtime(server) as client:
        token = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"])).token
    address = f"127.0.0.1:{server.listening.private}"
    found = HttpGrid(address, insecure=True, token=token)
    try:
        found._connect()
        assert found._client is not None
        task = found._client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = task.run.run_id, 1, task.task_id
        found.set_run(run_from_proto(task.run))
        yield found
    finally:
        found.close()


def message(node_id: int) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"a": 1})}), node_id, MessageType.TRAIN)


class Pull(threading.Thread):
    """A pull that waits, and when its answer came."""

    def __init__(self, server: Running, key: Key, node_id: int) -> None:
        super().__init__()
        self._asked = server, key, node_id
        self.start()

    def run(self) -> None:
        server, key, node_id = self._asked
        self.answer, self.at = server.pull(key, node_id), time.monotonic()


def test_a_held_pull_is_answered_when_something_is_pushed(server: Running, tmp_path: Path) -> None:
    key, node_id = server.node()
    with grid(server, tmp_path / "app") as pushing:
        took = []
        for _ in range(3):
            pull = Pull(server, key, node_id)
            time.sleep(0.5)
            assert pull.is_alive()
            (sent,) = pushing.push_messages([message(node_id)])
            pushed = time.monotonic()
            pull.join()
            took.append(pull.at - pushed)
            (found,) = pull.answer.messages_list
            assert found.metadata.message_id == sent
            server.post("/v1/fleet/confirm-message-received", b"", signed(key))
        assert min(took) < 0.3, took


def test_an_answer_that_was_lost_is_given_again_until_the_node_has_it(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "HOLD_S", 0.2)
    key, node_id = server.node()
    with grid(server, tmp_path / "app") as pushing:
        pushing.push_messages([message(node_id)])
        first, again = server.pull(key, node_id), server.pull(key, node_id)
        assert len(first.messages_list) == 1
        assert first == again
        server.post("/v1/fleet/confirm-message-received", b"", signed(key))
        began = time.monotonic()
        assert not server.pull(key, node_id).messages_list
        assert 0.2 <= time.monotonic() - began < 2


def test_who_leaves_while_it_waits_takes_no_message_along(server: Running, tmp_path: Path) -> None:
    key, node_id = server.node()
    question = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
    with grid(server, tmp_path / "app") as pushing:
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/fleet/pull-messages", question, signed(key), timeout=0.5)
        time.sleep(0.1)
        pushing.push_messages([message(node_id)])
        assert len(server.pull(key, node_id).messages_list) == 1


def test_a_node_that_was_killed_is_in_again_at_once_and_its_work_is_not_given_up(
    server: Running, tmp_path: Path
) -> None:
    key, node_id = server.node()
    pem = public_key_to_bytes(key.public_key())
    with grid(server, tmp_path / "app") as pushing:
        (sent,) = pushing.push_messages([message(node_id)])
        again = ActivateNodeRequest(public_key=pem, heartbeat_interval=10).SerializeToString()
        answer = server.post("/v1/fleet/activate-node", again, signed(key))
        assert ActivateNodeResponse.FromString(answer.content).node_id == node_id
        assert list(pushing.pull_messages([sent])) == []  # no error stands for its reply
        assert server.pull(key, node_id).messages_list[0].metadata.message_id == sent
    for interval in (5.0, 1e9, float("nan")):
        wrong = ActivateNodeRequest(public_key=pem, heartbeat_interval=interval).SerializeToString()
        assert server.post("/v1/fleet/activate-node", wrong, signed(key)).status_code == 401
    other = ActivateNodeRequest(
        public_key=public_key_to_bytes(server.node()[0].public_key()), heartbeat_interval=10
    )
    as_other = server.post("/v1/fleet/activate-node", other.SerializeToString(), signed(key))
    assert as_other.status_code == 401
    assert server.post("/v1/fleet/activate-node", b"\xff", signed(key)).status_code == 400


def test_what_messages_carry_is_in_memory_and_a_restart_drops_it(tmp_path: Path, database: Path) -> None:
    folder = tmp_path / "server"
    keys.init(folder, ["a"])
    shutil.copy(database, folder)

    def on_disk(table: str) -> int:
        with sqlite3.connect(folder / "state.db") as db:
            return int(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])

    with running(folder) as server:
        key, node_id = server.node()
        with grid(server, tmp_path / "app") as pushing:
            pushing.push_messages([message(node_id), message(node_id)])
        assert [on_disk(table) for table in ("message_ins", "objects", "object_push_sessions")] == [2, 0, 0]
        (tree,) = server.pull(key, node_id).message_object_trees
        assert len(list(iterate_object_tree(tree))) == 3  # the message, its content, a record
    with running(folder) as server:
        assert not server.pull(key, node_id).messages_list
        assert on_disk("message_ins") == 1  # the one that was delivered, and whose run is over


def pushing_of(reply: Message, node_id: int) -> PushMessagesRequest:
    """What a node announces a reply with."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return PushMessagesRequest(
        node=Node(node_id=node_id),
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
        clientapp_runtime_list=[0.1],
    )


def asked_of(server: Running, key: Key, node_id: int) -> Message:
    """The message that a node finds, without what it carries."""
    pulled = server.pull(key, node_id)
    found = message_from_proto(pulled.messages_list[0])
    found.metadata.__dict__["_message_id"] = pulled.message_object_trees[0].object_id
    server.post("/v1/fleet/confirm-message-received", b"", signed(key))
    return found


def test_a_reply_in_the_name_of_another_node_is_refused(server: Running, tmp_path: Path) -> None:
    (key, node_id), (_, another) = server.node(), server.node()
    with grid(server, tmp_path / "app") as pushing:
        (sent,) = pushing.push_messages([message(another)])

        def pushed(name: int) -> int:
            """The answer to a reply to the other node's message, in the name of a node."""
            question = message(another)
            question.metadata.__dict__["_message_id"] = sent
            reply = Message(RecordDict(), reply_to=question)
            reply.metadata.__dict__["_src_node_id"] = name
            request = pushing_of(reply, node_id).SerializeToString()
            return server.post("/v1/fleet/push-messages", request, signed(key)).status_code

        assert pushed(another) == 403
        pushed(node_id)  # in its own name, to what was not asked of it: Flower drops it
        assert list(pushing.pull_messages([sent])) == []


def replied(question: Message, arrays: int, size: int, first: int = 0) -> Message:
    """A reply with so many arrays of so many bytes each, all different."""
    made = {str(i): Array("uint8", (size,), "x", bytes([first + i]) * size) for i in range(arrays)}
    return Message(RecordDict({"arrays": ArrayRecord(made)}), reply_to=question)


def announced(server: Running, key: Key, request: PushMessagesRequest) -> httpx.Response:
    return server.post("/v1/fleet/push-messages", request.SerializeToString(), signed(key))


def delivered(server: Running, key: Key, node_id: int, reply: Message) -> int:
    """How many bytes of a reply the server takes, by what `fedapp client` sends them with."""
    answer = announced(server, key, pushing_of(reply, node_id))
    assert answer.status_code == 200
    opened = PushMessagesResponse.FromString(answer.content)

    def posted(name: str, body: bytes) -> bytes:
        return server.post(f"/v1/fleet/{name}", body, signed(key)).raise_for_status().content

    parts = get_all_nested_objects(reply), opened.objects_to_push
    return deliver(posted, Node(node_id=node_id), reply.metadata.run_id, opened.session_id, *parts)


def test_a_reply_has_a_most_and_nothing_is_added_to_it(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "PARTS", 40)
    folder = tmp_path / "server"
    keys.init(folder, ["a"])
    shutil.copy(database, folder)
    with running(folder, max_body=1 << 20) as server:
        key, node_id = server.node()
        with grid(server, tmp_path / "app") as pushing:
            list(pushing.push_messages([message(node_id), message(node_id)]))
            question = asked_of(server, key, node_id)

            many = announced(server, key, pushing_of(replied(question, 41, 1), node_id))
            assert (many.status_code, "parts, and the most is 40" in many.text) == (413, True)
            twice = pushing_of(replied(question, 1, 1), node_id)
            twice.messages_list.append(twice.messages_list[0])
            assert announced(server, key, twice).status_code == 400
            other = pushing_of(replied(question, 1, 1), node_id)
            other.message_object_trees[0].CopyFrom(get_object_tree(replied(question, 2, 1)))
            assert announced(server, key, other).status_code == 400

            monkeypatch.setattr(
                objects, "_BYTES", 1 << 19
            )  # a request has less than the most, many have more
            large = replied(question, 6, 200_000)
            with pytest.raises(httpx.HTTPStatusError, match="413"):
                delivered(server, key, node_id, large)
            assert (
                announced(server, key, pushing_of(large, node_id)).status_code == 200
            )  # as after a broken link
            more = pushing_of(large, node_id)
            more.message_object_trees[0].children.add(object_id="f" * 64)
            assert announced(server, key, more).status_code == 403

            question = asked_of(server, key, node_id)
            fits = replied(question, 5, 200_000, first=100)
            assert 1_000_000 < delivered(server, key, node_id, fits) < 1 << 20
            (came,) = pushing.pull_messages([question.metadata.message_id])
            assert len(came.content.array_records["arrays"]) == 5


def test_a_reply_that_was_delivered_is_forgotten(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once there are many: one that waits for its ServerApp is counted on, as is one of which parts come."""
    quotas, opened = list[quota.Quota](), quota.Quota.opened

    def opening(self: quota.Quota, request: PushMessagesRequest, session: str) -> None:
        quotas.append(self)
        opened(self, request, session)

    monkeypatch.setattr(quota.Quota, "opened", opening)
    monkeypatch.setattr(quota, "MANY", 2)
    key, node_id = server.node()
    with grid(server, tmp_path / "app") as pushing:

        def asked() -> Message:
            list(pushing.push_messages([message(node_id)]))
            return asked_of(server, key, node_id)

        def remembered() -> int:
            (replies,) = quotas[0]._replies.values()
            assert len(replies) == len(quotas[0]._sessions)
            return len(replies)

        coming = replied(asked(), 1, 1)
        taken = announced(server, key, pushing_of(coming, node_id))
        assert pushing._client is not None
        known = pushing._client.PullMessages(
            PullAppMessagesRequest(message_ids=[coming.metadata.reply_to_message_id])
        )
        assert len(known.messages_list) == 1  # the ServerApp waits for its parts
        waits = replied(asked(), 1, 1, first=1)
        delivered(server, key, node_id, waits)
        for first in range(2, 9):
            question = asked()
            delivered(server, key, node_id, replied(question, 1, 1, first))
            assert len(list(pushing.pull_messages([question.metadata.message_id]))) == 1
            assert remembered() <= 4
        session = PushMessagesResponse.FromString(taken.content).session_id
        name, content = next(iter(get_all_nested_objects(coming).items()))
        part = PushObjectRequest(
            node=Node(node_id=node_id), run_id=coming.metadata.run_id, session_id=session,
            object_id=name, object_content=content.deflate(),
        )  # fmt: skip
        assert quotas[0].store(part)
        more = pushing_of(waits, node_id)
        more.message_object_trees[0].children.add(object_id="f" * 64)
        assert announced(server, key, more).status_code == 403


def test_of_all_awaited_replies_those_that_came_are_loaded(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull names all that is awaited, 66 bytes each, and Flower's state loads whatever it is given."""
    loaded, get = list[int](), SqlLinkState.get_message_res

    def counting(self: State, message_ids: set[str], run_id: int) -> list[Message]:
        loaded.append(len(message_ids))
        return get(self, message_ids, run_id)

    monkeypatch.setattr(SqlLinkState, "get_message_res", counting)
    monkeypatch.setattr(state, "_LOOK_S", 3600.0)
    key, node_id = server.node()
    with grid(server, tmp_path / "app") as pushing:
        sent, other = pushing.push_messages([message(node_id), message(node_id)])
        questions = [asked_of(server, key, node_id), asked_of(server, key, node_id)]
        waiting = list(pushing.push_messages([message(node_id) for _ in range(9)]))
        many = [sent, *waiting] * 200  # more bytes than a question of a node may have
        assert list(pushing.pull_messages(many)) == []
        assert loaded[0] == 10
        for question in questions:
            delivered(server, key, node_id, replied(question, 1, 1))
        (came,) = pushing.pull_messages(many)
        assert came.metadata.reply_to_message_id == sent
        assert max(loaded[1:]) == 1
        (came,) = pushing.pull_messages([*waiting, other])  # which nobody had asked for
        assert came.metadata.reply_to_message_id == other
        monkeypatch.setattr(state, "_LOOK_S", 0.0)
        monkeypatch.setattr(state, "_LOOK_EACH_S", 0.2)
        cast(State, server.listening.front.state)._due.clear()
        assert list(pushing.pull_messages(waiting)) == []
        lost, until = "0" * 64, time.monotonic() + 10  # it is told, though between is asked for less
        while not (told := list(pushing.pull_messages([*waiting, lost]))):
            assert list(pushing.pull_messages(waiting[:1])) == []
            assert time.monotonic() < until
        assert told[0].has_error()
        assert told[0].metadata.reply_to_message_id == lost


def test_a_reply_to_a_run_that_was_stopped_is_answered_so(server: Running, tmp_path: Path) -> None:
    key, node_id = server.node()
    with grid(server, tmp_path / "app") as pushing:
        list(pushing.push_messages([message(node_id)]))
        question = asked_of(server, key, node_id)
        with server.access.control() as client:
            client.StopRun(StopRunRequest(run_id=question.metadata.run_id))
        request = pushing_of(replied(question, 1, 1), node_id).SerializeToString()
        answer = server.post("/v1/fleet/push-messages", request, signed(key))
    assert (answer.status_code, "cannot be read" in answer.text) == (403, False)


def test_a_node_that_asks_whether_its_run_is_over_is_not_refused(
    server: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each node asks that after each run: among such lines an intruder's would drown."""
    key, node_id = server.node()
    with grid(server, tmp_path / "app") as running_one:
        number = running_one.run.run_id
    with server.access.control() as client:
        assert client.StopRun(StopRunRequest(run_id=number)).success

    def ask(name: str) -> int:
        request = GetRunRequest(node=Node(node_id=node_id), run_id=number)
        return server.post(f"/v1/fleet/{name}", request.SerializeToString(), signed(key)).status_code

    counts = server.listening.front.refusals.counts
    before = counts.copy()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert ask("get-run") == 403
        assert (caplog.text, counts) == ("", before)
        assert ask("get-fab") == 403
        until = time.monotonic() + 10
        while counts == before and time.monotonic() < until:  # it is told once it is answered
            time.sleep(0.01)
        assert counts == before + Counter(forbidden=1)
        time.sleep(0.1)
        assert "POST /v1/fleet/get-fab: answered 403" in caplog.text


# What an operator's monitor asks


def scraped(server: Running) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Values by their labels, by their names."""
    from prometheus_client.parser import text_string_to_metric_families

    headers = {"Authorization": f"Bearer {server.access.token}"}
    with httpx.Client(verify=server.trust) as client:
        answer = client.get(f"{server.url}/metrics", headers=headers)
        assert client.post(f"{server.url}/metrics", headers=headers).status_code == 405
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in values
            values[labels] = sample.value
    return found


def label(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


def test_metrics_tell_of_nodes_runs_and_requests(server: Running, tmp_path: Path) -> None:
    before, count = scraped(server), server.state()[0]
    server.node()
    server.post("/metrics")  # without the token
    with grid(server, tmp_path / "app") as running_one:
        number = running_one.run.run_id
        assert label(run_id=str(number)) not in scraped(server).get("fedapp_run_round", {})
        folder = server.folder / "runs" / str(number)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("rounds: 5\nseed: 0\n")
        of_round: dict[str, Any] = {
            "loss": 1.0,
            "downlink_bytes": 5,
            "epsilon": None,
            "replies": 2,
            "failures": 1,
        }
        of_round |= {"seconds": 1.5, "stages": {"encode": 0.5, "train": None}}
        lines = (
            json.dumps({"round": n, "accuracy": 0.1 * n, "uplink_bytes": 10 * n, **of_round}) for n in (1, 2)
        )
        (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n" + '{"round": 3, "acc')  # in the making
        found = scraped(server)
    own = label(run_id=str(number))
    assert {name: values[own] for name, values in found.items() if own in values} == {
        "fedapp_run_planned_rounds": 5,
        "fedapp_run_round": 2,
        "fedapp_run_accuracy_ratio": 0.2,
        "fedapp_run_uplink_bytes_total": 30,
        "fedapp_run_downlink_bytes_total": 10,
        "fedapp_run_replies_total": 4,
        "fedapp_run_failures_total": 2,
        "fedapp_run_seconds_total": 3.0,
    }
    stages = {labels: v for labels, v in found["fedapp_run_stage_seconds_total"].items() if own <= labels}
    assert stages == {label(run_id=str(number), stage="encode"): 1.0}
    assert sum(found["fedapp_nodes"].values()) == count + 1
    assert found["fedapp_nodes"][label(status="online")] >= 1
    assert found["fedapp_runs"][label(status="running")] >= 1
    refused = label(reason="credentials")
    was = before.get("fedapp_refused_requests_total", {}).get(refused, 0)
    assert found["fedapp_refused_requests_total"][refused] == was + 1
    assert found["fedapp_requests_total"][label(code="401")] >= 1
    assert found["process_resident_memory_bytes"][label()] > 1e7
    text = str(found)
    assert server.access.token not in text


def test_of_runs_that_ended_metrics_tell_of_the_last_one_only(server: Running, tmp_path: Path) -> None:
    ended = []
    for app in ("first", "second"):
        with grid(server, tmp_path / app) as running_one:
            ended.append(running_one.run.run_id)
        with server.access.control() as client:
            assert client.StopRun(StopRunRequest(run_id=ended[-1])).success
        folder = server.folder / "runs" / str(ended[-1])
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("rounds: 5\n")
    told = scraped(server)["fedapp_run_planned_rounds"]
    assert label(run_id=str(ended[1])) in told
    assert label(run_id=str(ended[0])) not in told


def test_health_says_whether_it_serves(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with httpx.Client(verify=server.trust) as client:
        answer = client.get(f"{server.url}/health")
        assert (answer.status_code, answer.text) == (200, "ok")
        monkeypatch.setattr(server.listening.front, "ending", True)
        answer = client.get(f"{server.url}/health")
        assert (answer.status_code, answer.text) == (503, "ending")


# Backups


def test_a_server_comes_up_elsewhere_from_a_backup_of_one_that_runs(server: Running, tmp_path: Path) -> None:
    key, node_id = server.node()
    backup_cli.server(["backup", str(tmp_path / "backup.tar"), "--folder", str(server.folder)])
    server.node()  # which it does not know
    count = server.state()[0]
    backup_cli.server(["restore", str(tmp_path / "backup.tar"), "--folder", str(tmp_path / "new")])
    with running(tmp_path / "new") as again:
        assert again.access.token == server.access.token
        assert again.state()[0] == count - 1
        pem = public_key_to_bytes(key.public_key())
        request = ActivateNodeRequest(public_key=pem, heartbeat_interval=30).SerializeToString()
        answer = again.post("/v1/fleet/activate-node", request, signed(key))
        assert ActivateNodeResponse.FromString(answer.content).node_id == node_id


# What an operator types


@pytest.mark.parametrize(
    ("listens", "reached"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("10.77.0.1", "10.77.0.1"),  # and on no other address
        ("[fd00::2]", "[fd00::2]"),
        ("fed.example.org", "fed.example.org"),
    ],
)
def test_a_server_is_reached_from_its_own_machine_where_it_listens(listens: str, reached: str) -> None:
    assert from_here(listens) == reached


def typed(server: Running, main: Callable[[list[str]], None], *words: object) -> None:
    main([*map(str, words), "--folder", str(server.folder)])


def test_a_node_that_was_shut_out_never_comes_back(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    key, node_id = server.node()
    typed(server, registry.main, "unregister", node_id)
    assert capsys.readouterr().out == f"node {node_id} is shut out; its key can never be registered again\n"
    with pytest.raises(FedappError, match=r"refuses \(412\)"):
        typed(server, registry.main, "register", keys.openssh(key.public_key()))
    pem = public_key_to_bytes(key.public_key())
    activate = ActivateNodeRequest(public_key=pem, heartbeat_interval=30).SerializeToString()
    pull = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
    for name, request in (("activate-node", activate), ("pull-messages", pull)):
        assert server.post(f"/v1/fleet/{name}", request, signed(key)).status_code == 401
    typed(server, registry.main, "list")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{node_id} "))
    assert line.split() == [str(node_id), "unregistered", keys.fingerprint(pem)]


def test_a_run_is_stopped(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with grid(server, tmp_path / "app") as running_one:
        number = running_one.run.run_id
        typed(server, following.main, "stop", number)
        assert capsys.readouterr().out == f"run {number} is stopped\n"
        (run,) = following.of(server.access, number)
        assert (run.status.status, run.status.sub_status) == ("finished", "stopped")
        typed(server, following.main, "stop", number)
        assert capsys.readouterr().out == f"run {number} was over already: stopped\n"
        with pytest.raises(FedappError, match="404"):
            typed(server, following.main, "stop", number + 1)


def test_a_run_that_was_stopped_goes_on_as_another_one(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.access.control() as client, ThreadPoolExecutor(1) as thread:
        first = starting.start(client, ["rounds=3"])
        client.StopRun(StopRunRequest(run_id=first))
        words = "resume", first, "--into", tmp_path / "got"
        watched = thread.submit(typed, server, following.main, *words)
        while (newest := following.of(server.access)[0]).run_id == first:
            assert not watched.done(), watched.result()
        client.StopRun(StopRunRequest(run_id=newest.run_id))
        with pytest.raises(FedappError, match=f"run {newest.run_id} stopped"):
            watched.result(20)
    assert starting.overrides_of(newest) == f"rounds=3 resume={first}"
    assert f"run {newest.run_id} goes on with it" in capsys.readouterr().err


# Run folders


def test_a_run_folder_comes_back_whole_and_alone(server: Running, tmp_path: Path) -> None:
    folder = server.folder / "runs/7"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "plots").mkdir()
    for name in ("summary.json", "rounds.jsonl", "plots/a.svg", "checkpoint/state", ".partial"):
        (folder / name).write_text(name * 1000)
    (folder / "link").symlink_to(server.folder / keys.TOKEN)
    (folder / "up").symlink_to(server.folder)
    os.mkfifo(folder / "pipe")
    (server.folder / "runs/8").symlink_to("7")
    (server.folder / "runs/9").symlink_to(server.folder)
    for run_id in (7, 8):
        server.access.fetch(run_id, tmp_path / str(run_id))
        got = {str(p.relative_to(tmp_path / str(run_id))): p for p in (tmp_path / str(run_id)).rglob("*")}
        assert set(got) - {"plots"} == {"summary.json", "rounds.jsonl", "plots/a.svg"}
        assert all(path.read_text() == name * 1000 for name, path in got.items() if name != "plots")
    for run_id in (9, 10):
        with pytest.raises(FedappError, match="has no folder"):
            server.access.fetch(run_id, tmp_path / "none")


def test_a_file_that_changes_while_it_is_sent_breaks_no_archive(tmp_path: Path) -> None:
    (tmp_path / "grows").write_bytes(b"a" * 100_000)
    (tmp_path / "shrinks").write_bytes(b"b" * 100_000)
    sending = tar(tmp_path)
    sent = [next(sending)]
    with (tmp_path / "grows").open("ab") as file:
        file.write(b"c" * 1000)
    for piece in sending:
        sent.append(piece)
        if b"shrinks" in piece[:10]:
            os.truncate(tmp_path / "shrinks", 10)
    with tarfile.open(fileobj=io.BytesIO(b"".join(sent))) as archive:
        assert archive.extractfile("grows").read() == b"a" * 100_000  # type: ignore[union-attr]
        assert archive.extractfile("shrinks").read() == b"b" * 10 + bytes(99_990)  # type: ignore[union-attr]


def test_a_server_chooses_where_run_folders_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = OmegaConf.create({"run_dir": "/etc", "resume": None})
    monkeypatch.delenv("FEDAPP_RUNS", raising=False)
    assert server_app._placed(tree, 5) is None
    assert tree.run_dir == "/etc"
    monkeypatch.setenv("FEDAPP_RUNS", str(tmp_path))
    assert server_app._placed(tree, 5) == tmp_path / "5"
    assert tree.run_dir == str(tmp_path / "5")
    tree.resume = 4
    assert server_app._placed(tree, 6) == tmp_path / "6"
    assert (tree.run_dir, tree.resume) == (str(tmp_path / "4"), None)  # it had written nothing
    (tmp_path / "4").mkdir()
    (tmp_path / "4/config.yaml").write_text("rounds: 5\n")
    tree.resume = 4
    assert server_app._placed(tree, 6) == tmp_path / "6"
    assert tree.resume == str(tmp_path / "4")
    tree.resume = "../elsewhere"
    with pytest.raises(ConfigError, match="no run id"):
        server_app._placed(tree, 7)


def test_log_lines_on_refusals_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    refusals = bounded.Refusals(most=3, seconds=0.1)
    with caplog.at_level(logging.WARNING, "fedapp.server"):
        for _ in range(100):
            refusals.tell("a", "b", "c", 413)
        assert len(caplog.records) == 3
        time.sleep(0.15)
        refusals.tell("a", "b", "c", 418)
        refusals.tell("a", "b", "c")
    assert "97 more" in caplog.text
    assert refusals.counts == {"size": 100, "other": 1, "handshake": 1}


# Whole processes


def fedapp(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedapp.cli", *words, "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`fedapp server`, ready, on loopback and a free port."""
    said = folder.with_suffix(".out")
    command = [sys.executable, "-m", "fedapp.cli", "server", "--folder", str(folder), "--port", "0"]
    with said.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while "submit a run" not in said.read_text():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
        for log_file in (said, *sorted((folder / "log").iterdir())):
            print(f"--- {log_file.name}\n{log_file.read_text()}")


@pytest.mark.slow
def test_an_operators_day(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    assert fedapp("keys", "init", "--host", "localhost", folder=folder).returncode == 0
    keys.node(tmp_path / "node.key")
    with serving(folder) as process:
        registered = fedapp("nodes", "register", f"{tmp_path}/node.key.pub", "--name", "ward", folder=folder)
        assert "is registered" in registered.stdout, registered.stderr
        again = fedapp("nodes", "register", f"{tmp_path}/node.key.pub", folder=folder)
        assert again.returncode == 1
        assert len(again.stderr.splitlines()) == 1
        assert "ward" in fedapp("nodes", "list", folder=folder).stdout
        keys.renew(folder)
        process.send_signal(signal.SIGHUP)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        url = f"{(folder / 'address').read_text().strip()}/health"
        trust = ssl.create_default_context(cafile=folder / keys.CA)
        process.terminate()
        with httpx.Client(verify=trust) as client, suppress(httpx.TransportError):
            while (status := client.get(url).status_code) == 200:
                time.sleep(0.01)
            assert status == 503  # it says so while its own processes end
        assert process.wait(30) == 0
        assert not Path(f"/proc/{child}").exists()
        assert {p.name for p in folder.iterdir()} == {
            *("ca.pem", "ca.key", "server.pem", "server.key", "operator.token"),
            *("state.db", "flwr", "runs", "log", ".lock"),
        }
        assert "a new certificate" in (folder / "log/server.log").read_text()
        assert keys.token(folder / keys.TOKEN) not in (folder / "log/server.log").read_text()


@pytest.mark.slow
def test_a_run_from_submission_to_its_folder(tmp_path: Path) -> None:
    folder, nodes = tmp_path / "server", list[subprocess.Popen[bytes]]()
    keys.init(folder, ["localhost"])
    asked = "task=digits model=logistic privacy=none rounds=2 clients=2 run_dir=/nowhere"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with serving(folder):
        address = (folder / "address").read_text().strip().removeprefix("https://")
        access = Access(address, folder / keys.CA, keys.token(folder / keys.TOKEN))
        try:
            with access.control() as client:
                for node in range(2):
                    pem = registry.public_key([keys.node(tmp_path / f"node{node}.key")])
                    client.RegisterNode(RegisterNodeRequest(public_key=pem))
                    command = ["--superlink", address, "--root-certificates", f"{folder}/ca.pem"]
                    command += ["--port", str(free_port())]
                    command += ["--auth-supernode-private-key", f"{tmp_path}/node{node}.key", "--node-config"]
                    nodes.append(
                        subprocess.Popen(
                            ["flower-supernode", *command, f"partition-id={node} num-partitions=2"],
                            env=os.environ | {"FLWR_HOME": str(tmp_path / f"node{node}"), "PATH": path},
                            stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL,
                        )
                    )
                run_id = client.StartRun(
                    StartRunRequest(
                        fab=Fab(content=build_fab_from_disk(ROOT)),
                        override_config=user_config_to_proto({"overrides": asked}),
                    )
                ).run_id
                deadline = time.monotonic() + 480
                while True:
                    status = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
                    if status.status == "finished":
                        break
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
                assert status.sub_status == "completed", status.details
            access.fetch(run_id, tmp_path / "run")
        finally:
            for process in nodes:
                process.terminate()
            for process in nodes:
                process.wait(20)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["rounds"], summary["engine"], summary["task"]) == (2, "flower", "digits")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model.safetensors", "report.html"}
