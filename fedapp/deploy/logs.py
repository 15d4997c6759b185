"""Log files that rotate, in lines for people or, where a program reads them, in JSON."""

import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

BYTES, FILES = 10 << 20, 5  # of one file, and how many older ones are kept
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """A JSON object a line: time (UTC, ISO 8601), level, logger, message, and error where one was raised."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; what has several stays one, for JSON writes their ends as backslash and n."""
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)


def to_file(path: Path, as_json: bool, text: str = TEXT) -> RotatingFileHandler:
    """What writes lines to a file, all of them in JSON or in this format of `logging`."""
    handler = RotatingFileHandler(
        path, maxBytes=BYTES, backupCount=FILES, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(text))
    return handler
