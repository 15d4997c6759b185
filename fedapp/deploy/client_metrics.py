"""GET /health and GET /metrics of `fedapp client`, on this machine alone (`--metrics-port`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from fedapp.deploy.activity import Activity
from fedapp.deploy.metrics import CONTENT_TYPE, Labels, Metric, metric, process, text
from fedapp.errors import ConfigError, FedappError
from fedapp.privacy.filter import UNITS
from fedapp.privacy.ledger import Ledger

_DELTA = 1e-5  # of data without a limit
_WAIT_S = 10.0  # for a request, and for who reads the answer


@dataclass(frozen=True)
class Books:
    """The ledger that a node keeps, and the id of its data in it."""

    ledger: Path
    data_id: str

    def metrics(self) -> Iterator[Metric]:
        """What the data have spent, and may spend: what `fedapp ledger show` tells."""
        found: list[Metric] = []
        try:
            found += self._spending()
        except FedappError:
            found.clear()
        name, said = "fedapp_client_ledger_readable", "Whether the ledger can be read."
        yield from [metric(name, "gauge", said, int(bool(found))), *found]

    def _spending(self) -> Iterator[Metric]:
        ledger, most = Ledger(self.ledger), dict[tuple[str, float], float]()
        for limit in ledger.limits(self.data_id):  # of overlapping data, too: the least binds
            at = limit.unit, limit.delta
            most[at] = min(most.get(at, limit.epsilon), limit.epsilon)
        deltas = sorted({delta for _, delta in most} or {_DELTA})
        spent = {delta: ledger.spent(self.data_id, delta) for delta in deltas}

        def labels(unit: str, delta: float) -> Labels:
            return {"data_id": self.data_id, "unit": unit, "delta": f"{delta:g}"}

        name, releases = "fedapp_client_ledger", ledger.count(self.data_id)
        yield Metric(f"{name}_releases", "gauge", "Releases so far.", [({"data_id": self.data_id}, releases)])
        epsilons = [(labels(unit, delta), spent[delta][unit]) for delta in deltas for unit in UNITS]
        yield Metric(f"{name}_epsilon", "gauge", "Epsilon that is spent.", epsilons)
        limits = [(labels(*at), epsilon) for at, epsilon in most.items()]
        yield Metric(f"{name}_epsilon_limit", "gauge", "The most that may be spent.", limits)


@contextmanager
def watched(port: int, activity: Activity, books: Books | None = None) -> Iterator[int]:
    """Answer on 127.0.0.1 for so long; yields the port, which 0 leaves open. Raises ConfigError."""

    class Answers(BaseHTTPRequestHandler):
        timeout = _WAIT_S

        def do_GET(self) -> None:
            if self.path == "/health":
                trouble = activity.trouble
                self._answer(503 if trouble else 200, "text/plain", (trouble or "ok").encode())
            elif self.path == "/metrics":
                found = [*activity.metrics(), *(books.metrics() if books else ()), *process()]
                self._answer(200, CONTENT_TYPE, text(found))
            else:
                self._answer(404, "text/plain", b"there are /health and /metrics")

        def log_message(self, *_: object) -> None:
            """Nothing: each scrape would be a line."""

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on 127.0.0.1 port {port} ({error}): choose another --metrics-port"
        ) from error
    with server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
