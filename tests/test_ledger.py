"""The ledger: what adds up to what, what is refused, and that no crash and no race ever counts too little."""

import json
import logging
import math
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp

from fedapp import cli
from fedapp.errors import ConfigError, FedappError
from fedapp.privacy import accounting, filter, renyi
from fedapp.privacy.filter import FILTER, Unit, as_text, cost
from fedapp.privacy.ledger import BudgetSpent, Ledger, TwiceInRun, fingerprint
from fedapp.privacy.ledger_backup import bring_back
from fedapp.privacy.ledger_file import opened
from fedapp.privacy.release import ORDERS, Curve, Gaussian, Release, SharedGaussian

PLAIN = Gaussian(2.0, "none", 1.0, 1, "add_remove")
SAMPLED = Gaussian(1.0, "poisson", 0.05, 20, "add_remove")
REPLACED = Gaussian(4.0, "none", 1.0, 1, "replace")
SHARED = SharedGaussian(4.0, 1000, 9, 0.5, 2)
LAPLACE = Curve("laplace", tuple(0.01 * order for order in ORDERS), 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db", new=True)


def charge(ledger: Ledger, release: Release | None = PLAIN, unit: Unit = "example", **more: Any) -> None:
    given: dict[str, Any] = {"data_id": "a", "run_id": 7, "server_round": 1}
    if release:
        given |= {"mechanism": "example", "adversary": "the server too"}
    given |= more
    ledger.charge(unit=unit if release else None, releases=(release,) if release else (), **given)


# How releases add up


@pytest.mark.parametrize(
    "releases", [(PLAIN,) * 5, (SAMPLED,), (PLAIN, SAMPLED, LAPLACE), (REPLACED, SAMPLED), (SHARED, REPLACED)]
)
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_epsilon_is_that_of_dp_accounting_at_each_orders_share(
    ledger: Ledger, releases: tuple[Release, ...], delta: float
) -> None:
    """An independent conversion of the summed curve (dp-accounting), at delta over the number of orders."""
    for release in releases:
        charge(ledger, release)
    total = np.sum([renyi.rdp(release) for release in releases], axis=0)
    at = [ORDERS.index(order) for order in FILTER]
    spent = ledger.spent("a", delta)["example"]
    assert spent == pytest.approx(compute_epsilon(FILTER, total[at], delta / len(FILTER))[0], rel=1e-12)


@pytest.mark.parametrize("release", [PLAIN, SAMPLED, Gaussian(30.0, "none", 1.0, 15, "add_remove")])
def test_the_filter_costs_a_little_and_never_gains(release: Gaussian) -> None:
    tight = accounting.spent_by((release,), 1e-5).epsilon
    assert tight < filter.epsilon(cost(as_text(release), "example", "example"), 1e-5) < 1.6 * tight


def test_a_sum_does_not_depend_on_how_it_was_written_down(ledger: Ledger) -> None:
    for number in range(3):
        charge(ledger, SAMPLED, server_round=number)
    charge(ledger, Gaussian(1.0, "poisson", 0.05, 60, "add_remove"), data_id="b")
    assert ledger.spent("a")["example"] == pytest.approx(ledger.spent("b")["example"], rel=1e-12)
    assert ledger.spent("a", 1e-7)["example"] > ledger.spent("a")["example"]
    assert ledger.spent("nothing yet") == {"example": 0.0, "client": 0.0}


@pytest.mark.parametrize(
    ("unit", "release", "example", "client"),
    [
        ("example", PLAIN, PLAIN, None),
        ("client", REPLACED, REPLACED, REPLACED),
        ("client", PLAIN, Gaussian(2.0, "none", 1.0, 1, "replace"), PLAIN),  # 2C: the client stays, changed
        ("client", SHARED, SHARED, SHARED),
        ("client", LAPLACE, LAPLACE, LAPLACE),
        ("client", None, None, None),
    ],
)
def test_what_a_release_costs_either_unit(
    ledger: Ledger, unit: Unit, release: Release | None, example: Release | None, client: Release | None
) -> None:
    charge(ledger, release, unit)
    spent = ledger.spent("a")
    for name, as_if in (("example", example), ("client", client)):
        total = np.full(len(ORDERS), np.inf) if as_if is None else renyi.rdp(as_if)
        wanted = filter.epsilon(total[[ORDERS.index(order) for order in FILTER]], 1e-5)
        assert spent[name] == wanted  # type: ignore[index]
        assert math.isinf(wanted) == (as_if is None)


def test_releases_of_both_units_and_purposes_add_up(ledger: Ledger) -> None:
    charge(ledger, REPLACED, "client")
    once = ledger.spent("a")
    charge(ledger, REPLACED, "client", purpose="evaluate")
    twice = ledger.spent("a")
    assert twice["client"] == twice["example"] > once["client"]
    charge(ledger, SAMPLED, "example")
    assert ledger.spent("a")["example"] > twice["example"]
    assert ledger.spent("a")["client"] == math.inf


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.05), (2.0, 0.3), (0.7, 0.01), (5.0, 0.9)])
def test_one_contribution_for_another_under_poisson_sampling(noise: float, rate: float) -> None:
    """The bound lies above the true divergence, integrated here for the worst pair, at +C and at -C."""
    x = np.linspace(-80 * noise, 80 * noise, 400_001)

    def log_density(centre: float) -> NDArray[np.float64]:
        both = [
            math.log1p(-rate) - x**2 / (2 * noise**2),
            math.log(rate) - (x - centre) ** 2 / (2 * noise**2),
        ]
        values: NDArray[np.float64] = logsumexp(both, axis=0) - math.log(noise * math.sqrt(2 * math.pi))
        return values

    plus, minus, step = log_density(1.0), log_density(-1.0), math.log(x[1] - x[0])
    bound = cost(as_text(Gaussian(noise, "poisson", rate, 1, "add_remove")), "client", "example")
    for order, known in zip(FILTER[:9], bound[:9], strict=True):
        true = logsumexp(order * plus + (1 - order) * minus + step) / (order - 1)
        assert true <= known * (1 + 1e-6)
    assert bound[0] < 12 * (logsumexp(1.5 * plus - 0.5 * minus + step) / 0.5)


