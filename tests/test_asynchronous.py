"""Asynchronous rounds by hand and by law; over-selection and deadlines; what goes with neither."""

import re
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from grids import Elsewhere, Forgetful, bits, local, model_of, rounds_on
from grids import rounds_here as run

from fedapp import combinations, config
from fedapp.asynchronous import Asynchronous
from fedapp.client_app import client_app
from fedapp.codec.chain import Identity
from fedapp.cohorts import Cohorts
from fedapp.downlink import Downlink
from fedapp.errors import ConfigError, FedappError
from fedapp.fedbuff import FedBuff
from fedapp.job import Job
from fedapp.records import ARRAYS, METRICS, WEIGHT
from fedapp.rounds import Federation
from fedapp.speeds import Stragglers
from fedapp.vector import record_of
from fedapp.wire import compress

FAST = "task=digits privacy=none model=logistic clients=8 rounds=5 engine.workers=1"
BUFFERED = "strategy=fedbuff strategy.buffer=3 strategy.concurrency=4"
CODED = "codec.rate=0.5 codec.feedback=true downlink=coded"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


def model_after(overrides: str) -> bytes:
    return model_of(f"{FAST} {overrides}")


# The paper's formula, and a schedule by hand


@pytest.mark.parametrize(("staleness", "factor"), [(0, 1.0), (1, 0.7071068), (3, 0.5), (8, 1 / 3), (99, 0.1)])
def test_the_factor_is_one_over_the_root_of_one_and_the_staleness(staleness: int, factor: float) -> None:
    assert FedBuff().factor(staleness) == pytest.approx(factor)
    assert FedBuff(staleness_exponent=0.0).factor(staleness) == 1.0


MOVES, WEIGHTS, SECONDS = (1.0, 4.0, 16.0), (1, 2, 5), (1.0, 3.0, 4.0)


def mover(message: Message, context: Context) -> Message:
    """A client that adds a number of its own to all weights, and has an own number of examples."""
    which = int(context.node_config["partition-id"])

    def train(message: Message, context: Context) -> Message:
        received = message.content.array_records[ARRAYS]
        moved = record_of(
            {name: array.numpy() + np.float32(MOVES[which]) for name, array in received.items()}
        )
        content = RecordDict({ARRAYS: moved, METRICS: MetricRecord({WEIGHT: WEIGHTS[which]})})
        return Message(content, reply_to=message)

    return compress(Identity(), np.random.default_rng(0))(message, context, train)


ROOT = 2**0.5
SCHEDULES = {  # all are asked at 0; 0 answers at 1 and waits for new weights
    "": (
        # at 3 from 1; at 4 from 2, one step old, and from 0; at 5 from 0, at 6 from 1, one step old
        (1 + 8) / 3 + (80 / ROOT + 1) / 6 + (1 + 8 / ROOT) / 3,
        [(3.0, 2, 0), (4.0, 2, 0), (6.0, 2, 0)],
    ),
    "strategy.staleness_exponent=0": (9 / 3 + 81 / 6 + 9 / 3, [(3.0, 2, 0), (4.0, 2, 0), (6.0, 2, 0)]),
    # what comes from 2 at 4 and at 8 is dropped, and each time it begins anew
    "strategy.max_staleness=0": (9 / 3 + 9 / 3 + 9 / 3, [(3.0, 2, 0), (6.0, 2, 1), (9.0, 2, 1)]),
    "strategy.max_staleness=1 strategy.server_learning_rate=0.5": (
        ((1 + 8) / 3 + (80 / ROOT + 1) / 6 + (1 + 8 / ROOT) / 3) / 2,
        [(3.0, 2, 0), (4.0, 2, 0), (6.0, 2, 0)],
    ),
    # one at a time, so that nobody is stale: who is drawn, the seed decides
    "strategy.concurrency=1 strategy.buffer=3": (
        3 * (1 + 8 + 80) / 8,
        [(8.0, 3, 0), (16.0, 3, 0), (24.0, 3, 0)],
    ),
}


