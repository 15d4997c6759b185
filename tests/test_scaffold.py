"""Control variates: both ends agree whatever is lost, and clients that differ find the common optimum."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from grids import rounds_here
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedapp import config, scaffold
from fedapp.codec import Codec
from fedapp.codec.chain import Identity
from fedapp.codec.prune import TopK
from fedapp.codec.rate_distortion import RateDistortion
from fedapp.cohorts import Cohort
from fedapp.engine.local import LocalGrid
from fedapp.errors import ConfigError
from fedapp.records import ARRAYS, CONFIG, METRICS, WEIGHT, load_state
from fedapp.scaffold import COUNTED, FORGOTTEN, KEPT, STEERED, Control, Controls, Course, Scaffold
from fedapp.tasks import Data
from fedapp.training import Sgd
from fedapp.wire import Wire, compress

Vector = NDArray[Any]


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    LocalGrid(ClientApp(), [1], workers=0)  # sets the global that messages read the run and the node from


def pace(server_round: int) -> float:
    """A falling learning rate."""
    return 1 / (1 + 0.2 * (server_round - 1))


class World:
    """A server and clients of set weights that answer by `train(client, received, steering, round)`."""

    def __init__(
        self, weights: list[int], size: int, train: Any, codec: Codec | None = None, share: float = 1.0
    ) -> None:
        self.codec, self.train, self.weights = codec or Identity(), train, weights
        self.course = Course(pace, share)
        self.controls = Controls(len(weights), self.course)
        self.wire = Wire(
            Scaffold(min_train_nodes=1, min_available_nodes=1), self.codec, controls=self.controls
        )
        self.contexts = [Context(1, node, {}, RecordDict(), {}) for node in range(len(weights))]
        self.arrays = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
        self.round = 0

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id

        def handler(message: Message, context: Context) -> Message:
            received = message.content.array_records[ARRAYS]["w"].numpy()
            steering = message.content.array_records[STEERED]["w"].numpy()
            trained = received + self.train(node, received, steering, self.round) + steering
            arrays = ArrayRecord({"w": Array(trained.astype(np.float32))})
            metrics = MetricRecord({WEIGHT: self.weights[node]})
            return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=message)

        def recall(message: Message, context: Context) -> Control:
            return Control(message, context, self.codec, self.course)

        mod = compress(self.codec, np.random.default_rng(0), recall=recall)
        return mod(message, self.contexts[node], handler)

    def ask(self, cohort: list[int] | None = None) -> list[Message]:
        self.round += 1
        view: Any = Cohort(list(range(len(self.weights))) if cohort is None else cohort)
        messages = self.wire.configure_train(self.round, self.arrays, ConfigRecord(), view)
        return sorted(messages, key=lambda message: message.metadata.dst_node_id)

    def step(self, cohort: list[int] | None = None, lost: frozenset[int] = frozenset()) -> Vector:
        """One round in which some replies are lost on their way; returns the step of the weights."""
        before = self.arrays["w"].numpy()
        replies = [self.answer(message) for message in self.ask(cohort)]
        there = [reply for reply in replies if reply.metadata.src_node_id not in lost]
        arrays, _ = self.wire.aggregate_train(self.round, there)
        self.arrays = arrays or self.arrays
        step: Vector = self.arrays["w"].numpy() - before
        return step

    def control(self, node: int) -> Vector:
        """What the client will take for its control when it hears what counted."""
        message = next(m for m in self.ask() if m.metadata.dst_node_id == node)
        self.round -= 1
        control = Control(message, self.contexts[node], self.codec, self.course)
        return self.course.faded(control._counted, self.controls._at) * control._control


def noise(node: int, received: Vector, steering: Vector, server_round: int) -> Vector:
    return np.random.default_rng([node, server_round]).standard_normal(len(received)).astype(np.float32)


def mean(weights: list[int]) -> Vector:
    """Of what `noise` makes of ten zeros in round 3."""
    zeros = np.zeros(10)
    return np.average([noise(node, zeros, zeros, 3) for node in range(len(weights))], axis=0, weights=weights)


CODECS = [Identity(), TopK(0.3), RateDistortion(rate=2.0)]


@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=5),
    st.lists(st.tuples(st.frozensets(st.integers(0, 4)), st.frozensets(st.integers(0, 4))), max_size=5),
    st.sampled_from(CODECS),
)
@settings(max_examples=40, deadline=None)
def test_both_ends_agree_whoever_takes_part_and_whatever_is_lost(
    weights: list[int], rounds: list[tuple[frozenset[int], frozenset[int]]], codec: Codec
) -> None:
    world = World(weights, 40, noise, codec)
    for cohort, lost in rounds:
        world.step([node for node in cohort if node < len(weights)] or None, lost)
    known = {node for node, (at, _) in world.controls._counted.items() if at}
    found = [world.weights[node] * world.control(node) for node in known]
    np.testing.assert_allclose(
        world.controls._sum + np.zeros(40), np.sum([np.zeros(40), *found], axis=0), atol=1e-3
    )


@pytest.mark.parametrize("lost", [frozenset[int](), frozenset({1})])
def test_the_mean_is_that_of_what_clients_trained(lost: frozenset[int]) -> None:
    """Steering and controls cancel: with all clients there the step is the mean of their own updates."""
    world = World([1, 2, 5], 10, noise)
    world.step()
    world.step(lost=lost)
    expected = mean([1, 2, 5])
    np.testing.assert_allclose(world.step(), expected, atol=1e-6)


def test_few_give_the_mean_of_all_while_controls_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of clients whose updates do not change, any few are enough once all are known."""
    monkeypatch.setattr(scaffold, "FADE", 1.0)

    def own(node: int, received: Vector, steering: Vector, server_round: int) -> Vector:
        return np.full(4, node * pace(server_round), np.float32)

    world = World([1, 1, 1, 1], 4, own)
    for cohort in ([0, 1], [2, 3]):
        world.step(cohort)
    for cohort in ([0, 1], [0, 3], [2]):
        np.testing.assert_allclose(world.step(cohort), 1.5 * pace(world.round), rtol=1e-5)