def test_an_event_as_it_is_written_down(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was released by which mechanism, at which noise and rate, how often, and against whom."""
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    charge(ledger, SAMPLED, server_round=3, node=9)
    charge(ledger, SHARED, "client", run_id=8, mechanism="distributed_gaussian", adversary="somebody")
    charge(ledger, None, run_id=8, purpose="evaluate")
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        rows = db.execute(
            "SELECT id, unit, mechanism, adversary, run, round, purpose, time FROM events"
        ).fetchall()
        texts = [text for (text,) in db.execute("SELECT release FROM events")]
    db.close()
    assert rows == [
        ("a", "example", "example", "the server too", "7/9", 3, "train", 1000.5),
        ("a", "client", "distributed_gaussian", "somebody", "8/0", 1, "train", 1000.5),
        ("a", None, "none", "nobody", "8/0", 1, "evaluate", 1000.5),
    ]
    assert [text and json.loads(text) for text in texts] == [
        {"noise": 1.0, "sampling": "poisson", "rate": 0.05, "count": 20, "adjacency": "add_remove"},
        {"noise": 4.0, "values": 1000, "shares": 9, "variance": 0.5, "count": 2, "adjacency": "replace"},
        None,
    ]


# Limits


def test_a_release_past_the_limit_is_refused_and_leaves_no_trace(ledger: Ledger, tmp_path: Path) -> None:
    ledger.set_limit("a", "example", 6.0, 1e-5)
    for number in range(100):
        try:
            charge(ledger, SAMPLED, server_round=number)
        except BudgetSpent as error:
            refused = error
            break
    before = (tmp_path / "ledger.db").read_bytes()
    assert number > 2
    assert 5.0 < ledger.spent("a")["example"] <= 6.0
    assert "of the example-level limit of 6 at delta 1e-05 that a has" in str(refused)
    with pytest.raises(BudgetSpent):
        charge(ledger, SAMPLED, data_id="a", fingerprint="new content")
    assert (tmp_path / "ledger.db").read_bytes() == before
    charge(ledger, Gaussian(1000.0, "none", 1.0, 1, "add_remove"))  # what still fits may pass
    assert ledger.count("a") == number + 1


def test_limits_of_both_units_bind(ledger: Ledger) -> None:
    ledger.set_limit("a", "client", 8.0, 1e-5)
    for release in (SAMPLED, None):  # either would cost a client everything
        with pytest.raises(BudgetSpent, match="epsilon inf of the client-level limit of 8"):
            charge(ledger, release)
    charge(ledger, REPLACED, "client")
    ledger.set_limit("a", "example", 0.1, 1e-5)
    with pytest.raises(BudgetSpent, match=r"example-level limit of 0\.1"):
        charge(ledger, Gaussian(1e6, "none", 1.0, 1, "replace"), "client")


def test_what_stands_for_a_whole_run_is_written_down_once(ledger: Ledger) -> None:
    whole = Gaussian(3.0, "poisson", 0.1, 50, "add_remove")
    for number in range(1, 4):
        charge(ledger, whole, "client", server_round=number, once=True)
    assert ledger.count("a") == 1
    charge(ledger, whole, "client", run_id=8, once=True)
    charge(ledger, Gaussian(2.0, "poisson", 0.1, 50, "add_remove"), "client", once=True)
    assert ledger.count("a") == 3


def test_a_round_that_a_whole_run_does_not_stand_for_is_charged(ledger: Ledger) -> None:
    """Rounds that come again, or after a later one, would be more releases than were planned."""
    whole = Gaussian(2.0, "poisson", 0.1, 100, "add_remove")
    for number, due in ((1, 1), (2, 1), (3, 1), (3, 2), (2, 3), (4, 3)):
        charge(ledger, whole, "client", server_round=number, once=True)
        assert ledger.count("a") == due, number
        ledger.store("a", 7, number, "train", b"reply")
    charge(ledger, whole, "client", server_round=5, once=True)
    charge(ledger, whole, "client", server_round=5, once=True)  # it was killed before the reply was made
    assert ledger.count("a") == 3
    ledger.forget()
    charge(ledger, whole, "client", server_round=4, once=True)
    assert ledger.count("a") == 4


def test_without_a_limit_all_is_written_down_and_nothing_refused(ledger: Ledger) -> None:
    charge(ledger, None)
    charge(ledger, None)
    assert ledger.count("a") == 2
    assert ledger.spent("a") == {"example": math.inf, "client": math.inf}


@settings(deadline=None, max_examples=15)
@given(
    epsilon=st.floats(0.1, 20.0),
    events=st.lists(
        st.tuples(
            st.sampled_from([PLAIN, SAMPLED, REPLACED, SHARED, LAPLACE]),
            st.sampled_from(["example", "client"]),
            st.sampled_from(["a", "b", "c"]),
        ),
        max_size=12,
    ),
    overlaps=st.sets(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), max_size=2),
)
def test_whatever_is_asked_no_limit_is_passed(
    tmp_path_factory: pytest.TempPathFactory,
    epsilon: float,
    events: list[tuple[Release, Unit, str]],
    overlaps: set[tuple[str, str]],
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.db", new=True)
    ledger.set_limit("a", "example", epsilon, 1e-6)
    for one, other in sorted(overlaps):
        ledger.overlap(one, other)
    passed = 0
    for release, unit, data_id in events:
        try:
            charge(ledger, release, unit, data_id=data_id)
            passed += 1
        except BudgetSpent:
            pass
        assert ledger.spent("a", 1e-6)["example"] <= epsilon
    counts = {tuple(ids): ledger.count(ids[0]) for ids in ledger.budgets()}
    assert sum(counts.values()) == passed


# Whose budget it is


def test_ids_that_overlap_share_one_budget_and_every_limit(ledger: Ledger) -> None:
    charge(ledger, SAMPLED, data_id="a")
    charge(ledger, SAMPLED, data_id="b")
    alone = ledger.spent("a")["example"]
    ledger.set_limit("b", "example", alone * 1.01, 1e-5)
    ledger.set_limit("c", "client", 9.0, 1e-5)
    ledger.overlap("a", "b")
    assert ledger.spent("a") == ledger.spent("b")
    assert ledger.spent("a")["example"] > alone
    with pytest.raises(BudgetSpent, match="that b has"):
        charge(ledger, PLAIN, data_id="a")
    ledger.overlap("b", "c")
    assert ledger.budgets() == [["a", "b", "c"]]
    assert {limit.id for limit in ledger.limits("a")} == {"b", "c"}


def test_the_same_content_under_another_id_opens_no_budget(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    charge(ledger, SAMPLED, data_id="a", fingerprint="x")
    charge(ledger, SAMPLED, data_id="a", fingerprint="x")
    assert not caplog.records
    charge(ledger, SAMPLED, data_id="b", fingerprint="x")
    assert "b has the same content as a: they share one budget" in caplog.text
    assert ledger.count("b") == 3
    caplog.clear()
    charge(ledger, SAMPLED, data_id="b", fingerprint="y")
    assert "the content of b has changed: its budget goes on" in caplog.text
    assert ledger.count("a") == 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_fingerprints_are_of_content_and_names_below_a_folder(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / "1.png").write_bytes(b"123")
    (tmp_path / "three" / "dog").mkdir()
    (tmp_path / "three" / "cat" / "1.png").rename(tmp_path / "three" / "dog" / "1.png")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two") != fingerprint(tmp_path / "three")
    (tmp_path / "a.csv").write_bytes(b"x,y")
    (tmp_path / "b.csv").write_bytes(b"x,y")
    assert fingerprint(tmp_path / "a.csv") == fingerprint(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_bytes(b"x,z")
    assert fingerprint(tmp_path / "a.csv") != fingerprint(tmp_path / "b.csv")


# One node of a run


def test_a_run_gets_replies_of_one_budget_from_one_node(ledger: Ledger) -> None:
    """Two replies in one sum move it by 2C: the RDP of 4, where two events say 2."""
    charge(ledger, node=1)
    charge(ledger, node=1, server_round=2)
    charge(ledger, node=1, purpose="evaluate")
    with pytest.raises(TwiceInRun, match=r"^the data a are in this run through another node: take one"):
        charge(ledger, node=2)
    charge(ledger, node=2, run_id=77)
    charge(ledger, node=2, data_id="b")
    ledger.overlap("b", "c")
    for unit, release in (("example", PLAIN), (None, None)):
        with pytest.raises(TwiceInRun, match=r"^the data c overlap with b, which is in this run"):
            charge(ledger, release, unit, node=3, data_id="c")  # type: ignore[arg-type]
    assert (ledger.count("a"), ledger.count("b")) == (4, 1)


def test_a_reply_is_of_the_node_that_made_it(ledger: Ledger) -> None:
    ledger.store("a", 7, 1, "train", b"of 1", node=1)
    ledger.store("a", 7, 1, "train", b"of 2", node=2)
    assert [ledger.stored("a", 7, 1, "train", node=n) for n in (1, 2, 3)] == [b"of 1", b"of 2", None]


# Replies that are sent again


def test_a_stored_reply_comes_back_as_it_was(ledger: Ledger, tmp_path: Path) -> None:
    reply = os.urandom(1000)
    ledger.store("a", 2**63 + 5, 3, "train", reply)
    assert ledger.stored("a", 2**63 + 5, 3, "train") == reply
    for other in (("b", 2**63 + 5, 3, "train"), ("a", 5, 3, "train"), ("a", 2**63 + 5, 4, "train"),
                  ("a", 2**63 + 5, 3, "evaluate")):  # fmt: skip
        assert ledger.stored(*other) is None
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("UPDATE replies SET reply = ?", (reply[:-1] + b"?",))
    db.close()
    assert ledger.stored("a", 2**63 + 5, 3, "train") is None  # not the very same bytes: no reply
    ledger.store("a", 2**63 + 5, 4, "train", b"next")
    assert ledger.stored("a", 2**63 + 5, 3, "train") is None  # one round is kept


# Crashes and races


def in_child(work: Callable[[], object], statements: int | None = None) -> int:
    """Do it in a forked process, which kills itself before it runs more statements; returns its id."""
    pid = os.fork()
    if pid == 0:
        if statements is not None:
            _die_after(statements)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _die_after(statements: int) -> None:
    connect, left = sqlite3.connect, iter(range(statements))

    def counted(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **kwargs)
        db.set_trace_callback(lambda sql: None if next(left, None) is not None else _die())
        return db

    sqlite3.connect = counted  # type: ignore[assignment]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_before_any_statement_it_never_counts_too_little(tmp_path: Path) -> None:
    """Kill -9 before the first, second, ... statement; what was released by then must be written down."""
    path, released, killed = tmp_path / "ledger.db", tmp_path / "released", 0
    released.touch()
    Ledger(path, new=True).set_limit("a", "example", 1e6, 1e-5)

    def work() -> None:
        ledger = Ledger(path)
        for number in (1, 2):
            charge(ledger, server_round=number, fingerprint=f"content {number}")
            with released.open("a") as file:
                file.write("x")
            ledger.store("a", 7, number, "train", b"reply")

    for statements in range(100):
        _, status = os.waitpid(in_child(work, statements), 0)
        killed += os.WIFSIGNALED(status)
        assert Ledger(path).count("a") >= len(released.read_text())
        if not os.WIFSIGNALED(status):
            break
    assert killed > 25
    assert len(released.read_text()) >= killed / 2


def test_killed_at_any_time_it_never_counts_too_little(tmp_path: Path) -> None:
    path, released = tmp_path / "ledger.db", tmp_path / "released"
    released.touch()
    Ledger(path, new=True)

    def work() -> None:
        ledger = Ledger(path)
        with released.open("ab", buffering=0) as file:
            while True:
                charge(ledger)
                file.write(b"x")

    pauses = np.random.default_rng(0).uniform(0.03, 0.25, 25)
    for pause in pauses:
        child = in_child(work)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        made, written = len(released.read_bytes()), Ledger(path).count("a")
        assert made <= written <= made + len(pauses)
    assert made > 5


def test_a_commit_is_on_the_disk_once_it_returns(ledger: Ledger, tmp_path: Path) -> None:
    """What no kill shows, but a power cut would: SQLite's own settings, also of a file that had others."""
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        assert db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    db.close()
    charge(ledger)
    for connection in (opened(tmp_path / "ledger.db"), ledger._transaction()):
        with connection as db:
            for setting, value in (("synchronous", 3), ("fullfsync", 1), ("journal_mode", "delete")):
                assert db.execute(f"PRAGMA {setting}").fetchone() == (value,)


def test_two_nodes_at_once_pass_no_limit_and_lose_nothing(tmp_path: Path) -> None:
    path, released = tmp_path / "ledger.db", tmp_path / "released"
    ledger = Ledger(path, new=True)
    for _ in range(20):
        charge(ledger, data_id="apart")
    ledger.set_limit("a", "example", ledger.spent("apart")["example"], 1e-5)
    ledger.overlap("a", "b")

    def work(data_id: str) -> None:
        for _ in range(15):
            try:
                charge(Ledger(path), data_id=data_id)
            except BudgetSpent:
                continue
            with released.open("ab", buffering=0) as file:
                file.write(b"x")

    children = [in_child(lambda name=name: work(name)) for name in ("a", "b", "a")]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]  # waited for each other, and no more
    assert len(released.read_bytes()) == ledger.count("a") == 20  # of the 45 that were asked


