"""GET /metrics of `fedapp server`: nodes, runs, requests, and how far each run is."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from flwr.common.constant import Status
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.run import Run
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fedapp.deploy.bounded import Refusals
from fedapp.deploy.metrics import CONTENT_TYPE, Metric, counted, process, text
from fedapp.errors import ConfigError
from fedapp.report.folder import Round, read_rounds
from fedapp.stages import total

_NODES = "registered", "online", "offline"
_RUNS = "pending", "running", "completed", "failed", "stopped"


@dataclass(frozen=True)
class Metrics:
    """ASGI app: what an operator's Prometheus reads. Who may ask is the front's to know.

    Runs are told of while they go on, and the one that ended last: labels stay few however many runs
    there were. `answered` counts answers by their status, `refusals` those that were refused.
    """

    state: LinkState
    runs: Path
    answered: Counter[int]
    refusals: tuple[Refusals, ...]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["method"] != "GET":
            await Response(status_code=405)(scope, receive, send)
            return
        requests = list(self._requests())  # here, for it is this thread that counts them
        state = await run_in_threadpool(lambda: [*self._state(), *process()])
        await Response(text([*state, *requests]), media_type=CONTENT_TYPE)(scope, receive, send)

    def _requests(self) -> Iterator[Metric]:
        codes = {str(status): float(count) for status, count in self.answered.items()}
        yield counted("fedapp_requests_total", "Requests answered, by HTTP status.", "code", codes)
        reasons = Counter[str]()
        for one in self.refusals:
            reasons.update(one.counts)
        yield counted("fedapp_refused_requests_total", "Requests refused, by reason.", "reason", reasons)

    def _state(self) -> Iterator[Metric]:
        state = self.state
        nodes = Counter(node.status for node in state.get_node_info())
        yield Metric("fedapp_nodes", "gauge", "Nodes, by status.", _by_status(nodes, _NODES))
        runs = state.get_run_info()
        statuses = Counter(run.status.sub_status or run.status.status for run in runs)
        yield Metric("fedapp_runs", "gauge", "Runs, by status.", _by_status(statuses, _RUNS))
        yield from of_runs({run.run_id: _rounds(self.runs / str(run.run_id)) for run in _told_of(runs)})


def of_runs(runs: dict[int, tuple[int | None, list[Round]]]) -> Iterator[Metric]:
    """How far runs are, by their numbers, of the rounds that each has planned and those that it finished."""
    done = {number: rounds for number, (_, rounds) in runs.items() if rounds}

    def last(name: str, said: str, value: Callable[[Round], float | None]) -> Metric:
        found = ((number, value(rounds[-1])) for number, rounds in done.items())
        known = [({"run_id": str(number)}, float(v)) for number, v in found if v is not None]
        return Metric(name, "gauge", said, known)

    def sums(name: str, said: str, value: Callable[[Round], float]) -> Metric:
        found = ((number, sum(map(value, rounds))) for number, (_, rounds) in runs.items())
        return Metric(name, "counter", said, [({"run_id": str(number)}, float(v)) for number, v in found])

    planned = [({"run_id": str(n)}, float(most)) for n, (most, _) in runs.items() if most is not None]
    yield Metric("fedapp_run_planned_rounds", "gauge", "Rounds that the run is to have.", planned)
    yield last("fedapp_run_round", "The last round that is finished.", lambda r: r.round)
    yield last("fedapp_run_accuracy_ratio", "Accuracy after that round.", lambda r: r.accuracy)
    yield last("fedapp_run_epsilon", "Epsilon that the run has spent.", lambda r: r.epsilon)
    yield sums("fedapp_run_uplink_bytes_total", "Bytes from nodes.", lambda r: r.uplink_bytes)
    yield sums("fedapp_run_downlink_bytes_total", "Bytes to nodes.", lambda r: r.downlink_bytes)
    yield sums("fedapp_run_replies_total", "Replies of nodes.", lambda r: r.replies)
    yield sums("fedapp_run_failures_total", "Replies that were asked for in vain.", lambda r: r.failures)
    yield sums("fedapp_run_seconds_total", "Time of all its rounds.", lambda r: r.seconds)
    stages = [
        ({"run_id": str(number), "stage": stage}, seconds)
        for number, rounds in done.items()
        for stage, seconds in (total([each.stages for each in rounds]) or {}).items()
        if seconds is not None
    ]
    yield Metric("fedapp_run_stage_seconds_total", "counter", "Time of its rounds, by stage.", stages)


def _told_of(runs: Sequence[Run]) -> list[Run]:
    """Those that go on, and the one that ended last."""
    over = [run for run in runs if run.status.status == Status.FINISHED]
    last = sorted(over, key=lambda run: run.finished_at)[-1:]
    return [*(run for run in runs if run.status.status != Status.FINISHED), *last]


def _rounds(folder: Path) -> tuple[int | None, list[Round]]:
    """How many rounds a run has planned, as far as its folder tells, and those that are finished."""
    try:
        planned = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["rounds"]
        return int(planned), read_rounds(folder)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, ConfigError):  # none yet, or damaged
        return None, []


def _by_status(counts: Counter[str], known: Sequence[str]) -> list[tuple[dict[str, str], float]]:
    """The counts, with zeros: what is missing alerts nobody."""
    return [({"status": name}, float(counts[name])) for name in sorted({*known, *counts})]
