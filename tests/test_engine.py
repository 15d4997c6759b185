"""Whole rounds on the local engine: the same bits however executed, and faults that cost one reply."""

import io
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from grids import Elsewhere, Forgetful, bits, local, model_of, rounds_on
from grids import rounds_here as run
from rich.console import Console
from safetensors.numpy import load_file
from torch import nn

from fedapp import config, server_app, wire
from fedapp.client_app import FAILED, client_app, local_app
from fedapp.downlink import HOLDS, Downlink
from fedapp.engine.grid import next_replies, push, stream
from fedapp.engine.local import Local, LocalGrid
from fedapp.errors import ConfigError, FedappError
from fedapp.evaluation import Evaluated
from fedapp.job import Job
from fedapp.orphan import end_with
from fedapp.records import CONFIG, METRICS, WEIGHT
from fedapp.report.folder import Round, RunFolder
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.tasks import Data, Task

FAST = "task=digits privacy=none model=logistic clients=5 rounds=3 cohort=3 engine.workers=1"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


def model_after(overrides: str) -> bytes:
    return model_of(f"{FAST} {overrides}")


# One seed, one result


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(
    "setting",
    [
        "codec=default codec.feedback=true",
        "codec=topk",
        "codec=identity",
        "strategy=fedadam",
        "strategy=fedmedian",
        "strategy=fedprox trainer.momentum=0.9 cohort=null",
        "strategy=scaffold codec.rate=0.3",
        "model=small_cnn trainer.channels_last=true evaluate=server",
        "model=small_cnn trainer.bfloat16=true",
    ],
)
def test_any_number_of_workers_gives_the_same_bits(setting: str, workers: int) -> None:
    assert model_after(f"{setting} engine.workers={workers}") == model_after(setting)


def test_another_seed_gives_another_model() -> None:
    assert model_after("seed=1") != model_after("codec=default")


@pytest.mark.parametrize(
    "setting", ["codec=default", "codec=identity", "strategy=fedmedian", "strategy=scaffold codec.rate=0.3"]
)
def test_node_ids_and_the_order_of_arrival_change_no_bit(setting: str) -> None:
    job = job_of(setting)
    grid = Elsewhere(client_app(lambda _: job), [905, 17, 2**62 + 5, 44, 3])
    assert bits(rounds_on(job, grid)[0].arrays) == model_after(setting)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_cohorts_are_drawn_by_seed_and_round_alone(sampling: str) -> None:
    def drawn(seed: int) -> list[list[int]]:
        job = job_of(f"seed={seed} sampling={sampling}")
        return [job.cohorts.draw(number, 5) for number in range(1, 41)]

    cohorts = drawn(0)
    assert cohorts == drawn(0) != drawn(1)
    sizes = {len(cohort) for cohort in cohorts}
    assert sizes == ({3} if sampling == "fixed" else {1, 2, 3, 4, 5})  # none in 1 of 100 rounds
    assert len({tuple(cohort) for cohort in cohorts}) > 8
    assert {i for cohort in cohorts for i in cohort} == set(range(5))
    assert sum(map(len, cohorts)) == pytest.approx(120, abs=20)  # 3 deviations of a binomial of 200


def test_two_nodes_with_one_partition_are_refused() -> None:
    job = job_of("clients=3 cohort=3")
    grid = Elsewhere(client_app(lambda _: job), [5, 6, 7])
    grid._contexts[6].node_config["partition-id"] = 0
    with pytest.raises(FedappError, match="two nodes hold the same partition"):
        Federation(job, grid)


