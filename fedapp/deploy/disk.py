"""Room on a server's disk: what would fill it waits before it is full."""

import logging
import shutil
from pathlib import Path

from fedapp.deploy.bounded import Refused

RESERVE = 256 << 20  # bytes: for what goes on meanwhile, checkpoints and logs among it
_MORE = 1.1  # so many times the reserve ends the waiting
_log = logging.getLogger("fedapp.server")


class Disk:
    """The disk of a folder, looked at when something is to be written; when it fills and empties is told."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._full = folder, False

    def require(self) -> None:
        """Raise Refused, 503, while the disk is nearly full: who is told so asks again later."""
        free = shutil.disk_usage(self._folder).free
        full = free < RESERVE * (_MORE if self._full else 1)
        if full and not self._full:
            _log.error(
                "the disk of %s has %d MB left: runs wait until it has %d MB",
                *(self._folder, free >> 20, int(RESERVE * _MORE) >> 20),
            )
        elif self._full and not full:
            _log.warning("the disk of %s has %d MB again: runs go on", self._folder, free >> 20)
        self._full = full
        if full:
            raise Refused(503, "the server's disk is full: its operator must make room")
