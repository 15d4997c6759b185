"""How much each client does: what fits into a deadline, what an update of less counts, simulated links."""

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from grids import Elsewhere, model_of, rounds_on
from grids import rounds_here as run
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedapp import config, server_app
from fedapp.assignment import WHOLE, Deadline, Part, Took, Workloads, part_in
from fedapp.client_app import client_app
from fedapp.codec.chain import ErrorFeedback, Identity
from fedapp.codec.rate_distortion import RateDistortion
from fedapp.engine.timeline import Timeline
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.records import ARRAYS, CONFIG, METRICS
from fedapp.speeds import Stragglers
from fedapp.synchronous import Stepped, Synchronous
from fedapp.tasks import Data
from fedapp.training import Sgd
from fedapp.vector import layout_of, ravel

FAST = (
    "task=digits privacy=none model=logistic clients=8 rounds=4 engine.workers=1 partition=iid evaluate=none"
)
# A fast client takes 0.36 s for 180 examples and 2 epochs, a slow one 3.6 s.
TIMED = "assignment=deadline deadline=0.4 speeds=stragglers speeds.share=0.25"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


# What fits


@pytest.mark.parametrize(
    ("took", "part"),
    [
        (Took(5, 4), (1, 1)),  # of 10 seconds
        (Took(10, 0), (1, 1)),
        (Took(40, 0), (1 / 4, 1)),
        (Took(16, 2), (8 / 16, 1)),  # sending is quick: the rest of the time is for training
        (Took(2, 16), (1, 8 / 16)),
        (Took(20, 50), (5 / 20, 5 / 50)),  # half of the time each
        (Took(6, 5), (5 / 6, 1)),
        (Took(1e6, 0), (0.02, 1)),
        (Took(1e6, 1e6), (0.02, 0.02)),
        (Took(0, 0), (1, 1)),
        (None, (0.1, 1)),
    ],
)
def test_shares_by_hand(took: Took | None, part: tuple[float, float]) -> None:
    found = Deadline(margin=1.0).part(took, 10.0)
    assert (found.work, found.rate) == pytest.approx(part)
    assert found.batch == 1


@settings(deadline=None, max_examples=300)
@given(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0.1, 100), st.floats(0.1, 1))
def test_what_is_asked_fits_and_is_no_less_than_that(
    work: float, send: float, deadline: float, margin: float
) -> None:
    rule = Deadline(margin=margin, least=1e-6)
    part = rule.part(Took(work, send), deadline)
    takes = part.work * work + part.rate * send
    if part.work > 1e-6 < part.rate:
        assert takes <= margin * deadline * (1 + 1e-9)
        assert part == WHOLE or takes == pytest.approx(margin * deadline)


def test_batches_shrink_before_there_are_fewer_steps() -> None:
    rule = Deadline(margin=1.0, batch=0.25)
    half, tenth = rule.part(Took(20, 0), 10.0), rule.part(Took(100, 0), 10.0)
    assert (half.work, half.batch, half.steps) == (0.5, 0.5, 1.0)
    assert (tenth.work, tenth.batch, tenth.steps) == (0.1, 0.25, 0.4)


def message_to(node: int, content: RecordDict | None = None) -> Message:
    Elsewhere(client_app(lambda _: job_of()), [node])  # sets the identity that messages are made with
    return Message(content or RecordDict({CONFIG: ConfigRecord({"server-round": 1})}), node, "train")


def asked(workloads: Workloads, *nodes: int) -> dict[int, Part]:
    messages = workloads.tell([message_to(node) for node in nodes])
    return {message.metadata.dst_node_id: part_in(message) for message in messages}


def answered(workloads: Workloads, node: int, elapsed: float, said: Any) -> None:
    metrics = MetricRecord({"num-examples": 1} if said is None else {"num-examples": 1, "seconds": said})
    workloads.hear(Message(RecordDict({METRICS: metrics}), reply_to=message_to(node)), elapsed)


def test_who_was_heard_is_asked_for_what_fits() -> None:
    workloads = Workloads(Deadline(margin=1.0), 10.0)
    assert asked(workloads, 1, 2, 3, 4) == dict.fromkeys((1, 2, 3, 4), Part(0.1))
    answered(workloads, 1, 2.0, 2.0)  # 20 s for all, no link to speak of
    answered(workloads, 2, 5.5, 0.5)  # 5 s for all, and 5 s of sending
    answered(workloads, 3, 2.0, None)  # does not say: all of it was training
    workloads.end(10.0)  # the last one says nothing
    assert asked(workloads, 1, 2, 3, 4) == {1: Part(0.5), 2: WHOLE, 3: Part(0.5), 4: Part(0.05, 1.0, 0.5)}
    answered(workloads, 1, 11.0, 10.0)  # as fast as before, with a link of a second
    workloads.end(11.0)
    parts = asked(workloads, 1, 4)
    assert parts[1].work == pytest.approx(9 / 20)
    assert parts[4] == Part(0.025, 1.0, 0.25)


