"""Whole rounds in which the server sees nothing but sums: what arrives, what leaves, who may drop out."""

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from grids import Elsewhere
from grids import rounds_on as run
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import chisquare
from test_mechanisms import WIDE, WRONG, is_noise_of

from fedapp import client_app as app
from fedapp import config
from fedapp.client_app import client_app
from fedapp.combinations import check_roster
from fedapp.errors import ConfigError, FedappError
from fedapp.job import Job
from fedapp.privacy.distributed import Terms
from fedapp.records import ARRAYS, CONFIG, SECAGG
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.secagg import Client, wire
from fedapp.secagg.residues import unpack
from fedapp.server_app import simulate
from fedapp.synchronous import Synchronous
from fedapp.training import Sgd
from fedapp.vector import layout_of, ravel

PLAIN = "task=digits model=logistic clients=6 rounds=2 evaluate=none"
FAST = f"{PLAIN} privacy=distributed_gaussian"
SIGNED = "privacy.roster=made"
STAGES = ["query.advertise", "query.share", "train", "query.confirm", "query.unmask"]
SHARP = "privacy.epsilon=null privacy.noise_multiplier=0.01 privacy.clip=1000"


def job_of(overrides: str) -> Job:
    job = config.job(config.compose(f"{FAST} {overrides}"))
    job.prepare()
    return job


