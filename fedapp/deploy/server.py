"""`fedapp server`: Flower's SuperLink behind fedapp's front, and the process that starts the runs."""

import argparse
import asyncio
import logging
import secrets
import shutil
import signal
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.date import now
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from fedapp.deploy import backup_cli, files, keys, superexec
from fedapp.deploy.address import from_here, is_loopback
from fedapp.deploy.back import Back
from fedapp.deploy.bounded import Refusals
from fedapp.deploy.control import ADDRESS, Access, access
from fedapp.deploy.disk import Disk
from fedapp.deploy.front import Public
from fedapp.deploy.going_on import take_up
from fedapp.deploy.holding import Pushes
from fedapp.deploy.listener import CONNECTIONS, Listener, listener
from fedapp.deploy.logs import to_file
from fedapp.deploy.runs import RunFolders
from fedapp.deploy.server_metrics import Metrics
from fedapp.deploy.state import State
from fedapp.errors import FedappError

LEAST_DISK = 1 << 30  # bytes: a database that cannot grow loses runs
_log = logging.getLogger("fedapp.server")


def main(arguments: Sequence[str]) -> None:
    """Run the server until SIGINT or SIGTERM, or keep what it has. Raises FedappError."""
    if arguments and arguments[0] in ("backup", "restore"):
        backup_cli.server(arguments)
        return
    given = _parser().parse_args(arguments)
    host = given.host or ("127.0.0.1" if given.insecure else "0.0.0.0")
    folder = given.folder.expanduser().absolute()
    server = Server(folder, host, given.port, given.max_body, given.insecure, given.log_json)
    asyncio.run(server.run())


@dataclass(frozen=True)
class Server:
    """All that one server is made of; `run` checks it and runs it. `max_body` is in bytes."""

    folder: Path
    host: str = "0.0.0.0"
    port: int = 8443
    max_body: int = 100 << 20
    insecure: bool = False
    log_json: bool = False

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; SIGHUP takes a renewed certificate."""
        said, began = self.check(), now()
        over, loop, secret = asyncio.Event(), asyncio.get_running_loop(), secrets.token_bytes(32)
        for name in ("flwr", "runs", "log"):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        _logs(self.folder / "log", self.log_json)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, over.set)
        async with self.listening(secret) as listening:
            loop.add_signal_handler(signal.SIGHUP, listening.renew)
            child = await superexec.start(self.folder, secret, listening.private)
            output = self.folder / "log" / "superexec.log"
            copying = asyncio.create_task(superexec.copy(child, output, self.log_json))
            ending = asyncio.create_task(over.wait())
            try:
                print(self._next(listening.public, said), flush=True)
                _log.info("serving on %s port %d, %s", self.host, listening.public, said)
                left = self._access(), self.folder / "runs", began
                threading.Thread(target=take_up, args=left, daemon=True).start()
                await asyncio.wait({copying, ending, *listening.tasks}, return_when=asyncio.FIRST_COMPLETED)
                if not over.is_set():
                    raise FedappError(f"a part of it ended: see {self.folder / 'log'}, and start it again")
            finally:
                _log.info("ending")
                listening.front.ending = True
                await superexec.end(child)
                await copying
                ending.cancel()
                superexec.forget(self.folder)

    def _access(self) -> Access:
        """What the operator's own commands use."""
        return access(argparse.Namespace(folder=self.folder, server=None, ca=None, token_file=None))

    def check(self) -> str:
        """Whether all is in order; returns what to say of it. Raises FedappError, which names the repair."""
        if self.insecure:
            if not is_loopback(self.host):
                raise FedappError(
                    f"--insecure listens on 127.0.0.1 only, not on {self.host}: leave it away there"
                )
            files.private_folder(self.folder)
            if not (self.folder / keys.TOKEN).exists():
                keys.new_token(self.folder)
            said = "without TLS and node keys, for this machine only"
        else:
            ends, hosts = keys.check(self.folder)
            said = f"certificate for {', '.join(hosts)} until {ends:%Y-%m-%d}"
        if self.max_body < 1 << 20:
            raise FedappError(f"--max-body {self.max_body} is too small: 1048576 or more")
        keys.token(self.folder / keys.TOKEN)
        free = shutil.disk_usage(self.folder).free
        if free < LEAST_DISK:
            raise FedappError(
                f"{self.folder} has {free >> 20} MB left of its disk: free 1 GB, or choose another --folder"
            )
        if shutil.which(superexec.PROGRAM) is None:
            raise FedappError(f"{superexec.PROGRAM} is missing: install flwr beside fedapp")
        return said

    @contextmanager
    def _bound(self, host: str, port: int) -> Iterator[socket.socket]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            bound = socket.create_server((host.strip("[]"), port), family=family)
        except (OSError, OverflowError) as error:
            raise FedappError(
                f"cannot listen on {host} port {port} ({error}): choose another --port"
            ) from error
        with bound:
            # Accepted sockets inherit it. asyncio sets it where a socket says that it is TCP; these do not,
            # and without it the second part of an answer waits 40 ms for the receipt of the first.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield bound

    @asynccontextmanager
    async def listening(self, secret: bytes) -> AsyncIterator["Listening"]:
        """Both listeners, ready; `secret` guards what starts ServerApps."""
        with (
            files.alone(self.folder),
            self._bound(self.host, self.port) as outside,
            self._bound("127.0.0.1", 0) as inside,
        ):
            app = create_app(self._config(secret), SuperLinkLifespan)
            state, runs = State(app.state.linkstate_factory), self.folder / "runs"
            pushes, disk = Pushes(), Disk(self.folder)
            refusals, answered = Refusals(), Counter[int]()
            front = Public(
                app,
                state,
                keys.token(self.folder / keys.TOKEN),
                pushes,
                RunFolders(runs),
                Metrics(state, runs, answered, (refusals, CONNECTIONS)),
                disk,
                self.max_body,
                keyed=not self.insecure,
                refusals=refusals,
                answered=answered,
            )
            outer = listener(front, lifespan=True, folder=None if self.insecure else self.folder)
            inner = listener(Back(app, state, pushes, disk, self.max_body))
            tasks = [asyncio.create_task(outer.serve([outside])), asyncio.create_task(inner.serve([inside]))]
            public, private = outside.getsockname()[1], inside.getsockname()[1]
            try:
                while not (outer.started and inner.started) and not any(task.done() for task in tasks):
                    await asyncio.sleep(0.01)
                scheme = "http" if self.insecure else "https"
                files.write(self.folder / ADDRESS, f"{scheme}://{from_here(self.host)}:{public}\n".encode())
                yield Listening(self.folder, front, outer, public, private, tasks)
            finally:
                front.ending = True
                (self.folder / ADDRESS).unlink(missing_ok=True)
                pushes.end()
                outer.should_exit = inner.should_exit = True
                await asyncio.gather(*tasks, return_exceptions=True)

    def _config(self, secret: bytes) -> SuperLinkLifespanConfig:
        return SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host=self.host,
            port=self.port,
            insecure=self.insecure,
            certificates=None,  # TLS is uvicorn's, below
            superexec_auth_secret=secret,
            authn_plugin=NoOpControlAuthnPlugin(),  # who may ask is the front's
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=not self.insecure,
            fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(self.folder / "state.db"),
            isolation=ISOLATION_MODE_PROCESS,
            runtime_dependency_install=False,  # of a SuperExec that Flower starts; ours asks for none
        )

    def _next(self, port: int, said: str) -> str:
        there = "" if self.folder == keys.FOLDER else f" --folder {self.folder}"
        name = "HOST" if not is_loopback(self.host) else self.host
        join = f"fedapp client --server {name}:{port}" + (
            " --insecure --key node.key" if self.insecure else " --ca ca.pem --key node.key"
        )
        return (
            f"fedapp server on {self.host} port {port}, {said}\n"
            f"  register a node:   fedapp nodes register node.key.pub{there}\n"
            f"  a node joins:      {join}\n"
            f"  submit a run:      fedapp submit task=digits privacy=none clients=2{there}\n"
            f"  logs and runs:     {self.folder}"
        )


