"""What a node tells a monitor on its own machine, in which words, and what its log keeps to itself."""

import io
import logging
import math
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supercore.protobuf.client import ProtobufRequestContext
from prometheus_client.parser import text_string_to_metric_families

from fedapp.deploy import node
from fedapp.deploy.activity import Activity
from fedapp.deploy.client_metrics import Books, watched
from fedapp.deploy.executor import Discreet
from fedapp.deploy.metrics import Metric, metric, process, text
from fedapp.deploy.server_metrics import of_runs
from fedapp.errors import ConfigError, DataError
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.release import Gaussian
from fedapp.report.folder import Round

NOISED = Gaussian(2.0, "none", 1.0, 1, "add_remove")
MECHANISM, ADVERSARY = "example", "the server too"
ROUND = Round(1, 0.5, 1.0, 10, 20, 0.3, 1.5, 2, 0, {"encode": 0.5, "train": None})


def values(said: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What a reader of Prometheus' makes of it."""
    families = text_string_to_metric_families(said)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


# The text


def test_the_text_is_that_of_the_format() -> None:
    """The documented form (Prometheus, exposition formats, 0.0.4), letter for letter."""
    odd = 'a "b"\\c\nd'
    found = text([
        Metric("a_bytes_total", "counter", "Bytes.", [({"run": odd, "x": "y"}, 3.0), ({}, 1.5)]),
        Metric("none", "gauge", "Nothing.", []),
        metric("b", "gauge", "Infinite.", math.inf),
    ])  # fmt: skip
    assert found.decode() == (
        "# HELP a_bytes_total Bytes.\n# TYPE a_bytes_total counter\n"
        'a_bytes_total{run="a \\"b\\"\\\\c\\nd",x="y"} 3\na_bytes_total 1.5\n'
        "# HELP b Infinite.\n# TYPE b gauge\nb +Inf\n"
    )
    assert values(found.decode())[("a_bytes_total", frozenset({("run", odd), ("x", "y")}))] == 3


def spending(path: Path) -> Iterator[Metric]:
    ledger = Ledger(path, new=True)
    ledger.set_limit("ward 3", "example", 8.0, 1e-5)
    ledger.charge("ward 3", "example", [NOISED], 1, 1, mechanism=MECHANISM, adversary=ADVERSARY)
    return Books(path, "ward 3").metrics()


def test_names_kinds_and_units_are_those_that_prometheus_asks_for(tmp_path: Path) -> None:
    """https://prometheus.io/docs/practices/naming: base units, counters end in _total, nothing else does."""
    found = [*Activity().metrics(), *process(), *of_runs({7: (5, [ROUND])}), *spending(tmp_path / "l.db")]
    assert len({each.name for each in found}) == len(found) >= 20
    for each in found:
        assert re.fullmatch(r"(fedapp|process)_[a-z_]+", each.name)
        assert (each.kind == "counter") == each.name.endswith("_total"), each.name
        assert not re.search(r"_(ms|milliseconds|mb|megabytes|percent)(_|$)", each.name)
        assert each.said.endswith(".")
        assert each.values, each.name
        assert "\n" not in each.said
    kinds = {f.name: f.type for f in text_string_to_metric_families(text(found).decode())}
    assert set(kinds.values()) == {"counter", "gauge"}


def test_what_a_run_does_not_know_is_left_out() -> None:
    unknown = Round(1, None, None, 10, 20, None, 1.5, 2, 0)
    told = {each.name: each.values for each in of_runs({7: (None, [unknown]), 8: (4, [])})}
    for name in ("planned_rounds", "round", "accuracy_ratio", "epsilon", "stage_seconds_total"):
        assert ({"run_id": "7"} in [labels for labels, _ in told[f"fedapp_run_{name}"]]) == (name == "round")
    assert told["fedapp_run_uplink_bytes_total"] == [({"run_id": "7"}, 10.0), ({"run_id": "8"}, 0.0)]


# A node


def requested(activity: Activity, answer: httpx.Response | Exception) -> None:
    """One request of Flower's client through the activity."""
    context = ProtobufRequestContext("any", Any, httpx.Request("POST", "http://here", content=b"1234"))

    def call(_: ProtobufRequestContext) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    activity.intercept(context, call)


def get(port: int, path: str) -> tuple[int, str]:
    answer = httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False)
    return answer.status_code, answer.text