@pytest.mark.parametrize("said", [float("nan"), -1.0, float("inf"), 3, [1.0, 2.0], 1e300])
def test_strange_times_cost_nobody_else(said: Any) -> None:
    workloads = Workloads(Deadline(margin=1.0), 10.0)
    asked(workloads, 1, 2)
    answered(workloads, 1, 2.0, said)
    answered(workloads, 2, 2.0, 2.0)
    assert asked(workloads, 1, 2) == {1: Part(0.5), 2: Part(0.5)}


def test_where_enough_came_early_nothing_is_learnt_of_the_rest() -> None:
    workloads = Workloads(Deadline(), 10.0)
    asked(workloads, 1)
    workloads.end(9.0)
    assert asked(workloads, 1) == {1: Part(0.1)}


def test_fixed_costs_are_found_by_measuring_again() -> None:
    """A process that takes 2 s to start and 40 s to train, whatever is asked: the parts end at what fits."""
    workloads = Workloads(Deadline(margin=1.0), 10.0)
    for _ in range(30):
        part = asked(workloads, 1)[1]
        answered(workloads, 1, 2 + 40 * part.work, None)
    assert 2 + 40 * part.work == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("told", [{"work": 0.0}, {"work": 1.5}, {"rate": -1.0}, {"batch": float("nan")}])
def test_a_client_does_no_more_than_its_own_settings_say(told: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="the assigned"):
        part_in(message_to(1, RecordDict({CONFIG: ConfigRecord({**told})})))


def test_messages_that_say_the_same_share_it() -> None:
    workloads, shared = Workloads(Deadline(), 1.0), RecordDict({CONFIG: ConfigRecord({"server-round": 1})})
    messages = workloads.tell([message_to(node, shared) for node in (1, 2, 3)])
    assert len({id(message.content) for message in messages}) == 1
    assert dict(messages[0].content.config_records[CONFIG]) == {
        "server-round": 1, "work": 0.1, "batch": 1.0, "rate": 1.0,
    }  # fmt: skip


def test_only_a_rate_is_thinned_and_the_decoder_is_the_same() -> None:
    codec = ErrorFeedback(RateDistortion(rate=2.0))
    assert Part(rate=0.25).thinned(codec) == ErrorFeedback(RateDistortion(rate=0.5))
    for other in (RateDistortion(step=1.0), RateDistortion(nmse=0.1), Identity()):
        assert Part(rate=0.25).thinned(other) == other


# What less work counts


