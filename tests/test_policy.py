"""The client's policy, and policy and ledger around whole messages: what is declined, charged, sent again."""

import logging
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_to_proto
from grids import all_of, local
from hypothesis import given
from hypothesis import strategies as st

import fedapp
from fedapp import config
from fedapp.client_app import FAILED, client_app
from fedapp.downlink import HOLDS, Coded, Downlink
from fedapp.engine.local import LocalGrid
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.privacy import consent
from fedapp.privacy.consent import releases
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.policy import Policy, PolicyRefusal
from fedapp.privacy.release import Gaussian
from fedapp.records import ARRAYS, CONFIG, METRICS
from fedapp.rounds import Federation
from fedapp.tasks import Data
from fedapp.training import DpSgd

RULES = "tasks: [digits]\nprivacy: [none, example]\nmetrics: [num-examples]\n"
FAST = "task=digits model=logistic clients=3 rounds=3 evaluate=none downlink=plain privacy=none"
DP = "privacy=example privacy.epsilon=null privacy.noise_multiplier=2.0 trainer.steps=2"


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    LocalGrid(ClientApp(), [1], workers=0)  # sets the global that messages read the run and the node from
    # A checkout before another one on the path is no bundle that arrived.
    monkeypatch.setattr(consent, "installed", lambda: Path(fedapp.__file__).parent)


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


def policy(**rules: Any) -> Policy:
    return Policy(**{"tasks": ["digits", "csv"], "privacy": ["none", "example"],
                     "metrics": ["num-examples"]} | rules)  # fmt: skip


def load(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "policy.yaml").write_text(text)
    return Policy.load(tmp_path / "policy.yaml")


# Reading it


