"""X.509: a CA of one's own, and the certificates of servers, on NIST curves; what clients think of them."""

import ipaddress
import ssl
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedapp.errors import FedappError

DAYS = 3650  # that a CA holds
_LOCAL = "localhost", "127.0.0.1"  # the server's own machine reaches it by these
_CLOCKS = timedelta(hours=1)  # a certificate holds from so long ago: clocks differ


@dataclass(frozen=True)
class Authority:
    """A CA: its certificate and the key that signs with it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def authority() -> Authority:
    """A new CA, for servers alone: no other CA may follow it in a chain."""
    key = ec.generate_private_key(ec.SECP384R1())
    begins = datetime.now(UTC) - _CLOCKS
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedapp CA")])
    builder = _builder("fedapp CA", name, key, begins, begins + timedelta(days=DAYS))
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True).add_extension(
        _usage(key_cert_sign=True, crl_sign=True), critical=True
    )
    return Authority(builder.sign(key, hashes.SHA384()), key)


def issue(
    authority: Authority, hosts: Iterable[str], lasts: timedelta, begins: datetime | None = None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate for a server under `hosts`, 127.0.0.1 and localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_name(host) for host in dict.fromkeys([*hosts, *_LOCAL])]
    now = begins or datetime.now(UTC) - _CLOCKS
    builder = _builder("fedapp server", authority.certificate.subject, key, now, now + _CLOCKS + lasts)
    builder = (
        builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(_issuer(authority.certificate), critical=False)
    )
    return builder.sign(authority.key, hashes.SHA256()), key


def hosts(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def pair(certificate: Path, key: Path) -> None:
    """Raise OSError (ssl.SSLError is one) or ValueError where the two do not belong together."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")


def meet(certificate: Path, key: Path, ca: Path, host: str, strict: bool) -> None:
    """Let a server with these shake hands with a client that trusts the CA; raises ssl.SSLError as it does.

    Python's own clients are `strict` from 3.13 on.
    """
    one, other = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    one.load_verify_locations(ca)
    if strict:
        one.verify_flags |= ssl.VERIFY_X509_STRICT
    other.load_cert_chain(certificate, key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = one.wrap_bio(back, there, server_hostname=host), other.wrap_bio(there, back, True)
    for end in (client, server, client):
        with suppress(ssl.SSLWantReadError):  # then it is the other one's turn
            end.do_handshake()


def prove(authority: Authority, ca: Path) -> None:
    """Raise ssl.SSLError where the strictest client trusts no certificate of a CA, which is in `ca`."""
    made, key = issue(authority, (), timedelta(days=1))  # to be thrown away
    with tempfile.TemporaryDirectory() as place:
        certificate, own = Path(place, "certificate"), Path(place, "key")
        certificate.write_bytes(pem(made))
        own.write_bytes(pem(key))
        meet(certificate, own, ca, hosts(made)[0], strict=True)


def pem(made: x509.Certificate | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    """A certificate, or a private key without a password, in PEM."""
    if isinstance(made, x509.Certificate):
        return made.public_bytes(serialization.Encoding.PEM)
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return made.private_bytes(serialization.Encoding.PEM, form, none)


def _issuer(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """What a CA calls its key, in its own way: its certificates must call it the same."""
    try:
        own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        own = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _builder(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(
    digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode())
    except (ValueError, UnicodeError) as error:
        raise FedappError(f"--host {host} is neither a name nor an address: no port, no https://") from error
