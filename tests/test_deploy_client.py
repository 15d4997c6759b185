"""The participant's side of a deployment: what is checked, what is kept, what a node does with messages."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

import fedapp
from fedapp.deploy import client, preflight
from fedapp.deploy import node as deploy_node
from fedapp.deploy.activity import Activity
from fedapp.deploy.address import Address
from fedapp.deploy.bundle import bundle, difference, files, sign, signer
from fedapp.deploy.frames import context_of, message_of, of_context, of_message, round_of
from fedapp.deploy.link import Over
from fedapp.deploy.memory import Kept, Memory
from fedapp.deploy.node import Config, Node, Signers, _Run
from fedapp.errors import ConfigError, FedappError
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.policy import Policy
from fedapp.records import CONFIG

RUN, NODE = 7, 42
SETTINGS = "task=digits model=logistic privacy=none clients=2"


def changed(change: Callable[[dict[str, bytes]], object]) -> bytes:
    """The installed fedapp's bundle after a change to its files."""
    with zipfile.ZipFile(io.BytesIO(bundle())) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:  # stored, not deflated: how it is packed says nothing
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def newer(files: dict[str, bytes]) -> None:
    files["fedapp/wire.py"] += b"\n"
    files["pyproject.toml"] = files["pyproject.toml"].replace(b'version = "0.1.0"', b'version = "9.9.9"')


