"""Who trains: known probabilities, the worst losses, tags; what nodes tell, and what the server believes."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from grids import Elsewhere, bits, model_of, rounds_on
from grids import rounds_here as run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

import fedapp
from fedapp import config
from fedapp.client_app import client_app
from fedapp.cohorts import Cohorts
from fedapp.errors import ConfigError, DecodeError, FedappError
from fedapp.facts import Facts, read
from fedapp.job import Job
from fedapp.nodes import facts
from fedapp.privacy import consent
from fedapp.privacy.ledger import Ledger
from fedapp.records import CONFIG
from fedapp.selection import BySize, Poisson, PowerOfChoice, Selection, Tags, Uniform, probabilities
from fedapp.synchronous import Synchronous

FAST = "task=digits privacy=none model=logistic clients=8 rounds=4 cohort=3 engine.workers=1"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


def having(sizes: Sequence[int | None]) -> list[Facts]:
    return [Facts(examples=size) for size in sizes]


def drawn(selection: Selection, nodes: list[Facts], size: int, times: int = 4000) -> list[list[int]]:
    secret = np.random.default_rng(5).bytes
    return [selection.draw(nodes, size, secret) for _ in range(times)]


def deviates(cohorts: list[list[int]], expected: Sequence[float]) -> bool:
    """Whether a chi-square test at one in a million finds other probabilities of taking part than these.

    Its degrees of freedom are not exact, since who takes part together is not independent; the variance of
    each count is at most that of independent draws.
    """
    seen, n, p = Counter(i for cohort in cohorts for i in cohort), len(cohorts), np.array(expected)
    some = (p > 0) & (p < 1)
    counts = np.array([seen[i] for i in range(len(p))])
    if (counts[~some] != np.rint(n * p[~some])).any():
        return True
    counts, p = counts[some], p[some]
    statistic = float(((counts - n * p) ** 2 / (n * p * (1 - p))).sum())
    return bool(statistic > chi2.ppf(1 - 1e-6, len(p)))


SIZES = (10, 20, 30, 40, 0, 100, 400)
BY_SIZE = (0.1, 0.2, 0.3, 0.4, 0.0, 1.0, 1.0)  # of 3: the two largest surely, of the rest one, by size


def test_probabilities_by_hand() -> None:
    assert probabilities(np.array(SIZES, float), 3) == pytest.approx(BY_SIZE)
    assert probabilities(np.array([5.0, 5.0, 5.0, 5.0]), 1) == pytest.approx([0.25] * 4)
    assert probabilities(np.array([1.0, 0.0, 2.0]), 3) == pytest.approx([1, 0, 1])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=30), st.integers(1, 40))
def test_probabilities_are_proportional_up_to_one_and_add_up(sizes: list[int], count: int) -> None:
    found, held = probabilities(np.array(sizes, float), count), np.array(sizes, float)
    some = (found > 0) & (found < 1)
    assert found.sum() == pytest.approx(min(count, np.count_nonzero(held)))
    assert ((found > 0) == (held > 0)).all()
    if some.any():
        shares = found[some] / held[some]
        assert shares == pytest.approx(shares[0])
        assert (held[found == 1] * shares[0] >= 1 - 1e-9).all()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any),
    st.integers(1, 40),
    st.integers(0, 2**32),
)
def test_a_cohort_has_the_size_that_was_asked(sizes: list[int], count: int, seed: int) -> None:
    cohort = BySize().draw(having(sizes), count, np.random.default_rng(seed).bytes)
    assert len(cohort) == len(set(cohort)) == min(count, np.count_nonzero(sizes))
    assert cohort == sorted(cohort)
    assert all(sizes[i] for i in cohort)


RULES: dict[str, tuple[Selection, list[Facts], int, tuple[float, ...], tuple[float, ...]]] = {
    # selection, nodes, cohort, probabilities, and those of a wrong rule that must not pass
    "uniform": (Uniform(), having(SIZES), 3, (3 / 7,) * 7, BY_SIZE),
    "poisson": (Poisson(), having(SIZES), 3, (3 / 7,) * 7, BY_SIZE),
    "by_size": (BySize(), having(SIZES), 3, BY_SIZE, (3 / 7,) * 7),
    # one after the other by size, as is often done, has other probabilities: 1/6 + 2/6 * 1/4 + 3/6 * 1/3, ...
    "by_size of 3": (
        BySize(),
        having([1, 2, 3]),
        2,
        (1 / 3, 2 / 3, 1.0),
        (5 / 12, 11 / 15, 17 / 20),
    ),
    "by_size, not told": (BySize(), having([None, 1, 3, None]), 1, (0, 1 / 4, 3 / 4, 0), (1 / 4,) * 4),
    "candidates": (PowerOfChoice(3), having(SIZES), 1, BY_SIZE, (3 / 7,) * 7),
    "tags": (
        Tags(tags=("a",)),
        [Facts(tags=frozenset(words)) for words in ("a", "b", "ab", "", "a")],
        2,
        (2 / 3, 0, 2 / 3, 0, 2 / 3),
        (2 / 5,) * 5,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_nodes_take_part_with_known_probabilities(rule: str) -> None:
    selection, nodes, size, right, wrong = RULES[rule]
    cohorts = drawn(selection, nodes, size)
    assert not deviates(cohorts, right)
    assert deviates(cohorts, wrong)


def test_by_size_the_expected_mean_is_that_of_all_clients() -> None:
    """Examples over probability add up to all examples in each cohort, so a mean is no ratio of two draws."""
    values, sizes = np.array([3.0, -1.0, 4.0, 1.0, 9.0, -5.0, 2.0]), np.array(SIZES)
    nodes = having(SIZES)
    least = BySize().least_weight(nodes, 3)
    assert least == 100  # 100 examples share one place, so 10 / 0.1
    weights = np.where(sizes > 0, np.maximum(sizes, least), 0)
    cohorts = drawn(BySize(), nodes, 3)
    means = [np.average(values[cohort], weights=weights[cohort]) for cohort in cohorts]
    assert {int(weights[cohort].sum()) for cohort in cohorts} == {600}
    error = 5 * np.std(means) / len(means) ** 0.5
    assert np.mean(means) == pytest.approx(np.average(values, weights=sizes), abs=error)
    plain = [np.average(values[cohort], weights=sizes[cohort]) for cohort in cohorts]
    assert abs(np.mean(plain) - np.average(values, weights=sizes)) > error  # counted twice: by size again


def test_the_worst_are_those_of_the_highest_losses() -> None:
    losses = {3: 0.5, 1: 2.0, 7: 0.5, 4: 1.0}
    assert PowerOfChoice().worst(losses, 2) == [1, 4]
    assert PowerOfChoice().worst(losses, 3) == [1, 3, 4]  # of equal ones the lowest place
    assert PowerOfChoice().worst(losses, 9) == [1, 3, 4, 7]


def test_tags_and_resources_are_all_asked_for() -> None:
    node = Facts(labels=(0, 3, 1), cores=4, memory_mb=8000, speed=200, tags=frozenset({"gpu", "eu"}))
    for fitting in (Tags(), Tags(tags=("eu",), labels=(1, 2), cores=4, memory_gb=8.0),
                    Tags(examples_per_second=200)):  # fmt: skip
        assert fitting.fits(node)
    for other in (Tags(tags=("eu", "us")), Tags(labels=(0,)), Tags(cores=5), Tags(memory_gb=8.1),
                  Tags(examples_per_second=201)):  # fmt: skip
        assert not other.fits(node)
        assert not other.fits(Facts())
    assert Tags(tags=("eu",), cores=2).asks == ("tags", "cores")
    with pytest.raises(FedappError, match=r"none of 1 nodes tells that it has what .*us.* asks"):
        Tags(tags=("us",)).draw([node], 1, np.random.default_rng(0).bytes)


# Whole rounds


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The cohort of each round, as the run drew it."""
    cohorts: list[list[int]] = []
    draw = Synchronous._drawn

    def noted(self: Synchronous, *given: Any) -> list[int]:
        nodes = draw(self, *given)
        cohorts.append([self.places.partitions[node] for node in nodes])
        return nodes

    monkeypatch.setattr(Synchronous, "_drawn", noted)
    return cohorts


