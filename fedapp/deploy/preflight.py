"""What a participant's machine must have before its node starts, each with the repair where it has not."""

import datetime
import os
import shutil
import socket
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import yaml
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedapp.deploy.address import Address
from fedapp.deploy.files import private
from fedapp.errors import ConfigError
from fedapp.privacy.ledger import Ledger
from fedapp.secagg.roster import read_identity

FOLDER = Path("~/.fedapp/client")
Scalar = bool | int | float | str
_KEYS: Mapping[str, str] = {
    "partition-id": "which part of a shared data set this node holds, counted from 0",
    "num-partitions": "of how many",
    "data": "a table, or a folder of images",
    "data-id": "a name for the data in the ledger",
    "tags": "words by which runs may ask for this node, with commas between",
    "roster": "the file of all participants' signing keys, for secure aggregation",
    "signing-key": "the file of this node's own signing key",
}
_FILES = "data", "roster", "signing-key"
_SKEW = 4.0  # seconds: Flower refuses signatures from 5 s in the future
_FREE = 200e6  # bytes on the disk of the node's folder


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The node's key. Raises ConfigError where it is missing, open to others, or of another kind."""
    data = private(path, "the node's key ", f"make one with `fedapp keys node --out {path}`")
    try:
        key = load_ssh_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no OpenSSH private key without a passphrase ({error}): "
            "make one with `fedapp keys node`, and send its public half to the operator"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            f"{path} is no ECDSA key on P-384, which Flower needs: make one with `fedapp keys node`"
        )
    return key


def authority(path: Path) -> bytes:
    """The certificates that vouch for the server. Raises ConfigError."""
    try:
        data = path.read_bytes()
        found = x509.load_pem_x509_certificates(data)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the CA certificate {path} cannot be read ({error}): get ca.pem from the operator"
        ) from error
    now = datetime.datetime.now(datetime.UTC)
    if all(one.not_valid_after_utc < now for one in found):
        raise ConfigError(f"the CA certificate {path} has expired: get a new ca.pem from the operator")
    return data


def node_config(path: Path | None) -> dict[str, Scalar]:
    """What a node has, from its YAML file. Raises ConfigError for what is unknown or not there."""
    if path is None:
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read ({' '.join(str(error).split())}): give a YAML file"
        ) from error
    known = ", ".join(f"{key} ({what})" for key, what in _KEYS.items())
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} must map names to values, such as data: /path/table.csv; names are {known}"
        )
    for key, value in tree.items():
        if key not in _KEYS:
            raise ConfigError(f"{path} names {key!r}, which no task reads: names are {known}")
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{path}: {key} must be one value, got {value!r}")
    for key in _FILES:
        if key in tree and not Path(str(tree[key])).expanduser().exists():
            raise ConfigError(f"{path}: {key}={tree[key]!r} does not exist on this machine: mend the path")
    if ("roster" in tree) != ("signing-key" in tree):
        raise ConfigError(
            f"{path}: a roster goes with a signing key: give roster and signing-key, or neither"
        )
    if "roster" in tree:
        private(Path(str(tree["signing-key"])).expanduser())
        read_identity(Path(str(tree["signing-key"])), Path(str(tree["roster"])))
    return tree


def ledger(path: Path, data_id: str) -> str | None:
    """See that a ledger is there, and can be written; returns what its owner should know.

    Raises FedappError.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no ledger {path}: correct the path, or make it and set its limit, epsilon 8 say, with "
            f'`fedapp ledger set-limit {path} "{data_id}" example 8 1e-5`'
        )
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"the ledger {path} cannot be written: see who owns its folder")
    if Ledger(path).limits(data_id):
        return None
    return (
        f"the ledger {path} sets no limit for {data_id!r}: what runs spend is written down, and nothing is "
        "refused (`fedapp ledger set-limit`)"
    )


def reach(server: Address, ca: bytes | None) -> None:
    """Ask the server for a sign of life. Raises ConfigError that says what is in the way."""
    scheme = "http" if ca is None else "https"
    try:
        verify: ssl.SSLContext | bool = False
        if ca is not None:
            verify = ssl.create_default_context(cadata=ca.decode("ascii"))
        answer = httpx.get(f"{scheme}://{server}/health", verify=verify, timeout=10, trust_env=False)
    except httpx.ConnectError as error:
        raise ConfigError(_unreachable(server, error)) from error
    except httpx.TransportError as error:
        raise ConfigError(
            f"{server} does not speak {scheme} ({error or type(error).__name__}): see the port, and whether "
            f"the server was started {'with' if ca is None else 'without'} --insecure"
        ) from error
    if (wrong := clock(answer)) is not None:
        raise ConfigError(wrong)


def clock(answer: httpx.Response) -> str | None:
    """What is wrong with this machine's clock, by an answer of the server that has just come; else None."""
    told, waited = answer.headers.get("date"), answer.elapsed.total_seconds()
    if told is None:
        return None
    between = time.time() - waited / 2
    skew = between - parsedate_to_datetime(told).timestamp() - 0.5  # the header counts whole seconds
    if abs(skew) <= _SKEW + waited / 2 + 0.5:
        return None
    side = "ahead of" if skew > 0 else "behind"
    return (
        f"this machine's clock is {abs(skew):.0f} s {side} the server's, so signatures are refused: "
        "set it, with `timedatectl set-ntp true`, say"
    )


def room(folder: Path) -> None:
    """Raise ConfigError where the disk of the node's folder is nearly full."""
    free = shutil.disk_usage(folder).free
    if free < _FREE:
        raise ConfigError(
            f"{folder} has {free / 1e6:.0f} MB left, and a node wants {_FREE / 1e6:.0f}: make room"
        )


def _unreachable(server: Address, error: httpx.ConnectError) -> str:
    said = str(error)
    if "certificate has expired" in said:
        return f"the certificate of {server} has expired: tell the operator (`fedapp keys renew`)"
    if "not yet valid" in said:
        return f"the certificate of {server} is not yet valid: see whether this machine's clock is right"
    if "certificate is not valid for" in said or "doesn't match" in said or "Hostname mismatch" in said:
        return (
            f"the certificate is not for {server.host}: use the name that the operator gave, or ask for "
            f"`fedapp keys init --host {server.host}`"
        )
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return f"another CA vouches for {server} than yours ({said}): get ca.pem from the operator again"
    if "WRONG_VERSION_NUMBER" in said or "RECORD_LAYER" in said:
        return f"{server} does not speak TLS: see the port"
    try:
        socket.getaddrinfo(server.host, server.port)
    except OSError as unknown:
        return f"the name {server.host} cannot be found ({unknown}): see its spelling, and this machine's DNS"
    return (
        f"{server} cannot be reached ({said}): see that the server runs, and that no firewall is in between"
    )
