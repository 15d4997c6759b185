"""`fedapp client`: check everything, start the node, stay up."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from fedapp.deploy import backup_cli, preflight
from fedapp.deploy.address import Address
from fedapp.deploy.logs import to_file
from fedapp.errors import ConfigError

if TYPE_CHECKING:
    from fedapp.deploy.activity import Activity

_log = logging.getLogger("fedapp.client")
_TEXT = "%(asctime)s %(levelname)s %(message)s"


def main(arguments: Sequence[str]) -> None:
    """Run a participant's node until it is interrupted, or keep what it has. Raises FedappError."""
    if arguments and arguments[0] in ("backup", "restore", "forget"):
        backup_cli.client(arguments)
        return
    options = _parser().parse_args(arguments)
    folder: Path = options.folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _begin_log(folder, options.log_json)
    server = Address.of(options.server)
    config = preflight.node_config(options.data_config)
    if options.insecure:
        if not server.local:
            raise ConfigError(
                f"--insecure encrypts nothing, so the server must be 127.0.0.1, not {server.host}"
            )
        ca = None
    else:
        ca = preflight.authority((options.ca or folder / "ca.pem").expanduser())
    key = preflight.private_key((options.key or folder / "node.key").expanduser())
    signers: tuple[str, ...] = ()
    if options.policy is None:
        _log.warning("no --policy: whoever may submit runs may use these data for any of them")
    else:
        path = options.policy.expanduser().resolve()
        config["policy"], signers = str(path), _signers(path)
    books: tuple[Path, str] | None = None
    if options.ledger is not None:
        books = options.ledger.expanduser().resolve(), str(config.setdefault("data-id", "data"))
        config["ledger"] = str(books[0])
        if (said := preflight.ledger(*books)) is not None:
            _log.warning("%s", said)
    preflight.room(folder)
    preflight.reach(server, ca)

    from fedapp.deploy.activity import Activity
    from fedapp.deploy.bundle import signer
    from fedapp.deploy.link import Link
    from fedapp.deploy.memory import Memory
    from fedapp.deploy.node import serve
    from fedapp.report.folder import alone

    activity = Activity()
    with alone(folder), _watched(options.metrics_port, activity, books):
        memory = Memory(folder / "node.sqlite")
        try:
            link = Link(str(server), ca, key, ca is None, _log.warning, activity)
            serve(link, memory, config, activity, [signer(line) for line in signers])
        except KeyboardInterrupt:  # Ctrl-C, or SIGTERM
            _log.info("ended; work that was not answered is done at the next start")
        finally:
            memory.close()


@contextmanager
def _watched(port: int | None, activity: "Activity", books: tuple[Path, str] | None) -> Iterator[None]:
    """Tell a monitor on this machine how the node does, where a port is given."""
    if port is None:
        yield
        return
    from fedapp.deploy.client_metrics import Books, watched

    with watched(port, activity, books and Books(*books)) as port:
        _log.info("metrics on http://127.0.0.1:%d/metrics", port)
        yield


def _signers(path: Path) -> tuple[str, ...]:
    """Check a policy; returns whom it lists as signers."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other:  # what imports torch is not kept
        return other.submit(_load_policy, path).result()


def _load_policy(path: Path) -> tuple[str, ...]:
    from fedapp.privacy.policy import Policy

    return Policy.load(path).signers


def _begin_log(folder: Path, as_json: bool) -> None:
    logging.raiseExceptions = False  # a full disk costs lines, and no traceback for each
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers.append(to_file(folder / "node.log", as_json, _TEXT))
    logging.basicConfig(level=logging.INFO, format=_TEXT, handlers=handlers)
    for chatty in ("httpx", "httpcore", "flwr", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedapp client",
        description="Take part in a federation with the data of this machine.",
        epilog="fedapp client backup FILE writes all that it must not lose; fedapp client restore FILE takes "
        "it; fedapp client forget removes what it kept of runs",
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="where `fedapp server` runs")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="ca.pem of the operator (FOLDER/ca.pem)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="of `fedapp keys node` (FOLDER/node.key)")
    parser.add_argument(
        "--data-config",
        type=Path,
        metavar="FILE",
        help="YAML: data: PATH, or partition-id and num-partitions",
    )
    parser.add_argument("--policy", type=Path, metavar="FILE", help="YAML: what runs may ask of the data")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="where spent privacy is written down")
    parser.add_argument(
        "--folder",
        type=Path,
        default=preflight.FOLDER,
        help="of the node's key, state and log (%(default)s)",
    )
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="on 127.0.0.1: /metrics for Prometheus, and /health"
    )
    parser.add_argument("--log-json", action="store_true", help="node.log has a JSON object a line")
    parser.add_argument(
        "--insecure", action="store_true", help="plain HTTP, to a server on this machine only"
    )
    return parser