def test_health_of_a_node_is_whether_it_reaches_its_server_or_works() -> None:
    activity = Activity()
    with watched(0, activity) as port:
        assert get(port, "/health") == (503, "starting")
        with pytest.raises(httpx.ConnectError):
            requested(activity, httpx.ConnectError("no"))
        assert get(port, "/health") == (503, "starting")
        requested(activity, httpx.Response(200, content=b"12"))
        assert get(port, "/health") == (200, "ok")
        requested(activity, httpx.Response(503))  # of a proxy before it
        assert get(port, "/health") == (503, "unreachable")
        with activity.work("train"):
            assert get(port, "/health") == (200, "ok")
        assert get(port, "/health")[0] == 503
        requested(activity, httpx.Response(403))  # it says no, so it is there
        assert get(port, "/health")[0] == 200
        with pytest.raises(httpx.ReadTimeout):
            requested(activity, httpx.ReadTimeout("no"))
        assert get(port, "/health") == (503, "unreachable")
        assert get(port, "/")[0] == 404


def test_metrics_of_a_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    activity, ledger = Activity(), Ledger(tmp_path / "ledger.db", new=True)
    for data_id, most in (("ward 3", 8.0), ("ward 4", 3.0)):
        ledger.set_limit(data_id, "example", most, 1e-6)
    ledger.overlap("ward 3", "ward 4")
    ledger.charge("ward 3", "example", [NOISED], 1, 1, mechanism=MECHANISM, adversary=ADVERSARY)
    requested(activity, httpx.Response(200, content=b"12"))
    others = [(kind, 0) for kind in ("query.facts", "query.nonsense", "unheard of")]
    for kind, number in (("train", 3), ("train", 4), *others):
        with activity.work(kind, number):
            pass
    with watched(0, activity, Books(tmp_path / "ledger.db", "ward 3")) as port:
        status, said = get(port, "/metrics")
    assert status == 200
    found = values(said)
    expected: dict[tuple[str, frozenset[tuple[str, str]]], float] = {
        ("fedapp_client_connected", frozenset()): 1,
        ("fedapp_client_round", frozenset()): 4,
        ("fedapp_client_last_contact_timestamp_seconds", frozenset()): 1000,
        ("fedapp_client_sent_bytes_total", frozenset()): 4,
        ("fedapp_client_received_bytes_total", frozenset()): 2,
        ("fedapp_client_ledger_readable", frozenset()): 1,
        ("fedapp_client_messages_total", frozenset({("kind", "train")})): 2,
        ("fedapp_client_messages_total", frozenset({("kind", "query")})): 2,
        ("fedapp_client_messages_total", frozenset({("kind", "other")})): 1,
        ("fedapp_client_ledger_releases", frozenset({("data_id", "ward 3")})): 1,
    }
    at = {("data_id", "ward 3"), ("unit", "example"), ("delta", "1e-06")}
    expected["fedapp_client_ledger_epsilon", frozenset(at)] = ledger.spent("ward 3", 1e-6)["example"]
    expected["fedapp_client_ledger_epsilon_limit", frozenset(at)] = 3.0  # of what overlaps: the least
    assert {key: found.get(key) for key in expected} == expected
    (tmp_path / "ledger.db").unlink()
    gone = [each.name for each in Books(tmp_path / "ledger.db", "ward 3").metrics()]
    assert gone == ["fedapp_client_ledger_readable"]


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*--metrics-port"), watched(port, Activity()):
            pass


def test_only_this_machine_can_ask() -> None:
    with watched(0, Activity()) as port:
        for family, *_, address in socket.getaddrinfo(socket.gethostname(), port, type=socket.SOCK_STREAM):
            if not str(address[0]).startswith(("127.", "::1")):
                with socket.socket(family) as other:
                    assert other.connect_ex(address) != 0


# Logs


def test_what_a_process_says_is_in_the_nodes_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fedapp.client"):
        node._take_over(io.BytesIO(b"WARNING data check: x\n  File \xff\nERROR failed\n"))
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [("WARNING", "data check: x"), ("INFO", "  File \ufffd"), ("ERROR", "failed")]


@pytest.mark.parametrize(
    ("raised", "where", "words"),
    [
        (lambda: float("Wilhelmina"), True, False),
        (lambda: dict[str, int]()["Wilhelmina"], True, False),
        (lambda: throw(DataError("unknown values ['Wilhelmina']")), False, False),
        (lambda: throw(ConfigError("codec.rate=Wilhelmina")), False, True),
    ],
)
def test_exceptions_are_logged_without_words_that_may_quote_data(
    raised: Any, where: bool, words: bool
) -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(Discreet("%(levelname)s %(message)s"))
    own = logging.Logger("test")
    own.addHandler(handler)
    try:
        raised()
    except Exception as error:
        kind = type(error).__name__
        own.exception("a node failed")
    said = out.getvalue()
    assert said.startswith("ERROR a node failed\n")
    assert ("test_metrics.py" in said) == where
    assert said.splitlines()[-1].startswith(kind)
    assert ("Wilhelmina" in said.splitlines()[-1]) == words


def throw(error: Exception) -> None:
    raise error