def test_a_whole_policy_is_read(tmp_path: Path) -> None:
    text = RULES + (
        "versions: ['0.1.0']\nepsilon: 4\ndelta: 1.0e-5\nnoise: 0.8\nsecure_aggregation: false\n"
        "columns: [age, dose, outcome]\nrows: {consent: ['yes'], site: [1, 2]}\nclasses: [0, 1]\n"
        "fraction: 0.5\nsalt: four secret words here\nexamples: 100000\nsteps: 200\nseconds: 600\n"
    )
    read = load(tmp_path, text)
    assert (read.tasks, read.classes, read.epsilon, read.seconds) == (("digits",), ("0", "1"), 4, 600)
    assert read.rows == {"consent": ("yes",), "site": ("1", "2")}
    assert load(tmp_path, RULES) == Policy(
        tasks=("digits",), privacy=("none", "example"), metrics=("num-examples",)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RULES + "colums: [age]", "unknown rules colums: there are classes, columns, counts, delta"),
        ("tasks: [csv]\nprivacy: [none]", "lacks metrics: list what you accept"),
        ("", "holds no rules: give at least tasks, privacy, metrics"),
        ("tasks: [", "cannot be read"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
        (RULES + "classes: [no, yes]", "policy.classes must list words, and YAML reads none in False"),
        (RULES + "classes: cats", r"policy.classes must be a list of words, got 'cats': write \[a, b\]"),
        (RULES + "rows: [consent]", "policy.rows must map columns to lists of values"),
        (RULES + "rows: {consent: [yes]}", "policy.rows.consent must list words"),
        (RULES + "fraction: 0.5", "policy.fraction=0.5 needs policy.salt"),
        (RULES + "fraction: 0\nsalt: words", "policy.fraction must be a number above 0"),
        (RULES + "epsilon: 3", "set both, or neither"),
        (RULES + "epsilon: 3\ndelta: 1", "policy.delta must be a number above 0 and below 1"),
        (RULES + "noise: -1", "policy.noise"),
        (RULES + "steps: 1.5", "policy.steps must be a whole number"),
        (RULES + "secure_aggregation: maybe", "policy.secure_aggregation must be true or false"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fraction: 0.5\nsalt: 735152", "needs policy.salt"),
        ("salt: 'words: 735152", "no YAML at line"),
        ("salt: words 735152: more", "no YAML at line 4, column 19"),
    ],
)
def test_no_error_tells_the_salt(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(RULES + text)
    with pytest.raises(ConfigError, match=said) as caught:
        Policy.load(path)
    assert "735152" not in str(caught.value)


def test_a_policy_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the policy .*none.yaml cannot be read"):
        Policy.load(tmp_path / "none.yaml")


# What a run may ask


@pytest.mark.parametrize(
    ("rules", "overrides", "said"),
    [
        ({"tasks": ["csv"]}, "", "tasks: task=digits is not among csv"),
        ({"versions": ["0.0.9"]}, "", "versions: fedapp .* is not among 0.0.9"),
        ({"privacy": ["example"]}, "", "privacy: privacy=none is not among example"),
        ({"privacy": ["none"]}, DP, "privacy: privacy=example is not among none"),
        ({"privacy": ["example"]}, f"{DP} privacy.test_seed=1", "privacy=none is not among example"),
        ({"secure_aggregation": True}, DP, "secure_aggregation: it is required, and this run has none"),
        ({"noise": 2.1}, DP, "noise: the noise multiplier is 2, at least 2.1 is due"),
        ({"noise": 0.1}, "", "noise: the noise multiplier is 0, at least 0.1 is due"),
        ({"epsilon": 0.5, "delta": 1e-5}, DP, r"epsilon: the planned run spends [\d.]+, at most 0.5 may be"),
        ({"epsilon": 50.0, "delta": 1e-5}, "", "epsilon: the planned run spends inf"),
        ({"epsilon": 50.0, "delta": 1e-6}, DP, "delta: it is 1e-05, at most 1e-06 may be"),
        ({"metrics": ["accuracy"]}, "", "metrics: train needs num-examples"),
        (
            {"metrics": ["num-examples"], "privacy": ["central_gaussian"]},
            "privacy=central_gaussian privacy.quantile=0.5",
            "metrics: train needs below-clip",
        ),
    ],
)
def test_each_rule_refuses_by_its_name(rules: dict[str, Any], overrides: str, said: str) -> None:
    job = job_of(overrides)
    with pytest.raises(PolicyRefusal, match=f"the client's policy refuses: .*{said}") as refusal:
        policy(**rules).check(job, "train", 1, releases(job))
    assert refusal.value.rule in rules


def test_what_keeps_to_every_rule_passes() -> None:
    job = job_of(DP)
    kept = policy(
        privacy=["example"], versions=[fedapp.__version__], noise=2.0, epsilon=8.0, delta=1e-5, metrics=[]
    )
    kept.check(job, "train", 3, releases(job))
    policy().check(job_of(), "train", 1, ())
    for outside in (0, 4):
        with pytest.raises(PolicyRefusal, match=f"round {outside} is outside the 3 planned rounds"):
            kept.check(job, "train", outside, releases(job))
    with pytest.raises(PolicyRefusal, match="evaluate needs accuracy"):
        policy().check(job_of(), "evaluate", 1, ())


@pytest.mark.parametrize("chosen", ["example trainer.steps=2", "local_gaussian"])
def test_a_cohort_costs_what_a_client_lets_itself_be_asked_for(chosen: str) -> None:
    """It declines any round beyond those of the public draws, so the run costs its budget and no more."""
    job = job_of(f"privacy={chosen} privacy.epsilon=4 cohort=1")
    kept = policy(privacy=["example", "local_gaussian"], epsilon=4.0, delta=1e-5)
    assert job.answers_at_most < job.rounds
    kept.check(job, "train", 1, releases(job))


@pytest.mark.parametrize("chosen", ["example trainer.steps=2", "distributed_gaussian", "distributed_example"])
def test_a_cohort_costs_all_rounds_where_no_client_counts_them(chosen: str) -> None:
    given = "privacy.epsilon=null privacy.noise_multiplier=2 rounds=8"
    job = job_of(f"privacy={chosen} {given} clients=6 cohort=3")
    few, all_ = (job.spent(8, rounds) for rounds in (job.cohorts.most, 8))
    assert few is not None
    assert all_ is not None
    assert few.epsilon < all_.epsilon
    kept = policy(privacy=[chosen.split()[0]], epsilon=(few.epsilon + all_.epsilon) / 2, delta=1e-5)
    with pytest.raises(PolicyRefusal, match="epsilon: the planned run spends"):
        kept.check(job, "train", 1, releases(job))


def test_a_release_is_what_dp_sgd_does_in_one_fit() -> None:
    assert releases(job_of(DP)) == (Gaussian(2.0, "poisson", 0.12, 2, "add_remove"),)
    assert releases(job_of()) == releases(job_of(f"{DP} privacy.test_seed=1")) == ()


def test_a_run_may_name_no_file_of_the_client() -> None:
    job = job_of("task=csv task.path=/etc/passwd model=mlp")
    with pytest.raises(PolicyRefusal, match=r"task.path names a file of the client's machine"):
        policy(tasks=["csv"]).check(job, "train", 1, ())


@pytest.mark.parametrize(
    ("rules", "overrides", "examples", "refused"),
    [
        ({"examples": 200}, "trainer.epochs=2", 100, None),
        ({"examples": 199}, "trainer.epochs=2", 100, "examples"),
        ({"steps": 14}, "trainer.epochs=2", 100, None),  # batches of 16: 7 an epoch
        ({"steps": 13}, "trainer.epochs=2", 100, "steps"),
        ({"steps": 1}, DP, 0, "steps"),
        ({"steps": 2, "examples": 1440}, DP, 10**9, None),  # 2 * 0.12 * 6000: public, whatever it holds
        ({"examples": 1439}, DP, 0, "examples"),
    ],
)
def test_local_work_is_bounded(
    rules: dict[str, Any], overrides: str, examples: int, refused: str | None
) -> None:
    trainer = job_of(overrides).trainer
    if refused is None:
        policy(**rules).check_work(trainer, examples)
        return
    with pytest.raises(PolicyRefusal, match="a round asks for more than") as refusal:
        policy(**rules).check_work(trainer, examples)
    assert refusal.value.rule == refused
    assert str(examples * 2) not in str(refusal.value)  # the text is public


def test_work_is_broken_off_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(PolicyRefusal, match=r"seconds: a round may take at most 0.2 s"):
        _busy(policy(seconds=0.2), 20)
    assert time.monotonic() < started + 5
    with policy(seconds=0.1).in_time():
        pass
    time.sleep(0.2)  # nothing is left behind


def _busy(kept: Policy, seconds: float) -> None:
    end = time.monotonic() + seconds
    with kept.in_time():
        while time.monotonic() < end:
            pass


# Which part of the data


def numbered(n: int) -> Data:
    return Data(torch.arange(n, dtype=torch.float32)[:, None], torch.arange(n) % 3)


def test_classes_are_filtered_by_name() -> None:
    shared = policy(classes=["cat", "dog"]).share(numbered(9), ["bird", "cat", "dog"])
    assert shared.x[:, 0].tolist() == [1, 2, 4, 5, 7, 8]
    assert shared.y.tolist() == [1, 2] * 3
    assert len(policy(classes=[]).share(numbered(9), ["bird", "cat", "dog"])) == 0
    assert len(policy().share(numbered(0), ["bird", "cat", "dog"])) == 0


@given(st.integers(0, 300), st.integers(0, 300), st.text(max_size=5))
def test_the_same_fraction_is_chosen_every_time(n: int, more: int, salt: str) -> None:
    kept = policy(fraction=0.4, salt=salt)
    chosen = kept.share(numbered(n), "abc").x[:, 0].tolist()
    longer = kept.share(numbered(n + more), "abc").x[:, 0].tolist()
    assert longer[: len(chosen)] == chosen
    both = policy(fraction=0.4, salt=salt, classes=["b"]).share(numbered(n), "abc").x[:, 0].tolist()
    assert both == [x for x in chosen if x % 3 == 1]


def test_the_fraction_is_a_fair_draw_that_the_salt_decides() -> None:
    n, found = 4000, {}
    for salt in ("one", "two"):
        found[salt] = set(policy(fraction=0.3, salt=salt).share(numbered(n), "abc").x[:, 0].tolist())
        assert abs(len(found[salt]) - 0.3 * n) < 4 * math.sqrt(n * 0.3 * 0.7)
    assert abs(len(found["one"] & found["two"]) - 0.09 * n) < 4 * math.sqrt(n * 0.09 * 0.91)


TABLE = "age,dose,name,site,outcome\n1,2,x,A,no\n3,4,y,B,yes\n5,6,z,A,yes\n7,8,w,C,no\n"
CSV = "task=csv task.features=[age,dose] task.class_names=[no,yes] task.label=outcome model=mlp"


def test_rows_and_columns_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(TABLE)
    config_of = {"data": str(tmp_path / "own.csv")}
    job = job_of(CSV)
    kept = policy(rows={"site": ["A", "B"]}, columns=["age", "dose", "outcome"])
    kept.check(job, "train", 1, ())
    assert kept.data(job.task, config_of).x.tolist() == [[1, 2], [3, 4], [5, 6]]
    both = policy(rows={"site": ["A"], "name": ["z"]}, classes=["yes"]).data(job.task, config_of)
    assert both.x.tolist() == [[5, 6]]
    assert list(kept.table(pd.read_csv(config_of["data"], dtype=str)).columns) == ["age", "dose", "outcome"]
    assert policy().data(job.task, config_of).y.tolist() == [0, 1, 1, 0]


def test_tables_are_refused_by_column(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(TABLE)
    job = job_of(CSV)
    for columns, named in ((["age", "outcome"], "dose"), (["age", "dose"], "outcome")):
        with pytest.raises(PolicyRefusal, match=f"columns: the column {named} is not among age"):
            policy(columns=columns).check(job, "train", 1, ())
    with pytest.raises(PolicyRefusal, match="rows: the client's table has no column consent"):
        policy(rows={"consent": ["yes"]}).data(job.task, {"data": str(tmp_path / "own.csv")})
    for rules in ({"rows": {"site": ["A"]}}, {"columns": ["age"]}):
        with pytest.raises(PolicyRefusal, match="kept for task=csv on the client's own table only"):
            policy(**rules).data(job_of().task, {"partition-id": 0})


# Around whole messages


class Node:
    """One client and what its participant set up."""

    def __init__(self, job: Job, tmp_path: Path, rules: str | None = RULES, books: bool = True) -> None:
        self.job, self.config = job, dict[str, bool | int | float | str]({"partition-id": 0})
        self.config |= {"num-partitions": job.clients}
        if rules is not None:
            (tmp_path / "policy.yaml").write_text(rules)
            self.config |= {"policy": str(tmp_path / "policy.yaml")}
        if books:
            self.ledger = Ledger(tmp_path / "ledger.db", new=True)
            self.config |= {"ledger": str(tmp_path / "ledger.db"), "data-id": "a"}
        self.restarts()

    def restarts(self, number: int = 2) -> None:
        self.context = Context(11, number, self.config, RecordDict(), {})

    def asked(self, server_round: int = 1, purpose: str = "train") -> Message:
        arrays = ArrayRecord(self.job.task.model(0).state_dict())
        terms = self.job.mechanism.terms({}) if self.job.mechanism else {}
        told = ConfigRecord({"server-round": server_round, **terms})
        content = RecordDict({ARRAYS: arrays, CONFIG: told})
        message = Message(content, self.context.node_id, purpose)
        return client_app(lambda _: self.job)(message, self.context)

    def spent(self) -> float:
        return self.ledger.spent("a")["example"]


def sent(reply: Message) -> bytes:
    data: bytes = recorddict_to_proto(reply.content).SerializeToString()
    return data


def test_without_policy_and_ledger_a_reply_is_what_it_was(tmp_path: Path) -> None:
    plain = sent(Node(job_of(), tmp_path, None, books=False).asked())
    assert plain == sent(Node(job_of(), tmp_path, RULES.replace("s]", "s, train_loss]")).asked())
    assert plain == sent(Node(job_of(), tmp_path, None).asked())


@pytest.mark.parametrize("codec", ["codec=identity", "codec=default"])
def test_a_declined_request_names_the_rule_and_costs_nothing(tmp_path: Path, codec: str) -> None:
    node = Node(job_of(codec), tmp_path, RULES.replace("none, ", ""))
    for purpose in ("train", "evaluate"):
        reply = node.asked(purpose=purpose)
        assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
        said = "the client's policy refuses: privacy: privacy=none is not among example"
        assert reply.error.reason == said
    assert node.spent() == 0.0
    assert not node.context.state


def test_work_that_is_refused_after_reading_the_data_is_not_charged(tmp_path: Path) -> None:
    node = Node(job_of(), tmp_path, f"{RULES}examples: 10\n")
    assert "examples: a round asks for more than 10" in str(node.asked().error.reason)
    assert node.spent() == 0.0


def test_a_private_round_is_charged_once_and_sent_again_as_the_same_bytes(tmp_path: Path) -> None:
    node = Node(job_of(DP), tmp_path)
    first = node.asked(1)
    once = node.spent()
    assert 0 < once < math.inf
    node.restarts()
    assert sent(node.asked(1)) == sent(first)
    assert node.spent() == once
    node.asked(2)
    assert node.spent() > once
    assert node.ledger.spent("a")["client"] == math.inf
    again = node.asked(1)  # only the last round is kept
    assert sent(again) != sent(first)
    assert node.ledger.count("a") == 3


def test_data_are_in_a_run_through_one_node(tmp_path: Path) -> None:
    node = Node(job_of(DP), tmp_path)
    assert node.asked(1).has_content()
    node.restarts(number=3)  # another one on this machine, and its ledger's id is the same by mistake
    assert node.asked(1).error.reason == consent.TWICE
    assert node.ledger.count("a") == 1
    node.config["data-id"] = "b"
    node.restarts(number=3)
    assert node.asked(1).has_content()


def test_a_repeat_whose_reply_was_not_kept_is_charged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash between the charge and the reply."""
    node = Node(job_of(DP), tmp_path)

    def crash(*args: object, **more: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "store", crash)
        assert node.asked(1).error.reason == FAILED
    assert node.ledger.count("a") == 1
    assert node.asked(1).has_content()
    assert node.ledger.count("a") == 2


@pytest.mark.parametrize(
    ("choice", "counted", "known"),
    [
        ("local_gaussian", [1, 2], (Gaussian(4.0, "none", 1.0, 1, "replace"),)),
        ("central_gaussian", [1, 1], (Gaussian(4.0, "poisson", 2 / 3, 3, "add_remove"),)),
        (
            "central_gaussian privacy.network=untrusted codec=public_step",
            [1, 2],
            (Gaussian(4.0, "none", 1.0, 1, "replace"),),
        ),
    ],
)
def test_client_level_rounds_are_charged_by_what_they_hide(
    tmp_path: Path, choice: str, counted: list[int], known: tuple[Gaussian, ...]
) -> None:
    """Each reply where it is noised itself; all rounds at the first where being drawn or not hides it."""
    job = job_of(f"privacy={choice} privacy.epsilon=null privacy.noise_multiplier=4.0 cohort=2")
    node = Node(job, tmp_path, RULES.replace("none, example", str(job.choices["privacy"])))
    assert releases(job) == known
    spent = []
    for number, count in enumerate(counted, 1):
        assert node.asked(number).has_content()
        assert node.ledger.count("a") == count
        spent.append(node.ledger.spent("a"))
    assert 0 < spent[0]["client"] <= spent[0]["example"] < math.inf
    assert (spent[1] == spent[0]) == (choice == "central_gaussian")
    assert "outside the 3 planned rounds" in str(node.asked(4).error.reason)


def test_a_spent_budget_declines_without_telling_figures(tmp_path: Path) -> None:
    node = Node(job_of(DP), tmp_path)
    node.asked(1)
    node.ledger.set_limit("a", "example", node.spent() * 1.01, 1e-5)
    before = node.ledger.count("a")
    reply = node.asked(2)
    assert reply.error.reason == consent.SPENT
    assert not any(figure.isdigit() for figure in reply.error.reason)
    assert node.ledger.count("a") == before
    assert sent(node.asked(1))  # what was paid for may still be sent again


def test_the_charge_is_on_the_disk_before_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, seen = Node(job_of(DP), tmp_path), list[int]()
    fit = DpSgd.fit

    def watched(*given: Any) -> Any:
        seen.append(Ledger(tmp_path / "ledger.db").count("a"))
        return fit(*given)

    monkeypatch.setattr(DpSgd, "fit", watched)
    node.asked(1)
    assert seen == [1]


def test_an_unprotected_reply_costs_everything_and_is_declined_under_any_limit(tmp_path: Path) -> None:
    node = Node(job_of("evaluate=clients"), tmp_path, RULES.replace("examples]", "examples, accuracy, loss]"))
    assert node.asked(1, "evaluate").has_content()
    assert node.ledger.spent("a") == {"example": math.inf, "client": math.inf}
    node.ledger.set_limit("a", "example", 1e6, 1e-5)
    assert node.asked(2).error.reason == consent.SPENT


def test_metrics_leave_by_name(tmp_path: Path) -> None:
    def metrics(rules: str) -> MetricRecord:
        return Node(job_of(), tmp_path, rules).asked().content.metric_records[METRICS]

    assert set(metrics(RULES)) == {"num-examples"}
    (tmp_path / "ledger.db").unlink()
    assert set(metrics(RULES.replace("s]", "s, train_loss]"))) == {"num-examples", "train_loss"}


def test_the_model_trains_on_what_is_shared(tmp_path: Path) -> None:
    whole = Node(job_of(), tmp_path, None, books=False).asked()
    part = Node(job_of(), tmp_path, f"{RULES}classes: [3, 4]\nfraction: 0.5\nsalt: words\n").asked()
    counts = [int(r.content.metric_records[METRICS]["num-examples"]) for r in (whole, part)]  # type: ignore[arg-type]
    assert 0 < counts[1] < 0.2 * counts[0]
    assert sent(part) != sent(whole)


def test_a_ledger_needs_an_id_and_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node(job_of(), tmp_path)
    del node.config["data-id"]
    node.restarts()
    assert node.asked().error.reason == FAILED
    assert "a ledger needs to know whose budget to charge" in caplog.text
    node.config |= {"data-id": "a", "ledger": str(tmp_path / "typo.db")}
    node.restarts()
    assert node.asked().error.reason == FAILED
    assert "there is no ledger" in caplog.text


def test_a_file_known_under_another_id_shares_its_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own.csv").write_text(TABLE)
    node = Node(job_of(CSV), tmp_path, RULES.replace("digits", "csv"))
    node.config |= {"data": str(tmp_path / "own.csv")}
    node.asked()
    node.config |= {"data-id": "b"}
    node.restarts()
    assert node.asked(2).has_content()
    assert "b has the same content as a" in caplog.text
    assert node.ledger.budgets() == [["a", "b"]]


def test_a_run_goes_on_without_who_declines(tmp_path: Path) -> None:
    """On the local engine, with a coded downlink: one of three declines, and holds no version."""

    job = job_of("downlink=coded codec=default engine.workers=1")
    (tmp_path / "policy.yaml").write_text(RULES.replace("none, ", ""))
    Ledger(tmp_path / "ledger.db", new=True)
    sizes = [len(part) for part in job.task.partitions()]
    job.prepare()
    with local(job).grid(client_app(lambda _: job), sizes, 3) as grid:
        grid._contexts[2].node_config["policy"] = str(tmp_path / "policy.yaml")
        grid._contexts[3].node_config |= {"ledger": str(tmp_path / "ledger.db"), "data-id": "a"}
        records = all_of(Federation(job, grid))
    assert [(record.replies, record.failures) for record in records] == [(2, 1)] * 3
    assert Ledger(tmp_path / "ledger.db").count("a") == 3


def test_a_node_that_makes_nothing_of_a_message_is_charged_nothing(tmp_path: Path) -> None:

    job = job_of("downlink=coded codec=default")
    node = Node(job, tmp_path)
    server = Downlink(Coded(), job.initial)
    weights = job.initial
    for step in (1, 2):
        weights = ArrayRecord({n: type(a)(a.numpy() + np.float32(0.1)) for n, a in weights.items()})
        content = RecordDict({ARRAYS: ArrayRecord(), CONFIG: ConfigRecord({"server-round": step})})
        (message,) = server.send(weights, [Message(content, 2, "train")])
        if step == 2:
            node.restarts()  # it forgets the version that the server believes it holds
        reply = client_app(lambda _: job)(message, node.context)
        assert (CONFIG in reply.content.config_records) == (step == 2)
        helps = server.again(reply)
    assert HOLDS in reply.content.config_records[CONFIG]
    assert node.ledger.count("a") == 1
    assert helps
    (following,) = server.send(weights, [Message(content, 2, "train")])
    assert METRICS in client_app(lambda _: job)(following, node.context).content.metric_records
    assert node.ledger.count("a") == 2


# Whose fedapp it is


def test_a_bundle_that_differs_from_what_is_installed_is_declined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = Path(fedapp.__file__).parent
    shutil.copytree(running, tmp_path / "site" / "fedapp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(config.CONF, tmp_path / "site" / "fedapp" / "conf", dirs_exist_ok=True)
    monkeypatch.undo()
    LocalGrid(ClientApp(), [1], workers=0)
    others = [entry for entry in sys.path if not (Path(entry) / "fedapp" / "__init__.py").exists()]
    monkeypatch.setattr("sys.path", [str(running.parent), str(tmp_path / "site"), *others])
    assert consent.installed() == tmp_path / "site" / "fedapp"
    node = Node(job_of(), tmp_path)
    assert node.asked(1).has_content()
    with (tmp_path / "site" / "fedapp" / "training.py").open("a") as file:
        file.write("\n")
    with caplog.at_level(logging.WARNING):
        reply = node.asked(2)
    assert "versions: the run brings a fedapp that differs from the installed one" in str(reply.error.reason)
    assert "differs from the installed one in fedapp/training.py" in caplog.text
    monkeypatch.setattr("sys.path", [str(running.parent), *others])
    assert consent.installed() == running  # nothing shadows it