@pytest.mark.parametrize("setting", SCHEDULES)
def test_a_schedule_by_hand(setting: str) -> None:
    job = job_of(
        f"clients=3 rounds=3 codec=identity downlink=plain evaluate=none speeds=stragglers strategy=fedbuff "
        f"strategy.buffer=2 {setting}"
    )
    app: Any = mover
    with local(job).grid(app, [1] * 3, job.at_once, seconds=lambda which, _: SECONDS[which]) as grid:
        federation, records = rounds_on(job, grid)
    ways = [federation.arrays[name].numpy() - array.numpy() for name, array in job.initial.items()]
    total, happened = SCHEDULES[setting]
    assert np.concatenate([way.ravel() for way in ways]) == pytest.approx(total, abs=1e-5)
    assert [(record.clock, record.replies, record.failures) for record in records] == happened
    assert federation.messages == sum(r.replies + r.failures for r in records) + len(
        federation._asynchronous._flights if federation._asynchronous else ()
    )


# Laws


@pytest.mark.parametrize(
    ("workers", "setting"),
    [
        (2, f"{BUFFERED} {CODED} speeds=stragglers"),
        (3, f"{BUFFERED} {CODED} speeds=stragglers"),
        (3, f"{BUFFERED} codec=topk"),
        (2, f"{BUFFERED} codec=identity downlink=plain speeds=stragglers partition=dirichlet"),
        (3, f"cohort=3 over_selection=1.7 deadline=0.5 {CODED} speeds=stragglers"),
    ],
)
def test_any_number_of_workers_gives_the_same_bits(workers: int, setting: str) -> None:
    assert model_after(f"{setting} engine.workers={workers}") == model_after(setting)


@pytest.mark.parametrize("setting", [CODED, "codec=topk downlink=plain partition=iid"])
def test_where_all_are_waited_for_it_is_fedavg_to_the_bit(setting: str) -> None:
    """In whatever order they answer, here and elsewhere, by whatever speeds."""
    everyone = f"{setting} strategy=fedbuff strategy.buffer=8"
    fedavg = model_after(f"{setting} strategy=fedavg")
    assert model_after(everyone) == fedavg
    assert model_after(f"{everyone} speeds=stragglers") == fedavg
    job = job_of(everyone)
    grid = Elsewhere(client_app(lambda _: job), [905, 17, 2**62 + 5, 44, 3, 99, 98, 97])
    assert bits(rounds_on(job, grid)[0].arrays) == fedavg


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of each client that is asked: the round, its partition, how many are at work then."""
    seen: list[tuple[int, int, int]] = []
    push = Asynchronous._push

    def watched(self: Asynchronous, messages: list[Message], number: int, tries: int) -> int:
        refused = push(self, messages, number, tries)
        if not tries:
            at_work = len(self._flights)
            seen.extend((number, self.places.partitions[m.metadata.dst_node_id], at_work) for m in messages)
        return refused

    monkeypatch.setattr(Asynchronous, "_push", watched)
    return seen


def test_so_many_train_at_any_time_and_each_once_a_round(asked: list[tuple[int, int, int]]) -> None:
    federation, records = run(job_of(f"{BUFFERED} rounds=30 speeds=stragglers"))
    assert {at_work for _, _, at_work in asked} == {4}
    assert len({(number, which) for number, which, _ in asked}) == len(asked) == federation.messages
    assert {which for _, which, _ in asked} == set(range(8))
    assert len(asked) == 4 + 30 * 3 - 1  # who answers last is replaced in the next round
    assert [record.replies for record in records] == [3] * 30
    clocks = [record.clock or 0.0 for record in records]
    assert clocks == sorted(clocks)
    assert records[-1].accuracy is not None
    assert records[-1].accuracy > 0.7


def test_versions_are_kept_for_those_at_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node is sent the difference to the version that it holds, though others came out meanwhile."""
    helps: list[bool] = []
    again = Downlink.again

    def noted(self: Downlink, reply: Message) -> bool:
        helps.append(again(self, reply))
        return helps[-1]

    monkeypatch.setattr(Downlink, "again", noted)
    federation, records = run(job_of(f"{BUFFERED} rounds=40 codec.step=1 downlink=coded speeds=stragglers"))
    downlink = federation._downlink
    assert downlink is not None
    assert helps == [False] * 120
    assert len(downlink._versions) <= 2 + 8 + 4
    assert len(set(downlink._held.values())) > 2
    assert all(record.failures == 0 for record in records)
    assert federation.traffic.downlink < 0.25 * 4 * federation.parameters * federation.messages