class TestBundle:
    def test_the_installed_fedapp_is_itself_however_it_is_packed(self) -> None:
        assert difference(bundle()) is None
        assert difference(changed(lambda files: None)) is None

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda files: files.update({"fedapp/wire.py": files["fedapp/wire.py"] + b"#"}),
                "1 file differs",
            ),
            (lambda files: files.pop("conf/config.yaml"), "1 file differs"),
            (lambda files: files.update({"fedapp/more.py": b""}), "1 file differs"),
            (lambda files: files.update({"sitecustomize.py": b""}), "1 file differs"),
            (newer, "it is fedapp 9.9.9, and"),
        ],
    )
    def test_any_other_code_or_setting_is_told(self, change: Any, said: str) -> None:
        assert said in str(difference(changed(change)))

    def test_what_is_no_bundle_is_told(self) -> None:
        assert difference(b"") == difference(b"PK\x03\x04") == "it cannot be read"
        whole = bundle()
        assert difference(whole[: len(whole) // 2]) == "it cannot be read"
        assert difference(changed(lambda files: files.pop("pyproject.toml"))) == "it cannot be read"

    def test_a_file_that_is_there_twice_is_told(self) -> None:
        twice = io.BytesIO(bundle())
        with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("fedapp/wire.py", b"print('mine')")
        assert difference(twice.getvalue()) == "it holds a file twice"

    def test_a_bundle_that_claims_gigabytes_is_not_unpacked(self) -> None:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("fedapp/wire.py", bytes(65 << 20))
        assert difference(out.getvalue()) == "it is too large for a fedapp"


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another installation of fedapp, whose code differs; while it is the one in use."""
    package = tmp_path / "theirs" / "fedapp"
    source = Path(fedapp.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conf", "pyproject.toml", "LICENSE"):
        beside = source.parent / name
        (shutil.copytree if beside.is_dir() else shutil.copy)(beside, package.parent / name)
    (package / "rounds.py").write_text("print('a server of their own')\n")
    return package


def used(package: Path, do: Callable[[], Any]) -> Any:
    """What an installation does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedapp, "__file__", str(package / "__init__.py"))
        return do()


def test_a_bundle_holds_code_and_settings_and_nothing_that_lies_among_them(other: Path) -> None:
    secret = b"what nobody else may see"
    for place in (other, other / "deploy", other.parent, other.parent / "conf"):
        for name in ("node.key", "operator.token", "table.csv", "ledger.db", "policy.yml", ".env"):
            (place / name).write_bytes(secret)
    (other / "data.yaml").write_bytes(secret)
    with zipfile.ZipFile(io.BytesIO(used(other, bundle))) as archive:
        sent = {name: archive.read(name) for name in archive.namelist()}
    root = Path(fedapp.__file__).parents[1]
    found = [*(root / "fedapp").rglob("*.py"), *(root / "conf").rglob("*.yaml")]
    named = {str(path.relative_to(root)) for path in found}
    assert files(other).keys() == named  # Flower, to whom these are given, chooses once more
    assert sent.keys() == named | {"pyproject.toml", "LICENSE", ".info/CONTENT"}
    assert not [name for name, content in sent.items() if secret in content]


class TestSignatures:
    def test_code_that_a_signer_vouches_for_may_differ(self, other: Path, tmp_path: Path) -> None:
        unsigned = used(other, bundle)
        assert str(difference(unsigned)).startswith("1 file differs")
        key = key_file(tmp_path / "release.key", ed25519.Ed25519PrivateKey.generate())
        line = used(other, lambda: sign(key))
        sent, trusted = used(other, bundle), [signer(line)]
        assert difference(sent, trusted) is None
        assert difference(unsigned, trusted) == difference(unsigned)
        stranger = [ed25519.Ed25519PrivateKey.generate().public_key()]
        for signers in ([], stranger):
            assert "nobody whom the policy lists has signed it" in str(difference(sent, signers))
        assert difference(sent, [*stranger, *trusted]) is None

    def test_what_changed_after_it_was_signed_is_refused(self, other: Path, tmp_path: Path) -> None:
        key = key_file(tmp_path / "release.key", ed25519.Ed25519PrivateKey.generate())
        trusted = [signer(used(other, lambda: sign(key)))]
        (other / "wire.py").write_bytes((other / "wire.py").read_bytes() + b"#")
        assert "2 files differ" in str(difference(used(other, bundle), trusted))
        (other / "more.py").write_bytes(b"")
        assert "nobody whom the policy lists" in str(difference(used(other, bundle), trusted))
        used(other, lambda: sign(key))
        assert difference(used(other, bundle), trusted) is None
        settings = other.parent / "conf/config.yaml"
        settings.write_bytes(settings.read_bytes() + b"#")
        used(other, lambda: sign(key))
        assert "settings among them" in str(difference(used(other, bundle), trusted))

    def test_a_signature_makes_no_other_version(self, other: Path, tmp_path: Path) -> None:
        key = key_file(tmp_path / "release.key", ed25519.Ed25519PrivateKey.generate())
        trusted = [signer(used(other, lambda: sign(key)))]
        project = other.parent / "pyproject.toml"
        project.write_bytes(project.read_bytes().replace(b'version = "0.1.0"', b'version = "9.9.9"'))
        assert "it is fedapp 9.9.9" in str(difference(used(other, bundle), trusted))

    def test_keys_that_are_none_are_refused(self, tmp_path: Path) -> None:
        key = key_file(tmp_path / "node.key", ec.generate_private_key(ec.SECP384R1()))
        with pytest.raises(ConfigError, match="is not of Ed25519"):
            sign(key)
        key.chmod(0o644)
        with pytest.raises(FedappError, match="chmod 600"):
            sign(key)
        for line in ("", "ssh-ed25519 AAAA", ssh_line(ec.generate_private_key(ec.SECP384R1()))):
            (tmp_path / "policy.yaml").write_text(f"tasks: []\nprivacy: []\nmetrics: []\nsigners: ['{line}']")
            with pytest.raises(ConfigError, match=r"policy\.signers|policy must"):
                Policy.load(tmp_path / "policy.yaml")


def ssh_line(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class TestMemory:
    def test_a_message_is_in_work_until_it_is_answered_and_a_reply_waits_until_it_is_sent(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "node.sqlite"
        memory = Memory(path)
        assert (memory.in_work(), memory.unsent(), memory.context(RUN, RUN, 9)) == (None, None, None)
        assert memory.receive(b"asked", "first")
        memory.close()
        memory = Memory(path)
        assert (memory.in_work(), memory.unsent()) == (b"asked", None)
        memory.answer(b"reply", Kept(RUN, RUN, 1, b"context"))
        memory.close()
        memory = Memory(path)
        assert (memory.in_work(), memory.unsent()) == (None, b"reply")
        assert memory.context(RUN, RUN, 2) == b"context"
        memory.sent()
        assert (memory.unsent(), memory.context(RUN, RUN, 2)) == (None, b"context")
        assert not memory.receive(b"asked", "first")  # it was done, and the server did not hear of it
        assert memory.in_work() is None
        memory.close()

    def test_an_answer_that_cannot_be_written_changes_nothing(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path / "node.sqlite")
        assert memory.receive(b"asked", "first")
        memory.answer(b"first", Kept(RUN, RUN, 1, b"old"))
        memory.receive(b"asked again", "second")
        memory._db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON outbox BEGIN SELECT RAISE(FAIL, 'full'); END"
        )
        with pytest.raises(ConfigError, match="cannot be used"):
            memory.answer(b"second", Kept(RUN, RUN, 2, b"new"))
        assert (memory.in_work(), memory.unsent()) == (b"asked again", b"first")
        assert memory.context(RUN, RUN, 3) == b"old"
        memory.close()

    def test_the_contexts_used_last_are_kept(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path / "node.sqlite")
        for run in range(45):
            memory.answer(b"reply", Kept(run, run, 1, b"%d" % run))
        assert [memory.context(run, run, 2) for run in (0, 4, 5, 44)] == [None, None, b"5", b"44"]
        memory.close()

    def test_an_experiment_that_goes_on_finds_what_was_before_the_round_played_again(
        self, tmp_path: Path
    ) -> None:
        memory = Memory(tmp_path / "node.sqlite")
        for at in range(1, 6):
            memory.answer(b"reply", Kept(RUN, RUN, at, b"after %d" % at))
        later = 8
        found = [memory.context(RUN, later, at) for at in (6, 5, 4, 3)]
        assert found == [b"after 5", b"after 4", b"after 3", None]  # three rounds are kept
        assert memory.context(RUN, RUN, 5) == b"after 5"  # the same run, in the midst of a round
        assert memory.context(RUN, RUN, 3) == b"after 5"  # and wherever it is: what it was told is told
        memory.answer(b"reply", Kept(RUN, later, 4, b"again 4"))
        assert memory.context(RUN, later, 6) == b"again 4"  # round 5 as it was before is gone
        memory.close()

    def test_a_run_goes_on_from_its_newest_stage_whose_messages_name_no_round(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path / "node.sqlite")
        for at in (1, 2):
            memory.answer(b"reply", Kept(RUN, RUN, at, b"after %d" % at))
        for stage, at in ((b"advertise", 0), (b"share", 0), (b"train", 3), (b"unmask", 0)):
            memory.answer(b"reply", Kept(RUN, RUN, at, b"after " + stage))
            assert memory.context(RUN, RUN, 0) == b"after " + stage
        later = 8
        found = [memory.context(RUN, later, at) for at in (4, 3, 2)]
        assert found == [b"after unmask", b"after share", b"after 1"]
        memory.close()

    def test_another_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "node.sqlite").write_bytes(b"no database at all" * 100)
        with pytest.raises(ConfigError, match=r"node\.sqlite cannot be used"):
            Memory(tmp_path / "node.sqlite")


def key_file(path: Path, key: Any, form: PrivateFormat = PrivateFormat.OpenSSH) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
    path.chmod(0o600)
    return path


class TestPreflight:
    def test_a_good_key_is_read(self, tmp_path: Path) -> None:
        key = ec.generate_private_key(ec.SECP384R1())
        read = preflight.private_key(key_file(tmp_path / "node.key", key))
        assert read.private_numbers() == key.private_numbers()

    def test_a_key_that_others_can_read_is_refused(self, tmp_path: Path) -> None:
        path = key_file(tmp_path / "node.key", ec.generate_private_key(ec.SECP384R1()))
        path.chmod(0o640)
        with pytest.raises(ConfigError, match=r"mode 640.*chmod 600"):
            preflight.private_key(path)

    @pytest.mark.parametrize(
        ("key", "form", "said"),
        [
            (ec.generate_private_key(ec.SECP256R1()), PrivateFormat.OpenSSH, "no ECDSA key on P-384"),
            (ed25519.Ed25519PrivateKey.generate(), PrivateFormat.OpenSSH, "no ECDSA key on P-384"),
            (ec.generate_private_key(ec.SECP384R1()), PrivateFormat.PKCS8, "no OpenSSH private key"),
        ],
    )
    def test_keys_of_another_kind_are_refused(
        self, tmp_path: Path, key: Any, form: PrivateFormat, said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            preflight.private_key(key_file(tmp_path / "node.key", key, form))

    def test_a_key_that_is_not_there_names_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="fedapp keys node --out"):
            preflight.private_key(tmp_path / "node.key")

    @pytest.mark.parametrize(
        "content", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    )
    def test_what_is_no_certificate_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "ca.pem").write_bytes(content)
        with pytest.raises(ConfigError, match=r"get ca\.pem from the operator"):
            preflight.authority(tmp_path / "ca.pem")

    def test_node_configs(self, tmp_path: Path) -> None:
        path = tmp_path / "data.yaml"
        path.write_text("partition-id: 1\nnum-partitions: 3\ntags: eu,ward\n")
        found = {"partition-id": 1, "num-partitions": 3, "tags": "eu,ward"}
        assert preflight.node_config(path) == found
        assert preflight.node_config(None) == {}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("partition: 1", "names 'partition', which no task reads"),
            ("- 1", "must map names to values"),
            ("data: [a, b]", "must be one value"),
            ("data: nowhere.csv", "does not exist on this machine"),
            ("a: [", "cannot be read"),
        ],
    )
    def test_wrong_node_configs_are_refused(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            preflight.node_config(tmp_path / "data.yaml")

    def test_a_roster_and_a_signing_key_are_read_before_the_node_starts(self, tmp_path: Path) -> None:
        key = key_file(tmp_path / "sign.key", ed25519.Ed25519PrivateKey.generate())
        other = ed25519.Ed25519PrivateKey.generate().public_key()
        (tmp_path / "roster").write_bytes(other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
        path = tmp_path / "data.yaml"

        def told(text: str) -> str:
            path.write_text(text)
            with pytest.raises(FedappError) as caught:
                preflight.node_config(path)
            return str(caught.value)

        both = f"roster: {tmp_path}/roster\nsigning-key: {key}\n"
        assert "own signing key is not on its roster" in told(both)
        assert "a roster goes with a signing key" in told(f"roster: {tmp_path}/roster\n")
        assert "does not exist on this machine" in told(both.replace("sign.key", "none"))
        key.chmod(0o644)
        assert "chmod 600" in told(both)
        key.chmod(0o600)
        own = load_ssh_private_key(key.read_bytes(), None).public_key()
        (tmp_path / "roster").write_bytes(own.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
        path.write_text(both)
        assert preflight.node_config(path)["signing-key"] == str(key)

    def test_a_ledger_is_there_and_has_a_limit_or_its_owner_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "ledger.db"
        with pytest.raises(
            ConfigError, match=r'fedapp ledger set-limit .*ledger\.db "ward 3" example 8 1e-5'
        ):
            preflight.ledger(path, "ward 3")
        Ledger(path, new=True).set_limit("ward 2", "example", 8, 1e-5)
        assert "sets no limit for 'ward 3'" in str(preflight.ledger(path, "ward 3"))
        assert preflight.ledger(path, "ward 2") is None
        path.write_bytes(b"no database at all, but long enough to be taken for one")
        with pytest.raises(FedappError, match="cannot be used"):
            preflight.ledger(path, "ward 2")

    @pytest.mark.parametrize("text", ["", "host", "host:", ":8443", "host:http", "host:0", "host:70000"])
    def test_a_server_is_host_and_port(self, text: str) -> None:
        with pytest.raises(ConfigError, match="HOST:PORT"):
            Address.of(text)

    def test_without_tls_a_node_speaks_to_its_own_machine_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "_begin_log", Mock())
        monkeypatch.setattr(preflight, "reach", Mock())
        for there in ("other.host:8443", "10.0.0.5:8443", "127.0.0.1.other.host:8443", "[::]:8443"):
            with pytest.raises(ConfigError, match="--insecure encrypts nothing"):
                client.main(["--insecure", "--server", there, "--folder", str(tmp_path)])
        with pytest.raises(ConfigError, match="node's key"):  # the next thing that is missing
            client.main(["--insecure", "--server", "127.0.0.1:8443", "--folder", str(tmp_path)])
        preflight.reach.assert_not_called()  # type: ignore[attr-defined]

    @pytest.mark.parametrize(("free", "enough"), [(200_000_000, True), (199_000_000, False)])
    def test_a_disk_that_is_nearly_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, enough: bool
    ) -> None:
        asked = Mock(return_value=SimpleNamespace(free=free))
        monkeypatch.setattr(shutil, "disk_usage", asked)
        with nullcontext() if enough else pytest.raises(ConfigError, match=r"has 199 MB left, and .* 200"):
            preflight.room(tmp_path)
        asked.assert_called_once_with(tmp_path)

    def test_servers(self) -> None:
        assert str(Address.of("[::1]:8443")) == "[::1]:8443"
        assert Address.of("127.0.0.1:1").local
        assert not Address.of("fed.example.org:8443").local

    def test_a_server_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match="cannot be reached"):
            preflight.reach(Address.of("127.0.0.1:9"), None)

    def test_a_name_that_is_not_known(self) -> None:
        with pytest.raises(ConfigError, match=r"nowhere\.invalid cannot be found"):
            preflight.reach(Address.of("nowhere.invalid:8443"), None)


