"""Nodes that come when a run is under way, and those that come back under another key."""

import io
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from grids import Elsewhere, all_of, bits
from rich.console import Console

from fedapp import config, server_app
from fedapp.client_app import client_app
from fedapp.deploy.frames import round_of
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.privacy.begun import Begun
from fedapp.records import CONFIG
from fedapp.report.folder import Round, RunFolder
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.scaffold import COUNTED

SMALL = "task=digits model=logistic evaluate=none"


class Moving(Elsewhere):
    """A grid that nodes come to and leave; a node that has left answers with an error, as Flower has it.

    `slow` nodes answer at the second look. `says`: what a node says instead of its partition.
    """

    def __init__(self, job: Job, ids: list[int]) -> None:
        super().__init__(client_app(lambda _: job), ids)
        self._clients = job.clients
        for partition, node in enumerate(ids):
            self.come(node, partition)
        self.sent, self.looks = list[Message](), 0
        self.slow, self.says = set[int](), dict[int, RecordDict | Error]()

    def come(self, node: int, partition: int) -> None:
        own: Any = {"partition-id": partition, "num-partitions": self._clients}
        self._contexts[node] = Context(1, node, own, RecordDict(), {})

    def leave(self, node: int) -> None:
        del self._contexts[node]

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = list(super().push_messages(messages))
        self.sent += self._waiting[len(self._waiting) - len(names) :]
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        due = [m for m in self._waiting if m.metadata.message_id in set(message_ids)]
        ready = [m for m in due if m.metadata.dst_node_id not in self.slow]
        self.slow -= {m.metadata.dst_node_id for m in due}
        self._waiting = [m for m in self._waiting if m not in ready]
        return [self._reply(message) for message in ready]

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._contexts:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
        if message.metadata.message_type == "query" and node in self.says:
            return Message(self.says[node], reply_to=message)
        return self._app(message, self._contexts[node])

    def asked(self, kind: str) -> list[int]:
        """The nodes that messages of a kind were sent to."""
        return [m.metadata.dst_node_id for m in self.sent if m.metadata.message_type == kind]


OWN = RecordDict({CONFIG: ConfigRecord({"partition-id": -1})})


def job_of(settings: str) -> Job:
    job = config.job(config.compose(f"{SMALL} {settings}"))
    job.prepare()
    return job


def run(
    settings: str, ids: list[int], events: dict[int, Any], begun: Begun | None = None
) -> tuple[Federation, Moving, list[Round]]:
    """All rounds; `events` happen to the grid after so many of them."""
    job = job_of(settings)
    grid = Moving(job, ids)
    events.get(0, lambda _: None)(grid)
    federation, records = Federation(job, grid, begun=begun or Begun()), []
    for some in federation.run(Progress(Console(file=io.StringIO()), job.rounds)):
        records += some
        events.get(federation.finished, lambda _: None)(grid)
    return federation, grid, records


def counts(records: list[Round]) -> list[tuple[int, int]]:
    return [(record.replies, record.failures) for record in records]


NONE = "privacy=none clients=3 begin_with=2"


