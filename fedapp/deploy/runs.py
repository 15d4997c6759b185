"""How the run folders of a server come back to who submitted the runs."""

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

_PIECE = 1 << 16  # bytes
_NOT_SENT = "checkpoint"  # the server's own: nobody resumes from a copy


@dataclass(frozen=True)
class RunFolders:
    """ASGI app: GET /fedapp/runs/<run id>/folder streams a tar. Who may ask is the front's to know."""

    path: Path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._answer(scope["method"], scope["path"])(scope, receive, send)

    def _answer(self, method: str, path: str) -> Response:
        match path.split("/"):
            case ["", "fedapp", "runs", run_id, "folder"] if method == "GET" and run_id.isdecimal():
                folder = (self.path / run_id).resolve()  # a run that went on is a link to the first one's
                if folder.is_dir() and folder.is_relative_to(self.path.resolve()):
                    return StreamingResponse(tar(folder), media_type="application/x-tar")
                return _missing(
                    f"run {run_id} has no folder: it has not begun, or failed before its first round"
                )
        return _missing("there is nothing here")


def tar(folder: Path) -> Iterator[bytes]:
    """A folder's files as a tar, piece by piece, as they are now; nothing that links point to."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != _NOT_SENT and not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(here, name)
            try:
                file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
            except OSError:  # a link, or gone meanwhile
                continue
            with file:
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    continue
                info.size, info.mtime = status.st_size, int(status.st_mtime)
                yield info.tobuf()
                left = info.size
                while left:  # a file that grows meanwhile is cut, one that shrank is filled up
                    piece = file.read(min(_PIECE, left)) or bytes(min(_PIECE, left))
                    left -= len(piece)
                    yield piece
                yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _missing(why: str) -> Response:
    return JSONResponse({"detail": why}, 404)
