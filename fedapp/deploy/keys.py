"""The server's certificate and its CA, the operator's token, a node's key.

A node's key is ECDSA P-384 in OpenSSH's format, as flwr 1.41 wants it.
"""

import os
import re
import secrets
import ssl
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedapp.deploy import certificates
from fedapp.deploy.files import private, private_folder, write
from fedapp.errors import FedappError

FOLDER = Path("~/.fedapp/server").expanduser()
CA, CA_KEY, CERTIFICATE, KEY, TOKEN = "ca.pem", "ca.key", "server.pem", "server.key", "operator.token"
_NEW_KEY = "server.key.new"  # until its certificate is there


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
    _vacant(folder, force)
    authority = certificates.authority() if ca is None or ca_key is None else _read_authority(ca, ca_key)
    certificate, key = certificates.issue(authority, hosts, timedelta(days=_days(days)))
    _furnish(folder, [authority.certificate], None if ca else certificates.pem(authority.key))
    _put(folder, certificates.pem(certificate), certificates.pem(key))


def take(folder: Path, certificate: Path, key: Path, ca: Path, force: bool = False) -> None:
    """Do what `init` does, with a server certificate that there is, its key, and the certificate of its CA.

    Intermediate certificates come after it, in the same file. The CA's key is not needed.
    """
    _vacant(folder, force)
    pair, trusted = _given(certificate, key, ca), _certificates(ca)
    _furnish(folder, trusted)
    _put(folder, *pair)


def renew(folder: Path, hosts: Sequence[str] = (), days: int = 365, ca_key: Path | None = None) -> list[str]:
    """Make a new server certificate and key of the folder's CA; returns its hosts (default: as before).

    Broken off at any moment, it leaves the old pair or the new one, for `check` ends what was begun. Not
    covered: who reads between the two files. A server that starts then is to be started again; a backup that
    is made then holds no pair, and `renew` mends what it restores.
    """
    if ca_key is None and (folder / CA).exists() and not (folder / CA_KEY).exists():
        raise FedappError(f"{folder} has no {CA_KEY}, so its certificate is not its own: {_again(folder)}")
    authority = _read_authority(folder / CA, ca_key or folder / CA_KEY)
    names = list(hosts) or certificates.hosts(_certificates(folder / CERTIFICATE)[0])
    certificate, key = certificates.issue(authority, names, timedelta(days=_days(days)))
    _put(folder, certificates.pem(certificate), certificates.pem(key))
    return check(folder)[1]


def bring(folder: Path, certificate: Path, key: Path) -> list[str]:
    """Do what `renew` does, with a certificate that there is, and that leads to the folder's ca.pem."""
    _put(folder, *_given(certificate, key, folder / CA))
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


def check(folder: Path) -> tuple[datetime, list[str]]:
    """Check the server's certificate and key: there, private, a pair, in their time, trusted with ca.pem.

    Returns when it ends, and the hosts it is for. Raises FedappError, which names the repair. Where replacing
    them was broken off between the two, it is ended first.
    """
    _complete(folder)
    return _check(folder / CERTIFICATE, folder / KEY, folder / CA, _again(folder))


def called(folder: Path) -> str:
    """What the server's certificate calls it, which need not be 127.0.0.1."""
    return certificates.hosts(_certificates(folder / CERTIFICATE)[0])[0]


def _vacant(folder: Path, force: bool) -> None:
    """Raise FedappError where there are keys already, unless `force`."""
    there = [name for name in (CA, CA_KEY, CERTIFICATE, KEY, TOKEN) if (folder / name).exists()]
    if there and not force:
        raise FedappError(
            f"{folder} holds {', '.join(there)}: `fedapp keys renew` makes a new certificate of the same CA; "
            "--force replaces all, and then every participant needs the new ca.pem"
        )


def _furnish(folder: Path, ca: Sequence[x509.Certificate], ca_key: bytes | None = None) -> None:
    """Put all into a server's folder but its certificate and key; of a CA's key only one that it can use."""
    private_folder(folder)
    write(folder / CA, b"".join(map(certificates.pem, ca)))
    if ca_key is not None:
        write(folder / CA_KEY, ca_key, secret=True)
    elif not _signs_for(folder / CA_KEY, ca[0]):  # it is of the CA before, which is in force no more
        (folder / CA_KEY).unlink(missing_ok=True)
    new_token(folder)


