"""Files that are there whole or not at all, and those that only their owner may read."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedapp.errors import ConfigError, FedappError


def private(
    path: Path, named: str = "", mend: str = "correct the path, or let `fedapp keys` make it"
) -> bytes:
    """The content of a file that only its owner may read; ConfigError where others may, or it is missing.

    `named` is what the error calls it before its path, `mend` what it says to do where it is missing.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {named}{path} ({error.strerror}): {mend}") from error
    if mode & 0o077:
        raise ConfigError(f"{named}{path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}")
    return content


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