class Shuffled(Forgetful):
    """Answers in no order, and nodes start anew now and then."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._waiting.sort(key=lambda message: message.metadata.message_id)  # which are random
        return super().pull_messages(message_ids)


@pytest.mark.parametrize("downlink", ["coded", "plain"])
def test_it_runs_on_real_time_and_nodes_that_forget(downlink: str) -> None:
    job = job_of(f"{BUFFERED} rounds=12 downlink={downlink} codec.step=1 codec.feedback=false")
    _, records = rounds_on(job, Shuffled(client_app(lambda _: job), list(range(50, 58))))
    assert [(record.replies, record.failures, record.clock) for record in records] == [(3, 0, None)] * 12
    assert records[-1].accuracy is not None
    assert records[-1].accuracy > 0.5


def test_whoever_took_part_most_often_sets_epsilon(asked: list[tuple[int, int, int]]) -> None:
    job = job_of(f"{BUFFERED} privacy=example trainer.steps=2 speeds=stragglers")
    _, records = run(job)
    asked_most = max(sum(which == other for _, other, _ in asked) for which in range(8))
    spent = job.spent(job.rounds, asked_most)
    assert spent is not None
    assert records[-1].epsilon == spent.epsilon < 8.0
    assert asked_most <= job.rounds


# Clients in trouble


def failing(job: Job, *nodes: int) -> Any:
    app = client_app(lambda _: job)

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] in nodes and message.metadata.message_type == "train":
            raise ValueError("patient Morgan has a secret")
        return app(message, context)

    return answer


def test_who_always_fails_is_asked_once_a_round(asked: list[tuple[int, int, int]]) -> None:
    job = job_of(f"{BUFFERED} rounds=10")
    federation, records = run(job, failing(job, 5))
    assert [record.replies for record in records] == [3] * 10
    assert 0 < sum(record.failures for record in records) == sum(which == 5 for _, which, _ in asked) <= 10
    assert federation.accepted == 30


def test_a_buffer_that_nobody_can_fill_steps_with_what_is_there() -> None:
    job = job_of(f"{BUFFERED} rounds=3")
    _, records = run(job, failing(job, *range(6)))
    assert [(record.replies, record.failures) for record in records] == [(2, 6)] * 3


def test_where_all_fail_again_and_again_the_run_ends() -> None:
    job = job_of(BUFFERED)
    with pytest.raises(FedappError, match=r"round 3: none of 8 clients .* after 3 such rounds in a row"):
        run(job, failing(job, *range(8)))


def test_who_says_nothing_is_given_up() -> None:
    class Silent(Elsewhere):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            talking = [m for m in self._waiting if m.metadata.dst_node_id != 53]
            if not talking:
                return []
            self._waiting.remove(talking[0])
            return [self._app(talking[0], self._contexts[talking[0].metadata.dst_node_id])]

    job = job_of("strategy=fedbuff strategy.buffer=8 rounds=2 round_timeout=1")
    _, records = rounds_on(job, Silent(client_app(lambda _: job), list(range(50, 58))))
    assert [(record.replies, record.failures) for record in records] == [(7, 1)] * 2


def test_who_was_asked_first_is_given_up_first() -> None:
    class Mute(Elsewhere):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            training = self._waiting[-1].metadata.message_type == MessageType.TRAIN
            return [] if training else super().pull_messages(message_ids)

    job = job_of("strategy=fedbuff round_timeout=5")
    grid = Mute(client_app(lambda _: job), list(range(50, 58)))
    federation = Federation(job, grid)
    loop = federation._asynchronous
    assert loop is not None
    loop._send(1, federation.arrays, [4])
    loop._send(1, federation.arrays, [2, 6])
    early, *_ = loop._flights
    loop._flights[early] = replace(loop._flights[early], sent=time.monotonic() - 5)
    flight, reply = loop._next()
    assert reply is None
    assert flight.asked.metadata.dst_node_id == 54
    assert loop._training == {52, 56}


def test_a_message_that_the_grid_refuses_is_a_failure() -> None:
    class Refusing(Elsewhere):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[Any]:
            queries = [m for m in messages if m.metadata.message_type == "query"]
            return super().push_messages(queries) if queries else [None]  # and no more

    job = job_of(BUFFERED)
    with pytest.raises(FedappError, match="round 3: none of 8 clients returned an update"):
        rounds_on(job, Refusing(client_app(lambda _: job), list(range(50, 58))))


# Over-selection and deadlines


def seconds(job: Job, which: int) -> float:
    assert job.seconds is not None
    return job.seconds(which, len(job.task.partitions()[which]))


def taken(job: Job, number: int) -> list[int]:
    """Who of those asked answers first, as far as they count."""
    order = sorted(job.cohorts.draw(number, job.clients), key=lambda which: (seconds(job, which), which))
    late = [which for which in order if job.deadline is not None and seconds(job, which) > job.deadline]
    return [which for which in order if which not in late][: job.in_round]


@pytest.mark.parametrize(
    "setting",
    ["cohort=3 over_selection=1.7", "cohort=4 over_selection=1.3 deadline=0.5", "cohort=5 deadline=0.5"],
)
@pytest.mark.parametrize("codec", [CODED, "codec=identity downlink=plain"])
def test_the_first_are_taken_and_the_rest_leave_no_trace(
    setting: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is that of those who came in time: also what all clients keep, and every byte they sent."""
    job = job_of(f"{setting} {codec} speeds=stragglers")
    cohorts = {number: taken(job, number) for number in range(1, 6)}
    assert all(len(cohorts[number]) < len(job.cohorts.draw(number, 8)) for number in (1, 2))
    federation, records = run(job)
    alone = job_of(f"cohort=null {codec} speeds=stragglers")
    with monkeypatch.context() as patch:
        patch.setattr(Cohorts, "draw", lambda self, number, nodes, facts: sorted(cohorts[number]))
        wanted, _ = run(alone)
    assert bits(federation.arrays) == bits(wanted.arrays)
    assert [record.replies for record in records] == [len(cohorts[number]) for number in range(1, 6)]
    assert federation.traffic.uplink == wanted.traffic.uplink
    assert federation.traffic.downlink > wanted.traffic.downlink
    clock = 0.0
    for number, record in enumerate(records, 1):
        slowest = max(seconds(job, which) for which in cohorts[number])
        full = len(cohorts[number]) == job.in_round
        clock += slowest if full or job.deadline is None else job.deadline
        assert record.clock == pytest.approx(clock)
        assert record.failures == (0 if full else len(job.cohorts.draw(number, 8)) - len(cohorts[number]))