@dataclass
class FakeLink:
    """A server in this process: it has one run, and takes replies."""

    fab: bytes = field(default_factory=bundle)
    over: bool = False
    goes_on: dict[int, int] = field(default_factory=dict)  # a run, and the one that it takes up
    sent: list[Message] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)

    def open(self) -> int:
        return NODE

    def close(self) -> None:
        pass

    def confirm(self, message: Message) -> None:
        self.confirmed.append(message.metadata.message_id)

    def run(self, number: int) -> Any:
        if self.over:
            raise Over
        resume = f" resume={self.goes_on[number]}" if number in self.goes_on else ""
        return SimpleNamespace(run_id=number, override_config={"overrides": SETTINGS + resume})

    def bundle(self, run: Any) -> bytes:
        return self.fab

    def send(self, reply: Message, seconds: float) -> int:
        if self.over:
            raise Over
        self.sent.append(reply)
        return 1


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskIdentity, "_run_id", RUN)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 0)


def asked(kind: str = "query", at: int = 1) -> Message:
    """A message of a round; 0: of none, as the stages of secure aggregation are."""
    content = RecordDict({CONFIG: ConfigRecord({"server-round": at})} if at else {})
    message = Message(content, NODE, kind)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def asked_in(run: int, kind: str, at: int) -> Message:
    """The same in a run of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIdentity, "_run_id", run)
        return asked(kind, at)


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict[str, Any]]]:
    """What each message found kept, where `train` keeps its round as the residual, and a round's secret."""
    found = list[dict[str, dict[str, Any]]]()

    def work(run: _Run, message: bytes, goes_on: Callable[[], bool]) -> tuple[bytes, bytes]:
        context, asked = context_of(run._context), message_of(message)
        found.append({name: dict(record) for name, record in context.state.config_records.items()})
        if asked.metadata.message_type == "train":
            at = round_of(asked)
            context.state["residual"] = ConfigRecord({"after": at})
        elif asked.metadata.message_type != "query":
            context.state["secagg"] = ConfigRecord({"after": asked.metadata.message_type})
        run._context = of_context(context)
        return of_message(Message(RecordDict(), reply_to=asked)), run._context

    monkeypatch.setattr(_Run, "work", work)
    return found