def _signs_for(key: Path, ca: x509.Certificate) -> bool:
    with suppress(OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return serialization.load_pem_private_key(key.read_bytes(), None).public_key() == ca.public_key()
    return False


def _given(certificate: Path, key: Path, ca: Path) -> tuple[bytes, bytes]:
    """The certificates, no more, and the key in given files. Raises FedappError for what does not fit."""
    _check(certificate, key, ca, "give those that belong together", strict=True)
    return b"".join(map(certificates.pem, _certificates(certificate))), private(key)


def _check(file: Path, key: Path, ca: Path, again: str, strict: bool = False) -> tuple[datetime, list[str]]:
    certificate, trusted = _certificates(file)[0], _certificates(ca)
    private(key)
    try:
        certificates.pair(file, key)
    except (ssl.SSLError, ValueError) as error:
        raise FedappError(f"{file} and {key} are no pair ({error}): {again}") from error
    begins, ends, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if now >= ends:
        raise FedappError(f"{file} expired on {ends:%Y-%m-%d %H:%M} UTC: {again}")
    if now < begins:
        raise FedappError(f"{file} holds only from {begins:%Y-%m-%d %H:%M} UTC: set this machine's clock")
    if all(now >= one.not_valid_after_utc for one in trusted):
        raise FedappError(f"{ca} expired: `fedapp keys init --force`, and all take the new ca.pem")
    hosts = certificates.hosts(certificate)
    if not hosts:
        raise FedappError(f"{file} is for no host (subjectAltName): {again}")
    try:
        certificates.meet(file, key, ca, hosts[0], strict)
    except (ssl.SSLError, ValueError) as error:
        said = getattr(error, "verify_message", error)
        raise FedappError(f"who trusts {ca} does not trust {file} ({said}): {again}") from error
    return ends, hosts


def _again(folder: Path) -> str:
    """How a new certificate comes into a server's folder."""
    command = f"`fedapp keys renew --folder {folder}`"
    if (folder / CA_KEY).exists():
        return f"{command} makes a new one"
    return f"{command} takes a new one by --certificate FILE --key FILE, or makes one by --ca-key FILE"


def _put(folder: Path, certificate: bytes, key: bytes) -> None:
    """Replace the server's certificate and key: two files, of which only one can come first."""
    write(folder / _NEW_KEY, key, secret=True)
    write(folder / CERTIFICATE, certificate)
    _complete(folder)


def _complete(folder: Path) -> None:
    """Bring the new key to its place, if its certificate came to its own."""
    with suppress(OSError, ValueError):  # there is none, it is of a certificate that never came
        certificates.pair(folder / CERTIFICATE, folder / _NEW_KEY)
        os.replace(folder / _NEW_KEY, folder / KEY)


def _read_authority(file: Path, key_file: Path) -> certificates.Authority:
    certificate = _certificates(file)[0]
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
    found = certificates.Authority(certificate, key)
    try:
        certificates.prove(found, file)
    except ssl.SSLError as error:
        raise FedappError(
            f"clients do not trust certificates of {file} ({getattr(error, 'verify_message', error)}), those "
            "of Python 3.13 and later at least: give a CA that has not expired, with basicConstraints "
            "(critical), keyUsage keyCertSign and a subjectKeyIdentifier, or let fedapp make its own"
        ) from error
    return found


def _certificates(file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except OSError as error:
        raise FedappError(
            f"cannot read {file} ({error.strerror}): correct the path, or let `fedapp keys init` make it"
        ) from error
    except ValueError as error:
        raise FedappError(f"{file} is no certificate in PEM: `fedapp keys init` makes one") from error


def _days(days: int) -> int:
    if not 1 <= days <= certificates.DAYS:
        raise FedappError(f"--days {days} is out of range: 1 to {certificates.DAYS}")
    return days