# A ledger that fedapp of version 1 wrote


def of_version_1(path: Path) -> float:
    """A ledger as fedapp wrote it before events named their mechanism; returns what a client has spent."""
    shared = Curve("distributed Gaussian", tuple(0.02 * order for order in ORDERS), 1)
    with sqlite3.connect(path, isolation_level=None) as db:
        db.executescript("""
            CREATE TABLE data (id TEXT PRIMARY KEY, budget INTEGER NOT NULL);
            CREATE TABLE fingerprints (id TEXT NOT NULL, fingerprint TEXT NOT NULL,
                PRIMARY KEY (id, fingerprint));
            CREATE TABLE limits (id TEXT NOT NULL, unit TEXT NOT NULL, epsilon REAL NOT NULL,
                delta REAL NOT NULL, PRIMARY KEY (id, unit));
            CREATE TABLE events (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, unit TEXT,
                release TEXT, adversary TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
                purpose TEXT NOT NULL, time REAL NOT NULL);
            CREATE TABLE replies (id TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
                purpose TEXT NOT NULL, digest TEXT NOT NULL, reply BLOB NOT NULL,
                PRIMARY KEY (id, run, purpose));
            INSERT INTO data VALUES ('a', 1), ('b', 1);
            INSERT INTO fingerprints VALUES ('a', 'content');
            INSERT INTO limits VALUES ('a', 'client', 40.0, 1e-5);
            INSERT INTO events (id, unit, release, adversary, run, round, purpose, time) VALUES
                ('a', 'client', '{"adjacency": "replace", "count": 1, "noise": 4.0, "rate": 1.0,'
                    || ' "sampling": "none"}', 'server', '7/0', 1, 'train', 1000.5),
                ('b', 'client', '{"adjacency": "add_remove", "count": 50, "noise": 3.0, "rate": 0.1,'
                    || ' "sampling": "poisson"}', 'observers', '8/0', 2, 'train', 1001.5);
            INSERT INTO replies VALUES ('a', '7/0', 1, 'train',
                'a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3', X'313233');
            PRAGMA user_version = 1;
        """)
        db.execute(
            "INSERT INTO events (id, unit, release, adversary, run, round, purpose, time) "
            "VALUES ('a', 'client', ?, 'server', '9/0', 1, 'train', 1002.5)",
            (json.dumps({"mechanism": shared.mechanism, "rdp": shared.rdp, "count": 1, "orders": ORDERS}),),
        )
    db.close()
    sampled = Gaussian(3.0, "poisson", 0.1, 50, "add_remove")
    costs = [cost(as_text(release), "client", "client") for release in (REPLACED, sampled, shared)]
    return filter.epsilon(np.sum(costs, axis=0), 1e-5)


