"""The server's certificate and key: given ones, and how others take their place, whatever ends that."""

import argparse
import os
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flwr.proto.control_pb2 import ListNodesRequest
from test_deploy_server import Running, running

from fedapp.deploy import certificates, control, keys, keys_cli
from fedapp.deploy.certificates import Authority
from fedapp.errors import FedappError

pytestmark = pytest.mark.filterwarnings(  # what flwr's own dependencies say of it
    "ignore:No path_separator found:DeprecationWarning"
)
NOW = datetime.now(UTC)


def authority(name: str, by: Authority | None = None, usage: bool = True) -> Authority:
    """A CA: a root, or one that another CA vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, signs = (subject, key) if by is None else (by.certificate.subject, by.key)
    times = NOW - timedelta(hours=1), NOW + timedelta(days=30)
    builder = certificates._builder(name, issuer, key, *times)
    builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signs.public_key()), critical=False
    )
    if usage:
        builder = builder.add_extension(certificates._usage(key_cert_sign=True), critical=True)
    return Authority(builder.sign(signs, hashes.SHA256()), key)


def pem(path: Path, *made: x509.Certificate | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Path:
    path.write_bytes(b"".join(map(certificates.pem, made)))
    path.chmod(0o600)
    return path


class Company:
    """A root CA, one that it vouches for, and the certificates that this one issues; their files."""

    def __init__(self, folder: Path, usage: bool = True) -> None:
        self._folder = folder
        self.root = authority("root", usage=usage)
        self.between = authority("between", self.root)
        self.ca = pem(folder / "root.pem", self.root.certificate)

    def issue(self, *hosts: str, begins: datetime | None = None) -> tuple[Path, Path]:
        """A certificate for these alone, with the one between, and its key."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certificates, "_LOCAL", ())
            made, key = certificates.issue(self.between, hosts, timedelta(days=9), begins)
        chain = pem(self._folder / "chain.pem", made, self.between.certificate)
        return chain, pem(self._folder / "key.pem", key)


@pytest.fixture
def company(tmp_path: Path) -> Company:
    return Company(tmp_path)


def run(*words: object) -> None:
    keys_cli.main([str(word) for word in words])


def seen(server: Running, host: str) -> int:
    """The serial number of the certificate that a participant meets, who has ca.pem and this name."""
    trust = ssl.create_default_context(cadata=(server.folder / keys.CA).read_text())
    trust.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", server.listening.public)) as plain,
        trust.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return int(str(dict(secure.getpeercert() or {})["serialNumber"]), 16)


def serial(certificate: Path) -> int:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number


def test_a_given_certificate_serves_and_another_takes_its_place(tmp_path: Path, company: Company) -> None:
    folder, host = tmp_path / "server", "fed.example.org"
    chain, key = company.issue(host, "*.example.org")
    run("init", "--folder", folder, "--certificate", chain, "--key", key, "--ca", company.ca)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "ca.pem": 0o644, "server.pem": 0o644, "server.key": 0o600, "operator.token": 0o600
    }  # fmt: skip
    assert keys.check(folder)[1] == [host, "*.example.org"]
    with running(folder) as server:
        assert seen(server, host) == seen(server, "other.example.org") == serial(chain)
        here = argparse.Namespace(folder=folder, server=None, ca=None, token_file=None)
        with control.of(here) as client:  # at 127.0.0.1, which the certificate does not name
            assert list(client.ListNodes(ListNodesRequest()).nodes_info) == []
        with pytest.raises(FedappError, match="has no folder"):
            control.access(here).fetch(1, tmp_path / "none")
        company.issue(host)
        run("renew", "--folder", folder, "--certificate", chain, "--key", key)
        assert seen(server, host) != serial(chain)
        server.listening.renew()
        assert seen(server, host) == serial(chain)


def test_one_of_several_cas_is_enough(tmp_path: Path, company: Company) -> None:
    (ca,) = x509.load_pem_x509_certificates(company.ca.read_bytes())
    pem(company.ca, authority("other").certificate, ca)
    keys.take(tmp_path / "server", *company.issue("a"), company.ca)
    keys.check(tmp_path / "server")


def test_a_private_key_in_the_file_of_the_certificate_stays_private(tmp_path: Path, company: Company) -> None:
    chain, key = company.issue("*.example.org")  # any name of many is one of the server's
    chain.write_bytes(key.read_bytes() + chain.read_bytes())
    keys.take(tmp_path / "server", chain, chain, chain.with_name("root.pem"))
    assert keys.check(tmp_path / "server")[1] == ["*.example.org"]
    for name in (keys.CA, keys.CERTIFICATE):
        assert "PRIVATE" not in (tmp_path / "server" / name).read_text()


