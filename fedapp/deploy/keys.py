"""`fedapp keys`: the server's certificate and its CA, the operator's token, a node's key.

A node's key is ECDSA P-384 in OpenSSH's format, as flwr 1.41 wants it.
"""

import argparse
import fcntl
import os
import re
import secrets
import ssl
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import IO

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedapp.deploy import certificates
from fedapp.errors import FedappError

FOLDER = Path("~/.fedapp/server").expanduser()
CA, CA_KEY, CERTIFICATE, KEY, TOKEN = "ca.pem", "ca.key", "server.pem", "server.key", "operator.token"
_NEW_KEY = "server.key.new"  # until its certificate is there


def main(arguments: Sequence[str]) -> None:
    """Run one subcommand; exits 2 on a wrong one. Raises FedappError for what does not fit."""
    parser = argparse.ArgumentParser("fedapp keys", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("init", help="operator: a CA, a server certificate, an operator's token")
    again = commands.add_parser("renew", help="operator: a new server certificate of the same CA")
    own = commands.add_parser("node", help="participant: a node's key; prints the half for the operator")
    for command in (first, again):
        command.add_argument("--host", action="append", default=[], help="a name or address of the server")
        command.add_argument("--folder", type=Path, default=FOLDER, help="server's folder (%(default)s)")
        command.add_argument("--days", type=int, default=365, help="the certificate holds (%(default)s)")
        command.add_argument("--ca-key", type=Path, help="the key of a CA that exists already")
    first.add_argument("--ca", type=Path, help="a CA that exists already: its certificate")
    first.add_argument("--force", action="store_true", help="replace what is there: all must join anew")
    own.add_argument("--out", type=Path, default=Path("node.key"), help="its file (%(default)s)")
    own.add_argument("--force", action="store_true", help="replace the key that is there")
    given = parser.parse_args(arguments)
    if given.command == "init":
        init(given.folder, given.host, given.days, given.ca, given.ca_key, given.force)
        print(f"{given.folder}: give {CA} to all participants, and {CA} with {TOKEN} to who submits runs")
        print("next: fedapp server" + ("" if given.folder == FOLDER else f" --folder {given.folder}"))
    elif given.command == "renew":
        hosts = renew(given.folder, given.host, given.days, given.ca_key)
        print(f"{given.folder / CERTIFICATE} is new, for {', '.join(hosts)}")
        print("a running server takes it on SIGHUP: systemctl reload, or kill -HUP with its process id")
    else:
        print(f"send this line to the operator; {given.out} stays here:", flush=True)
        print(node(given.out, given.force))


def init(
    folder: Path,
    hosts: Sequence[str],
    days: int = 365,
    ca: Path | None = None,
    ca_key: Path | None = None,
    force: bool = False,
) -> None:
    """Make all that a server needs to be reached safely. Nothing is written unless all of it can be.

    Raises FedappError where there are keys already, unless `force`.
    """
    if not hosts:
        raise FedappError("keys init needs the server's name or address: --host fed.example.org")
    if (ca is None) != (ca_key is None):
        raise FedappError("--ca and --ca-key belong together: give both, or neither")
    there = [name for name in (CA, CA_KEY, CERTIFICATE, KEY, TOKEN) if (folder / name).exists()]
    if there and not force:
        raise FedappError(
            f"{folder} holds {', '.join(there)}: `fedapp keys renew` makes a new certificate of the same CA; "
            "--force replaces all, and then every participant needs the new ca.pem"
        )
    authority = certificates.authority() if ca is None or ca_key is None else _read_authority(ca, ca_key)
    certificate, key = certificates.issue(authority, hosts, timedelta(days=_days(days)))
    private_folder(folder)
    write(folder / CA, certificates.pem(authority.certificate))
    if ca is None:
        write(folder / CA_KEY, certificates.pem(authority.key), secret=True)
    _put(folder, certificates.pem(certificate), certificates.pem(key))
    new_token(folder)


def renew(folder: Path, hosts: Sequence[str] = (), days: int = 365, ca_key: Path | None = None) -> list[str]:
    """Make a new server certificate and key of the folder's CA; returns its hosts (default: as before).

    Broken off at any moment, it leaves the old pair or the new one, for `check` ends what was begun. Not
    covered: a backup that reads one before and the other after; `renew` mends what it restores.
    """
    authority = _read_authority(folder / CA, ca_key or folder / CA_KEY)
    names = list(hosts) or certificates.hosts(_certificate(folder / CERTIFICATE))
    certificate, key = certificates.issue(authority, names, timedelta(days=_days(days)))
    _put(folder, certificates.pem(certificate), certificates.pem(key))
    return check(folder)[1]


def node(path: Path, force: bool = False) -> str:
    """Make a node's key, `path` and `path`.pub; returns the public half, one line."""
    public = path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists() and not force:
            raise FedappError(f"{file} exists: choose another --out; --force makes the old key useless")
    key = ec.generate_private_key(ec.SECP384R1())
    form, none = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    line = openssh(key.public_key())
    write(path, key.private_bytes(serialization.Encoding.PEM, form, none), secret=True)
    write(public, line.encode() + b"\n")
    return line


def openssh(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as one line: `ecdsa-sha2-nistp384 AAAA...`."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def fingerprint(pem: bytes) -> str:
    """What `ssh-keygen -l` shows of a public key, here in PEM: SHA256:..."""
    key = serialization.load_pem_public_key(pem)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    digest = sha256(b64decode(openssh(key).split()[1])).digest()
    return "SHA256:" + b64encode(digest).decode().rstrip("=")


def new_token(folder: Path) -> None:
    """Write an operator's token: 32 random bytes, URL-safe base64."""
    write(folder / TOKEN, secrets.token_urlsafe(32).encode() + b"\n", secret=True)


def token(path: Path) -> str:
    """The token in a file that nobody else can read."""
    text = private(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{43}", text, re.ASCII):  # so that no other secret is ever sent
        raise FedappError(f"{path} holds no operator's token: it is the operator.token of `fedapp keys init`")
    return text


def private(path: Path) -> bytes:
    """The content of a file that only its owner may read; FedappError where others may, or it is missing."""
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise FedappError(f"cannot read {path} ({error.strerror}): `fedapp keys` makes it") from error
    if mode & 0o077:
        raise FedappError(f"{path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}")
    return content


def check(folder: Path) -> tuple[datetime, list[str]]:
    """Check the server's certificate and key: there, private, a pair, of ca.pem, in their time.

    Returns when it ends, and the hosts it is for. Raises FedappError, which names the repair. Where replacing
    them was broken off between the two, it is ended first.
    """
    _complete(folder)
    file, again = folder / CERTIFICATE, f"`fedapp keys renew --folder {folder}` makes a new one"
    certificate, authority = _certificate(file), _certificate(folder / CA)
    private(folder / KEY)
    try:
        _pair(file, folder / KEY)
    except (ssl.SSLError, ValueError) as error:
        raise FedappError(f"{file} and {folder / KEY} are no pair ({error}): {again}") from error
    begins, ends, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if now >= ends:
        raise FedappError(f"{file} expired on {ends:%Y-%m-%d %H:%M} UTC: {again}")
    if now < begins:
        raise FedappError(f"{file} holds only from {begins:%Y-%m-%d %H:%M} UTC: set this machine's clock")
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception as error:
        raise FedappError(f"{file} was not issued by {folder / CA}: {again}") from error
    if now >= authority.not_valid_after_utc:
        raise FedappError(f"{folder / CA} expired: `fedapp keys init --force`, and all take the new ca.pem")
    return ends, certificates.hosts(certificate)


def write(path: Path, content: bytes, secret: bool = False) -> None:
    """Replace a file at once, by one that only its owner can read where it is secret."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as file:
            file.write(content)
            os.chmod(file.name, 0o600 if secret else 0o644)
    except OSError as error:
        raise FedappError(f"cannot write {path} ({error.strerror}): choose another place") from error


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there, mode 0600, once all of it is written. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise FedappError(f"cannot make {folder} ({error.strerror}): choose another --folder") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a server's folder; FedappError while another server runs from it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FedappError(f"another server runs from {folder}: end it first") from error
        yield


def _put(folder: Path, certificate: bytes, key: bytes) -> None:
    """Replace the server's certificate and key: two files, of which only one can come first."""
    write(folder / _NEW_KEY, key, secret=True)
    write(folder / CERTIFICATE, certificate)
    _complete(folder)


def _complete(folder: Path) -> None:
    """Bring the new key to its place, if its certificate came to its own."""
    with suppress(OSError, ValueError):  # there is none, it is of a certificate that never came
        _pair(folder / CERTIFICATE, folder / _NEW_KEY)
        os.replace(folder / _NEW_KEY, folder / KEY)


def _pair(certificate: Path, key: Path) -> None:
    """Raise OSError (ssl.SSLError is one) or ValueError where the two do not belong together."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")


def _read_authority(file: Path, key_file: Path) -> certificates.Authority:
    certificate = _certificate(file)
    try:
        key = serialization.load_pem_private_key(private(key_file), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedappError(
            f"{key_file} is no key in PEM without a password: give the key of {file}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise FedappError(f"{key_file} is neither an ECDSA nor an RSA key: let fedapp make its own CA")
    if key.public_key() != certificate.public_key():
        raise FedappError(f"{key_file} is not the key of {file}: give the two that belong together")
    return certificates.Authority(certificate, key)


def _certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise FedappError(f"cannot read {file} ({error.strerror}): `fedapp keys init` makes it") from error
    except ValueError as error:
        raise FedappError(f"{file} is no certificate in PEM: `fedapp keys init` makes one") from error


def _days(days: int) -> int:
    if not 1 <= days <= certificates.DAYS:
        raise FedappError(f"--days {days} is out of range: 1 to {certificates.DAYS}")
    return days
