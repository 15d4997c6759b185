"""The Flower bundle that carries fedapp, and whether one that arrives is the fedapp installed here.

A bundle of the same version and settings whose code differs may carry a signature of all that it holds
(Ed25519), by somebody whom a participant's policy lists: then its server's word is taken. It is not run.
"""

import io
import tomllib
import zipfile
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

import fedapp
from fedapp.deploy.files import private, write
from fedapp.errors import ConfigError
from fedapp.secagg.roster import read_signing_key

_SIGNATURE = "signature"  # a file beside the code that it is of; a line of the bundle's pyproject.toml
_LARGEST = 64 << 20  # bytes of a bundle, unpacked: far more than fedapp has
_BESIDE = {"pyproject.toml", "LICENSE", "README.md", ".info/CONTENT"}  # no code, and nothing reads them here


def files(package: Path) -> dict[str, Path]:
    """The files that make a fedapp what it is, by their names in a bundle: code, and settings.

    Settings lie inside an installed package, and beside it in a checkout.
    """
    conf = package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
    named = {f"fedapp/{file.relative_to(package)}": file for file in package.rglob("*.py")}
    return named | {f"conf/{file.relative_to(conf)}": file for file in conf.rglob("*.yaml")}


def digests(package: Path) -> dict[str, str]:
    """The digest of each of them."""
    return {name: sha256(file.read_bytes()).hexdigest() for name, file in files(package).items()}


def bundle() -> bytes:
    """The installed fedapp as a bundle, with its signature. Raises ConfigError where it is not whole."""
    from flwr.cli.build import build_fab_from_files

    package = Path(fedapp.__file__).parent
    beside = package if (package / "pyproject.toml").exists() else package.parent
    try:
        found = {name: (beside / name).read_bytes() for name in ("pyproject.toml", "LICENSE")}
    except OSError as error:
        raise ConfigError(f"this fedapp cannot be sent ({error}): install it anew") from error
    if (package / _SIGNATURE).exists():
        line = (package / _SIGNATURE).read_text().strip()
        found["pyproject.toml"] += f'\n[tool.fedapp]\n{_SIGNATURE} = "{line}"\n'.encode()
    return build_fab_from_files({**found, **files(package)})[0]


def sign(key: Path) -> str:
    """Sign the installed fedapp with a key of ssh-keygen -t ed25519; returns its public half, one line.

    The signature lies beside the code, and every bundle carries it. Raises FedappError.
    """
    package = Path(fedapp.__file__).parent
    private(key)
    own = read_signing_key(key)
    signature = own.sign(_manifest(digests(package), fedapp.__version__))
    write(package / _SIGNATURE, b64encode(signature) + b"\n")
    return own.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def signer(line: str) -> Ed25519PublicKey:
    """Whoever signs, from a line that `sign` returned. Raises ValueError."""
    found = load_ssh_public_key(line.encode())
    if not isinstance(found, Ed25519PublicKey):
        raise ValueError("no key of ssh-keygen -t ed25519")
    return found


def _manifest(of: Mapping[str, str], version: str) -> bytes:
    """What is signed: the digest of every file, and the version."""
    lines = [f"{digest}  {name}" for name, digest in sorted(of.items())]
    return "\n".join(["fedapp bundle 1", version, *lines, ""]).encode()


@dataclass(frozen=True)
class _Sent:
    """What a bundle holds, and what it is signed with."""

    digests: Mapping[str, str]
    version: str
    signature: bytes

    def by(self, signers: Collection[Ed25519PublicKey]) -> bool:
        """Whether one of these has signed it."""
        for one in signers:
            with suppress(InvalidSignature):
                one.verify(self.signature, _manifest(self.digests, self.version))
                return True
        return False


def _read(content: bytes) -> _Sent | str:
    """What a bundle holds; or what is wrong with it, in public words."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename not in _BESIDE]
            if sum(entry.file_size for entry in archive.infolist()) > _LARGEST:
                return "it is too large for a fedapp"
            sent = {entry.filename: sha256(archive.read(entry)).hexdigest() for entry in entries}
            project = tomllib.loads(archive.read("pyproject.toml").decode())
            signature = b64decode(project.get("tool", {}).get("fedapp", {}).get(_SIGNATURE, ""))
            version = str(project["project"]["version"])
    except (
        *(zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError),
        *(NotImplementedError, RuntimeError),
    ):
        return "it cannot be read"
    if len(sent) != len(entries):
        return "it holds a file twice"
    return _Sent(sent, version, signature)


def difference(content: bytes, signers: Collection[Ed25519PublicKey] = ()) -> str | None:
    """How a bundle that arrived differs from the installed fedapp, in public words; None if it may be served.

    Files are compared by what they hold: how a zip file was packed may differ from machine to machine. One
    that a signer vouches for may differ in its code. Both ends read the same settings, so these may not.
    """
    own, sent = digests(Path(fedapp.__file__).parent), _read(content)
    if isinstance(sent, str):
        return sent
    changed = {name for name, _ in sent.digests.items() ^ own.items()}
    if not changed:
        return None
    if sent.version != fedapp.__version__:
        return f"it is fedapp {sent.version[:20]}, and {fedapp.__version__} is installed here"
    many = "1 file differs" if len(changed) == 1 else f"{len(changed)} files differ"
    said = f"{many} from fedapp {fedapp.__version__} as it is installed here"
    if not sent.signature:
        return said
    if not sent.by(signers):
        return f"{said}, and nobody whom the policy lists has signed it"
    if any(name.startswith("conf/") for name in changed):
        return f"{said}, settings among them, which a signature does not make up for"
    return None
