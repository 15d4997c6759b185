"""Whole private runs: noise that never comes twice, and what ledgers and policies see of them."""

import io
import math
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from grids import Elsewhere, local
from grids import rounds_on as run
from numpy.typing import NDArray
from rich.console import Console
from test_mechanisms import WIDE, WRONG, is_noise_of

import fedapp
from fedapp import client_app as app
from fedapp import config
from fedapp.client_app import client_app
from fedapp.codec.chain import Identity
from fedapp.codec.packet import decode_update
from fedapp.engine.local import LocalGrid
from fedapp.job import Job
from fedapp.nodes import partitions
from fedapp.privacy import accounting, consent, filter
from fedapp.privacy.consent import releases
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.local import LocalGaussian
from fedapp.privacy.mechanism import Plan
from fedapp.privacy.release import Gaussian, Release
from fedapp.records import ARRAYS, CONFIG, METRICS, SECAGG, UPDATE, WEIGHT
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.secagg import client as secagg_client
from fedapp.secagg import server as secagg_server
from fedapp.secagg.residues import unpack
from fedapp.training import DpSgd
from fedapp.vector import layout_of, ravel
from fedapp.wire import compress

FAST = "task=digits model=logistic clients=6 rounds=3 evaluate=none downlink=plain codec=identity"
CHOICES = {  # a new privacy choice joins with one row
    "example": "privacy.noise_multiplier=1000 trainer.steps=1",  # next to which gradients are nothing
    "local_gaussian": "privacy.noise_multiplier=2 trainer.epochs=0",
    "central_gaussian": "privacy.noise_multiplier=2 trainer.epochs=0",
    "distributed_gaussian": "privacy.noise_multiplier=2 trainer.epochs=0 privacy.tolerated=0.2",
    "distributed_example": "privacy.noise_multiplier=1000 privacy.tolerated=0.2",
}
every_choice = pytest.mark.parametrize("choice", CHOICES)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    # A checkout before another one on the path is no bundle that arrived.
    monkeypatch.setattr(consent, "installed", lambda: Path(fedapp.__file__).parent)


def job_of(choice: str, more: str = "") -> Job:
    overrides = f"{FAST} privacy={choice} privacy.epsilon=null {CHOICES[choice]} {more}"
    job = config.job(config.compose(overrides))
    job.prepare()
    return job


# Noise that never comes twice


def noise_of(job: Job, workers: int) -> list[NDArray[np.float64]]:
    """What each client's reply and each round's model hold of noise: no client learns anything here."""
    sizes = [len(part) for part in job.task.partitions()]
    layout, found = layout_of(job.initial), list[NDArray[np.float64]]()
    with local(job).grid(client_app(lambda _: job), sizes, workers) as grid:
        pull = grid.pull_messages

        def watched(message_ids: Iterable[str]) -> list[Message]:
            replies = list(pull(message_ids))
            for reply in replies:
                records = reply.content.array_records
                if job.terms is not None and "values" in reply.content.config_records[SECAGG]:
                    packed = reply.content.config_records[SECAGG]["values"]
                    assert isinstance(packed, bytes)
                    share = unpack(packed, job.terms.kept, job.terms.modulus).astype(np.float64)
                    found.append((share + job.terms.modulus / 2) % job.terms.modulus)
                elif ARRAYS in records and UPDATE in records[ARRAYS]:
                    update = decode_update(bytes(records[ARRAYS][UPDATE].data), Identity(), layout)
                    found.append(update.astype(np.float64))
                elif ARRAYS in records:
                    found.append((ravel(records[ARRAYS], layout) - before).astype(np.float64))
            return replies

        grid.pull_messages = watched  # type: ignore[method-assign]
        federation, before = Federation(job, grid), ravel(job.initial, layout)
        for _ in federation.run(Progress(Console(file=io.StringIO()), job.rounds)):
            after = ravel(federation.arrays, layout)
            found.append((after - before).astype(np.float64))
            before = after
    return found


def echo(rows: list[NDArray[np.float64]]) -> float:
    """The largest correlation of two: of independent ones, 650 values each, seldom above 0.18."""
    return float(np.abs(np.corrcoef(rows) - np.eye(len(rows))).max())


def noises(choice: str, workers: list[int], more: str = "") -> list[NDArray[np.float64]]:
    """The noise of several runs of one job, wherever it was added: in each of 6 replies, or in each round."""
    rows = [noise for n in workers for noise in noise_of(job_of(choice, f"engine.workers={n} {more}"), n)]
    assert len(rows) == len(workers) * 3 * (6 + 1)
    of_rounds = choice == "central_gaussian"
    return [row for index, row in enumerate(rows) if (index % 7 == 6) == of_rounds]