def events(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute("SELECT * FROM events ORDER BY number")]
    db.close()
    return rows


def test_a_ledger_of_version_1_keeps_all_that_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    spent, before = of_version_1(path), events(path)
    ledger = Ledger(path)
    assert ledger.spent("a")["client"] == pytest.approx(spent, rel=1e-12)
    assert (ledger.count("a"), ledger.budgets()) == (3, [["a", "b"]])
    assert [(limit.unit, limit.epsilon) for limit in ledger.limits("b")] == [("client", 40.0)]
    assert ledger.stored("a", 7, 1, "train") == b"123"
    named = [
        {"mechanism": "unknown", "adversary": "a server that follows the protocol"},  # whichever it was
        {"mechanism": "central_gaussian", "adversary": "observers of the models"},
        {"mechanism": "unknown", "adversary": "a server that follows the protocol"},
    ]
    assert events(path) == [row | words for row, words in zip(before, named, strict=True)]
    charge(ledger, REPLACED, "client", fingerprint="content")
    assert [row["mechanism"] for row in events(path)[3:]] == ["example"]
    ledger.set_limit("a", "client", ledger.spent("a")["client"], 1e-5)
    with pytest.raises(BudgetSpent):
        charge(ledger, REPLACED, "client")


def test_what_version_1_released_unprotected_holds_against_nobody(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    of_version_1(path)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE events SET unit = NULL, release = NULL WHERE number = 1")
    db.close()
    assert Ledger(path).mechanisms("a")[0] == ("none", "nobody", 1)
    assert Ledger(path).spent("a")["client"] == math.inf


def test_a_backup_of_version_1_is_brought_back(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.db", tmp_path / "copy.db"
    of_version_1(path)
    shutil.copy(path, copy)
    bring_back(copy, path)
    charge(Ledger(path), REPLACED, "client")
    with pytest.raises(FedappError, match="has 1 releases that the backup lacks"):
        bring_back(copy, path)
    of_version_1(tmp_path / "behind.db")
    bring_back(path, tmp_path / "behind.db")
    assert events(tmp_path / "behind.db") == events(path)


def test_killed_while_it_is_brought_up_to_date_a_ledger_is_whole(tmp_path: Path) -> None:
    versions = []
    for statements in range(100):
        path = tmp_path / f"{statements}.db"
        of_version_1(path)
        _, status = os.waitpid(in_child(lambda path=path: Ledger(path), statements), 0)  # type: ignore[misc]
        with sqlite3.connect(path) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
        db.close()
        versions.append((version, "mechanism" in events(path)[0]))
        assert Ledger(path).count("a") == 3
        if not os.WIFSIGNALED(status):
            break
    assert len(versions) > 10
    assert set(versions[:-1]) == {(1, False)}
    assert versions[-1] == (2, True)


# What is no ledger


def test_a_missing_ledger_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FedappError, match=r"there is no ledger .*typo.db: correct the path"):
        Ledger(tmp_path / "typo.db")
    with pytest.raises(FedappError, match="cannot be made"):
        Ledger(tmp_path / "no" / "folder.db", new=True)
    Ledger(tmp_path / "ledger.db", new=True).set_limit("a", "client", 1.0, 1e-5)
    assert (tmp_path / "ledger.db").stat().st_mode & 0o777 == 0o600
    assert Ledger(tmp_path / "ledger.db", new=True).budgets() == [["a"]]  # it is opened, not emptied


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 100)
    with pytest.raises(FedappError, match=r"cannot be used .file is not a database"):
        Ledger(tmp_path / "text")
    (tmp_path / "empty").touch()
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE things (x)")
    other.close()
    for name, new in (("empty", False), ("other.db", False), ("other.db", True)):
        with pytest.raises(FedappError, match="is no ledger of version 2"):
            Ledger(tmp_path / name, new)