@dataclass(frozen=True)
class Listening:
    """Listeners that run: their ports, and the tasks that end when one of them does."""

    folder: Path
    front: Public
    outer: Listener
    public: int
    private: int
    tasks: Sequence[asyncio.Task[None]]

    def renew(self) -> None:
        """Take the certificate that is in the folder now, for connections from now on."""
        context = self.outer.config.ssl
        if context is None:
            return
        try:
            ends, _ = keys.check(self.folder)
            context.load_cert_chain(self.folder / keys.CERTIFICATE, self.folder / keys.KEY)
        except (FedappError, OSError) as error:
            _log.error("the certificate stays as it was: %s", error)
        else:
            _log.info("a new certificate, until %s", f"{ends:%Y-%m-%d}")


def _parser() -> argparse.ArgumentParser:
    kept = "fedapp server backup FILE writes all that it must not lose; fedapp server restore FILE takes it"
    parser = argparse.ArgumentParser("fedapp server", description=__doc__, epilog=kept)
    parser.add_argument("--folder", type=Path, default=keys.FOLDER, help="keys, state, runs (%(default)s)")
    parser.add_argument("--host", help="the address to listen on (0.0.0.0; 127.0.0.1 with --insecure)")
    parser.add_argument("--port", type=int, default=8443)
    parser.add_argument("--max-body", type=int, default=100 << 20, metavar="BYTES", help="(%(default)s)")
    parser.add_argument("--insecure", action="store_true", help="no TLS, no node keys: on this machine only")
    parser.add_argument("--log-json", action="store_true", help="log files have a JSON object a line")
    return parser


def _logs(folder: Path, as_json: bool) -> None:
    """fedapp's and Flower's lines to a file that rotates; to the terminal only warnings of either."""
    logging.raiseExceptions = False  # a full disk costs lines, and no traceback for each
    file = to_file(folder / "server.log", as_json)
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("fedapp", "flwr", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [file, terminal], False
        logger.setLevel(logging.WARNING if name == "uvicorn" else logging.INFO)