def alone(company: Company) -> tuple[Path, Path, Path]:
    chain, key = company.issue("a")
    pem(chain, x509.load_pem_x509_certificate(chain.read_bytes()))
    return chain, key, company.ca


def of_another_key(company: Company) -> tuple[Path, Path, Path]:
    chain, key = company.issue("a")
    return chain, pem(key, ec.generate_private_key(ec.SECP256R1())), company.ca


def readable(company: Company) -> tuple[Path, Path, Path]:
    chain, key = company.issue("a")
    key.chmod(0o640)
    return chain, key, company.ca


def nameless(company: Company) -> tuple[Path, Path, Path]:
    chain, key = company.issue("a")
    return pem(chain, company.between.certificate), pem(key, company.between.key), company.ca


def careless(company: Company) -> tuple[Path, Path, Path]:
    """As `openssl req -x509` makes a CA."""
    other = Company(company.ca.parent, usage=False)
    return *other.issue("a"), other.ca


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (of_another_key, "are no pair .*: give those that belong together"),
        (lambda own: (*own.issue("a"), pem(own.ca, authority("root").certificate)), "who trusts .* does not"),
        (lambda own: (*own.issue("a"), pem(own.ca, own.between.certificate)), "unable to get issuer"),
        (lambda own: (*own.issue("a", begins=NOW - timedelta(days=10)), own.ca), "expired on"),
        (lambda own: (*own.issue("a", begins=NOW + timedelta(days=1)), own.ca), "holds only from"),
        (alone, "unable to get local issuer"),
        (nameless, "is for no host"),
        (careless, "does not include key usage"),
        (readable, "chmod 600"),
        (lambda own: (*own.issue("a"), own.ca.with_name("none")), "cannot read .*none"),
    ],
)
def test_what_clients_would_not_trust_is_not_taken(
    tmp_path: Path, company: Company, given: Callable[[Company], tuple[Path, Path, Path]], said: str
) -> None:
    chain, key, ca = given(company)
    with pytest.raises(FedappError, match=said):
        keys.take(tmp_path / "server", chain, key, ca)
    assert not (tmp_path / "server").exists()


def test_a_certificate_of_another_ca_does_not_take_the_place_of_one(tmp_path: Path, company: Company) -> None:
    keys.init(tmp_path / "server", ["a"])
    before = {path: path.read_bytes() for path in (tmp_path / "server").iterdir()}
    with pytest.raises(FedappError, match=r"who trusts .*ca\.pem does not trust .*chain\.pem"):
        keys.bring(tmp_path / "server", *company.issue("a"))
    assert {path: path.read_bytes() for path in (tmp_path / "server").iterdir()} == before


