"""The Flower bundle that carries fedapp, and whether one that arrives is the fedapp installed here."""

import io
import tomllib
import zipfile
from hashlib import sha256
from pathlib import Path

import fedapp
from fedapp.errors import ConfigError

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
    """The installed fedapp as a bundle. Raises ConfigError where the installation is not whole."""
    from flwr.cli.build import build_fab_from_files

    package = Path(fedapp.__file__).parent
    beside = package if (package / "pyproject.toml").exists() else package.parent
    try:
        found = {name: (beside / name).read_bytes() for name in ("pyproject.toml", "LICENSE")}
    except OSError as error:
        raise ConfigError(f"this fedapp cannot be sent ({error}): install it anew") from error
    return build_fab_from_files({**found, **files(package)})[0]


def difference(content: bytes) -> str | None:
    """How a bundle that arrived differs from the installed fedapp, in public words; None if it does not.

    Files are compared by what they hold: how a zip file was packed may differ from machine to machine.
    """
    own = digests(Path(fedapp.__file__).parent)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename not in _BESIDE]
            if sum(entry.file_size for entry in archive.infolist()) > _LARGEST:
                return "it is too large for a fedapp"
            sent = {entry.filename: sha256(archive.read(entry)).hexdigest() for entry in entries}
            version = tomllib.loads(archive.read("pyproject.toml").decode())["project"]["version"]
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError):
        return "it cannot be read"
    if len(sent) != len(entries):
        return "it holds a file twice"
    changed = {name for name, _ in sent.items() ^ own.items()}
    if not changed:
        return None
    if version != fedapp.__version__:
        return f"it is fedapp {str(version)[:20]}, and {fedapp.__version__} is installed here"
    many = "1 file differs" if len(changed) == 1 else f"{len(changed)} files differ"
    return f"{many} from fedapp {fedapp.__version__} as it is installed here"
