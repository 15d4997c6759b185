"""Log files in JSON: one object a line, whatever is logged."""

import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedapp.deploy import client, logs, server
from fedapp.deploy.logs import to_file


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Loggers, which live as long as the process, end as they began."""
    names = ("fedapp", "flwr", "uvicorn", "httpx", "httpcore", "alembic")
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    before = [([*one.handlers], one.propagate, one.level) for one in loggers]
    raising = logging.raiseExceptions
    yield
    logging.raiseExceptions = raising
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_one_object(tmp_path: Path) -> None:
    log = logging.getLogger("fedapp.test_logs")
    log.propagate = False
    log.addHandler(to_file(tmp_path / "log", as_json=True))
    log.warning('%s of\n"two" lines, é and \udcff', 1)
    try:
        raise ValueError("what was wrong")
    except ValueError:
        log.exception("it failed")
    log.handlers.pop().close()
    first, second = lines(tmp_path / "log")
    assert first.keys() == {"time", "level", "logger", "message"}
    assert first["message"] == '1 of\n"two" lines, é and \udcff'
    assert (first["level"], first["logger"]) == ("WARNING", "fedapp.test_logs")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 60
    assert second["error"].startswith("Traceback")
    assert second["error"].endswith("ValueError: what was wrong")


def check(log: logging.Logger, path: Path, as_json: bool, message: str, text: str) -> None:
    """That one line was written: this message in JSON, or a text that ends like this."""
    for handler in log.handlers:
        handler.close()
    if as_json:
        assert [line["message"] for line in lines(path)] == [message]
    else:
        assert path.read_text().endswith(text)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_server_writes_what_was_asked(tmp_path: Path, as_json: bool) -> None:
    server._logs(tmp_path, as_json)
    logging.getLogger("fedapp.server").info("serving on %s", "here")
    written = " INFO fedapp.server: serving on here\n"
    check(logging.getLogger("fedapp"), tmp_path / "server.log", as_json, "serving on here", written)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_client_writes_what_was_asked(
    tmp_path: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    client._begin_log(tmp_path, as_json)
    logging.getLogger("fedapp.client").warning("no --policy")
    check(logging.getLogger(), tmp_path / "node.log", as_json, "no --policy", " WARNING no --policy\n")


@pytest.mark.parametrize(
    ("begin", "name", "logger"),
    [(server._logs, "server.log", "fedapp.server"), (client._begin_log, "node.log", "fedapp.client")],
)
def test_what_is_too_much_begins_a_new_file_and_the_oldest_goes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[Path, bool], None],
    name: str,
    logger: str,
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    monkeypatch.setattr(logs, "BYTES", 1000)
    monkeypatch.setattr(logs, "FILES", 2)
    begin(tmp_path, False)
    for number in range(100):
        logging.getLogger(logger).info("line %d", number)
    for handler in logging.getLogger("fedapp").handlers + logging.getLogger().handlers:
        handler.close()
    files = [tmp_path / f"{name}.2", tmp_path / f"{name}.1", tmp_path / name]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(500 < path.stat().st_size <= 1000 for path in files[:2])
    kept = [int(line.rpartition(" ")[2]) for path in files for line in path.read_text().splitlines()]
    assert kept == [*range(100 - len(kept), 100)]


def test_what_no_file_can_hold_costs_no_line(tmp_path: Path) -> None:
    handler = to_file(tmp_path / "log", as_json=False)
    handler.emit(logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "a path \udcff"}))
    handler.close()
    assert (tmp_path / "log").read_text().endswith("INFO x: a path \\udcff\n")