class Watched(Elsewhere):
    """A grid in this process that keeps replies, and loses those to some types of message from some nodes."""

    def __init__(self, job: Job, lost: dict[str, set[int]] | None = None) -> None:
        super().__init__(client_app(lambda _: job), list(range(2, job.clients + 2)))
        self.replies: list[tuple[str, Message]] = []
        self._lost = lost or {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = self._waiting[-1]
        (reply,) = super().pull_messages(message_ids)
        kind = asked.metadata.message_type
        if asked.metadata.dst_node_id in self._lost.get(kind, ()):
            return [Message(Error(1, "lost"), reply_to=asked)]
        self.replies.append((kind, reply))
        return [reply]


def moved(federation: Federation) -> NDArray[np.float64]:
    job = federation.job
    layout = layout_of(job.initial)
    return ravel(federation.arrays, layout).astype(np.float64) - ravel(job.initial, layout)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_with_next_to_no_noise_it_is_the_uniform_mean_of_clipped_updates(strategy: str) -> None:
    """As a trusted server makes it, that sees every update: privacy=central_gaussian."""
    found = []
    for privacy in ("distributed_gaussian", "central_gaussian codec=identity"):
        chosen = f"privacy={privacy} privacy.epsilon=null privacy.noise_multiplier=0.01 privacy.test_seed=1"
        job = config.job(config.compose(f"{PLAIN} {chosen} strategy={strategy} rounds=1"))
        federation, (record,) = run(job, Watched(job))
        assert (record.replies, record.failures) == (6, 0)
        found.append(moved(federation))
    assert np.corrcoef(found[0], found[1])[0, 1] > (0.98 if strategy == "fedavg" else 0.9)
    assert np.linalg.norm(found[0]) == pytest.approx(np.linalg.norm(found[1]), rel=0.05)


def test_noise_arrives_in_the_mean_as_the_terms_say() -> None:
    job = job_of(
        f"trainer.epochs=0 rounds=1 {WIDE} privacy.epsilon=null privacy.noise_multiplier=2 "
        f"privacy.test_seed=1"
    )
    noise = moved(run(job, Watched(job))[0])
    assert isinstance(job.terms, Terms)
    every_share = job.terms.noise * math.sqrt(6 / job.terms.honest) / 6  # all replied
    assert is_noise_of(noise, every_share)
    assert not any(is_noise_of(noise, wrong * every_share) for wrong in WRONG)
    assert noise.std() > 2 * 1.0 / 6


def test_only_masked_values_leave_a_client() -> None:
    """The server's view: uniform residues, whatever the update; a keys-and-shares record in other stages."""
    job = job_of(f"{SHARP} rounds=6")
    grid = Watched(job)
    run(job, grid)
    assert job.terms is not None
    kinds = [kind for kind, _ in grid.replies if kind != "query"]
    assert kinds.count("train") == kinds.count("query.advertise") == kinds.count("query.unmask") == 36
    seen = []
    for kind, reply in grid.replies:
        if kind == "query":
            continue
        assert list(reply.content) == [SECAGG]
        if kind == "train":
            packed = reply.content.config_records[SECAGG]["values"]
            assert isinstance(packed, bytes)
            seen.append(unpack(packed, job.terms.kept, job.terms.modulus))
    counts = np.bincount(np.concatenate(seen) * 64 // job.terms.modulus, minlength=64)
    assert chisquare(counts).pvalue > 1e-6
    assert np.abs(np.corrcoef(seen) - np.eye(36)).max() < 0.2


@pytest.mark.parametrize(
    ("told", "session", "answers"),
    [(1, 1, True), (2, 2, True), (1, 2, False), (2, 1, False), (3, 3, False), (0, 0, False)],
)
def test_a_server_gets_one_sum_a_round_and_of_no_others(told: int, session: int, answers: bool) -> None:
    """Whatever it says: a session is a round of the plan, which the noise was set for, and comes once."""
    job = job_of(f"{SHARP} rounds=2 {SIGNED}")
    federation = Federation(job, Watched(job))
    assert isinstance(federation._way, Synchronous)
    summed = federation._way._summed(session, list(federation.places.nodes.values()))
    assert isinstance(summed, wire.SecureSum)
    beside = RecordDict({ARRAYS: job.initial, CONFIG: ConfigRecord({"server-round": told})})
    messages = [
        Message(RecordDict({**beside, **content}), node, "train") for node, content in summed.begin().items()
    ]
    for reply in federation._exchange.send(job.initial, messages):
        summed.take(reply)
    if answers:
        assert summed.mean()[1] == 6
    else:
        with pytest.raises(FedappError, match="secure aggregation has failed"):
            summed.mean()


def test_a_message_that_comes_twice_is_not_trained_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger would charge for it, and nothing could be sent."""
    job, fit, trained = job_of(f"{SHARP} rounds=1"), Sgd.fit, list[int]()

    def counted(*given: Any) -> Any:
        trained.append(1)
        return fit(*given)

    monkeypatch.setattr(Sgd, "fit", counted)
    federation = Federation(job, Watched(job))
    assert isinstance(federation._way, Synchronous)
    summed = federation._way._summed(1, list(federation.places.nodes.values()))
    assert isinstance(summed, wire.SecureSum)
    beside = RecordDict({ARRAYS: job.initial, CONFIG: ConfigRecord({"server-round": 1})})
    contents = summed.begin()
    for answered in (6, 0):
        messages = [Message(RecordDict({**beside, **c}), node, "train") for node, c in contents.items()]
        assert (
            sum(reply.has_content() for reply in federation._exchange.send(job.initial, messages)) == answered
        )
        assert len(trained) == 6


@pytest.mark.parametrize("stage", STAGES)
def test_a_tolerated_dropout_at_any_stage_costs_one_reply(stage: str) -> None:
    job = job_of(f"{SHARP} privacy.tolerated=0.2 privacy.test_seed=3 {SIGNED}")
    federation, rounds = run(job, Watched(job, {stage: {4}}))
    left = 6 if stage in ("query.confirm", "query.unmask") else 5
    assert [r.replies for r in rounds] == [left] * 2
    assert [r.failures for r in rounds] == [6 - left] * 2
    whole, _ = run(job, Watched(job))
    if left == 6:
        assert np.array_equal(moved(federation), moved(whole))
    else:
        assert not np.array_equal(moved(federation), moved(whole))


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_dropouts_lose_the_round_and_nothing_else(
    stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(f"{SHARP} privacy.tolerated=0.2 {SIGNED}")
    grid = Watched(job, {stage: {3, 4, 5, 7}})
    federation = Federation(job, grid)
    before, rounds = federation.arrays, federation.run(Progress(Console(file=io.StringIO()), 2))
    (lost,) = next(rounds)
    assert (lost.replies, lost.failures, federation.finished) == (0, 6, 1)
    assert federation.arrays is before
    assert federation.budget.spent == job.spent(1, 1)  # what clients sent is counted all the same
    assert "round 1: secure aggregation has failed" in caplog.text
    grid._lost = {}
    assert [whole.replies for whole in next(rounds)] == [6]
    assert federation.arrays is not before
    assert federation.budget.spent == job.spent(2, 2)
    assert not list(rounds)


@pytest.mark.parametrize("stage", STAGES)
def test_where_nobody_is_left_the_run_ends(stage: str) -> None:
    job = job_of(f"{SHARP} privacy.tolerated=0.2 {SIGNED}")
    with pytest.raises(FedappError, match="secure aggregation has failed: 0"):
        run(job, Watched(job, {stage: set(range(2, 8))}))


def test_a_lost_round_is_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds.jsonl, and in what the summary notes; the run goes on."""
    answer = wire.answer

    def silent(client: Client, stage: str, message: Message, context: Context) -> Message:
        late = message.metadata.message_type == "query.share" and context.node_config["partition-id"] != 0
        if late and message.content.config_records[SECAGG]["session"] == 2:
            raise ConnectionError
        return answer(client, stage, message, context)

    monkeypatch.setattr(app, "answer", silent)
    tree = config.compose(f"{FAST} rounds=3 engine.workers=1 run_dir={tmp_path / 'run'}")
    simulate(tree, tmp_path / "run", Console(file=io.StringIO()), 0.0)
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [(one["replies"], one["failures"]) for one in records] == [(6, 0), (0, 6), (6, 0)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["note"] == "no update came of round 2, which changed nothing"
    assert summary["epsilon"] == records[2]["epsilon"] == pytest.approx(8, rel=0.01)


# With a roster


def test_a_roster_changes_no_bit_of_the_sum() -> None:
    plain, signed = (job_of(f"privacy.test_seed=7 {more}") for more in ("", SIGNED))
    grid = Watched(signed)
    federation, rounds = run(signed, grid)
    assert np.array_equal(moved(federation), moved(run(plain, Watched(plain))[0]))
    assert [kind for kind, _ in grid.replies].count("query.confirm") == 12
    assert [record.replies for record in rounds] == [6, 6]


class Known(Watched):
    """Nodes with a roster and signing keys of their own, in files; some have none."""

    def __init__(self, job: Job, folder: Path, without: tuple[int, ...] = ()) -> None:
        super().__init__(job)
        private = [Ed25519PrivateKey.generate() for _ in self._contexts]
        public = [key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) for key in private]
        (folder / "roster").write_bytes(b"\n".join(public))
        for (node, context), key in zip(self._contexts.items(), private, strict=True):
            file = folder / f"{node}.key"
            file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
            if node not in without:
                context.node_config |= {"roster": str(folder / "roster"), "signing-key": str(file)}


def test_nodes_bring_their_own_rosters(tmp_path: Path) -> None:
    job = config.job(
        config.compose(f"{FAST} rounds=1 privacy.tolerated=0.2 privacy.roster={tmp_path}/roster")
    )
    grid = Known(job, tmp_path, without=(4,))
    job.prepare()
    _, (record,) = run(job, grid)
    assert (record.replies, record.failures) == (5, 1)


def test_a_node_with_a_roster_takes_no_part_where_nobody_signs(tmp_path: Path) -> None:
    job = job_of("rounds=1 privacy.tolerated=0.2")
    _, (record,) = run(job, Known(job, tmp_path, without=(2, 3, 4, 5, 6)))
    assert (record.replies, record.failures) == (5, 1)


def test_a_roster_is_made_in_simulations_only() -> None:
    for given, simulated, said in (
        (SIGNED, False, "not for nodes of their own: set privacy.roster=the file"),
        ("privacy.roster=some", True, "not for a simulation: set privacy.roster=made"),
    ):
        job = config.job(config.compose(f"{FAST} {given}"))
        with pytest.raises(ConfigError, match=said):
            check_roster(job, simulated)
        check_roster(job, not simulated)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("query.advertise", "6 clients have advertised keys, at least 7 must"),
        ("query.share", "6 clients have shared, at least 7 must"),
        ("train", "6 clients have sent masked vectors, at least 7 must"),
    ],
)
def test_a_sum_of_fewer_than_carry_the_noise_is_never_opened(
    stage: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Masks would allow it, and the server that then throws the sum away has seen it."""
    job = job_of(f"{SHARP} clients=8 privacy.tolerated=0.1")
    assert job.secure is not None
    assert job.secure.terms.honest == 7
    assert job.secure.plan.graph(8).threshold < 6
    grid = Watched(job, {stage: {3, 4}})
    _, rounds = run(job, grid)
    assert [record.replies for record in rounds] == [0, 0]
    assert said in caplog.text
    assert "query.unmask" not in [kind for kind, _ in grid.replies]


def test_who_never_advertises_costs_one_reply_even_where_nobody_else_may_drop_out() -> None:
    """Of five one may drop out; the four that are left would not stand another."""
    job = job_of(f"{SHARP} clients=5 privacy.tolerated=0.25 privacy.roster=made")
    assert job.secure is not None
    with pytest.raises(ConfigError, match="no threshold stands 1 colluding clients and 1 dropouts of 4"):
        job.secure.plan.require(4, complete=True)
    _, rounds = run(job, Watched(job, {"query.advertise": {3}}))
    assert [record.replies for record in rounds] == [4, 4]


def test_a_test_seed_gives_the_same_bits_though_keys_are_fresh() -> None:
    one, other = (job_of("privacy.test_seed=7") for _ in range(2))
    assert np.array_equal(moved(run(one, Watched(one))[0]), moved(run(other, Watched(other))[0]))
    earnest = job_of("")
    assert not np.array_equal(moved(run(earnest, Watched(earnest))[0]), moved(run(one, Watched(one))[0]))


def test_every_byte_of_the_protocol_is_counted() -> None:
    job = job_of(f"{SHARP} rounds=1 privacy.keep=0.1")
    grid = Watched(job)
    federation, (record,) = run(job, grid)
    assert job.terms is not None
    values = job.terms.kept * job.terms.bits / 8
    protocol = 6 * (64 + 5 * 80 + 16 + 5 * 32)  # keys, sealed shares, commitment, opened shares
    assert 6 * values + protocol < record.uplink_bytes < 6 * values + protocol + 6 * 400
    assert record.uplink_bytes == federation.traffic.uplink


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("codec=topk", "secure aggregation takes the place of codec=topk: leave codec out"),
        ("sampling=poisson", "set sampling=fixed"),
        ("cohort=2", "fewer than 3 clients hide nobody in their sum: set cohort=3 or more"),
        ("strategy=krum", "strategy=krum needs each update by itself"),
        ("privacy.tolerated=1", "privacy.tolerated must be a number at least 0 and below 1"),
        (
            "privacy.tolerated=0.5",
            r"privacy.tolerated=0.5 of 6 clients: no threshold .*set privacy.tolerated",
        ),
        (
            "clients=4 privacy.tolerated=0.3",
            r"privacy.tolerated=0.3 of 4 clients: .*set privacy.tolerated lower",
        ),
        ("privacy.bits=2", "privacy.bits=2 makes noise"),
        ("evaluate=clients", "evaluate=clients sends private accuracies"),
        ("model=resnet18 model.norm=batch", "has other state too"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(chosen)