def test_power_of_choice_trains_the_worst_of_its_candidates(
    trained: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("selection=power_of_choice selection.candidates=6 partition=dirichlet rounds=3")
    told: list[dict[int, float]] = []
    candidates: list[list[int]] = []
    draw = Cohorts.draw

    def noted(self: Cohorts, *args: Any) -> list[int]:
        candidates.append(draw(self, *args))
        return candidates[-1]

    def worst(self: PowerOfChoice, losses: dict[int, float], size: int) -> list[int]:
        told.append(losses)
        return sorted(sorted(losses, key=losses.__getitem__)[-size:])

    monkeypatch.setattr(Cohorts, "draw", noted)
    monkeypatch.setattr(PowerOfChoice, "worst", worst)
    federation, records = run(job)
    assert [set(losses) for losses in told] == [set(places) for places in candidates]
    assert {len(losses) for losses in told} == {6}
    for cohort, losses in zip(trained, told, strict=True):
        others = losses.keys() - cohort
        assert len(cohort) == 3
        assert min(losses[i] for i in cohort) >= max(losses[i] for i in others)
    assert federation.messages == 3 * (6 + 3)
    assert [record.replies for record in records] == [3] * 3
    monkeypatch.undo()
    assert bits(run(job)[0].arrays) == bits(federation.arrays)


def test_the_loss_that_candidates_tell_is_that_of_the_weights_of_the_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, told = job_of("selection=power_of_choice rounds=1 downlink=plain"), list[dict[int, float]]()
    worst = PowerOfChoice.worst

    def noted(self: PowerOfChoice, losses: dict[int, float], size: int) -> list[int]:
        told.append(dict(losses))
        return worst(self, losses, size)

    monkeypatch.setattr(PowerOfChoice, "worst", noted)
    run(job)
    model = job.task.model(job.seed)
    for partition, loss in told[0].items():
        expected = job.task.evaluate(model, job.task.client_data({"partition-id": partition}))["loss"]
        assert loss == pytest.approx(expected)


def test_what_candidates_are_sent_and_say_is_counted() -> None:
    same = "codec=identity downlink=plain rounds=1"
    uniform, chosen = (run(job_of(f"{same} {s}"))[1][0] for s in ("", "selection=power_of_choice"))
    weights = 4 * 650
    assert chosen.downlink_bytes > uniform.downlink_bytes + 6 * weights
    assert uniform.uplink_bytes < chosen.uplink_bytes < uniform.uplink_bytes + weights


def test_where_no_candidate_tells_its_loss_the_run_ends() -> None:
    job = job_of("selection=power_of_choice")
    app = client_app(lambda _: job)

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate":
            raise ValueError("no")
        return app(message, context)

    with pytest.raises(FedappError, match="round 1: none of 6 candidates told its loss"):
        run(job, answer)


def test_only_nodes_with_the_tags_train(trained: list[list[int]]) -> None:
    job = job_of("selection=tags selection.tags=[gpu,eu] selection.given=[[gpu,eu],[eu],[gpu,us]] rounds=2")
    _, records = run(job)
    assert trained == [[0, 3, 6]] * 2
    assert [record.replies for record in records] == [3] * 2
    job = job_of("selection=tags selection.tags=[gpu,eu] selection.given=[[gpu,eu],[eu]] cohort=2 rounds=5")
    trained.clear()
    run(job)
    assert all(len(cohort) == 2 and {0, 2, 4, 6}.issuperset(cohort) for cohort in trained)
    assert len(set(map(tuple, trained))) > 1


def test_only_nodes_with_the_labels_train(trained: list[list[int]]) -> None:
    job = job_of("selection=tags selection.labels=[3] partition=pathological rounds=2 cohort=8")
    run(job)
    assert trained == [np.flatnonzero(job.task.label_counts()[:, 3]).tolist()] * 2
    assert 0 < len(trained[0]) < 8


@pytest.mark.parametrize("codec", ["codec.feedback=false", "codec=identity downlink=plain"])
@pytest.mark.parametrize("selection", ["by_size", "power_of_choice"])
def test_clients_weigh_as_the_selection_says(
    codec: str, selection: str, trained: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is the mean of what each of its clients does alone, with weights by hand."""
    setting = f"{codec} rounds=1 evaluate=none partition=dirichlet"
    job = job_of(f"{setting} selection={selection}")
    moved = ravelled(run(job)[0].arrays) - ravelled(job.initial)
    (cohort,) = trained
    sizes = np.array([len(part) for part in job.task.partitions()])
    by_size = np.maximum(sizes[cohort], job.selection.least_weight(having(sizes.tolist()), 3))
    weights = by_size if selection == "by_size" else np.ones(3)
    moves = []
    for partition in cohort:
        monkeypatch.setattr(Cohorts, "draw", lambda *_, which=partition: [which])
        moves.append(ravelled(run(job_of(setting))[0].arrays) - ravelled(job.initial))
    assert moved == pytest.approx(np.average(moves, axis=0, weights=weights), abs=1e-6)
    assert moved != pytest.approx(np.average(moves, axis=0, weights=sizes[cohort]), abs=1e-6)


def ravelled(arrays: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


@pytest.mark.parametrize(
    "setting", ["selection=by_size", "selection=power_of_choice", "selection=tags selection.labels=[1]"]
)
def test_any_number_of_workers_gives_the_same_bits(setting: str) -> None:
    one = f"{FAST} {setting} rounds=2"
    assert model_of(f"{one} engine.workers=3") == model_of(one)


def test_poisson_is_one_thing_by_two_names() -> None:
    by_name, by_key = job_of("selection=poisson"), job_of("sampling=poisson")
    assert by_name.selection == by_key.selection == Poisson()
    assert by_name.sampling == by_key.sampling == "poisson"
    assert [by_name.cohorts.draw(r, 8) for r in range(20)] == [by_key.cohorts.draw(r, 8) for r in range(20)]
    assert len({len(by_name.cohorts.draw(r, 8)) for r in range(20)}) > 1
    central = job_of("privacy=central_gaussian selection=uniform")
    assert central.selection == Poisson()
    assert job_of("privacy=central_gaussian sampling=fixed").selection == Uniform()
    assert job_of("privacy=central_gaussian selection=poisson").sampling == "poisson"


# What nodes elsewhere tell


def elsewhere(job: Job, app: Any = None, nodes: int = 8) -> Elsewhere:
    return Elsewhere(app or client_app(lambda _: job), list(range(50, 50 + nodes)))


def test_nodes_elsewhere_tell_what_is_asked_and_give_the_same_bits() -> None:
    for setting in ("selection=by_size", "selection=power_of_choice", "selection=tags selection.labels=[1]"):
        job = job_of(f"{setting} codec.feedback=false codec.step=2")
        assert bits(rounds_on(job, elsewhere(job))[0].arrays) == bits(run(job)[0].arrays)


def test_tags_come_from_the_node_config(trained: list[list[int]]) -> None:
    job = job_of("selection=tags selection.tags=[ward,eu] selection.cores=1 selection.memory_gb=0.001")
    grid = elsewhere(job)
    for node in (51, 54):
        grid._contexts[node].node_config["tags"] = "eu, ward,other"
    grid._contexts[52].node_config["tags"] = "eu"
    rounds_on(job, grid)
    assert trained == [[1, 4]] * 4


def told(job: Job, grid: Elsewhere) -> dict[int, Facts]:
    return facts(grid, job, {node: i for i, node in enumerate(sorted(grid.get_node_ids()))}, 1)


def test_a_node_tells_no_more_than_is_asked() -> None:
    assert told(job_of(), elsewhere(job_of())) == {}
    job = job_of("selection=by_size")
    answers = told(job, elsewhere(job))
    sizes = [len(part) for part in job.task.partitions()]
    assert answers == {50 + i: Facts(examples=size) for i, size in enumerate(sizes)}
    job = job_of("selection=tags selection.labels=[1]")
    answers = told(job, elsewhere(job))
    assert [answers[50 + i].labels for i in range(8)] == list(map(tuple, job.task.label_counts().tolist()))
    assert {node.examples for node in answers.values()} == {None}


def test_a_node_tries_how_fast_it_trains() -> None:
    job = job_of("selection=tags selection.examples_per_second=1")
    before = [value.clone() for value in job.model.state_dict().values()]
    answers = told(job, elsewhere(job))
    assert all(node.speed is not None and node.speed > 100 for node in answers.values())
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.state_dict().values(), strict=True))


def test_simulated_clients_are_as_fast_as_they_are_simulated(trained: list[list[int]]) -> None:
    slow = "speeds=stragglers speeds.seconds_per_example=0.01 speeds.share=0.25 speeds.slowdown=10"
    job = job_of(f"selection=tags selection.examples_per_second=100 cohort=6 {slow}")
    assert sorted(job.speed(i) for i in range(8)) == [10, 10, *[100] * 6]
    run(job)
    assert {len(drawn) for drawn in trained} == {6}
    assert {job.speed(i) for drawn in trained for i in drawn} == {100}


RULED = "tasks: [digits]\nprivacy: [none]\nmetrics: [num-examples, accuracy, loss]\n"


@pytest.mark.parametrize(
    ("rules", "tells"),
    [
        (RULED, False),
        (f"{RULED}facts: [labels]\n", False),
        (f"{RULED}facts: [examples]\n", True),
        (f"{RULED}facts: [examples]\nclasses: ['1']\n", "ones"),
        (f"{RULED}facts: [examples]\nepsilon: 8\ndelta: 1.0e-5\n", False),  # which this run does not keep to
        (f"{RULED.replace('none', 'example')}facts: [examples]\n", False),
    ],
)
def test_of_its_data_a_node_tells_what_its_policy_lists(
    rules: str, tells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A checkout before another one on the path is no bundle that arrived.
    monkeypatch.setattr(consent, "installed", lambda: Path(fedapp.__file__).parent)
    job = job_of("selection=by_size")
    grid = elsewhere(job)
    (tmp_path / "policy.yaml").write_text(rules)
    grid._contexts[50].node_config["policy"] = str(tmp_path / "policy.yaml")
    answers, ones = told(job, grid), int(job.task.label_counts()[0, 1])
    examples = len(job.task.partitions()[0])
    assert answers[50].examples == (ones if tells == "ones" else examples if tells else None)
    assert answers[51].examples is not None


def test_a_node_with_a_ledger_or_under_privacy_tells_nothing_of_its_data(tmp_path: Path) -> None:
    job = job_of("selection=by_size")
    grid = elsewhere(job)
    ledger = Ledger(tmp_path / "ledger.db", new=True)
    grid._contexts[50].node_config |= {"ledger": str(tmp_path / "ledger.db"), "data-id": "a"}
    assert told(job, grid)[50] == Facts()
    assert ledger.count("a") == 0
    private = job_of("privacy=example")
    assert set(told(job, elsewhere(job, client_app(lambda _: private))).values()) == {Facts()}


def test_a_node_tries_its_speed_only_for_runs_that_its_policy_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consent, "installed", lambda: Path(fedapp.__file__).parent)
    job = job_of("selection=tags selection.examples_per_second=1")
    grid = elsewhere(job)
    for node, rules in ((50, RULED), (51, RULED.replace("digits", "csv"))):
        (tmp_path / f"{node}.yaml").write_text(rules)
        grid._contexts[node].node_config["policy"] = str(tmp_path / f"{node}.yaml")
    answers = told(job, grid)
    assert answers[50].speed is not None
    assert answers[51].speed is None


def test_who_does_not_tell_is_not_drawn_and_where_nobody_does_it_is_said(
    trained: list[list[int]], tmp_path: Path
) -> None:
    job, grid = job_of("selection=by_size"), None
    grid = elsewhere(job)
    (tmp_path / "policy.yaml").write_text(RULED)
    for node in range(50, 56):
        grid._contexts[node].node_config["policy"] = str(tmp_path / "policy.yaml")
    rounds_on(job, grid)
    assert trained == [[6, 7]] * 4
    for node in (56, 57):
        grid._contexts[node].node_config["policy"] = str(tmp_path / "policy.yaml")
    with pytest.raises(FedappError, match=r"no node tells how many examples it has: set selection=uniform"):
        rounds_on(job, grid)


STRANGE: list[dict[str, Any]] = [
    {"examples": -1},
    {"examples": 2**24},
    {"examples": True},
    {"examples": 1.5},
    {"examples": "9"},
    {"examples": [1]},
    {"labels": [1] * 9},
    {"labels": [1] * 9 + [-1]},
    {"labels": [0.5] * 10},
    {"labels": 3},
    {"cores": -1},
    {"cores": 2**40},
    {"memory-mb": 1e9},
    {"speed": -1},
    {"speed": 3.5},
    {"tags": "gpu"},
    {"tags": [1]},
    {"tags": ["a"] * 33},
    {"tags": ["a" * 65]},
]


@pytest.mark.parametrize("strange", STRANGE)
def test_strange_facts_are_refused(strange: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        read(ConfigRecord(strange), 10)


def test_facts_as_they_are() -> None:
    record = ConfigRecord(
        {"examples": 0, "labels": [0] * 10, "cores": 1, "memory-mb": 9, "speed": 7, "tags": ["a", "b"]}
    )
    assert read(record, 10) == Facts(0, (0,) * 10, 1, 9, 7, frozenset({"a", "b"}))
    assert read(ConfigRecord({"something": "else"}), 10) == Facts()


ANSWERS: list[Callable[[], RecordDict]] = [
    RecordDict,
    lambda: RecordDict({CONFIG: ConfigRecord({"examples": -5})}),
    lambda: RecordDict({CONFIG: ConfigRecord({"examples": "many"})}),
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_strange_answer_costs_that_node_its_place(answer: Any, trained: list[list[int]]) -> None:
    job = job_of("selection=by_size cohort=7 rounds=2")
    app = client_app(lambda _: job)

    def answers(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.facts" and context.node_id == 53:
            return Message(answer(), reply_to=message)
        return app(message, context)

    rounds_on(job, elsewhere(job, answers))
    assert trained == [[0, 1, 2, 4, 5, 6, 7]] * 2


# What does not go together


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            "privacy=example selection=by_size",
            r"selection=by_size .* privacy=example.* set selection=uniform",
        ),
        (
            "privacy=central_gaussian selection=power_of_choice",
            r"selection=power_of_choice .* privacy=central",
        ),
        ("privacy=local_gaussian selection=tags", r"selection=tags .* privacy=local_gaussian"),
        ("privacy=distributed_gaussian selection=tags", r"selection=tags .* privacy=distributed_gaussian"),
        ("selection=by_size sampling=poisson", r"selection=by_size draws .* leave sampling out"),
        ("selection=poisson sampling=fixed", r"selection=poisson draws .* leave sampling out"),
        ("selection=by_size strategy=fedbuff cohort=null", r"selection=by_size .* strategy=fedbuff"),
        ("selection=tags strategy=scaffold", r"selection=tags .* strategy=scaffold"),
        ("selection=by_size aggregation=ckks", r"selection=by_size .* aggregation=ckks"),
        ("selection=power_of_choice selection.candidates=2", r"selection.candidates .* from 3 to 8, got 2"),
        ("selection=power_of_choice selection.candidates=9", r"selection.candidates .* from 3 to 8, got 9"),
        ("selection=tags selection.tags=gpu", r"selection.tags must be a list of words, got 'gpu'"),
        ("selection=tags selection.labels=[a]", r"selection.labels must be a list of whole numbers"),
        ("selection=tags selection.given=[gpu]", r"selection.given must list tags of nodes, got \['gpu'\]"),
        ("selection=tags selection.cores=-1", r"selection.cores .* at least 0, got -1"),
        ("selection=tags selection.memory_gb=lots", r"selection.memory_gb .* got 'lots'"),
    ],
)
def test_what_does_not_go_together_is_named(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(overrides)