def quadratic(curvature: list[float], optimum: list[float], steps: int = 10) -> Any:
    """Gradient descent of each client on its own curvature/2 (w - optimum)^2; the steering in equal parts."""

    def train(node: int, received: Vector, steering: Vector, server_round: int) -> Vector:
        w, lr = received.astype(np.float64), 0.05 * pace(server_round)
        for _ in range(steps):
            w = w - lr * curvature[node] * (w - optimum[node]) + steering / steps
        return (w - steering - received).astype(np.float32)

    return train


@pytest.mark.parametrize("codec", [Identity(), TopK(0.5), RateDistortion(rate=3.0)])
def test_clients_that_differ_find_the_optimum_of_all(codec: Codec) -> None:
    """Where several steps of each lead averaging elsewhere (Karimireddy et al. 2020, section 3, figure 1)."""
    curvature, optimum = [1.0, 8.0], [1.0, 0.0]
    best = float(np.average(optimum, weights=curvature))
    world = World([1, 1], 8, quadratic(curvature, optimum), codec)
    for _ in range(24):
        world.step()
    assert abs(world.arrays["w"].numpy() - best).max() < 0.01

    plain = World([1, 1], 8, lambda *at: quadratic(curvature, optimum)(at[0], at[1], np.zeros(8), at[3]))
    for _ in range(24):
        plain.step()  # never pushed by the steering on its way, so its own updates are those of averaging
    assert abs(plain.arrays["w"].numpy() - best).min() > 0.025


def test_news_become_few_where_updates_come_again() -> None:
    """Of the same update each round ever less is lost."""
    rng = np.random.default_rng(0)
    always = rng.standard_normal((2, 2000)).astype(np.float32)

    def own(node: int, received: Vector, steering: Vector, server_round: int) -> Vector:
        update: Vector = always[node] * np.float32(pace(server_round))
        return update

    world = World([1, 1], 2000, own, RateDistortion(rate=1.0))
    expected, missed = always.mean(axis=0), []
    for _ in range(8):
        step = world.step() / pace(world.round)
        missed.append(float(np.sum((step - expected) ** 2) / np.sum(expected**2)))
    assert missed[0] > 0.1  # one bit a value of noise
    assert missed[7] < 0.2 * missed[0]


def test_a_node_that_forgot_costs_one_round_and_all_begin_anew() -> None:
    world = World([1, 2, 5], 10, noise)
    world.step()
    world.contexts[1] = Context(1, 1, {}, RecordDict(), {})
    replies = [world.answer(message) for message in world.ask()]
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert (replies[1].error.code, replies[1].error.reason) == (ErrorCode.MOD_FAILED_PRECONDITION, FORGOTTEN)
    world.wire.aggregate_train(world.round, replies)
    assert world.wire.failures == 1
    messages = world.ask()
    assert [m.content.config_records[CONFIG][COUNTED] for m in messages] == [0, 0, 0]
    world.round -= 1
    expected = mean([1, 2, 5])
    np.testing.assert_allclose(world.step(), expected, atol=1e-6)
    assert len(world.controls._counted) == 3


