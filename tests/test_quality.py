"""The check of a client's data: what it counts, what stops training, and what of it leaves the client."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from grids import Elsewhere
from PIL import Image
from rich.console import Console

from fedapp import cli, config, server_app
from fedapp.client_app import client_app
from fedapp.deploy.frames import round_of
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.models import Logistic
from fedapp.nodes import checks
from fedapp.privacy.ledger import Ledger
from fedapp.records import ARRAYS, CONFIG
from fedapp.report.page import _data
from fedapp.tasks import Data
from fedapp.tasks.folders import ImageFolder
from fedapp.tasks.partition import Iid
from fedapp.tasks.quality import COUNTS, Findings, check_ranges, of_data, of_table
from fedapp.tasks.quality_cli import run
from fedapp.tasks.schema import Schema

SCHEMA = Schema("sick", ("no", "yes"), (("age", None), ("town", ("ulm", "york"))))
OWN = "task=csv task.features=[age,dose] task.class_names=[no,yes] task.label=sick model=logistic"
GOOD = "age,dose,sick\n" + "".join(f"{i},{i % 7},{'no' if i % 2 else 'yes'}\n" for i in range(20))


def job_of(overrides: str) -> Job:
    return config.job(config.compose(overrides))


def table(**columns: list[str | None]) -> pd.DataFrame:
    return pd.DataFrame(columns, dtype="str")


def said(found: Findings) -> str:
    return "\n".join(f"{problem.fatal}: {problem.said}" for problem in found.problems)


# What is counted


def test_a_good_table_has_no_problems() -> None:
    good = table(age=["1", "2", "3"], town=["ulm", "york", "ulm"], sick=["no", "yes", "no"])
    found = of_table(good, SCHEMA, (("age", 0, 120),))
    assert not found.problems
    assert {name: n for name, n in found.counts.items() if n} == {"examples": 3, "largest-class": 2}
    assert set(found.counts) == set(COUNTS)


def test_everything_is_counted_not_only_the_first() -> None:
    bad = table(
        age=["1", None, "old", "inf", "300", "1"],
        town=["ulm", "york", "paris", None, "ulm", "ulm"],
        sick=["no", "yes", "maybe", "no", "no", "no"],
        other=[None] * 6,
    )
    found = of_table(bad, SCHEMA, (("age", 0, 120),))
    assert found.fatal
    assert found.counts == {
        "examples": 6, "columns-missing": 0, "values-missing": 2, "values-malformed": 3,
        "values-out-of-range": 2, "labels-unknown": 1, "duplicates": 1, "classes-absent": 0,
        "largest-class": 4,
    }  # fmt: skip
    for text in (
        "True: column age: 1 values are missing", "True: column age: 2 values are no finite",
        "False: column age: 2 values are outside 0 to 120", "True: column town: 1 values such as ['paris']",
        "True: column sick: 1 values such as ['maybe'] are none of ['no', 'yes']", "False: 1 examples repeat",
    ):  # fmt: skip
        assert text in said(found)


def test_the_wrong_schema_stops_training() -> None:
    found = of_table(table(age=["1"], village=["ulm"]), SCHEMA)
    assert found.fatal
    assert found.counts["columns-missing"] == 2
    assert "['town', 'sick'] are not there" in said(found)
    assert not any("village" in problem.logged for problem in found.problems)  # it may be no header
    empty = table(age=[], town=[], sick=[])
    assert of_table(empty, SCHEMA).fatal
    assert not of_table(empty, SCHEMA, empty=True).fatal


def test_balance_and_absent_classes_are_told() -> None:
    y = torch.tensor([0] * 19 + [1])
    found = of_data(Data(torch.arange(20.0)[:, None], y), ["a", "b", "c"])
    assert not found.fatal
    assert (found.counts["classes-absent"], found.counts["largest-class"]) == (1, 19)
    assert "95.0 % of the examples are of class a" in said(found)
    assert "no examples of the classes c" in said(found)


def test_what_is_not_finite_or_of_no_class_or_twice() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [float("nan"), 0.0], [1.0, 2.0]])
    found = of_data(Data(x, torch.tensor([0, 0, 1, 5])), ["a", "b"])
    names = "values-malformed", "labels-unknown", "duplicates"
    assert [found.counts[name] for name in names] == [1, 1, 1]
    assert found.fatal


def test_images(tmp_path: Path) -> None:
    task = ImageFolder(
        build=Logistic(), partition=Iid(), clients=1, seed=0, class_names=["cat", "dog"], size=4
    )
    assert task.examined(tmp_path / "nothing").fatal
    for name, value in (("cat/a", 1), ("cat/b", 1), ("cow/c", 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "cat" / "half.png").write_bytes((tmp_path / "cat" / "a.png").read_bytes()[:40])
    found = task.examined(tmp_path)
    counts = {"examples": 4, "values-malformed": 1, "labels-unknown": 1, "duplicates": 1, "classes-absent": 1}
    assert {name: found.counts[name] for name in counts} == counts
    assert "1 images in folders ['cow'] that are none of ['cat', 'dog']" in said(found)
    assert "half.png cannot be read" in said(found)
    assert not any(word in problem.logged for problem in found.problems for word in ("cow", "half"))


@pytest.mark.parametrize("ranges", ["{age:[3]}", "{age:[5,1]}", "{age:[a,b]}", "[1,2]", "7"])
def test_ranges_that_are_none(ranges: str) -> None:
    with pytest.raises(ConfigError, match=r"task.ranges.* must be \[low, high\]"):
        job_of(f"{OWN} task.ranges={ranges}")
    assert check_ranges({"age": [0, 120]}) == (("age", 0.0, 120.0),)


# A node


def asked(job: Job, kind: str, node: Context) -> Message:
    grid = Elsewhere(client_app(lambda _: job), [7])
    grid._contexts = {7: node}
    content = RecordDict({ARRAYS: job.initial, CONFIG: ConfigRecord({"server-round": 1})})
    grid.push_messages([Message(content, 7, kind)])
    return next(iter(grid.pull_messages([])))


def node_of(**settings: Any) -> Context:
    return Context(1, 7, {"partition-id": 0, **{k: str(v) for k, v in settings.items()}}, RecordDict(), {})


def policy_of(tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(f"tasks: [csv]\nprivacy: [none, example]\nmetrics: [num-examples]\n{more}\n")
    return path


def test_a_node_whose_data_cannot_be_trained_on_declines_and_tells_its_own_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, job = tmp_path / "t.csv", job_of(f"{OWN} privacy=none clients=1 codec=identity")
    node = node_of(data=path)
    path.write_text(GOOD.replace("yes", "perhaps").replace("3,3,", ",3,"))
    reply = asked(job, MessageType.TRAIN, node)
    assert reply.has_error()
    assert "perhaps" not in str(reply.error.reason)
    assert "data check: column age: 1 values are missing" in caplog.text
    assert "data check: column sick: 10 values are none of ['no', 'yes']" in caplog.text
    assert "perhaps" not in caplog.text  # `fedapp check` shows it
    path.write_text(GOOD)
    assert not asked(job, MessageType.TRAIN, node).has_error()
    caplog.clear()
    path.write_text(GOOD + "1,1,no\n")  # repeats one: told before the first round only
    assert not asked(job, MessageType.TRAIN, node).has_error()
    assert "data check" not in caplog.text


@pytest.mark.parametrize(
    ("rule", "privacy", "left"),
    [
        (None, "none", {}),  # no policy lets nothing out
        ("", "none", {}),
        ("counts: [examples, duplicates]", "none", {"examples": 20, "duplicates": 0}),
        ("counts: [examples]\ncolumns: [age, sick]", "none", None),  # refuses the run: it names dose
        ("counts: [examples]\nrows: {dose: ['1']}", "none", {"examples": 3}),
        ("counts: [examples]", "example", {}),
    ],
)
def test_counts_leave_by_name(
    tmp_path: Path, rule: str | None, privacy: str, left: dict[str, int] | None
) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    rules: dict[str, Any] = {} if rule is None else {"policy": policy_of(tmp_path, rule)}
    job = job_of(f"{OWN} privacy={privacy} clients=1")
    reply = asked(job, "query.check", node_of(data=tmp_path / "t.csv", **rules))
    assert reply.has_error() == (left is None)
    if left is not None:
        assert dict(reply.content.config_records[CONFIG]) == left


def test_counts_are_charged_as_what_is_not_protected(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    ledger = Ledger(tmp_path / "ledger.db", new=True)
    given = {"data": tmp_path / "t.csv", "policy": policy_of(tmp_path, "counts: [examples]")}
    books = {"ledger": tmp_path / "ledger.db", "data-id": "mine"}
    job = job_of(f"{OWN} privacy=none clients=1")
    assert not asked(job, "query.check", node_of(**given, **books)).has_error()
    assert ledger.count("mine") == 1
    ledger.set_limit("mine", "example", 1.0, 1e-5)
    assert asked(job, "query.check", node_of(**given, **books)).has_error()


def test_a_policy_names_counts_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    node = node_of(data=tmp_path / "t.csv", policy=policy_of(tmp_path, "counts: [secrets]"))
    assert asked(job_of(f"{OWN} privacy=none clients=1"), "query.check", node).has_error()


# The server's report


def test_the_server_takes_counts_and_nothing_else() -> None:
    told = [{"examples": 5, "duplicates": -1, "other": 3}, {"examples": "many"}, {}, {"examples": 2}]

    def app(message: Message, context: Context) -> Message:
        assert round_of(message) == 4
        record: Any = told[int(context.node_config["partition-id"])]
        return Message(RecordDict({CONFIG: ConfigRecord(record)}), reply_to=message)

    grid = Elsewhere(app, [3, 4, 5, 6])  # type: ignore[arg-type]
    found = checks(grid, job_of(f"{OWN} privacy=none"), [3, 4, 5, 6], 4)
    assert sorted(found, key=str) == [{"examples": 2}, {"examples": 5}]
    assert checks(grid, job_of(f"{OWN} privacy=local_gaussian"), [3, 4, 5, 6], 1) == []
    assert checks(grid, job_of("task=digits privacy=none"), [3, 4, 5, 6], 1) == []  # nobody's own


def test_a_simulation_has_a_section_in_its_report(tmp_path: Path) -> None:
    rows = [f"{20 + i % 50},{i % 7},{'yes' if i % 3 else 'no'}" for i in range(100)]
    (tmp_path / "t.csv").write_text("\n".join(["age,dose,sick", *rows]) + "\n")
    tree = config.compose(
        f"{OWN} task.path={tmp_path}/t.csv privacy=none clients=3 rounds=1 codec=identity partition=iid"
    )
    server_app.simulate(tree, tmp_path / "run", Console(file=io.StringIO()), 0.0)
    counts = json.loads((tmp_path / "run/data.json").read_text())["counts"]
    held = [client["examples"] for client in counts]
    assert (len(held), max(held) - min(held)) == (3, 1)
    assert f"{sum(held)} of 3 clients, {max(held)} at most" in _data(tmp_path / "run")
    assert "Data of the clients" in (tmp_path / "run/report.html").read_text()


# The command


def test_the_command_prints_counts_and_a_line_for_each_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, shown = tmp_path / "t.csv", io.StringIO()
    path.write_text(GOOD)
    assert not run([f"data={path}", *OWN.split()], Console(file=shown, width=200)).problems
    assert "nothing is wrong with it" in shown.getvalue()
    path.write_text(GOOD.replace("yes", "perhaps") + "1,1,no\n")
    monkeypatch.setattr("sys.argv", ["fedapp", "check", f"data={path}", *OWN.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "stops training: column sick: 10 values such as ['perhaps']" in out
    assert "look at: 1 examples repeat an earlier one" in out
    with pytest.raises(ConfigError, match="add data="):
        run(OWN.split())