class Ramp:
    """A loss whose gradient is the same everywhere: the sum of the weights, each times its own number."""

    def loss(self, output: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return output.sum() / len(target)


@pytest.mark.parametrize(
    "trainer",
    [
        Sgd(lr=0.1, batch_size=4, epochs=5),
        Sgd(lr=0.1, batch_size=4, epochs=5, momentum=0.9),
        Sgd(lr=0.1, batch_size=4, epochs=5, proximal_mu=0.7),
        Sgd(lr=0.1, batch_size=4, epochs=5, proximal_mu=0.7, momentum=0.5),
    ],
)
@pytest.mark.parametrize("part", [Part(0.5), Part(0.04), Part(0.3, 0.5), Part(0.25, 0.25), Part(1.0, 0.5)])
def test_along_one_gradient_a_part_counts_as_far_as_all(trainer: Sgd, part: Part) -> None:
    def moved(sgd: Sgd) -> torch.Tensor:
        model = torch.nn.Linear(3, 1)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        data = Data(torch.ones(20, 3), torch.zeros(20, dtype=torch.int64))
        task: Any = Ramp()
        sgd.fit(task, model, data, {}, np.random.default_rng(0), 0.0)
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before

    whole = moved(trainer)
    assert whole.abs().min() > 0.1
    torch.testing.assert_close(moved(replace(trainer, part=part)), whole, rtol=1e-4, atol=1e-5)


def test_reach_is_fednovas_norm() -> None:
    """Wang et al. 2020: [t - r (1 - r^t) / (1 - r)] / (1 - r), and (1 - (1 - lr mu)^t) / (lr mu)."""
    assert Sgd().reach(7, 0.1) == 7
    r, t = 0.9, 7
    assert Sgd(momentum=r).reach(t, 0.1) == pytest.approx((t - r * (1 - r**t) / (1 - r)) / (1 - r))
    a = 0.1 * 0.5
    assert Sgd(proximal_mu=0.5).reach(t, 0.1) == pytest.approx((1 - (1 - a) ** t) / a)


def moves(job: Job) -> np.ndarray[Any, Any]:
    federation, _ = run(job)
    layout = layout_of(job.initial)
    return ravel(federation.arrays, layout) - ravel(job.initial, layout)


def test_the_mean_goes_where_all_go_and_not_where_the_fast_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one gradient a client, a round with slow ones is the round without, times the mean part."""
    weights = torch.linspace(-1, 1, 10)

    def ramp(task: Any, output: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return (output * weights[target][:, None] * torch.arange(10)).mean()  # by label, so by client

    job = job_of("rounds=0")
    monkeypatch.setattr(type(job.task), "loss", ramp)
    same = "partition=dirichlet rounds=1 trainer.batch_size=2000 trainer.epochs=20 codec=identity"
    whole = moves(job_of(same))
    tell = Workloads.tell

    def told(self: Workloads, messages: list[Message]) -> list[Message]:
        self._took = {node: Took(1000.0 if node % 2 else 200.0, 0.0) for node in range(2, 10)}
        return tell(self, messages)

    monkeypatch.setattr(Workloads, "tell", told)
    job = job_of(f"{same} {TIMED} deadline=100 assignment.margin=1")
    sizes = np.array([len(one) for one in job.task.partitions()])
    some = moves(job)
    pace = np.average([0.1 if i % 2 else 0.5 for i in range(8)], weights=sizes)
    assert some == pytest.approx(pace * whole, abs=1e-6)
    assert np.abs(whole).max() > 0.05


# Whole rounds


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, Part]]:
    """What each round asked of whom, by partition."""
    rounds: list[dict[int, Part]] = []
    tell = Workloads.tell

    def noted(self: Workloads, messages: list[Message]) -> list[Message]:
        messages = tell(self, messages)
        rounds.append({m.metadata.dst_node_id - 2: part_in(m) for m in messages})
        return messages

    monkeypatch.setattr(Workloads, "tell", noted)
    return rounds


def slow(job: Job) -> set[int]:
    assert job.seconds is not None
    return {i for i in range(8) if job.seconds(i, 180) > 1}


def test_slow_clients_are_asked_for_less_and_all_are_in_time(told: list[dict[int, Part]]) -> None:
    job = job_of(TIMED)
    _, records = run(job)
    assert [record.replies for record in records] == [8] * 4
    assert len(slow(job)) == 2
    assert set(told[0].values()) == {Part(0.1)}
    for later in told[1:]:
        for partition, part in later.items():
            assert job.seconds is not None
            all_of_it = job.seconds(partition, len(job.task.partitions()[partition]))
            assert part.work == pytest.approx(min(1.0, 0.9 * 0.4 / all_of_it))
            assert part.rate == 1
    assert all(told[1][i].work < 0.15 for i in slow(job))
    assert records[-1].clock == pytest.approx(0.36 + 3 * 0.36, rel=0.05)  # and not 4 * 3.6
    _, before = run(job_of(TIMED.replace("assignment=deadline", "")))
    assert [record.replies for record in before] == [6] * 4


def test_slow_links_send_fewer_bits(told: list[dict[int, Part]]) -> None:
    links = "speeds.bytes_per_second=5000 speeds.seconds_per_example=1e-6"
    job = job_of(f"{TIMED} deadline=0.8 codec.rate=4 {links}")
    assert job.sending is not None
    narrow = {i for i in range(8) if job.sending(i, 5000) > 1.01}
    assert len(narrow) == 2
    _, records = run(job)
    assert [record.replies for record in records] == [8 - len(narrow)] + [8] * 3
    for later in told[2:]:
        assert {i for i, part in later.items() if part.rate < 1} == narrow
        assert {part.work for part in later.values()} == {1.0}
    assert records[-1].uplink_bytes < records[0].uplink_bytes * 8 / 6


def test_real_bytes_take_the_time() -> None:
    """A round ends when the last packet has been sent: its bytes over the speed of its link."""
    job = job_of(
        "rounds=1 cohort=1 codec.rate=4 speeds=stragglers speeds.share=0 speeds.bytes_per_second=1000"
    )
    (which,) = job.cohorts.draw(1, 8)
    _, records = run(job)
    training = 1e-3 * 2 * len(job.task.partitions()[which])
    assert records[0].clock == pytest.approx(training + records[0].uplink_bytes / 1000)
    assert records[0].uplink_bytes > 300


def test_answers_come_in_the_order_in_which_they_are_sent() -> None:
    """A quick client with a slow link is later than one that trains longer, whoever is computed first."""
    Elsewhere(client_app(lambda _: job_of()), [1])
    orders = []
    for computed in ((0, 1, 2), (2, 1, 0)):
        timeline = Timeline(lambda message: (1.0, 2.0, 4.0)[message.metadata.dst_node_id])
        messages = [Message(RecordDict(), node, "train") for node in range(3)]
        for i, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(i)
            timeline.sent(message)
        came = []
        for i in computed:
            timeline.done((Message(RecordDict(), reply_to=messages[i]), None), (2.0, 0.0, 0.0)[i])
            while (answer := timeline.next()) is not None:
                came.append((answer[0].metadata.reply_to_message_id, timeline.now))
        orders.append(came)
    assert orders == [[("1", 2.0), ("0", 3.0), ("2", 4.0)]] * 2


@pytest.mark.parametrize(
    "setting",
    [
        "speeds.bytes_per_second=3000 codec.rate=0.5 codec.feedback=true",
        "cohort=3 over_selection=1.7 assignment.batch=0.3 selection=by_size",
    ],
)
def test_any_number_of_workers_gives_the_same_bits(setting: str) -> None:
    one = f"{FAST} {TIMED} {setting}"
    assert model_of(f"{one} engine.workers=3") == model_of(one)


@pytest.mark.parametrize(
    "setting", [TIMED, "selection=power_of_choice cohort=3", "selection=by_size cohort=3"]
)
def test_stopped_and_resumed_is_the_same_run(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulate(folder: Path, overrides: str) -> bytes:
        tree = config.compose(overrides)
        console = Console(file=io.StringIO())
        server_app.simulate(tree, folder, console, time.perf_counter(), overrides.split())
        return (folder / "model.safetensors").read_bytes()

    given = f"{FAST} {setting} codec.rate=0.5 codec.feedback=true"
    whole = simulate(tmp_path / "whole", f"{given} run_dir={tmp_path / 'whole'}")
    rounds = Synchronous.round

    def stops(self: Synchronous, number: int, *rest: Any) -> Stepped:
        if number == 3:
            raise KeyboardInterrupt
        return rounds(self, number, *rest)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Synchronous, "round", stops)
        with pytest.raises(KeyboardInterrupt):
            simulate(folder, f"{given} checkpoint=0 run_dir={folder}")
    assert simulate(folder, f"resume={folder}") == whole


def test_elsewhere_time_is_real_and_clients_tell_theirs() -> None:
    job = job_of("assignment=deadline deadline=60")
    replies: list[Message] = []
    app = client_app(lambda _: job)

    def noted(message: Message, context: Context) -> Message:
        replies.append(app(message, context))
        return replies[-1]

    started = time.perf_counter()
    federation, records = rounds_on(job, Elsewhere(noted, list(range(50, 58))))  # type: ignore[arg-type]
    assert [record.replies for record in records] == [8] * 4
    said = [reply.content[METRICS]["seconds"] for reply in replies if ARRAYS in reply.content.array_records]
    assert len(said) == 32
    assert all(isinstance(s, float) and 0 < s < time.perf_counter() - started for s in said)
    workloads = federation._wire.workloads
    assert workloads is not None
    assert set(workloads.tell([message_to(50)])[0].content.config_records[CONFIG].values()) >= {1.0}


# What does not go together


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("assignment=deadline", r"assignment=deadline needs a deadline: set deadline"),
        (f"{TIMED} privacy=example", r"noise of privacy=example is set for"),
        (f"{TIMED} privacy=local_gaussian", r"noise of privacy=local_gaussian is set for"),
        (f"{TIMED} strategy=scaffold", r"strategy=scaffold does not take"),
        (f"{TIMED} strategy=qfedavg", r"strategy=qfedavg does not take"),
        (f"{TIMED} trainer.epochs=0", r"set trainer.epochs=1"),
        (f"{TIMED} assignment.margin=0", r"assignment.margin .* above 0 and at most 1, got 0"),
        (f"{TIMED} assignment.least=2", r"assignment.least .* got 2"),
        ("speeds=stragglers speeds.bytes_per_second=0", r"speeds.bytes_per_second .* above 0, got 0"),
    ],
)
def test_what_does_not_go_together_is_named(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(overrides)


def test_models_with_other_state_are_refused() -> None:
    job = job_of(f"{TIMED} model=resnet18 model.norm=batch")
    with pytest.raises(ConfigError, match="assignment=deadline norm_bound=None deals in parameters"):
        job.prepare()


def test_links_by_hand() -> None:
    links = Stragglers(share=0.5, slowdown=4.0, bytes_per_second=100.0).links(4, np.random.default_rng(0))
    assert links is not None
    assert sorted(links(i, 200) for i in range(4)) == [2.0, 2.0, 8.0, 8.0]
    assert Stragglers().links(4, np.random.default_rng(0)) is None
