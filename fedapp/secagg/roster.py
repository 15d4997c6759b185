"""Long-term keys: who a participant is, and whom it knows, from files as ssh-keygen writes them."""

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedapp.errors import ConfigError
from fedapp.secagg.keys import signer

MADE = "made"
"""In the place of a file: a simulation makes keys when it starts."""


@dataclass(frozen=True)
class Identity:
    """A signing key, 32 bytes (Ed25519), and the public keys of all participants, its own among them."""

    signing_key: bytes = field(repr=False)
    roster: frozenset[bytes]

    def __post_init__(self) -> None:
        if signer(self.signing_key) not in self.roster:
            raise ConfigError("a node's own signing key is not on its roster: add its public key, a line")


def read_roster(path: Path) -> frozenset[bytes]:
    """Public keys, 32 bytes each, from a file with one a line: `ssh-ed25519 <base64>`. Raises ConfigError."""
    try:
        lines = [line for line in path.expanduser().read_bytes().splitlines() if line.strip()]
        found = [load_ssh_public_key(line) for line in lines]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"the roster {path} cannot be read ({error}): join the .pub files in it") from error
    raw = [key.public_bytes_raw() for key in found if isinstance(key, Ed25519PublicKey)]
    if not raw or len(raw) < len(found) or len(set(raw)) < len(raw):
        raise ConfigError(f"the roster {path} must list keys of ssh-keygen -t ed25519, each once, a line")
    return frozenset(raw)


def read_identity(signing_key: Path, roster: Path) -> Identity:
    """A node's own, from its private key and its roster. Raises ConfigError."""
    return Identity(read_signing_key(signing_key).private_bytes_raw(), read_roster(roster))


def read_signing_key(signing_key: Path) -> Ed25519PrivateKey:
    """A private key as ssh-keygen writes it. Raises ConfigError."""
    try:
        key = load_ssh_private_key(signing_key.expanduser().read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"the signing key {signing_key} cannot be read ({error}): make it by ssh-keygen -t ed25519 -N ''"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the signing key {signing_key} is not of Ed25519: ssh-keygen -t ed25519 makes one")
    return key


def make(count: int) -> tuple[Identity, ...]:
    """So many participants that know each other."""
    private = [Ed25519PrivateKey.generate().private_bytes_raw() for _ in range(count)]
    roster = frozenset(map(signer, private))
    return tuple(Identity(key, roster) for key in private)