@pytest.fixture
def _without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of noise lie open, in workers too: they are forked from here."""
    for module in (secagg_client, secagg_server):
        monkeypatch.setattr(module, "add_mask", lambda *_: None)


@every_choice
@pytest.mark.usefixtures("_without_masks")
def test_noise_never_comes_twice(choice: str) -> None:
    """Between clients, rounds, worker processes and runs of the same seed."""
    assert echo(noises(choice, [1, 2])) < 0.25


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *_: np.random.bytes,  # each forked worker has the same stream before it
        lambda *_: np.random.default_rng(1).bytes,
        lambda seed, use, number, partition: np.random.default_rng(partition).bytes,
        lambda seed, use, number, partition: np.random.default_rng(number).bytes,
    ],
    ids=["forked", "constant", "of the client", "of the round"],
)
def test_noise_that_comes_twice_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Callable[[int], bytes]]
) -> None:
    monkeypatch.setattr(app, "source", wrong)
    assert echo(noises("local_gaussian", [2])) > 0.99


def test_masks_do_not_come_twice_either() -> None:
    """What the server sees of the same noise, in two runs whose sessions have the same numbers."""
    assert echo(noises("distributed_gaussian", [1, 2], "privacy.test_seed=1")) < 0.25


# Noise of DP-SGD: the other mechanisms' is in test_mechanisms.py, test_secure_rounds.py and so on


@pytest.mark.parametrize("codec", ["identity", "dither codec.stage.step=0.05"])
def test_noise_arrives_in_the_mean_as_it_was_set(codec: str) -> None:
    """Packed and unpacked, over public constants, whoever drew what; next to it gradients are nothing."""
    job = job_of(
        "example",
        f"codec={codec} downlink=fine strategy=fedavg {WIDE} rounds=1 engine.workers=1 privacy.test_seed=1 "
        "trainer.max_grad_norm=0.3 trainer.steps=2 trainer.lr=0.5 trainer.examples_per_client=240",
    )
    assert job.wire_codec is not None
    federation, (record,) = run(job, Elsewhere(client_app(lambda _: job), list(range(2, 8))))
    assert (record.replies, record.failures) == (6, 0)
    noise = ravel(federation.arrays, layout := layout_of(job.initial)).astype(np.float64)
    noise -= ravel(job.initial, layout)
    deviation = 1000 * 0.3 * 0.5 / (0.12 * 240) * math.sqrt(2 / 6)
    assert is_noise_of(noise, deviation)
    assert not any(is_noise_of(noise, wrong * deviation) for wrong in WRONG)


# What participants' ledgers and policies see


class Participants(Elsewhere):
    """A grid in this process whose every node has a ledger, where its data have an id, and a policy."""

    def __init__(self, job: Job, folder: Path, rules: str = "") -> None:
        super().__init__(client_app(lambda _: job), list(range(2, job.clients + 2)))
        privacy = job.choices["privacy"]
        text = f"tasks: [digits]\nprivacy: [{privacy}]\nmetrics: []\nnoise: 1.9\n{rules}"
        (folder / "policy.yaml").write_text(text)
        self.ledger = Ledger(folder / "ledger.db", new=True)
        for node, context in self._contexts.items():
            context.node_config |= {"policy": str(folder / "policy.yaml"), "data-id": str(node)}
            context.node_config |= {"ledger": str(folder / "ledger.db")}


def charged(folder: Path, node: int) -> tuple[Release, ...]:
    with sqlite3.connect(folder / "ledger.db") as db:
        rows = db.execute("SELECT release FROM events WHERE id = ?", (str(node),)).fetchall()
    db.close()
    return tuple(filter._release(text) for (text,) in rows)


PROTOCOL = "a server that follows the protocol"


@pytest.mark.parametrize(
    ("choice", "more", "named"),
    [
        ("example", "", ("example", "example", "the server too")),
        ("local_gaussian", "", ("client", "local_gaussian", "the server too")),
        ("central_gaussian", "", ("client", "central_gaussian", "observers of the models")),
        ("distributed_gaussian", "", ("client", "distributed_gaussian", PROTOCOL)),
        ("distributed_example", "", ("example", "distributed_example", PROTOCOL)),
        ("local_gaussian", "privacy.test_seed=1", (None, "none", "nobody")),
    ],
)
def test_events_name_who_is_protected_by_what_against_whom(
    choice: str, more: str, named: tuple[str | None, str, str], tmp_path: Path
) -> None:
    job = job_of(choice, f"rounds=1 {more}")
    grid = Participants(job, tmp_path)
    for context in grid._contexts.values():
        del context.node_config["policy"]
    run(job, grid)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        rows = db.execute("SELECT unit, mechanism, adversary FROM events").fetchall()
    db.close()
    assert rows
    assert set(rows) == {named}


@every_choice
def test_ledgers_are_charged_what_the_run_reports(choice: str, tmp_path: Path) -> None:
    job = job_of(choice, "cohort=4 privacy.noise_multiplier=2")
    rules = "secure_aggregation: true" if job.terms is not None else ""
    federation, rounds = run(job, grid := Participants(job, tmp_path, rules))
    assert [record.failures for record in rounds] == [0, 0, 0]
    assert sum(record.replies for record in rounds) == federation.begun.took_part.total()
    epsilons = []
    for node in grid.get_node_ids():
        times, paid = federation.begun.took_part[node - 2], charged(tmp_path, node)
        if not times:
            assert not paid
            continue
        # In the central model once, for all rounds of the run.
        assert paid == (1 if choice == "central_gaussian" else times) * tuple(releases(job))
        spent = job.spent(job.rounds, times)
        assert spent is not None
        if isinstance(job.trainer, DpSgd):
            (one,) = releases(job)
            assert isinstance(one, Gaussian)
            assert job.trainer.history(times) == ((one.noise, one.rate, times * one.count),)
        else:
            assert accounting.spent_by(paid, 1e-5) == spent
        epsilons.append(spent.epsilon)
        assert job.privacy.unit is not None
        assert (
            grid.ledger.spent(str(node))[job.privacy.unit] >= spent.epsilon
        )  # a filter costs more than one planned run
    assert federation.budget.spent is not None
    assert federation.budget.spent.epsilon == max(epsilons) == rounds[-1].epsilon


@every_choice
def test_a_client_declines_past_its_limit_and_the_run_goes_on(choice: str, tmp_path: Path) -> None:
    job = job_of(choice, "privacy.noise_multiplier=2")
    grid = Participants(job, tmp_path)
    unit = job.privacy.unit
    assert unit is not None
    scratch = Ledger(tmp_path / "scratch.db", new=True)
    scratch.charge("x", unit, releases(job), 1, 1, mechanism=choice, adversary=job.privacy.against)
    central = choice == "central_gaussian"
    grid.ledger.set_limit("4", unit, scratch.spent("x")[unit] * (0.99 if central else 1.01), 1e-5)
    federation, rounds = run(job, grid)
    assert [(record.replies, record.failures) for record in rounds] == [
        (5, 1) if central else (6, 0), (5, 1), (5, 1),
    ]  # fmt: skip
    assert grid.ledger.count("4") == (0 if central else 1)
    assert grid.ledger.count("5") == (1 if central else 3)
    assert federation.budget.spent == job.spent(
        3, 3
    )  # what was asked for: the server does not know who declined


def test_a_message_that_comes_twice_is_not_charged_twice(tmp_path: Path) -> None:
    """Its masked reply is not kept, and no vector is masked twice: it is refused before training."""
    job = job_of("distributed_gaussian", "rounds=1")
    grid, twice = Participants(job, tmp_path), list[Message]()
    pull = grid.pull_messages

    def doubled(message_ids: Iterable[str]) -> Iterable[Message]:
        asked = grid._waiting[-1]
        replies = pull(message_ids)
        if asked.metadata.message_type == "train":
            context = grid._contexts[asked.metadata.dst_node_id]
            twice.append(client_app(lambda _: job)(asked, context))
        return replies

    grid.pull_messages = doubled  # type: ignore[method-assign]
    _, (record,) = run(job, grid)
    assert (record.replies, record.failures) == (6, 0)
    assert [reply.has_error() for reply in twice] == [True] * 6
    assert [grid.ledger.count(str(node)) for node in grid.get_node_ids()] == [1] * 6


def test_nodes_beyond_those_that_noise_is_set_for_take_no_part() -> None:
    """Draws among more nodes than planned would give some of them more rounds than the budget has."""
    job = job_of("distributed_gaussian", "cohort=3")
    grid = Elsewhere(client_app(lambda _: job), list(range(2, 11)))
    for context in grid._contexts.values():
        del context.node_config["partition-id"]  # they bring their own data
    assert sorted(partitions(grid, job, 1).values()) == list(range(6))


def test_what_counts_batches_does_not_leave_beside_a_private_update() -> None:
    """Whatever model a server chose: a client does not see it refused before anything starts."""
    LocalGrid(client_app(lambda _: job_of("local_gaussian")), [1], workers=0)
    arrays = ArrayRecord({"w": Array(np.zeros(4, np.float32)), "n": Array(np.zeros((), np.int64))})
    message = Message(RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord()}), 2, "train")

    def trained(message: Message, context: Context) -> Message:
        batches = ArrayRecord({"w": Array(np.ones(4, np.float32)), "n": Array(np.array(7))})
        metrics = MetricRecord({WEIGHT: 99, "train_loss": 0.5})
        return Message(RecordDict({ARRAYS: batches, METRICS: metrics}), reply_to=message)

    private = LocalGaussian(plan=Plan("fixed", 6, 6, 3, 3))
    mod = compress(Identity(), np.random.default_rng(0), private)
    reply = mod(message, Context(1, 2, {}, RecordDict(), {}), trained)
    assert list(reply.content[ARRAYS]) == [UPDATE]
    assert dict(reply.content[METRICS]) == {WEIGHT: 1}