@pytest.mark.parametrize(
    "settings",
    [
        f"{NONE} codec.feedback=true",
        f"{NONE} codec=identity downlink=plain",
        f"{NONE} strategy=fedmedian",
        f"{NONE} strategy=scaffold trainer.epochs=1",
        f"{NONE} assignment=deadline deadline=9 trainer.epochs=1",
        f"{NONE} selection=by_size",
        "privacy=example clients=3 begin_with=2",
        "privacy=distributed_gaussian privacy.tolerated=0.2 clients=6 begin_with=5",
    ],
)
def test_who_comes_in_round_3_takes_part_from_then_on(
    settings: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Slow to answer as it is, no round waits for it."""

    def come(grid: Moving) -> None:
        grid.come(2, partition=job.clients - 1)
        grid.slow.add(2)

    job = job_of(settings)
    most, ids = job.clients, [7, 5, 2**63 + 1, 9, 4][: job.clients - 1]
    with caplog.at_level(logging.WARNING):
        _, grid, records = run(f"{settings} rounds=4", ids, {1: come})
    assert counts(records) == [(most - 1, 0), (most - 1, 0), (most, 0), (most, 0)]
    assert f"round 3: node 2 joins with partition {most - 1}" in caplog.text
    assert grid.asked("query") == [*sorted(ids), 2]


def test_the_same_bits_whatever_the_ids() -> None:
    """Places go by partition, and cohorts by the seed, whoever is late."""
    settings = "privacy=none clients=4 begin_with=3 cohort=2 rounds=6 codec.feedback=true"
    one, _, records = run(settings, [5, 6, 7], {3: lambda grid: grid.come(8, partition=3)})
    other, _, again = run(settings, [70, 60, 50], {3: lambda grid: grid.come(4, partition=3)})
    assert bits(one.arrays) == bits(other.arrays)
    assert counts(records) == counts(again)
    drawn = [set(one.job.cohorts.draw(number, 4)) for number in range(1, 7)]
    missed = [len(cohort - {3}) if number <= 3 else 2 for number, cohort in enumerate(drawn, 1)]
    assert [replies for replies, _ in counts(records)] == missed
    assert 1 in missed


def test_who_comes_late_is_drawn_by_what_it_has_and_tests_too() -> None:
    settings = "privacy=none clients=3 begin_with=2 rounds=3 partition=dirichlet evaluate=clients"
    federation, grid, records = run(
        f"{settings} selection=by_size cohort=1", [5, 6], {1: lambda grid: grid.come(8, partition=2)}
    )
    assert [record.clients_tested for record in records] == [2, 3, 3]
    assert grid.asked("query.facts") == [5, 6, 8]
    facts, selection = federation.places.facts, federation.job.selection
    assert all(node.examples for node in facts)
    assert federation._wire._least == selection.least_weight(facts, 1) > 0


@pytest.mark.parametrize("after", [1, 2])
def test_who_comes_late_tells_of_its_data_once_it_has_a_place(tmp_path: Path, after: int) -> None:
    """Even who comes in the last round, which is the third; who stands by is not asked."""
    rows = "".join(f"{20 + i % 50},{'yes' if i % 3 else 'no'}\n" for i in range(20))
    (tmp_path / "table.csv").write_text(f"age,sick\n{rows}")
    rules = "tasks: [csv]\nprivacy: [none]\nmetrics: [num-examples]\ncounts: [examples]\n"
    (tmp_path / "policy.yaml").write_text(rules)
    own: Any = {"data": str(tmp_path / "table.csv"), "policy": str(tmp_path / "policy.yaml")}

    def arrive(grid: Moving) -> None:
        for node in (8, 9):
            grid.come(node, 0)
            grid._contexts[node].node_config = own

    task = "task=csv task.label=sick task.features=[age] task.class_names=[no,yes] codec=identity"
    tree = config.compose(f"{SMALL} {task} {NONE} rounds=3 run_dir={tmp_path}/run")
    job = config.job(tree)
    grid = Moving(job, [5, 6])
    for context in grid._contexts.values():
        context.node_config = own

    class Joined(RunFolder):
        def append(self, r: Round, lasting: bool = True) -> None:
            super().append(r, lasting)
            if r.round == after:
                arrive(grid)

    folder = Joined(tmp_path / "run")
    server_app.run(job, tree, grid, folder, Console(file=io.StringIO()), 0.0)
    assert grid.asked("query.check") == [5, 6, 8]
    assert json.loads((tmp_path / "run/data.json").read_text())["counts"] == [{"examples": 20}] * 3


def rekey(grid: Moving) -> None:
    """The participant of partition 1 comes back under another key."""
    grid.leave(6)
    grid.come(60, partition=1)


@pytest.mark.parametrize(
    "settings",
    [
        "codec.feedback=true",
        "strategy=scaffold trainer.epochs=1",
        "assignment=deadline deadline=9 trainer.epochs=1",
        "selection=power_of_choice cohort=2 selection.candidates=3",
        "aggregation=ckks aggregation.key_holder=1",
    ],
)
def test_who_comes_back_under_another_key_has_its_place_again(
    settings: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        federation, _, records = run(f"privacy=none clients=3 rounds=4 {settings}", [5, 6, 7], {2: rekey})
    assert counts(records) == [(federation.job.in_round, 0)] * 4
    assert "round 3: node 60 takes over from node 6, which has left, with partition 1" in caplog.text
    assert list(federation.places.nodes.items()) == [(0, 5), (1, 60), (2, 7)]
    state = federation.state()
    for told in (
        state["workloads"],
        (state["downlink"] or {}).get("held"),
        (state["controls"] or {}).get("counted"),
    ):
        held = [place for place, *_ in (() if told is None else told)]
        assert len(set(held)) == len(held)
    if federation._downlink:
        assert not {6} & (federation._downlink._held.keys() | federation._downlink._sent.keys())
        assert isinstance(state["downlink"]["held"], np.ndarray)


def test_nodes_are_in_the_order_of_their_partitions() -> None:
    """Which goes by the seed then, whoever came when."""
    federation, _, _ = run(
        "privacy=none clients=3 begin_with=2 rounds=3",
        [5, 6, 7],
        {0: lambda grid: grid.leave(6), 1: lambda grid: grid.come(60, partition=1)},
    )
    assert list(federation.places.nodes.items()) == [(0, 5), (1, 60), (2, 7)]


def test_the_old_key_may_have_the_place_again() -> None:
    def back(grid: Moving) -> None:
        grid.leave(60)
        grid.come(6, partition=1)

    federation, _, records = run("privacy=none clients=3 rounds=6", [5, 6, 7], {2: rekey, 4: back})
    assert counts(records) == [(3, 0)] * 6
    assert federation.places.nodes[1] == 6


def test_all_control_variates_begin_anew_where_one_is_gone() -> None:
    """The sum of all has the control of who left in it, and no one can take it out."""
    _, grid, _ = run("privacy=none clients=3 rounds=4 strategy=scaffold", [5, 6, 7], {2: rekey})
    trained = [m for m in grid.sent if m.metadata.message_type == "train"]
    told = [m.content.config_records[CONFIG][COUNTED] for m in trained]
    assert told == [0, 0, 0, 1, 1, 1, 0, 0, 0, 3, 3, 3]


def test_rounds_that_wait_for_nobody_take_late_nodes_too() -> None:
    settings = "privacy=none clients=4 begin_with=3 rounds=6 strategy=fedbuff strategy.buffer=2"

    def come(grid: Moving) -> None:
        rekey(grid)
        grid.come(8, partition=3)

    federation, grid, records = run(settings, [5, 6, 7], {2: come})
    assert [record.replies for record in records] == [2] * 6
    assert sum(record.failures for record in records) <= 1  # what the one that left was at
    assert {8, 60} <= set(grid.asked("train"))
    assert not {6} & set(grid.asked("train")[-3:])
    assert list(federation.places.nodes.items()) == [(0, 5), (1, 60), (2, 7), (3, 8)]


def test_a_run_that_goes_on_seats_who_is_there_now() -> None:
    """All of them are asked before the round that comes: they go on from what they kept of those before."""
    settings = "privacy=none clients=3 rounds=4 codec.feedback=true selection=by_size"
    before, *_ = run(settings.replace("rounds=4", "rounds=3"), [5, 6, 7], {1: rekey})
    job = job_of(f"{settings} begin_with=2")
    grid = Moving(job, [50, 70])
    federation = Federation(job, grid, finished=3)
    federation.restore(before.state())
    grid.come(61, partition=2)
    (record,) = all_of(federation)
    assert (record.round, record.replies) == (4, 3)
    assert [grid.asked(kind) for kind in ("query", "query.facts")] == [[50, 70, 61]] * 2
    assert {round_of(message) for message in grid.sent} == {4}


# What is charged


def own(grid: Moving) -> None:
    """One with data of its own comes."""
    grid.come(8, partition=2)
    grid.says[8] = OWN


def test_data_of_which_nobody_knows_where_they_were_are_charged_what_anyone_was(tmp_path: Path) -> None:
    """Who comes with data of its own may be one that took part before; who tells its partition is known."""
    settings = "privacy=local_gaussian clients=3 begin_with=2 rounds=4"
    begun = Begun(tmp_path / "begun")
    federation, _, records = run(settings, [5, 6], {2: own}, begun)
    assert counts(records) == [(2, 0), (2, 0), (3, 0), (3, 0)]
    assert begun.took_part == {0: 4, 1: 4, 2: 4}
    again = Begun(tmp_path / "begun")
    assert (again.took_part, again.moved) == (begun.took_part, True)
    known, _, _ = run(settings, [5, 6], {2: lambda grid: grid.come(8, partition=2)})
    assert known.begun.took_part == {0: 4, 1: 4, 2: 2}
    assert not known.begun.moved
    assert federation.budget.spent is not None
    assert federation.budget.spent == known.budget.spent


def test_a_run_ends_before_data_that_may_have_been_elsewhere_pass_its_budget() -> None:
    """Noise is set for three rounds of one place; who may have had them in another gets none of this."""
    settings = "privacy=local_gaussian clients=3 cohort=1 begin_with=2 rounds=6 seed=11"
    drawn = [place for number in range(1, 7) for place in job_of(settings).cohorts.draw(number, 3)]
    assert drawn == [1, 1, 1, 2, 2, 2]
    federation, _, records = run(settings, [5, 6], {3: own})
    assert len(records) == 3
    assert federation.budget.ends(federation.finished)
    assert len(run(settings, [5, 6], {3: lambda grid: grid.come(8, partition=2)})[2]) == 6


# Who stands by


def test_where_all_are_there_nobody_is_asked() -> None:
    _, grid, _ = run("privacy=none clients=2 rounds=3", [5, 6], {1: lambda grid: grid.come(8, partition=1)})
    assert grid.asked("query") == [5, 6]
    assert grid.looks == 1 + 3  # at the start, and once a round


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (Error(ErrorCode.INVALID_FAB, "it is fedapp 9.9.9"), "reply of node 8 refused: it is fedapp 9.9.9"),
        (0, "node 8 stands by: partition 0 has a node, or is none of clients=3"),
        (3, "node 8 stands by: partition 3 has a node, or is none of clients=3"),
    ],
)
def test_who_does_not_fit_stands_by_and_is_asked_once(
    said: int | Error, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = said if isinstance(said, Error) else RecordDict({CONFIG: ConfigRecord({"partition-id": said})})

    def come(grid: Moving) -> None:
        grid.come(8, partition=2)
        grid.says[8] = answer

    with caplog.at_level(logging.WARNING):
        _, grid, records = run(f"{NONE} rounds=4", [5, 6], {1: come})
    assert counts(records) == [(2, 0)] * 4
    assert grid.asked("query") == [5, 6, 8]
    assert caplog.text.count(told) == 1


def test_data_of_its_own_do_not_take_the_place_of_others() -> None:
    """A link that breaks for a minute moves nobody: only who tells the partition takes it over."""

    def come(grid: Moving) -> None:
        grid.leave(6)
        grid.come(8, partition=1)
        grid.says[8] = OWN

    federation, _, records = run(
        "privacy=none clients=2 rounds=4", [5, 6], {1: come, 2: lambda grid: grid.come(6, partition=1)}
    )
    assert counts(records) == [(2, 0), (1, 1), (2, 0), (2, 0)]
    assert federation.places.nodes == {0: 5, 1: 6}


def test_homomorphic_sums_need_their_key_holder_at_once() -> None:
    with pytest.raises(ConfigError, match="its key holder must be there at once: leave begin_with out"):
        job_of(f"{NONE} aggregation=ckks")


def test_more_than_all_cannot_be_waited_for() -> None:
    with pytest.raises(ConfigError, match="begin_with"):
        job_of("privacy=none clients=2 begin_with=3")