def node(link: Any, folder: Path, signers: Signers = (), **more: str) -> Node:
    config: Config = {"partition-id": 1, "num-partitions": 2, **more}
    return Node(link, Memory(folder / "node.sqlite"), config, Activity(), signers)


@pytest.mark.usefixtures("identity")
class TestNode:
    @pytest.mark.slow
    def test_a_process_beside_the_node_answers_and_stays(self, tmp_path: Path) -> None:
        link = FakeLink()
        own = node(link, tmp_path)
        try:
            own.take(asked())
            process = own._runs[RUN]._process
            own.take(asked())
            assert own._runs[RUN]._process is process
            held = [reply.content.config_records[CONFIG]["partition-id"] for reply in link.sent]
            assert held == [1, 1]
            assert (own._memory.in_work(), own._memory.unsent()) == (None, None)
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)  # for memory, say
            own.take(asked())
            own.take(asked())
            errors = [reply.has_error() for reply in link.sent]
            assert errors == [False, False, True, False]
            assert (own._activity.replies["answered"], own._activity.replies["failed"]) == (3, 1)
            assert own._activity.seconds["query"] > 0
            link.over = True
            own._tidied -= 100
            own.tidy()
            assert own._runs == {}
        finally:
            own.close()
        assert process.poll() is not None

    def test_another_fedapp_is_declined_and_never_run(self, tmp_path: Path) -> None:
        evil = f"open({str(tmp_path / 'run')!r}, 'w')\n".encode()
        link = FakeLink(changed(lambda f: f.update({"fedapp/__init__.py": evil + f["fedapp/__init__.py"]})))
        own = node(link, tmp_path)
        own.take(asked())
        own.close()
        assert link.sent[0].error.code == ErrorCode.INVALID_FAB
        assert "1 file differs from fedapp" in str(link.sent[0].error.reason)
        assert not (tmp_path / "run").exists()
        activity = own._activity
        assert (activity.messages["query"], activity.replies["declined"], activity.working) == (1, 1, False)

    @pytest.mark.slow
    def test_a_signed_bundle_is_served_never_run_and_skips_no_policy(
        self, other: Path, tmp_path: Path
    ) -> None:
        code = (other / "__init__.py").read_text()
        (other / "__init__.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n{code}")
        (other / "privacy/consent.py").write_text(
            "def consent(job_of):\n    return lambda m, c, call: call(m, c)\n"
        )
        key = key_file(tmp_path / "release.key", ed25519.Ed25519PrivateKey.generate())
        trusted = [signer(used(other, lambda: sign(key)))]
        (tmp_path / "policy.yaml").write_text("tasks: [csv]\nprivacy: [example]\nmetrics: []\n")
        link = FakeLink(used(other, bundle))
        own = node(link, tmp_path, trusted, policy=str(tmp_path / "policy.yaml"))
        own.take(asked())
        own.take(asked("query.check"))
        own.close()
        assert [reply.has_error() for reply in link.sent] == [False, True]
        assert "the client's policy refuses: tasks" in str(link.sent[1].error.reason)
        assert not (tmp_path / "run").exists()

    def test_a_run_that_takes_up_another_finds_what_was_kept_before_its_first_round(
        self, tmp_path: Path, before: list[dict[str, dict[str, Any]]]
    ) -> None:
        """However it begins: the first question, which comes before any round's work, names that round."""
        own = node(FakeLink(goes_on={8: RUN}), tmp_path)
        for kind, at in (("query", 1), ("train", 1), ("train", 2)):
            own.take(asked_in(RUN, kind, at))
        for kind, at in (("query", 2), ("query.facts", 2), ("train", 2), ("train", 3)):
            own.take(asked_in(8, kind, at))
        own.close()
        kept = [found.get("residual", {}).get("after") for found in before]
        assert kept == [None, None, 1, 1, 1, 1, 2]

    def test_secrets_of_a_round_stay_in_their_run(
        self, tmp_path: Path, before: list[dict[str, dict[str, Any]]]
    ) -> None:
        """Else a server could have a round masked, or opened, once more in a run that takes up another."""
        own = node(FakeLink(goes_on={8: RUN}), tmp_path)
        stages = [("advertise", 0), ("share", 0), ("train", 2), ("unmask", 0)]
        for kind, at in [("query", 1), ("train", 1), *stages]:
            own.take(asked_in(RUN, f"query.{kind}" if not at else kind, at))
        own.take(asked_in(8, "query", 2))
        own.close()
        after = [found.get("secagg", {}).get("after") for found in before]
        assert after == [None, None, None, *("query.advertise", "query.share", "query.share"), None]
        assert before[-1] == {"residual": {"after": 1}}

    def test_what_was_left_is_done_at_the_next_start(self, tmp_path: Path) -> None:
        link, memory = FakeLink(), Memory(tmp_path / "node.sqlite")
        memory.receive(of_message(asked()), "first")  # and then it was killed
        memory.close()
        own = node(link, tmp_path)
        own.catch_up()
        own.close()
        assert [reply.has_error() for reply in link.sent] == [False]
        kept = of_message(link.sent[0])
        memory = Memory(tmp_path / "node.sqlite")
        memory.answer(kept)  # and then it was killed before the reply left
        memory.close()
        own = node(link, tmp_path)
        own.catch_up()
        own.close()
        assert of_message(message_of(kept)) == of_message(link.sent[1])
        assert own._runs == {}  # the same bytes, without work

    def test_a_reply_that_was_interrupted_is_sent_at_the_next_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link, memory = FakeLink(), Memory(tmp_path / "node.sqlite")
        reply = of_message(Message(RecordDict(), reply_to=asked()))
        memory.answer(reply)
        memory.close()

        def interrupted(reply: Message, seconds: float) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(link, "send", interrupted)
        own = node(link, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            own.catch_up()
        assert own._memory.unsent() == reply
        own.close()

    def test_a_run_that_is_over_leaves_nothing(self, tmp_path: Path) -> None:
        link, memory = FakeLink(over=True), Memory(tmp_path / "node.sqlite")
        memory.receive(of_message(asked()), "first")
        memory.close()
        own = node(link, tmp_path)
        own.catch_up()
        assert own._memory.in_work() is None
        own.close()
        assert link.sent == []

    def test_a_run_that_ends_under_way_ends_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However long its process would have gone on."""
        link, working = FakeLink(), list[subprocess.Popen[bytes]]()

        def start(run: _Run) -> Connection:
            run._pipe, theirs = Pipe()
            with theirs:
                run._process = subprocess.Popen(["sleep", "20"], pass_fds=[theirs.fileno()])
            working.append(run._process)
            link.over = True
            return run._pipe

        monkeypatch.setattr(_Run, "_start", start)
        monkeypatch.setattr(deploy_node, "_ASKED", 0.01)
        own = node(link, tmp_path)
        own.take(asked("train"))
        assert [process.poll() for process in working] == [-signal.SIGKILL]
        assert (own._memory.in_work(), own._memory.unsent(), own._runs) == (None, None, {})
        own.close()
        assert link.sent == []

    def test_a_reply_that_nobody_wants_any_more_is_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = FakeLink(changed(newer))
        own = node(link, tmp_path)
        monkeypatch.setattr(link, "send", Mock(side_effect=Over))
        own.take(asked())
        own.close()
        assert own._activity.replies == {"answered": 0, "declined": 0, "failed": 0, "unwanted": 1}


@pytest.mark.slow
def test_the_process_that_works_ends_with_its_node(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from fedapp.deploy.node import _Run\n"
        "from flwr.app import Context, RecordDict\n"
        "run = _Run(Context(1, 1, {}, RecordDict(), {'overrides': ''}), None, 1)\n"
        "run._start()\n"
        "print(run._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fedapp.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    child = int(done.stdout)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists():
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


def test_a_node_never_imports_torch() -> None:
    modules = "fedapp.deploy.node, fedapp.deploy.client, fedapp.deploy.client_metrics"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
