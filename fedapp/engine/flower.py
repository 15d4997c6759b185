"""Flower's simulation runtime as an engine: clients are actors of Ray, on this machine or on a cluster."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from queue import Queue
from threading import Event, Thread
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedapp import check
from fedapp.errors import ConfigError, FedappError

_POLL = 0.1  # seconds between looks for the first answer


@dataclass(frozen=True)
class Flower:
    """Actors of Ray train one client at a time each; they import the app and read the data themselves.

    address: of a Ray cluster that runs already ("auto": the one of this machine), each machine of which has
    this fedapp and the data; null starts Ray here, for this run. workers: how many actors, here; null: as
    many as fit. cpus, gpus: what one takes of what Ray counts.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None:
            check.whole("engine.workers", self.workers, 1, 1024)
        check.real("engine.cpus", self.cpus, above=0.0, high=1024.0)
        check.real("engine.gpus", self.gpus, low=0.0, high=1024.0)
        if self.address is not None and self.workers is not None:
            raise ConfigError(
                f"engine.workers={self.workers} is for this machine, and the cluster engine.address="
                f"{self.address} has as many as fit: leave engine.workers out, and set engine.cpus"
            )

    @contextmanager
    def grid(self, app: ClientApp, clients: int) -> Iterator[Grid]:
        """Flower's grid over so many nodes, one a partition. Ends the actors, and Ray where it started it.

        The runtime has a thread of its own, and the rounds keep this one, which Ctrl-C reaches; actors then
        finish the clients that they train, since Ray aborts a process that leaves while it waits. Raises
        ConfigError without the extra `ray`, FedappError where the runtime does not start.
        """
        if find_spec("ray") is None:
            raise ConfigError(
                "engine=flower needs Ray: pip install 'flwr[simulation]>=1.41,<1.42' (fedapp's extra `ray`), "
                "or set engine=local"
            )
        handed, over, server = Queue[Grid | Exception](), Event(), ServerApp()

        @server.main()
        def hand_over(grid: Grid, context: Context) -> None:
            handed.put(grid)
            over.wait()

        def simulate() -> None:
            from flwr.simulation import run_simulation

            try:
                run_simulation(server, app, clients, backend_config=self._backend())
            except Exception as error:
                handed.put(error)

        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it warns that `run_simulation` is to go
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        runtime = Thread(target=simulate, daemon=True)
        runtime.start()
        try:
            yield _started(handed)
        finally:
            over.set()
            runtime.join()

    def _backend(self) -> dict[str, Any]:
        """What Flower passes on to Ray."""
        here = {} if self.workers is None else {"num_cpus": max(1, round(self.workers * self.cpus))}
        return {
            "init_args": {
                **(here if self.address is None else {"address": self.address}),
                "logging_level": "ERROR",
                "log_to_driver": True,
            },
            "client_resources": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }


def _started(handed: "Queue[Grid | Exception]") -> Grid:
    """The grid, once a node has answered: what keeps the runtime from starting shows at once."""
    grid, asked = handed.get(), set[str]()
    while isinstance(grid, Grid) and not (asked and list(grid.pull_messages(asked))):
        if not handed.empty():
            grid = handed.get()
        elif not asked and (nodes := list(grid.get_node_ids())):
            asked = set(grid.push_messages([Message(RecordDict(), nodes[0], MessageType.QUERY)]))
        time.sleep(_POLL)
    if isinstance(grid, Grid):
        return grid
    cause: BaseException = grid
    while cause.__cause__ is not None:
        cause = cause.__cause__
    raise FedappError(
        f"Flower's simulation runtime did not start ({cause}): see that Ray has engine.cpus and engine.gpus "
        "for one client, and that engine.address is right"
    ) from grid