def test_a_deadline_that_nobody_meets_is_named() -> None:
    with pytest.raises(FedappError, match=r"none of 8 .*, or deadline=0.001 is early"):
        run(job_of("deadline=0.001 speeds=stragglers"))


def test_an_error_is_no_answer_that_counts() -> None:
    job = job_of("cohort=4 over_selection=2 speeds=stragglers rounds=2")
    first = [taken(job, number)[0] for number in (1, 2)]
    _, records = run(job, failing(job, *first))
    assert [(record.replies, record.failures > 0) for record in records] == [(4, True)] * 2


def test_elsewhere_the_first_are_those_that_come_first() -> None:
    job = job_of("cohort=3 over_selection=2 codec=identity")
    grid = Elsewhere(client_app(lambda _: job), list(range(50, 58)))
    federation, records = rounds_on(job, grid)
    assert [(record.replies, record.failures) for record in records] == [(3, 0)] * 5
    assert (federation.messages, len(grid._waiting)) == (30, 15)


# Speeds, and what does not go together


def test_a_share_of_the_clients_is_slower_always_the_same() -> None:
    job = job_of("speeds=stragglers speeds.share=0.25 clients=40 trainer.epochs=3")
    assert job.seconds is not None
    times = sorted(job.seconds(which, 100) for which in range(40))
    assert times == pytest.approx([0.3] * 30 + [3.0] * 10)
    assert [job.seconds(which, 7) for which in range(40)] == [job.seconds(which, 7) for which in range(40)]
    assert job_of("speeds=stragglers speeds.share=0 clients=40").seconds is not None
    with pytest.raises(ConfigError, match=r"speeds.slowdown must be .* got 0.5"):
        Stragglers(slowdown=0.5)