def test_a_full_or_unwritable_ledger_says_so(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def full(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **kwargs)
        db.execute("PRAGMA max_page_count = 1")
        return db

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(FedappError, match="nothing is released without it"):
        ledger.store("a", 1, 1, "train", os.urandom(100_000))


def test_bad_values_are_named(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="unit must be one of example, client"):
        ledger.set_limit("a", "row", 1.0, 1e-5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="epsilon"):
        ledger.set_limit("a", "client", 0.0, 1e-5)
    with pytest.raises(ConfigError, match="delta"):
        ledger.set_limit("a", "client", 1.0, 1.0)
    with pytest.raises(ValueError, match="an unprotected release has no unit"):
        ledger.charge("a", "example", (), 1, 1, mechanism="example", adversary="the server too")
    with pytest.raises(ValueError, match="an unprotected release has no unit"):
        charge(ledger, mechanism=None)
    with pytest.raises(ValueError, match="an unprotected release has no unit"):
        charge(ledger, adversary=None)
    with pytest.raises(ValueError, match="an unprotected release has no unit"):
        ledger.charge("a", None, (PLAIN,), 1, 1, mechanism="example", adversary="the server too")


def test_a_curve_at_other_orders_is_not_misread(ledger: Ledger, tmp_path: Path) -> None:
    charge(ledger, LAPLACE)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("UPDATE events SET release = replace(release, '1024.0', '2048.0')")
    db.close()
    with pytest.raises(FedappError, match="at other orders"):
        ledger.spent("a")


# The command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["fedapp", "ledger", *arguments])
    cli.main()


def test_the_command_sets_joins_and_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "ledger.db")
    command(monkeypatch, "set-limit", path, "ward 3", "example", "8", "1e-6")
    charge(Ledger(path), SAMPLED, data_id="ward 4")
    command(monkeypatch, "overlap", path, "ward 3", "ward 4")
    capsys.readouterr()
    command(monkeypatch, "show", path)
    spent = Ledger(path).spent("ward 3", 1e-6)["example"]
    assert capsys.readouterr().out.splitlines() == [
        "ward 3, ward 4: 1 releases",
        "  1 by privacy=example, against the server too",
        f"  example  epsilon {spent:.4g} of 8 at delta 1e-06",
        "  client   epsilon inf without a limit at delta 1e-05",
    ]


def test_the_command_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "typo.db")
    for arguments, code, said in (
        (("show", path), 1, "fedapp: there is no ledger"),
        (("overlap", path, "a", "b"), 1, "fedapp: there is no ledger"),
        (("set-limit", path, "a", "example", "one", "1e-5"), 2, "usage: fedapp ledger"),
        (("set-limit", path, "a", "example", "0", "1e-5"), 1, "fedapp: epsilon must be a number above 0"),
        (("set-limit", path, "a", "row", "1", "1e-5"), 2, "invalid choice: 'row'"),
        ((), 2, "usage: fedapp ledger"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(monkeypatch, *arguments)
        assert ended.value.code == code
        assert said in capsys.readouterr().err