def test_a_strange_answer_to_the_first_question_ends_nothing() -> None:
    job = job_of("clients=3 cohort=3")
    app = client_app(lambda _: job)
    strange = {6: RecordDict(), 7: RecordDict({CONFIG: ConfigRecord({"partition-id": "one"})})}

    def answers(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query" and context.node_id in strange:
            return Message(strange[context.node_id], reply_to=message)
        return app(message, context)

    federation = Federation(job, Elsewhere(answers, [5, 6, 7]))  # type: ignore[arg-type]
    assert federation.places.partitions == {5: 0, 6: 1, 7: 2}


def test_nodes_that_do_not_come_are_named() -> None:
    job = job_of("round_timeout=0.3")
    with pytest.raises(FedappError, match=r"2 of clients=5 nodes .* set clients=2"):
        Federation(job, Elsewhere(client_app(lambda _: job), [5, 6]))


# Weights on their way to the nodes


STATELESS = "cohort=3 rounds=6 codec.feedback=false codec.step=2"  # a rate remembers its last miss


def test_nodes_that_start_anew_train_on_the_same_weights() -> None:
    job = job_of(STATELESS)
    app = client_app(lambda _: job)
    plain, _ = rounds_on(job, Elsewhere(app, [5, 6, 7, 8, 9]))
    grid = Forgetful(app, [5, 6, 7, 8, 9])
    federation, records = rounds_on(job, grid)
    assert bits(federation.arrays) == bits(plain.arrays)
    assert [(record.replies, record.failures) for record in records] == [(3, 0)] * 6
    assert federation.messages == plain.messages == 18
    assert grid.pulled > 18
    assert federation.traffic.downlink > plain.traffic.downlink


def test_nodes_that_hold_the_latest_versions_are_sent_theirs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others need is made while these train."""
    held, send = list[list[int]](), Downlink.send

    def watched(self: Downlink, weights: ArrayRecord, messages: Iterable[Message]) -> Iterator[Message]:
        messages = list(messages)
        held.append([self._held.get(message.metadata.dst_node_id, 0) for message in messages])
        return send(self, weights, messages)

    monkeypatch.setattr(Downlink, "send", watched)
    job = job_of("codec=default rounds=6 clients=12 cohort=6")
    rounds_on(job, Elsewhere(client_app(lambda _: job), list(range(5, 17))))
    assert len(held) == 6
    assert held == [sorted(versions, reverse=True) for versions in held]
    assert max(len(set(versions)) for versions in held) > 2


def test_a_node_whose_seed_gives_another_model_is_given_the_servers() -> None:
    job = job_of(f"{STATELESS} cohort=null")
    other = replace(job)
    other.__dict__["initial"] = ArrayRecord(job.task.model(job.seed + 1).state_dict())
    plain, usual = rounds_on(job, Elsewhere(client_app(lambda _: job), [5, 6, 7, 8, 9]))
    grid = Elsewhere(client_app(lambda context: other if context.node_id == 7 else job), [5, 6, 7, 8, 9])
    federation, records = rounds_on(job, grid)
    assert bits(federation.arrays) == bits(plain.arrays)
    assert all(record.failures == 0 for record in records)
    more = [a.downlink_bytes - b.downlink_bytes for a, b in zip(records, usual, strict=True)]
    assert more[0] > 4 * federation.parameters
    assert more[1:] == [0] * 5


def test_a_node_that_decodes_nothing_costs_its_reply() -> None:
    job = job_of(f"{STATELESS} cohort=null rounds=2")
    app = client_app(lambda _: job)

    def deaf(message: Message, context: Context) -> Message:
        if context.node_id != 7 or message.metadata.message_type == "query":
            return app(message, context)
        says = RecordDict({CONFIG: ConfigRecord({HOLDS: 1})})
        return Message(says, reply_to=message)

    _, records = rounds_on(job, Elsewhere(deaf, [5, 6, 7, 8, 9]))  # type: ignore[arg-type]
    assert [(record.replies, record.failures) for record in records] == [(4, 1)] * 2


def test_evaluation_on_clients_is_sent_and_counted_but_not_sent_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever holds a version because it tested it is not sent it again for training."""
    tested, records = run(job_of(f"{STATELESS} cohort=null model=mlp evaluate=clients"))
    monkeypatch.setattr(Federation, "_evaluate", lambda self, number: Evaluated())
    silent, others = run(job_of(f"{STATELESS} cohort=null model=mlp evaluate=clients"))
    assert bits(tested.arrays) == bits(silent.arrays)
    assert tested.messages == 2 * silent.messages
    # six versions are tested, of which the last is new; the six messages to train say next to nothing more
    assert tested.traffic.downlink < 1.6 * silent.traffic.downlink
    assert records[0].downlink_bytes > 3 * others[0].downlink_bytes
    assert records[0].accuracy is not None


# What a round reports


def test_rounds_report_what_happened() -> None:
    federation, records = run(job_of("clients=4 cohort=2 rounds=2"))
    assert [record.round for record in records] == [1, 2]
    assert all((record.replies, record.failures) == (2, 0) for record in records)
    assert sum(record.uplink_bytes for record in records) == federation.traffic.uplink > 0
    assert sum(record.downlink_bytes for record in records) == federation.traffic.downlink
    assert federation.traffic.uplink < 4 * federation.parameters
    assert federation.traffic.downlink < 4 * federation.parameters
    assert federation.messages == 4
    assert all(record.epsilon is None for record in records)


@pytest.mark.parametrize("setting", ["codec=identity", "strategy=krum", "strategy=bulyan clients=8 cohort=8"])
def test_replies_are_counted_on_every_path(setting: str) -> None:
    federation, records = run(job_of(f"cohort=null rounds=1 {setting}"))
    assert records[0].replies == federation.accepted == federation.job.clients
    assert records[0].failures == 0


@pytest.mark.parametrize(("where", "known"), [("server", True), ("clients", True), ("none", False)])
def test_the_model_is_tested_where_the_settings_say(where: str, known: bool) -> None:
    _, records = run(job_of(f"evaluate={where} rounds=2 trainer.lr=0.5"))
    assert (records[-1].accuracy is not None) == known
    assert (records[-1].loss is not None) == known
    if known:
        assert records[-1].accuracy is not None
        assert records[-1].accuracy > 0.5


@pytest.mark.parametrize(
    "setting", ["clients=1 cohort=null", "clients=2 cohort=null engine.workers=9", "rounds=0"]
)
def test_small_runs_work(setting: str) -> None:
    job = job_of(setting)
    _, records = run(job)
    assert [record.replies for record in records] == [job.in_round] * job.rounds


# Clients in trouble


@dataclass(frozen=True)
class Troubled:
    """A task that fails for one partition, or gives it no examples, or such as no training survives."""

    task: Any
    partition: int
    trouble: str

    def client_data(self, node_config: Mapping[str, bool | int | float | str]) -> Data:
        data: Data = self.task.client_data(node_config)
        if self.partition not in (-1, node_config["partition-id"]):
            return data
        if self.trouble == "raises":
            raise ValueError("patient Morgan has a secret")
        if self.trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "diverges":
            return Data(data.x * float("nan"), data.y)
        return Data(data.x[:0], data.y[:0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def troubled(trouble: str, partition: int = 1, overrides: str = "") -> Job:
    job = job_of(f"cohort=null rounds=2 {overrides}")
    task: Task = Troubled(job.task, partition, trouble)
    return replace(job, task=task)


@pytest.mark.parametrize("codec", ["default", "identity"])
@pytest.mark.parametrize("trouble", ["raises", "dies"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_in_trouble_costs_its_reply_and_the_rounds_go_on(
    trouble: str, codec: str, workers: int
) -> None:
    _, records = run(troubled(trouble, 1, f"codec={codec} engine.workers={workers}"))
    assert [(record.replies, record.failures) for record in records] == [(4, 1), (4, 1)]


@pytest.mark.parametrize("codec", ["default", "identity"])
def test_why_a_client_failed_is_in_the_log(
    codec: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        logging.root, "handlers", []
    )  # as `fedapp simulate` leaves them, and not as pytest does
    _, records = run(troubled("raises", 1, f"codec={codec}"))
    assert [(record.replies, record.failures) for record in records] == [(4, 1), (4, 1)]
    logged = capfd.readouterr().err
    assert logged.count("node 3 failed on a train message\nTraceback (most recent call last):\n") == 2
    assert logged.count("ValueError: patient Morgan has a secret\n") == 2


@pytest.mark.parametrize(
    ("setting", "checks", "said"),
    [
        ("codec=default", True, FAILED),
        ("codec=identity downlink=coded", True, FAILED),
        ("codec=identity downlink=coded", False, "values times their weight must stay below"),
        ("codec=identity downlink=plain", True, "linear.weight is not finite"),
    ],
    ids=["default", "a client that looks", "one that does not", "plain"],
)
def test_weights_that_are_not_finite_cost_their_client(
    setting: str, checks: bool, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever notices: the client, the worker that would add them up, the server."""
    without, _ = run(troubled("raises", 1, setting))
    caplog.clear()
    if not checks:
        monkeypatch.setattr(wire, "require_finite", lambda *_: None)
    federation, records = run(troubled("diverges", 1, setting))
    assert [(record.replies, record.failures) for record in records] == [(4, 1), (4, 1)]
    assert bits(federation.arrays) == bits(without.arrays)
    refused = [text for text in caplog.messages if "refused" in text]
    assert len(refused) == 2
    assert all(text.startswith(f"reply of node 3 refused: {said}") for text in refused)


@pytest.mark.parametrize(
    "setting",
    ["cohort=3", "strategy=fedbuff cohort=null strategy.buffer=3", "strategy=scaffold",
     "privacy=distributed_gaussian privacy.epsilon=1000"],
)  # fmt: skip
def test_a_run_ends_whose_steps_lead_nowhere(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "finite", lambda arrays: False)
    job = job_of(f"rounds=5 {setting}")
    job.prepare()
    sizes, records = [len(part) for part in job.task.partitions()], list[Round]()
    with local(job).grid(local_app(job), sizes, job.at_once, job.fold, seconds=job.seconds) as grid:
        federation = Federation(job, grid)
        rounds = federation.run(Progress(Console(file=io.StringIO()), job.rounds))
        with pytest.raises(FedappError, match=r"round 3: none of . clients returned an update"):
            records.extend(record for some in rounds for record in some)
    assert [(record.replies, record.failures > 0) for record in records] == [(0, True)] * 3
    assert federation.arrays is job.initial


@dataclass(frozen=True)
class Uneven:
    """A task whose clients have so many examples, some of them more than once."""

    task: Any
    sizes: tuple[int, ...]

    def client_data(self, node_config: Mapping[str, bool | int | float | str]) -> Data:
        everything: Data = self.task.train_data()
        return everything.at(np.arange(self.sizes[int(node_config["partition-id"])]) % len(everything))

    def partitions(self) -> list[Any]:
        return [np.arange(size) for size in self.sizes]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


@pytest.mark.parametrize("setting", ["codec=default", "codec=identity downlink=coded", "codec=identity"])
def test_clients_of_one_and_of_many_examples_count_by_them(setting: str) -> None:
    job = job_of(f"clients=2 cohort=null rounds=1 {setting}")
    task: Task = Uneven(job.task, (1, 20_000))
    job = replace(job, task=task)

    def alone(partition: int) -> Any:
        app = local_app(job)

        def answer(message: Message, context: Context) -> Message:
            if message.metadata.message_type == "train" and context.node_config["partition-id"] != partition:
                raise ValueError("no")
            return app(message, context)

        return answer

    federation, (record,) = run(job)
    assert (record.replies, record.failures) == (2, 0)
    one, many = (run(job, alone(partition))[0].arrays for partition in (0, 1))
    for name, array in federation.arrays.items():
        mean = (one[name].numpy().astype(np.float64) + 20_000 * many[name].numpy()) / 20_001
        moved = np.abs(one[name].numpy() - many[name].numpy()).max() / 20_001
        assert moved > 1e-6
        assert np.abs(array.numpy() - mean).max() < 0.1 * moved


@pytest.mark.parametrize("codec", ["default", "identity"])
@pytest.mark.parametrize("evaluate", ["server", "clients"])
def test_a_client_without_examples_changes_nothing(codec: str, evaluate: str) -> None:
    federation, records = run(troubled("empty", 1, f"codec={codec} evaluate={evaluate}"))
    assert [(record.replies, record.failures) for record in records] == [(5, 0), (5, 0)]
    assert all(np.isfinite(array.numpy()).all() for array in federation.arrays.values())
    assert records[-1].accuracy is not None


def test_clients_all_without_examples_keep_the_model() -> None:
    job = troubled("empty", -1)
    federation, _ = run(job)
    start = job.task.model(job.seed).state_dict()
    assert all(np.array_equal(array.numpy(), start[name]) for name, array in federation.arrays.items())


@pytest.mark.parametrize("codec", ["default", "identity"])
@pytest.mark.parametrize("trouble", ["raises", "dies"])
def test_whole_cohorts_in_trouble_stop_the_run(trouble: str, codec: str) -> None:
    """After three rounds, or all of a run of fewer."""
    for rounds, last in ((2, 2), (5, 3)):
        job, ended = (
            troubled(trouble, -1, f"codec={codec} rounds={rounds}"),
            rf"after {last} such rounds in a row",
        )
        with pytest.raises(
            FedappError, match=f"round {last}: none of 5 clients returned an update; .* {ended}"
        ):
            run(job)


def failing_in(job: Job, *rounds: int) -> Any:
    """The clients of a run, which all fail in these rounds."""
    app = local_app(job)

    def answer(message: Message, context: Context) -> Message:
        number = message.content.config_records[CONFIG].get("server-round")
        if message.metadata.message_type == "train" and number in rounds:
            raise ValueError("patient Morgan has a secret")
        return app(message, context)

    return answer


def round_by_round(job: Job, app: Any) -> tuple[list[Round], list[bytes]]:
    """Each round, and the model after it."""
    job.prepare()
    sizes = [len(part) for part in job.task.partitions()]
    with local(job).grid(app, sizes, job.at_once, job.fold, seconds=job.seconds) as grid:
        federation = Federation(job, grid)
        rounds = federation.run(Progress(Console(file=io.StringIO()), job.rounds))
        found = [(record, bits(federation.arrays)) for records in rounds for record in records]
    return [record for record, _ in found], [model for _, model in found]


@pytest.mark.parametrize(
    "setting",
    [
        "codec=default",
        "codec=identity downlink=plain",
        "strategy=fedmedian",
        "strategy=fedavgm",
        "strategy=fedbuff strategy.buffer=5",
        "strategy=fedavgm privacy=local_gaussian privacy.test_seed=1",
        "cohort=4 over_selection=1.25 deadline=1000 speeds=stragglers",
    ],
)
def test_a_round_in_which_all_fail_is_skipped_and_said(
    setting: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(f"cohort=null rounds=4 {setting}")
    records, models = round_by_round(job, failing_in(job, 2))
    assert [r.replies for r in records] == [job.in_round, 0, job.in_round, job.in_round]
    assert [r.failures for r in records] == [0, 5, 0, 0]
    assert models[0] == models[1]
    assert len(set(models)) == 3
    assert records[0].accuracy == records[1].accuracy
    early = ", or deadline=1000 is early" if "deadline" in setting else ""
    said = f"round 2 is skipped: none of 5 clients returned an update; the log says why{early}"
    assert [text for text in caplog.messages if "skipped" in text] == [said]


def test_a_skipped_round_is_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "local_app", lambda job: failing_in(job, 2))
    console = Console(file=io.StringIO(), width=200)
    tree = config.compose(f"{FAST} cohort=null rounds=4 run_dir={tmp_path}")
    summary = server_app.simulate(tree, tmp_path, console, time.perf_counter())
    assert (summary.rounds, summary.interrupted) == (4, False)
    assert summary.note == "no update came of round 2, which changed nothing"
    rounds = RunFolder(tmp_path, again=True).rounds()
    assert [(r.replies, r.failures) for r in rounds] == [(5, 0), (0, 5), (5, 0), (5, 0)]
    assert summary.uplink_bytes == sum(r.uplink_bytes for r in rounds)
    assert rounds[1].uplink_bytes == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"^round (.)/4 .*  5 failed ", shown, re.MULTILINE) == ["2"]
    assert load_file(tmp_path / "model.safetensors").keys() == {"linear.weight", "linear.bias"}
    assert summary.note in (tmp_path / "report.html").read_text()


def test_accidents_apart_do_not_add_up() -> None:
    job = job_of("cohort=null rounds=9")
    _, records = run(job, failing_in(job, 1, 2, 4, 5, 7, 8))
    assert [r.replies for r in records] == [0, 0, 5] * 3


def test_under_central_privacy_noise_hides_that_all_failed() -> None:
    job = job_of("privacy=central_gaussian privacy.test_seed=1 sampling=fixed rounds=4 cohort=null")
    records, models = round_by_round(job, failing_in(job, 2))
    assert [r.replies for r in records] == [5, 0, 5, 5]
    assert len(set(models)) == 4


def test_the_text_of_a_clients_error_stays_on_the_client() -> None:
    job = troubled("raises", -1)
    with Local(workers=1).grid(client_app(lambda _: job), [1] * 5, 5) as grid:
        asked = [
            Message(RecordDict(), node, kind) for node in grid.partitions for kind in ("train", "evaluate")
        ]
        replies = list(stream(grid, asked, 60))
    assert len(replies) == 10
    for reply in replies:
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert reply.error.reason == FAILED
        assert "Morgan" not in repr(reply)


@pytest.mark.parametrize("setting", ["codec=default", "codec=identity", "strategy=fedmedian"])
def test_batch_norm_counts_stay_whole_numbers(setting: str) -> None:
    def build(input_shape: tuple[int, ...], classes: int) -> nn.Module:
        width = int(np.prod(input_shape))
        return nn.Sequential(nn.Flatten(), nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))

    job = job_of(f"rounds=2 {setting}")
    federation, records = run(replace(job, task=replace(job.task, build=build)))  # type: ignore[type-var]
    assert all(record.failures == 0 for record in records)
    counter = federation.arrays["2.num_batches_tracked"].numpy()
    assert counter.dtype == np.int64
    assert counter > 1


# The grid itself


def echo() -> ClientApp:
    """Counts its messages in the context, and does what the message says: sleep, die, exit."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        orders = message.content.config_records["orders"]
        seen = int(context.state.metric_records.get("seen", MetricRecord({"n": 0}))["n"]) + 1  # type: ignore[arg-type]
        context.state["seen"] = MetricRecord({"n": seen})
        node = str(context.node_id)
        if node in orders:
            order = str(orders[node])
            if order == "exit":
                sys.exit(3)
            if order == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if order == "raise":
                raise ValueError("patient Morgan has a secret")
            time.sleep(float(order))
        told = MetricRecord({WEIGHT: seen, "pid": os.getpid(), "node": context.node_id})
        return Message(RecordDict({METRICS: told}), reply_to=message)

    return app


def orders(nodes: Iterable[int], **what: str) -> list[Message]:
    told = {name.removeprefix("n"): order for name, order in what.items()}
    content = RecordDict({"orders": ConfigRecord(told)})  # type: ignore[arg-type]
    return [Message(content, node, "train") for node in nodes]


def told(replies: Iterable[Message], key: str) -> list[int]:
    return [reply.content.metric_records[METRICS][key] for reply in replies if reply.has_content()]  # type: ignore[misc]


@pytest.fixture
def grid() -> Iterator[LocalGrid]:
    with Local(workers=2).grid(echo(), [10, 40, 20, 30], 4) as grid:
        yield grid


def test_the_largest_client_comes_first() -> None:
    with Local(workers=1).grid(echo(), [10, 40, 20, 30], 4) as grid:
        assert told(stream(grid, orders(grid.partitions), 60), "node") == [3, 5, 4, 2]


def test_state_is_kept_for_each_node(grid: LocalGrid) -> None:
    for number in range(1, 4):
        assert told(stream(grid, orders(grid.partitions), 60), WEIGHT) == [number] * 4
    assert told(stream(grid, orders([2]), 60), WEIGHT) == [4]


def test_every_node_answers_for_itself(grid: LocalGrid) -> None:
    for reply in stream(grid, orders(grid.partitions), 60):
        assert reply.metadata.src_node_id == reply.content.metric_records[METRICS]["node"]
        assert reply.metadata.reply_to_message_id


def test_more_workers_than_messages_and_fewer_than_clients() -> None:
    with Local(workers=8).grid(echo(), [1] * 3, 2) as grid:
        assert len(grid._pool.workers) == 2
        assert sorted(told(stream(grid, orders(grid.partitions), 60), "node")) == [2, 3, 4]
    with Local().grid(echo(), [1], 1) as grid:
        assert told(stream(grid, orders([2]), 60), "node") == [2]


def test_what_waits_for_a_busy_worker_is_taken_by_an_idle_one(grid: LocalGrid) -> None:
    """4 is given to the worker of 3 while that one is at work; the other worker is done before."""
    for number in (1, 2):
        replies = list(stream(grid, orders(grid.partitions, n3="1.5"), 60))
        assert told(replies, "node")[-1] == 3
        assert told(replies, WEIGHT) == [number] * 4  # each was done once
        assert len(set(told(replies, "pid")[:3])) == 1


def test_a_message_is_begun_before_the_next_one_is_made(grid: LocalGrid) -> None:
    slow = {f"n{node}": "0.3" for node in grid.partitions}

    def made() -> Iterator[Message]:
        for number, message in enumerate(orders(grid.partitions, **slow)):
            assert sum(len(worker.given) for worker in grid._pool.workers) == number
            yield message

    assert sorted(told(stream(grid, made(), 60), "node")) == [2, 3, 4, 5]


def test_workers_go_on_while_messages_are_made(grid: LocalGrid) -> None:
    def made() -> Iterator[Message]:
        for number, message in enumerate(orders(grid.partitions)):
            if number > 2:  # two are with workers, or were, and the third is done after one of these
                assert not grid._pool.queue
                assert all(len(worker.given) < 2 for worker in grid._pool.workers)
                assert grid._early
            yield message
            time.sleep(0.5)

    for number in (1, 2):
        replies = list(stream(grid, made(), 60))
        assert sorted(told(replies, "node")) == [2, 3, 4, 5]
        assert told(replies, WEIGHT) == [number] * 4


@pytest.mark.parametrize("order", ["die", "exit"])
def test_nobody_is_forked_while_messages_are_made(grid: LocalGrid, order: str) -> None:
    """What makes them may be threads that hold locks."""
    workers = list(grid._pool.workers)

    def made() -> Iterator[Message]:
        for message in orders(grid.partitions, n2=order):
            yield message
            time.sleep(0.2)
            assert grid._pool.workers == workers

    replies = list(stream(grid, made(), 60))
    assert Counter(reply.has_error() for reply in replies) == {True: 1, False: 3}
    assert told(stream(grid, orders([2]), 60), WEIGHT) == [1]
    assert grid._pool.workers != workers


def test_what_waits_when_its_time_is_over_is_not_begun(grid: LocalGrid) -> None:
    """3 and 5 are at work then, and 4 and 2 wait for their workers."""
    late = orders(grid.partitions, n3="1.2", n5="0.8")
    assert told(stream(grid, late, 0.3), "node") == []
    time.sleep(1.5)
    replies = list(stream(grid, orders(grid.partitions), 60))
    assert dict(zip(told(replies, "node"), told(replies, WEIGHT), strict=True)) == {2: 1, 3: 2, 4: 1, 5: 2}


def test_what_is_not_begun_when_its_time_is_over_is_never_begun() -> None:
    """Though the next messages are pushed one by one, before anything is pulled."""
    with Local(workers=1).grid(echo(), [10] * 6, 6) as grid:
        assert told(stream(grid, orders(grid.partitions, n2="0.8"), 0.3), "node") == []
        assert told(stream(grid, iter(orders([7, 6])), 60), WEIGHT) == [1, 1]
        assert told(stream(grid, iter(orders(grid.partitions)), 60), "node") == [2, 3, 4, 5, 6, 7]
        again = list(stream(grid, orders(grid.partitions), 60))
        assert told(again, WEIGHT) == [3, 2, 2, 2, 3, 3]  # 2 was at work, and 3 to 5 only waited


@pytest.mark.parametrize("seconds", [None, lambda which, examples: 1.0], ids=["real", "simulated"])
def test_a_pull_looks_at_no_message_that_is_awaited_or_waits(
    seconds: Callable[[int, int], float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one for each reply: with 10,000 clients, rounds would be spent looking."""
    looked = Counter[str]()

    class Awaited(Set[str]):
        def __init__(self, names: Iterable[str]) -> None:
            self._names = set(names)

        def __contains__(self, name: object) -> bool:
            return name in self._names

        def __len__(self) -> int:
            return len(self._names)

        def __iter__(self) -> Iterator[str]:
            looked["awaited"] += 1
            return iter(self._names)

    queue = list[Message]()

    def read(message: Message) -> Any:
        looked["queued"] += any(message is one for one in queue)
        return message.__dict__["_metadata"]

    with Local(workers=1).grid(echo(), [10] * 200, 200, seconds=seconds) as grid:
        names = Awaited(grid.push_messages(orders(grid.partitions)))
        monkeypatch.setattr(Message, "metadata", property(read))
        replies = list[Message]()
        while len(replies) < 10:
            queue[:] = grid._pool.queue
            replies += grid.pull_messages(names)
        monkeypatch.undo()
        assert len(grid._pool.queue) > 150
        assert looked["awaited"] == 0
        assert looked["queued"] < 150  # of those that are taken from the queue


@pytest.mark.parametrize("seconds", [None, lambda which, examples: 1.0], ids=["real", "simulated"])
def test_what_was_pushed_before_a_message_could_not_be_made_is_not_begun(
    seconds: Callable[[int, int], float] | None,
) -> None:
    def made() -> Iterator[Message]:
        yield from orders([2, 3, 4, 5], n2="0.5")
        raise OSError("no space left")

    with Local(workers=1).grid(echo(), [10] * 6, 6, seconds=seconds) as grid:
        with pytest.raises(OSError, match="no space left"):
            list(stream(grid, made(), 60))
        replies = list(stream(grid, orders([3, 4, 5, 6]), 60))  # 2 was at work
        assert sorted(told(replies, "node")) == [3, 4, 5, 6]
        assert told(replies, WEIGHT) == [1, 1, 1, 1]


def test_unequal_clients_end_as_soon_as_if_none_were_given_ahead() -> None:
    """The worker of the largest one gets what is least worth doing first."""
    with Local(workers=2).grid(echo(), [100, 50, 49, *[1] * 8], 11) as grid:
        times = {f"n{node}": "0.05" for node in grid.partitions} | {"n2": "1.0", "n3": "0.5", "n4": "0.49"}
        began = time.monotonic()
        assert len(told(stream(grid, orders(grid.partitions, **times), 60), "node")) == 11
        assert time.monotonic() - began < 1.45  # 1.2, and 1.7 where 4 waits for the end of 2


def test_an_answer_counts_though_its_worker_dies_before_the_next_request_reaches_it() -> None:
    with Local(workers=1).grid(echo(), [10, 10], 2) as grid:
        large = {f"x{number}": os.urandom(1500).hex() for number in range(100)}
        waiting = push(grid, [orders([node], n2="0.1", **large)[0] for node in (2, 3)])
        grid._pool.dispatch()
        time.sleep(0.5)  # 2 is answered, and the request to 3 is too large to wait in the pipe
        os.kill(grid._pool.workers[0].process.pid or 0, signal.SIGKILL)
        replies = [reply for _ in range(2) for reply in next_replies(grid, waiting, time.monotonic() + 10)]
        assert [(reply.metadata.src_node_id, reply.has_error()) for reply in replies] == [
            (2, False),
            (3, True),
        ]


@pytest.mark.parametrize("order", ["die", "exit"])
def test_what_waits_for_a_worker_that_dies_is_done(order: str) -> None:
    with Local(workers=1).grid(echo(), [10, 40, 20, 30], 4) as grid:
        replies = list(stream(grid, orders(grid.partitions, n3=order), 60))
        assert [reply.has_error() for reply in replies] == [True, False, False, False]
        assert told(replies, "node") == [5, 4, 2]


def test_a_worker_that_died_is_not_overdue_too() -> None:
    """When the server looks, the worker of 3 is gone, its time is over, and 2 waits for it."""
    with Local(workers=1, client_timeout=0.3).grid(echo(), [10, 20], 2) as grid:
        waiting = push(grid, orders([3, 2], n3="die"))
        time.sleep(0.6)
        replies = list[Message]()
        while len(replies) < 2:
            replies += next_replies(grid, waiting, time.monotonic() + 10)
        assert [(reply.metadata.src_node_id, reply.has_error()) for reply in replies] == [
            (3, True),
            (2, False),
        ]


@pytest.mark.parametrize("order", ["die", "exit"])
def test_a_worker_that_dies_is_replaced(grid: LocalGrid, order: str) -> None:
    for number in (1, 2):
        replies = list(stream(grid, orders(grid.partitions, n4=order), 60))
        assert len(replies) == 4
        (failed,) = [reply for reply in replies if reply.has_error()]
        assert failed.metadata.src_node_id == 4
        assert failed.error.code == ErrorCode.CLIENT_APP_CRASHED
        assert told(replies, WEIGHT) == [number] * 3
    assert told(stream(grid, orders([4]), 60), WEIGHT) == [1]  # what it did before it died is lost


def test_a_worker_killed_in_the_middle_is_replaced(grid: LocalGrid) -> None:
    victim = grid._pool.workers[0].process.pid
    assert victim is not None
    timer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
    timer.start()
    replies = list(stream(grid, orders(grid.partitions, n3="0.8", n5="0.8"), 60))
    timer.join()
    assert Counter(reply.has_error() for reply in replies) == {True: 1, False: 3}
    assert len(list(stream(grid, orders(grid.partitions), 60))) == 4


def test_workers_killed_while_idle_cost_nothing(grid: LocalGrid) -> None:
    for worker in grid._pool.workers:
        worker.process.kill()
        worker.process.join()
    assert len(told(stream(grid, orders(grid.partitions), 60), "node")) == 4


def test_a_worker_killed_between_the_look_and_the_send_is_one_failure(
    grid: LocalGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = grid._pool.workers[0]
    worker.process.kill()
    worker.process.join()
    looks = iter([True])
    monkeypatch.setattr(worker.process, "is_alive", lambda: next(looks, False))
    replies = list(stream(grid, orders(grid.partitions), 60))
    assert Counter(reply.has_error() for reply in replies) == {True: 1, False: 3}


def test_an_app_without_a_guard_does_not_leak_its_error_either(capfd: pytest.CaptureFixture[str]) -> None:
    with Local(workers=1).grid(echo(), [1], 1) as grid:
        (reply,) = stream(grid, orders([2], n2="raise"), 60)
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "Morgan" not in repr(reply)
    logged = capfd.readouterr().err
    assert logged.startswith("Traceback (most recent call last):\n")
    assert logged.endswith("ValueError: patient Morgan has a secret\n")


def test_late_replies_are_not_counted_in_a_later_round() -> None:
    with Local(workers=1).grid(echo(), [10, 40, 20, 30], 4) as grid:
        assert told(stream(grid, orders(grid.partitions, n3="1.0"), 0.4), "node") == []  # 3 blocks the others
        time.sleep(0.9)
        late = list(stream(grid, orders([2, 3]), 60))
        assert sorted(told(late, "node")) == [2, 3]
        assert told(late, WEIGHT) == [2, 1]  # node 3 did train in the round it was late for; node 2 did not
        assert not grid._pool.queue


def test_a_round_that_times_out_counts_the_silent_as_failures() -> None:
    job = job_of("cohort=null rounds=1 round_timeout=3.0 engine.workers=2")
    job.prepare()
    app = client_app(lambda _: job)

    def slow(message: Message, context: Context) -> Message:
        time.sleep(60.0 if context.node_id == 2 else 0.0)
        return app(message, context)

    with Local(workers=2).grid(slow, [1] * 5, 5) as grid:  # type: ignore[arg-type]
        _, records = rounds_on(job, grid)
    assert (records[0].replies, records[0].failures) == (4, 1)


@pytest.mark.parametrize("simulated", [None, lambda which, examples: 1000.0])
def test_a_client_that_takes_too_long_is_ended_and_others_go_on(
    simulated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By seconds that pass in fact."""
    engine, began = Local(workers=1, client_timeout=1.5), time.monotonic()
    with engine.grid(echo(), [10, 40, 20, 30], 4, seconds=simulated) as grid:
        replies = list(stream(grid, orders(grid.partitions, n3="60"), 60))
        (failed,) = [reply for reply in replies if reply.has_error()]
        assert failed.metadata.src_node_id == 3
        assert failed.error.code == ErrorCode.CLIENT_APP_CRASHED
        assert failed.error.reason == "engine.client_timeout=1.5 is over"
        assert sorted(told(replies, "node")) == [2, 4, 5]
        assert told(stream(grid, orders([3]), 60), WEIGHT) == [1]  # what it did before it was ended is lost
    assert time.monotonic() - began < 20
    said = r"the client of partition 1 was ended after 1\.\d s of a train message: .*_timeout above 1\.5"
    assert re.search(said, caplog.text)


def test_the_servers_test_may_take_longer_than_a_client() -> None:
    app = ClientApp()

    @app.query("test")
    def test(message: Message, context: Context) -> Message:
        time.sleep(0.6)
        return Message(RecordDict(), reply_to=message)

    with Local(workers=1, client_timeout=0.2).grid(app, [1], 1) as grid:
        grid.test([RecordDict()])
        (reply,) = grid.tested(60)
    assert reply.has_content()


# Nothing is left behind


@pytest.mark.parametrize("how", ["well", "badly", "while busy"])
def test_no_process_and_no_pipe_outlives_the_grid(how: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    kept: list[LocalGrid] = []
    try:
        with Local(workers=3).grid(echo(), [1] * 3, 3) as grid:
            kept.append(grid)
            assert len(multiprocessing.active_children()) == 3
            list(stream(grid, orders(grid.partitions, n3="die"), 60))
            if how == "badly":
                raise KeyError("in the middle")
            if how == "while busy":
                list(stream(grid, orders(grid.partitions, n2="60", n3="60"), 0.2))
    except KeyError:
        pass
    assert not multiprocessing.active_children()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["codec.rate=0.5 codec.feedback=true", "codec=identity downlink=plain"])
def test_memory_does_not_grow_with_the_rounds(setting: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of the server and of each worker, by /proc, in MB."""
    caplog.set_level(logging.WARNING, "flwr")  # as in a run: pytest keeps what is logged
    job, seen = job_of(f"clients=4 cohort=null rounds=300 evaluate=none engine.workers=2 {setting}"), {}
    job.prepare()
    sizes = [len(part) for part in job.task.partitions()]
    with local(job).grid(local_app(job), sizes, job.at_once, job.fold) as grid:
        federation = Federation(job, grid)
        for _ in federation.run(Progress(Console(file=io.StringIO()), job.rounds)):
            if federation.finished in (50, 300):
                workers = [worker.process.pid for worker in grid._pool.workers]
                seen[federation.finished] = [_resident(pid) for pid in (os.getpid(), *workers)]
    grown = np.subtract(seen[300], seen[50])
    assert len(grown) == 3
    assert (grown < 5).all(), grown


def _resident(pid: int | None) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


ORPHANS = """
import os, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from fedapp import config
from fedapp.engine.grid import stream
from fedapp.engine.local import Local
app = ClientApp()
@app.train()
def train(message, context):
    if "kept" in context.state:
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(60)
    context.state["kept"] = ArrayRecord({"a": Array(np.zeros(9999))})
    return Message(RecordDict(), reply_to=message)
fold = config.job(config.compose("task=digits privacy=none model=logistic")).fold
with Local(workers=3, state_mb=0).grid(app, [1] * 3, 3, fold) as grid:
    for _ in range(2):
        list(stream(grid, [Message(RecordDict(), node, "train") for node in grid.partitions], 60))
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Though clients are at work; and nothing else is left."""
    surroundings = {**os.environ, "TMPDIR": str(tmp_path), "SQLITE_TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", ORPHANS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(3)]
        used = {path for pid in (parent.pid, *workers) for path in _files_of(pid)}
        parent.kill()
        parent.wait(60)
        deadline = time.monotonic() + 20
        while any(map(_lives, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [pid for pid in workers if _lives(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert len(set(workers)) == 3
    assert not left
    assert any(
        path.startswith(f"{tmp_path}/") for path in used
    )  # what clients keep, in a file without a name
    assert not [path for path in used if path.startswith("/dev/shm/") and Path(path).exists()]
    assert not list(tmp_path.iterdir())


def test_a_worker_ends_whose_parent_was_dead_before_it_asked() -> None:
    for known, status in ((os.getpid(), 0), (os.getppid(), 1)):
        child = os.fork()
        if not child:
            end_with(known)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def _files_of(pid: int) -> set[str]:
    """What a process has mapped or opened."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    opened = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return {*opened, *(line.split(maxsplit=5)[5] for line in maps if "/" in line)}


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, -1, 1025, 2.0, "two", True])
def test_worker_counts_out_of_range_are_named(workers: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine.workers must be a whole number from 1 to 1024, got"):
        Local(workers)