def test_a_given_certificate_is_renewed_by_who_gave_it(
    tmp_path: Path, company: Company, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "server"
    keys.take(folder, *company.issue("a"), company.ca)
    how = "keys renew --folder .* by --certificate FILE --key FILE"
    with pytest.raises(FedappError, match=f"not its own: .*{how}"):
        run("renew", "--folder", folder)
    pem(folder / keys.KEY, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(FedappError, match=f"are no pair .*{how}"):
        keys.check(folder)
    with pytest.raises(FedappError, match="--force"):
        keys.take(folder, *company.issue("a"), company.ca)
    keys.take(folder, *company.issue("a"), company.ca, force=True)
    keys.check(folder)


@pytest.mark.parametrize("signs", [False, True])
def test_no_key_of_a_ca_before_stays_beside_a_given_one(
    tmp_path: Path, company: Company, capsys: pytest.CaptureFixture[str], signs: bool
) -> None:
    folder, key = tmp_path / "server", tmp_path / "ca.key"
    keys.init(folder, ["a"])
    if signs:
        given: tuple[object, ...] = (
            "--ca",
            company.ca,
            "--ca-key",
            pem(key, company.root.key),
            "--host",
            "a",
        )
    else:
        chain, own = company.issue("a")
        given = "--ca", company.ca, "--certificate", chain, "--key", own
    run("init", "--folder", folder, "--force", *given)
    assert not (folder / keys.CA_KEY).exists()
    removed = f"{folder / keys.CA_KEY} is removed: it was the key of the CA before"
    assert capsys.readouterr().out.splitlines()[0] == removed
    run("init", "--folder", folder, "--force", *given)
    assert "removed" not in capsys.readouterr().out
    keys.check(folder)


def test_the_key_of_the_given_ca_stays_where_it_is(tmp_path: Path) -> None:
    keys.init(tmp_path, ["a"])
    before = (tmp_path / keys.CA_KEY).read_bytes()
    keys.init(tmp_path, ["b"], ca=tmp_path / keys.CA, ca_key=tmp_path / keys.CA_KEY, force=True)
    assert (tmp_path / keys.CA_KEY).read_bytes() == before
    assert keys.renew(tmp_path)[0] == "b"


@pytest.mark.parametrize(
    "words",
    ["init --certificate c --key k", "init --certificate c --ca a", "init --key k --ca a", "renew --key k",
     "init --certificate c --key k --ca a --host h", "renew --certificate c --key k --ca-key a"],
)  # fmt: skip
def test_a_certificate_is_given_with_all_that_belongs_to_it(tmp_path: Path, words: str) -> None:
    with pytest.raises(FedappError, match="--certificate, --key and, for init, --ca belong together"):
        run(*words.split(), "--folder", tmp_path)


def test_a_certificate_of_ones_own_is_one_that_the_strictest_client_trusts(tmp_path: Path) -> None:
    keys.init(tmp_path, ["fed.example.org", "10.0.0.5"])
    certificate, key, ca = (tmp_path / name for name in (keys.CERTIFICATE, keys.KEY, keys.CA))
    for host in ("fed.example.org", "10.0.0.5", "localhost", "127.0.0.1"):
        certificates.meet(certificate, key, ca, host, strict=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        certificates.meet(certificate, key, ca, "other.example.org", strict=True)


SKI, USAGE, OF_CA = (
    x509.SubjectKeyIdentifier(b"of its own"),  # no digest of the key, as some CAs have it
    certificates._usage(key_cert_sign=True),
    x509.BasicConstraints(True, None),
)


def of_ones_own(folder: Path, *extensions: tuple[x509.ExtensionType, bool]) -> tuple[Path, Path]:
    """The files of a CA with these extensions, each critical or not."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "own")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 5, NOW, NOW + timedelta(days=9))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return pem(folder / "own.pem", builder.sign(key, hashes.SHA256())), pem(folder / "own.key", key)


def test_a_ca_names_its_key_as_it_likes(tmp_path: Path) -> None:
    ca, key = of_ones_own(tmp_path, (SKI, False), (USAGE, True), (OF_CA, True))
    folder = tmp_path / "server"
    run("init", "--folder", folder, "--ca", ca, "--ca-key", key, "--host", "a")
    certificates.meet(folder / keys.CERTIFICATE, folder / keys.KEY, folder / keys.CA, "a", strict=True)
    run("renew", "--folder", folder, "--ca-key", key)
    certificates.meet(folder / keys.CERTIFICATE, folder / keys.KEY, folder / keys.CA, "a", strict=True)


@pytest.mark.parametrize(
    ("extensions", "said"),
    [
        ([(USAGE, True), (OF_CA, True)], "Missing Subject Key Identifier"),
        ([(SKI, False), (USAGE, True), (OF_CA, False)], "not marked critical"),
        ([(SKI, False), (OF_CA, True)], "does not include key usage"),
        ([], "invalid CA certificate"),
    ],
)
def test_a_ca_that_the_strictest_client_does_not_trust_is_not_taken(
    tmp_path: Path, extensions: list[tuple[x509.ExtensionType, bool]], said: str
) -> None:
    ca, key = of_ones_own(tmp_path, *extensions)
    with pytest.raises(FedappError, match=f"own.pem .*{said}.* give a CA .*basicConstraints"):
        run("init", "--folder", tmp_path / "server", "--ca", ca, "--ca-key", key, "--host", "a")
    assert not (tmp_path / "server").exists()


class Killed(BaseException):
    """What no handler of errors holds up."""


@pytest.mark.parametrize("replaced", [0, 1, 2, 3])
def test_renewing_that_is_broken_off_leaves_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """After so many files were replaced, of the three that there are to replace."""
    keys.init(tmp_path, ["a"])
    before = [(tmp_path / name).read_bytes() for name in (keys.CERTIFICATE, keys.KEY)]
    replace, left = os.replace, iter(range(replaced))

    def until(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until)
        if replaced < 3:
            with pytest.raises(Killed):
                keys.renew(tmp_path)
        else:
            keys.renew(tmp_path)
    keys.check(tmp_path)
    after = [(tmp_path / name).read_bytes() for name in (keys.CERTIFICATE, keys.KEY)]
    assert (after == before) == (replaced < 2)
    assert (tmp_path / keys.KEY).stat().st_mode & 0o777 == 0o600
    keys.renew(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("ca.key", "ca.pem", "operator.token", "server.key", "server.pem")
    ]


def test_a_key_without_its_certificate_stays_where_it_is(tmp_path: Path) -> None:
    keys.init(tmp_path / "server", ["a"])
    keys.init(tmp_path / "other", ["a"])
    waiting, used = tmp_path / "server" / keys._NEW_KEY, (tmp_path / "server" / keys.KEY).read_bytes()
    other = (tmp_path / "other" / keys.KEY).rename(waiting).read_bytes()
    keys.check(tmp_path / "server")
    assert (waiting.read_bytes(), (tmp_path / "server" / keys.KEY).read_bytes()) == (other, used)