def test_a_client_that_weighs_other_than_before_makes_all_begin_anew() -> None:
    world = World([1, 2, 5], 10, noise)
    world.step()
    world.weights[2] = 6
    world.step()
    expected = mean([1, 2, 6])
    np.testing.assert_allclose(world.step(), expected, atol=1e-6)


def test_those_who_are_told_the_same_share_a_message() -> None:
    world = World([1, 1, 1], 4, noise)
    world.step([0, 1])
    first, second, third = (message.content for message in world.ask())
    assert first is second
    assert third is not first


def test_a_failed_training_changes_nothing_that_a_client_keeps() -> None:
    world = World([1, 1], 4, noise)
    world.step()
    before = {name: value.tolist() for name, value in load_state(world.contexts[0], KEPT).items()}
    world.train = lambda *at: np.full(4, np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN or infinite values in w"):
        world.answer(world.ask()[0])
    assert {name: value.tolist() for name, value in load_state(world.contexts[0], KEPT).items()} == before


def test_a_control_fades_by_a_tenth_from_cohort_to_cohort() -> None:
    """A client that takes part in a quarter of the rounds: after four."""
    course = Course(pace, share=0.25)
    assert course.faded(3, 3) == 1
    assert course.faded(3, 7) == pytest.approx(0.9)


@pytest.mark.parametrize(("lost", "news"), [(frozenset[int](), [-3.6, 1.0]), (frozenset({0}), [0.0, 0.0])])
def test_half_of_what_was_lost_comes_again_and_only_where_it_counted(
    lost: frozenset[int], news: list[float]
) -> None:
    """One of two values is sent a round; the first round's is the first."""

    def train(node: int, received: Vector, steering: Vector, server_round: int) -> Vector:
        return np.array([4.0, 2.0] if server_round == 1 else [0.0, 0.0])

    world = World([1], 2, train, TopK(0.5))
    world.course = world.controls._course = Course(lambda now: 1.0)
    np.testing.assert_allclose(world.step(lost=lost), [0, 0] if lost else [4, 0], atol=1e-6)
    world.step()
    np.testing.assert_allclose(load_state(world.contexts[0], KEPT)["news"], news, atol=1e-6)


class Line:
    """A task of one weight: half the squared distance to what is given."""

    def loss(self, output: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return ((output - target) ** 2 / 2).mean()


@pytest.mark.parametrize(("size", "batch", "epochs"), [(10, 4, 3), (3, 8, 1), (8, 8, 2)])
def test_training_goes_all_of_the_way(size: int, batch: int, epochs: int) -> None:
    """Where gradients are zero, steps of any number add up to the steering."""
    task: Any = Line()
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    data = Data(torch.zeros(size, 1), torch.zeros(size, 1))
    trainer = Sgd(lr=0.1, batch_size=batch, epochs=epochs)
    trainer.fit(task, model, data, {}, np.random.default_rng(0), 0.0, way=[torch.full((1, 1), 3.0)])
    assert model.weight.item() == pytest.approx(3.0, rel=1e-5)


FAST = "task=digits privacy=none strategy=scaffold clients=4 rounds=3 trainer.epochs=1 engine.workers=1 "


@pytest.mark.parametrize("setting", ["codec=identity", "codec=default codec.rate=0.5 cohort=2"])
def test_it_runs_and_sums_alike_wherever_replies_are_added(setting: str) -> None:
    job = config.job_of(FAST + setting)
    (folded, rounds), (plain, _) = rounds_here(job), rounds_here(job, fold=False)
    assert [one.failures for one in rounds] == [0, 0, 0]
    for name in folded.arrays:
        np.testing.assert_array_equal(folded.arrays[name].numpy(), plain.arrays[name].numpy())


def refusals() -> Iterator[tuple[str, str]]:
    yield "privacy=example", "privacy=example: set privacy=none"
    yield "privacy=none aggregation=ckks", "aggregation=ckks: set aggregation=open"
    yield "privacy=none codec.feedback=true", "set codec.feedback=false"
    yield "privacy=none trainer.epochs=0", "trainer.epochs=0: set 1 or more"


@pytest.mark.parametrize(("setting", "said"), list(refusals()))
def test_what_it_does_not_go_with_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.job_of(f"task=digits strategy=scaffold {setting}")