REFUSED = {
    f"{BUFFERED} privacy=central_gaussian": "strategy=fedbuff, privacy=central_gaussian is not accounted for",
    f"{BUFFERED} privacy=distributed_gaussian": "strategy=fedbuff, privacy=distributed_gaussian is not acc",
    f"{BUFFERED} privacy=distributed_example": "strategy=fedbuff, privacy=distributed_example is not acc",
    f"{BUFFERED} aggregation=ckks": "strategy=fedbuff, aggregation=ckks adds whole cohorts",
    f"{BUFFERED} sampling=poisson": "strategy=fedbuff, sampling=poisson",
    f"{BUFFERED} cohort=3": "strategy=fedbuff, there is no cohort: leave cohort out",
    f"{BUFFERED} over_selection=1.3": "leave over_selection out",
    f"{BUFFERED} deadline=3": "leave deadline out",
    f"{BUFFERED} evaluate=clients": "set evaluate=server or none",
    "strategy=fedbuff strategy.buffer=9": "strategy.buffer must be a whole number from 1 to 8, got 9",
    "strategy=fedbuff strategy.concurrency=9": "strategy.concurrency must be a whole number from 1 to 8",
    "strategy=fedbuff strategy.concurrency=0": "strategy.concurrency must be",
    "strategy=fedbuff strategy.max_staleness=-1": "strategy.max_staleness must be",
    "over_selection=1.3 privacy=central_gaussian": "over_selection=1.3, privacy=central_gaussian is not",
    "deadline=3 privacy=central_gaussian": "deadline=3, privacy=central_gaussian is not accounted for",
    "deadline=3 privacy=distributed_gaussian": "deadline=3, privacy=distributed_gaussian is not accounted",
    "over_selection=1.3 sampling=poisson": "over_selection=1.3, sampling=poisson",
    "over_selection=1.3 aggregation=ckks": "over_selection=1.3, aggregation=ckks",
    "over_selection=1.3 strategy=krum": "strategy=krum would weigh who is fast, attackers too",
    "over_selection=0.9": "over_selection must be",
    "deadline=0": "deadline must be",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_go_together_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[setting])):
        job_of(setting)


def test_simulated_and_real_time_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match="speeds=stragglers simulates time, and here it is real"):
        combinations.check_clock(job_of("speeds=stragglers"), simulated=False)
    for setting in ("over_selection=1.3", "deadline=3"):
        with pytest.raises(ConfigError, match="without speeds nobody is: set speeds=stragglers"):
            combinations.check_clock(job_of(setting), simulated=True)
        combinations.check_clock(job_of(setting), simulated=False)
    combinations.check_clock(job_of(BUFFERED), simulated=True)
