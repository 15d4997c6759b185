"""Homomorphic aggregation: sums that the server cannot read, and one node that opens them."""

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from grids import Elsewhere
from grids import rounds_on as run
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapp import config
from fedapp.ckks import SLOTS, EncryptedSum, decrypt, encrypt, keys
from fedapp.client_app import client_app
from fedapp.errors import ConfigError, DecodeError, FedappError
from fedapp.job import Job
from fedapp.records import CKKS, METRICS, WEIGHT
from fedapp.vector import layout_of, ravel

pytest.importorskip("tenseal")
FAST = "task=digits model=logistic privacy=none clients=4 cohort=3 rounds=2 evaluate=none downlink=plain"


@pytest.fixture(scope="module")
def pair() -> tuple[bytes, bytes]:
    return keys()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 3, SLOTS - 1, SLOTS, SLOTS + 1, 5000]), st.floats(1e-3, 1e5), st.integers(1, 4))
def test_the_sum_opens_to_the_sum(size: int, scale: float, count: int) -> None:
    secret, public = keys()
    rng = np.random.default_rng(size)
    vectors = rng.uniform(-scale, scale, (count, size))
    total = EncryptedSum(public, size)
    for vector in vectors:
        total.add(encrypt(vector, public))
    opened = decrypt(total.serialize(), secret)
    assert opened.shape == (size,)
    assert np.abs(opened - vectors.sum(0)).max() < 1e-3


def test_the_public_half_opens_nothing(pair: tuple[bytes, bytes]) -> None:
    secret, public = pair
    ciphertexts = encrypt(np.ones(10), public)
    assert decrypt(ciphertexts, secret) == pytest.approx(1, abs=1e-4)
    with pytest.raises(Exception, match="secret"):
        decrypt(ciphertexts, public)
    other, _ = keys()
    assert np.abs(decrypt(ciphertexts, other) - 1).max() > 1e3


def test_the_same_update_never_looks_the_same(pair: tuple[bytes, bytes]) -> None:
    assert encrypt(np.ones(10), pair[1]) != encrypt(np.ones(10), pair[1])


def test_bytes_that_are_no_ciphertexts_are_refused_and_leave_the_sum(pair: tuple[bytes, bytes]) -> None:
    secret, public = pair
    good = encrypt(np.ones(3000), public)
    total = EncryptedSum(public, 3000)
    total.add(good)
    for bad in ([], good[:1], [*good, good[1]], [good[1], good[0]], [good[0], b"no"], [b"", good[1]],
                [good[0][:-40], good[1]]):  # fmt: skip
        with pytest.raises(DecodeError, match="ciphertexts"):
            total.add(bad)
    assert decrypt(total.serialize(), secret) == pytest.approx(1, abs=1e-4)


def test_values_beyond_the_range_are_refused(pair: tuple[bytes, bytes]) -> None:
    for value in (2.0**20, np.nan, np.inf):
        with pytest.raises(FedappError, match="must stay below"):
            encrypt(np.array([value]), pair[1])


def job_of(overrides: str) -> Job:
    job = config.job(config.compose(f"{FAST} {overrides}"))
    job.prepare()
    return job


class Watched(Elsewhere):
    """A grid in this process that keeps the kinds and contents of replies, and changes some."""

    def __init__(self, job: Job, lost: tuple[str, ...] = (), weight: int | None = None) -> None:
        super().__init__(client_app(lambda _: job), [9, 7, 5, 3])
        self.seen: list[tuple[str, RecordDict]] = []
        self._lost, self._weight = lost, weight

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = self._waiting[-1]
        kind, node = asked.metadata.message_type, asked.metadata.dst_node_id
        (reply,) = super().pull_messages(message_ids)
        if kind in self._lost and node == 9:
            return [Message(Error(1, "lost"), reply_to=asked)]
        if self._weight and kind == "train" and node == 9:
            reply.content.metric_records[METRICS][WEIGHT] = self._weight
        if reply.has_content():
            self.seen.append((kind, RecordDict({**reply.content})))
        return [reply]


def test_it_is_the_mean_that_the_server_would_have_made() -> None:
    secret, plain = job_of("aggregation=ckks"), job_of("codec=identity")
    grid = Watched(secret)
    (one, rounds), (other, _) = run(secret, grid), run(plain, Watched(plain))
    layout = layout_of(secret.initial)
    assert np.abs(ravel(one.arrays, layout) - ravel(other.arrays, layout)).max() < 1e-5
    assert [(r.replies, r.failures) for r in rounds] == [(3, 0)] * 2
    assert secret.coded_by == "ckks"
    for kind, content in grid.seen:
        if kind == "train":
            assert set(content) == {CKKS, METRICS}
            assert set(content.metric_records[METRICS]) == {WEIGHT}


def test_all_that_is_sent_is_counted() -> None:
    job = job_of("aggregation=ckks rounds=1")
    grid = Watched(job)
    _, (record,) = run(job, grid)
    sent = 0
    for _, content in grid.seen:
        for field in content.config_records.get(CKKS, ConfigRecord()).values():
            parts = field if isinstance(field, list) else [field]
            sent += sum(len(part) for part in parts if isinstance(part, bytes))
    assert sent < record.uplink_bytes < sent + 3000


def test_a_reply_that_is_lost_costs_itself_and_a_lost_key_holder_the_run() -> None:
    job = job_of("aggregation=ckks cohort=4")
    _, rounds = run(job, Watched(job, lost=("train",)))
    assert [(r.replies, r.failures) for r in rounds] == [(3, 1)] * 2
    holder = job_of("aggregation=ckks cohort=4")
    for stage in ("query.key", "query.open"):
        with pytest.raises(FedappError, match="the key holder did not answer: the round is lost"):
            run(holder, Watched(holder, lost=(stage,)))


def test_under_privacy_every_client_weighs_one() -> None:
    chosen = FAST.replace("privacy=none", "privacy=example")
    job = config.job(config.compose(f"{chosen} aggregation=ckks cohort=4 rounds=1 privacy.test_seed=1"))
    _, (record,) = run(job, Watched(job, weight=1000))
    assert (record.replies, record.failures) == (3, 1)


def test_a_key_opens_one_sum() -> None:
    job = job_of("aggregation=ckks")
    grid = Watched(job)
    run(job, grid)
    grid.push_messages([Message(RecordDict({CKKS: ConfigRecord({"values": [b"x"]})}), 9, "query.open")])
    (reply,) = grid.pull_messages([])
    assert reply.has_error()


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("codec=topk", "it takes the place of codec=topk: leave codec out"),
        ("strategy=krum", "strategy=krum needs each update by itself"),
        ("aggregation.key_holder=4", "key_holder=4 is no partition of clients=4: set 0 to 3"),
        ("aggregation.key_holder=-1", "aggregation.key_holder must be a whole number of at least 0"),
        ("privacy=central_gaussian", "privacy=central_gaussian bounds each update at the server"),
        ("privacy=distributed_gaussian", "choose privacy=none or example"),
        ("model=resnet18 model.norm=batch", "has other state too"),
    ],
)
def test_what_cannot_be_is_refused(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(f"aggregation=ckks {chosen}")
