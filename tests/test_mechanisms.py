"""Client-level privacy: what it bounds, what it adds, what it never sends; alone and through the wire."""

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from grids import Elsewhere, rounds_on
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console
from scipy.stats import kstest

from fedapp import config
from fedapp.client_app import FAILED, client_app
from fedapp.codec.packet import pack, padded, unpack, unpadded
from fedapp.codec.public_step import PublicStep
from fedapp.codec.rotate import rotated
from fedapp.errors import ConfigError, DecodeError
from fedapp.job import Job
from fedapp.privacy import accounting
from fedapp.privacy.central import BIT, CLIP, CentralGaussian
from fedapp.privacy.local import LocalGaussian
from fedapp.privacy.mechanism import Mechanism, Plan, clipped, length
from fedapp.privacy.secret import normal, source, uniform
from fedapp.records import ARRAYS, CONFIG, METRICS, STYPE, UPDATE, WEIGHT, size_of
from fedapp.report.folder import Round
from fedapp.report.progress import Progress
from fedapp.rounds import Federation
from fedapp.vector import layout_of, ravel

PLAN = Plan("poisson", cohort=10, clients=100, rounds=5, most=5)
MANY = 250_000
WIDE = "model=mlp model.hidden=[512,430]"  # 258,180 parameters on digits
PADDED = "privacy.packet_bytes"
PRIVATE = ("example", "local_gaussian", "central_gaussian", "distributed_gaussian", "distributed_example")


def mechanism(cls: type[LocalGaussian] | type[CentralGaussian], **settings: Any) -> Any:
    return cls(epsilon=None, plan=PLAN, **{"noise_multiplier": 2.0, **settings})


WRONG = (2 / 3, 0.95**0.5, 1.05**0.5, 3 / 2)
"""Times a deviation: the least that `is_noise_of` is to tell, on either side, and by more."""


def is_noise_of(values: NDArray[Any], sigma: float) -> bool:
    """Whether the values are independent Gaussians of this deviation: variance within 2 %, shape, no echo."""
    if len(values) < 200_000:
        raise ValueError("too few to tell 2 % of variance")
    z = values.astype(np.float64) / sigma
    lags = [abs(float(np.mean(z[k:] * z[:-k]))) for k in (1, 2, 64)]
    shaped = kstest(z[:20_000], "norm").pvalue > 1e-6
    return bool(abs(z.var() - 1) < 0.02 and abs(z.mean()) < 0.01 and max(lags) < 0.01 and shaped)


# Clipping


@settings(max_examples=300)
@given(
    arrays(np.float32, st.integers(0, 40), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    st.floats(1e-6, 1e6),
)
def test_what_is_clipped_is_never_longer(x: NDArray[np.float32], norm: float) -> None:
    before = x.copy()
    y = clipped(x, norm)
    assert length(y) <= norm
    assert y.dtype == np.float32
    assert np.array_equal(x, before)
    if length(x) <= norm:
        assert np.array_equal(x, y)
    elif norm > 1e-3:
        assert length(y) == pytest.approx(norm, rel=1e-5)


def test_what_is_not_finite_is_clipped_to_nothing() -> None:
    for bad in (math.inf, -math.inf, math.nan):
        assert not clipped(np.array([1, bad], np.float32), 1.0).any()


# Secret randomness


def test_the_operating_systems_noise_never_comes_twice() -> None:
    one, other = normal(MANY, source(None)), normal(MANY, source(None, 1))
    assert is_noise_of(one, 1.0)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.01
    assert not np.array_equal(normal(9, source(None)), normal(9, source(None)))


def test_a_test_seed_gives_each_use_a_stream_of_its_own() -> None:
    assert np.array_equal(normal(9, source(3, 0, 1)), normal(9, source(3, 0, 1)))
    streams = [normal(MANY, source(3, use, number)) for use in (0, 1) for number in (1, 2)]
    assert np.abs(np.corrcoef(streams) - np.eye(4)).max() < 0.01
    assert 0 < uniform(MANY, source(0)).min() < uniform(MANY, source(0)).max() < 1


def test_noise_that_is_wrong_is_told_apart() -> None:
    right = normal(MANY, source(5))
    assert is_noise_of(right, 1.0)
    for factor in WRONG:
        assert not is_noise_of(factor * right, 1.0)
        assert not is_noise_of(right, factor)
    assert not is_noise_of(np.tile(right[:64], MANY // 64), 1.0)  # a seed that is used again
    assert not is_noise_of(math.sqrt(3) * (2 * uniform(MANY, source(5)) - 1), 1.0)


# What a client adds


def test_a_local_client_sends_its_clipped_update_and_noise_of_its_own() -> None:
    local = mechanism(LocalGaussian, clip=0.5)
    update = np.full(MANY, 1.0, np.float32)
    sent, side, state = local.on_client(update, {}, {}, source(1))
    assert is_noise_of(sent - clipped(update, 0.5), 2.0 * 0.5)
    assert sent.dtype == np.float32
    assert not side
    other, *_ = local.on_client(update, {}, state, source(2))
    assert abs(np.corrcoef(sent, other)[0, 1]) < 0.01


def test_a_local_client_takes_part_no_more_often_than_the_noise_pays_for() -> None:
    local, state = mechanism(LocalGaussian), dict[str, NDArray[Any]]()
    for _ in range(PLAN.most):
        _, _, state = local.on_client(np.ones(3, np.float32), {}, state, source(1))
    with pytest.raises(ConfigError, match="asked 6 times, and the noise is set for 5"):
        local.on_client(np.ones(3, np.float32), {}, state, source(1))


@pytest.mark.parametrize("most", [1, 7, 400])
@pytest.mark.parametrize("budget", [0.5, 8.0, 50.0])
def test_local_noise_is_that_of_one_analytic_gaussian(budget: float, most: int) -> None:
    """The client may be replaced, so the sensitivity is 2C; T participations divide the noise by sqrt(T)."""
    local = LocalGaussian(epsilon=budget, plan=Plan("fixed", 10, 100, 1000, most))
    one = accounting.analytic_gaussian(budget, 1e-5)
    assert local.noise == pytest.approx(2 * one * math.sqrt(most), rel=3e-3)
    spent = accounting.spent_by(local.releases(1000, most), 1e-5).epsilon
    assert 0.99 * budget < spent <= budget


# What the server adds


def test_a_trusted_server_noises_the_sum_and_divides_by_what_is_public() -> None:
    central = mechanism(CentralGaussian, clip=0.5)
    total = np.linspace(-1, 1, MANY)
    for replies in (0, 3, 10):
        mean, kept = central.on_server(total, {}, replies, {}, source(replies))
        assert is_noise_of(10 * mean - total, 2.0 * 0.5)
        assert not kept


def test_a_server_clips_what_a_client_did_not() -> None:
    central = mechanism(CentralGaussian, clip=0.5)
    honest, side, _ = central.on_client(np.ones(100, np.float32), {CLIP: 0.5}, {}, source(1))
    assert length(honest) <= 0.5
    assert not side
    lie, _ = central.on_reply(np.full(100, 1e30, np.float32), {}, central.terms({}))
    assert length(lie) <= 0.5


def test_central_budgets_are_accounted_for_the_sampler_that_draws() -> None:
    for sampling, adjacency in (("poisson", "add_remove"), ("fixed", "replace")):
        plan = Plan(sampling, 10, 100, 20, 20)  # type: ignore[arg-type]
        central = CentralGaussian(epsilon=4.0, plan=plan)
        (release,) = central.releases(20, 3)
        assert (release.sampling, release.rate, release.count) == (sampling, 0.1, 20)
        assert release.adjacency == adjacency
        assert 3.9 < accounting.spent_by((release,), 1e-5).epsilon <= 4.0


def adaptive(**settings: Any) -> Any:
    return mechanism(CentralGaussian, quantile=0.5, **settings)


@pytest.mark.parametrize("bit_noise", [1.5, 5.0])
def test_noise_on_updates_and_bits_together_cost_what_the_multiplier_says(bit_noise: float) -> None:
    """Andrew et al. 2021, Theorem 1: z = (z_sum^-2 + (2 sigma_b)^-2)^-1/2."""
    on_sum, on_bits = adaptive(bit_noise=bit_noise)._noises
    assert on_bits == bit_noise
    assert (on_sum**-2 + (2 * on_bits) ** -2) ** -0.5 == pytest.approx(2.0)
    mean, _ = adaptive(bit_noise=bit_noise).on_server(np.zeros(MANY), {}, 10, {}, source(0))
    assert is_noise_of(10 * mean, on_sum)


def test_the_clip_norm_follows_the_quantile() -> None:
    """Norms of 1 to 100: from far above and far below it comes to the median."""
    for start in (1.0, 1000.0):
        central = CentralGaussian(
            epsilon=None, noise_multiplier=0.1, clip=start, quantile=0.5, bit_noise=1.0,
            plan=Plan("poisson", 100, 1000, 200, 200),
        )  # fmt: skip
        state: dict[str, float] = {}
        for number in range(200):
            bits = 0.0
            for norm in range(1, 101):
                update = np.array([norm, 0], np.float32)
                _, side, _ = central.on_client(update, central.terms(state), {}, source(0))
                bits += central.on_reply(update, side, central.terms(state))[1][BIT]
            _, kept = central.on_server(np.zeros(2), {BIT: bits}, 100, state, source(number))
            state = dict(kept)
        assert state[CLIP] == pytest.approx(50, rel=0.1)


def test_the_bits_noise_is_right_too() -> None:
    central = adaptive(bit_noise=3.0, clip_rate=1.0)
    secret = source(4)
    clips = [central.on_server(np.zeros(1), {BIT: 2.0}, 10, {}, secret)[1][CLIP] for _ in range(20_000)]
    below = -np.log(clips) + 0.5  # of a clip of 1 at rate 1
    assert below.mean() == pytest.approx(0.7, abs=0.01)
    assert below.std() == pytest.approx(0.3, rel=0.02)


def test_a_bit_is_one_of_two() -> None:
    for said in ({}, {BIT: 0.4}, {BIT: 1e9}, {BIT: math.nan}):
        with pytest.raises(DecodeError, match=r"below-clip is 0.5 or -0.5"):
            adaptive().on_reply(np.ones(3, np.float32), said, {})


def test_bits_that_spend_the_whole_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy.bit_noise=0.9 spends .* set privacy.bit_noise above 1"):
        adaptive(bit_noise=0.9).on_server(np.zeros(1), {}, 0, {}, source(0))


# Through the wire

FAST = (
    "task=digits model=logistic clients=6 rounds=3 engine.workers=1 codec=identity downlink=plain "
    "trainer.epochs=0 evaluate=none"
)


def job_of(overrides: str) -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


class Watched(Elsewhere):
    """A grid in this process that keeps the replies."""

    def __init__(self, job: Job) -> None:
        super().__init__(client_app(lambda _: job), list(range(2, job.clients + 2)))
        self.replies: list[Message] = []
        self.sizes: list[int] = []
        self.packets: list[bytes] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (reply,) = super().pull_messages(message_ids)
        if reply.has_content() and METRICS in reply.content:
            self.replies.append(reply)
            self.sizes.append(size_of(reply.content))
            self.packets += [a.data for n, a in reply.content.array_records[ARRAYS].items() if n == UPDATE]
        return [reply]


def run(job: Job, grid: Grid | None = None) -> tuple[Federation, list[Round]]:
    job.prepare()
    return rounds_on(job, grid or Watched(job))


def moved(federation: Federation, job: Job) -> NDArray[np.float64]:
    layout = layout_of(job.initial)
    return ravel(federation.arrays, layout).astype(np.float64) - ravel(job.initial, layout)


@pytest.mark.parametrize(
    ("privacy", "deviation"),
    [
        ("central_gaussian clients=40 cohort=20", 3.0 / 20),
        ("local_gaussian", 3.0 / math.sqrt(6)),
    ],
)
def test_noise_arrives_in_the_sum_as_it_was_set(privacy: str, deviation: float) -> None:
    """Clients that train nothing: all that the model moves is noise, over a cohort of a public size."""
    job = job_of(
        f"privacy={privacy} privacy.noise_multiplier=1.5 privacy.epsilon=null privacy.clip=2 "
        f"rounds=1 privacy.test_seed=1 {WIDE}"
    )
    noise = moved(run(job)[0], job)
    assert is_noise_of(noise, deviation)
    assert not any(is_noise_of(noise, wrong * deviation) for wrong in WRONG)


@pytest.mark.parametrize(
    "privacy", ["local_gaussian", "central_gaussian", "central_gaussian privacy.quantile=0.5"]
)
def test_nothing_else_of_a_client_leaves_it(privacy: str) -> None:
    job = job_of(f"privacy={privacy} trainer.epochs=1")
    grid = Watched(job)
    run(job, grid)
    assert len(grid.replies) == 18
    for reply in grid.replies:
        (metrics,) = reply.content.metric_records.values()
        assert metrics.keys() - {BIT} == {WEIGHT}
        assert metrics[WEIGHT] == 1
        assert not reply.content.config_records
        assert len(reply.content.array_records) == 1


@pytest.mark.parametrize("codec", ["identity", "default"])
def test_what_a_client_sends_instead_of_an_update_moves_the_sum_by_the_clip_norm(codec: str) -> None:
    """The server clips again what it decoded, on the way from a packet to the sum."""

    class Lied(Watched):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            (reply,) = super().pull_messages(message_ids)
            if reply.has_content() and ARRAYS in reply.content and reply.metadata.src_node_id == 4:
                packet, _ = job.codec.encode(np.full(layout.size, 100, np.float32), layout, {}, rng)
                data = pack(packet, job.codec, layout)
                reply.content[ARRAYS] = ArrayRecord({UPDATE: Array("uint8", (len(data),), STYPE, data)})
            return [reply]

    feedback = "codec.feedback=false" if codec == "default" else ""
    job = job_of(
        "privacy=central_gaussian privacy.epsilon=null privacy.noise_multiplier=0.01 privacy.clip=0.5 "
        f"sampling=fixed trainer.epochs=0 rounds=1 codec={codec} {feedback}"
    )
    layout, rng = layout_of(job.initial), np.random.default_rng(0)
    federation, (record,) = run(job, Lied(job))
    assert (record.replies, record.failures) == (6, 0)
    assert 6 * np.linalg.norm(moved(federation, job)) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("privacy", PRIVATE)
def test_no_client_tests_for_a_server_under_privacy(privacy: str) -> None:
    """Whatever the server's own settings say: it may have others than it tells."""
    chosen = f"task=digits model=logistic clients=3 privacy={privacy} downlink=plain"
    job = config.job(config.compose(chosen))
    node = Elsewhere(client_app(lambda _: job), [7, 8, 9])
    content = RecordDict({ARRAYS: job.initial, CONFIG: ConfigRecord({"server-round": 1})})
    node.push_messages([Message(content, 7, "evaluate")])
    (reply,) = node.pull_messages([])
    assert reply.has_error()
    assert reply.error.reason == FAILED


def test_private_cohorts_come_from_the_operating_system() -> None:
    one, other = (job_of("privacy=central_gaussian clients=400 cohort=100") for _ in range(2))
    draws = [one.cohorts.draw(number, 400) for number in range(200)]
    assert draws[0] != other.cohorts.draw(0, 400)
    assert draws[0] != one.cohorts.draw(0, 400)
    sizes = np.array([len(drawn) for drawn in draws])
    assert sizes.mean() == pytest.approx(100, abs=2.5)  # 4 standard errors
    assert sizes.std() == pytest.approx(math.sqrt(75), rel=0.2)  # binomial, not a set size
    fixed = job_of("privacy=central_gaussian clients=400 cohort=100 sampling=fixed")
    assert [len(fixed.cohorts.draw(number, 400)) for number in range(20)] == [100] * 20
    assert fixed.cohorts.draw(1, 400) != fixed.cohorts.draw(1, 400)


def test_padded_packets_all_have_one_size_and_the_same_effect() -> None:
    chosen = "privacy=central_gaussian privacy.test_seed=1 trainer.epochs=1 codec=default rounds=2"
    plain, wide, narrow = (
        job_of(f"{chosen} {p}") for p in ("", f"{PADDED}=2000", f"{PADDED}=128 codec.rate=2")
    )
    expected, _ = run(plain)
    for job, same in ((wide, True), (narrow, False)):
        grid = Watched(job)
        federation, rounds = run(job, grid)
        assert [r.replies for r in rounds] == [6, 6]
        assert len(grid.sizes) == 12
        assert len(set(grid.sizes)) == 1
        assert np.array_equal(moved(federation, job), moved(expected, plain)) == same


def test_padding_that_is_not_padding_is_refused() -> None:
    assert unpadded(padded(b"packet", b"", 20), 20) == b"packet"
    assert unpadded(padded(b"a packet of more", b"nil", 16), 16) == b"nil"
    good = padded(b"packet", b"", 20)
    for bad in (good[:-1], good + b"\0", good[:-1] + b"1", b"\xff" * 20):
        with pytest.raises(DecodeError, match="packet"):
            unpadded(bad, 20)
    with pytest.raises(ConfigError, match=r"privacy.packet_bytes=5 does not even hold a packet of zeros"):
        padded(b"packet", b"nil", 5)


# On a network that is watched

WATCHED = "privacy=central_gaussian privacy.network=untrusted"


@pytest.mark.parametrize("codec", ["public_step", "identity"])
def test_a_watched_network_sees_replies_of_one_size_whatever_is_in_them(codec: str) -> None:
    """Updates of zero, of training, and enormous ones, in all rounds."""
    seen = set[tuple[int, int]]()
    adaptive = "privacy.quantile=0.5" if codec == "identity" else ""
    for training in ("trainer.epochs=0", "trainer.epochs=1", "trainer.epochs=2 trainer.lr=1000"):
        job = job_of(f"{WATCHED} codec={codec} {adaptive} {training}")
        grid = Watched(job)
        _, rounds = run(job, grid)
        assert [record.replies for record in rounds] == [6, 6, 6]
        seen |= {(size, len(sent)) for size, sent in zip(grid.sizes, grid.packets, strict=True)}
    ((whole, packed),) = seen
    size = layout_of(job.initial).size
    assert packed == (-(-size * 4 // 8) + 11 if codec == "public_step" else 4 * size + 7)
    assert whole > packed


def test_the_step_on_a_watched_network_follows_public_numbers_alone() -> None:
    """Only the clip norm and the size of the model, whatever an update is; and the sum comes out right."""
    chosen = "privacy.clip=2 privacy.epsilon=null privacy.noise_multiplier=0.01 rounds=1 trainer.epochs=1"
    job = job_of(f"{WATCHED} {chosen} codec=public_step codec.bits=8 codec.step=0.03")
    assert job.codec == PublicStep(8, 0.03, norm=2.0)
    layout, grid = layout_of(job.initial), Watched(job)
    coded, _ = run(job, grid)
    for data in grid.packets:
        sent = unpack(data, job.codec, layout)
        levels = rotated(job.codec.decode(sent, layout).astype(float), sent.header)
        levels /= 0.03 * 2 / math.sqrt(layout.size)
        assert levels == pytest.approx(np.rint(levels), abs=1e-3)
    plain = job_of(f"{WATCHED} {chosen} codec=identity")
    exact = moved(run(plain)[0], plain)
    assert np.linalg.norm(moved(coded, job) - exact) < 0.2 * np.linalg.norm(exact)  # most of it is noise


def test_who_takes_part_is_public_on_a_watched_network_and_amplifies_nothing() -> None:
    chosen = f"{WATCHED} codec=public_step clients=20 cohort=4 rounds=10 privacy.epsilon=6"
    job, again = job_of(chosen), job_of(chosen)
    drawn = [job.cohorts.draw(number, 20) for number in range(1, 11)]
    assert drawn == [again.cohorts.draw(number, 20) for number in range(1, 11)]
    assert {len(cohort) for cohort in drawn} == {4}
    most = max(sum(i in cohort for cohort in drawn) for i in range(20))
    assert most < 10
    local = job_of(chosen.replace(f"{WATCHED} codec=public_step", "privacy=local_gaussian"))
    assert isinstance(job.privacy, CentralGaussian)
    assert isinstance(local.privacy, LocalGaussian)
    assert job.privacy.noise == local.privacy.noise
    assert job.releases(10, most) == local.releases(10, most)
    _, rounds = run(job)
    assert 5.9 < (rounds[-1].epsilon or 0) <= 6
    assert "network" in job.privacy.against


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("", r"codec=default or the size of its packets would tell of an update: set codec=public_step"),
        ("codec=eden", "the step of codec=eden"),
        ("codec=dither", "the step of codec=dither"),
        ("codec=public_step sampling=poisson", "sees who is drawn, .*: set sampling=fixed"),
        ("codec=public_step selection=poisson", "sees who is drawn, .*: set sampling=fixed"),
        (
            "codec=public_step privacy.quantile=0.5",
            "quantile moves the clip norm, .*: set privacy.quantile=null",
        ),
        (
            "codec=public_step privacy.network=tor",
            "network must be one of trusted, untrusted",
        ),
        ("codec=public_step codec.bits=9", "codec.bits must be a whole number from 2 to 8, got 9"),
        ("codec=public_step codec.step=0", "codec.step must be a number at least 1e-06"),
        ("codec=public_step codec.norm=.nan", "codec.norm must be a number above 0"),
    ],
)
def test_what_a_watched_network_would_tell_is_refused(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.job(config.compose(f"task=digits {WATCHED} {chosen}"))


def test_a_test_seed_fixes_all_and_vouches_for_nothing() -> None:
    chosen = "privacy=central_gaussian cohort=3 privacy.test_seed=1 trainer.epochs=1"
    (one, rounds), (other, _) = run(job_of(chosen)), run(job_of(chosen))
    assert np.array_equal(moved(one, job_of(chosen)), moved(other, job_of(chosen)))
    assert [r.epsilon for r in rounds] == [None] * 3
    assert "nothing is private" in str(job_of(chosen).note)
    in_earnest = job_of("privacy=central_gaussian cohort=3 trainer.epochs=1")
    assert not np.array_equal(moved(run(in_earnest)[0], in_earnest), moved(run(in_earnest)[0], in_earnest))


def test_an_empty_cohort_is_a_round_of_noise() -> None:
    job = job_of("privacy=central_gaussian cohort=1 rounds=40 privacy.test_seed=1")
    federation, rounds = run(job)
    empty = [r for r in rounds if r.replies == 0]
    assert 5 < len(empty) < 25  # (5/6)^6 of 40 is 13
    assert all(r.uplink_bytes == r.downlink_bytes == 0 for r in empty)
    deviation = moved(federation, job).std() / math.sqrt(40)
    assert isinstance(job.privacy, CentralGaussian)
    assert deviation == pytest.approx(job.privacy.noise, rel=0.1)  # as in the others: over a cohort of 1


class Failing(Watched):
    """Every second reply of a client claims seven examples."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (reply,) = super().pull_messages(message_ids)
        if METRICS in reply.content and len(self.replies) % 2:
            reply.content[METRICS] = MetricRecord({WEIGHT: 7})
        return [reply]


def test_replies_that_weigh_more_are_refused_and_count_as_nothing() -> None:
    job = job_of("privacy=central_gaussian rounds=1 trainer.epochs=1 trainer.lr=5 privacy.test_seed=2")
    whole, _ = run(job)
    half, (record,) = run(job, Failing(job))
    assert (record.replies, record.failures) == (3, 3)
    assert length((moved(half, job) - moved(whole, job)).astype(np.float32)) < 3 * 1.0 / 6 + 1e-3


def test_the_clip_norm_of_a_round_reaches_clients_and_stays_public() -> None:
    job = job_of("privacy=central_gaussian privacy.quantile=0.5 trainer.epochs=1 rounds=3")
    federation = Federation(job, Watched(job))
    clips = []
    asked = federation._wire.inner.configure_train

    def told(number: int, arrays: ArrayRecord, sent: ConfigRecord, grid: Grid) -> Iterable[Message]:
        clips.append(sent[CLIP])
        return asked(number, arrays, sent, grid)

    federation._wire.inner.configure_train = told  # type: ignore[method-assign, assignment]
    list(federation.run(Progress(Console(file=io.StringIO()), 3)))
    assert clips[0] == 1.0
    assert len(set(clips)) == 3


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("privacy=central_gaussian strategy=fedmedian", "strategy=fedmedian needs each update by itself"),
        ("privacy=local_gaussian strategy=krum", "strategy=krum needs each update by itself"),
        ("privacy=local_gaussian strategy=qfedavg", "needs the clients' losses"),
        ("privacy=central_gaussian codec=topk codec.feedback=true", "set codec.feedback=false"),
        ("privacy=central_gaussian evaluate=clients", "evaluate=clients sends private accuracies"),
        (
            "privacy=central_gaussian trainer=dp_sgd",
            "trainer=dp_sgd does not go with privacy=central_gaussian",
        ),
        ("privacy=central_gaussian privacy.clip=0", "privacy.clip must be a number above 0"),
        ("privacy=local_gaussian privacy.clip=.inf", "privacy.clip"),
        ("privacy=local_gaussian privacy.epsilon=-1", "privacy.epsilon must be a number at least 0.01"),
        ("privacy=central_gaussian privacy.quantile=1", "privacy.quantile"),
        ("privacy=central_gaussian privacy.noise_multiplier=1", "set exactly one of"),
        ("privacy=local_gaussian codec=public_step", "noise makes updates far longer than codec=public_step"),
        ("privacy=none sampling=systematic", "sampling must be one of auto, fixed, poisson"),
    ],
)
def test_what_cannot_be_private_is_refused_before_anything_starts(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.job(config.compose(f"task=digits {chosen}"))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("privacy.quantile=0.5 privacy.bit_noise=0.01", "privacy.bit_noise=0.01 spends more than noise"),
        ("codec=identity privacy.packet_bytes=128", "packet_bytes=128 does not even hold a packet of zeros"),
    ],
)
def test_so_is_what_only_the_plan_or_the_model_shows(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(f"privacy=central_gaussian {chosen}").prepare()


@pytest.mark.parametrize("bad", ["nan", "-1", "0", "inf", "-inf"])
@pytest.mark.parametrize("privacy", PRIVATE)
def test_no_number_of_privacy_may_be_one_that_bounds_nothing(privacy: str, bad: str) -> None:
    base = f"task=digits privacy={privacy}"
    chosen = OmegaConf.to_container(config.compose(base).privacy)
    assert isinstance(chosen, dict)
    names = {str(name) for name, value in chosen.items() if value is None or isinstance(value, (int, float))}
    assert {"epsilon", "delta", "noise_multiplier"} <= names
    for name in sorted(names - {"test_seed", "roster"}):
        instead = "privacy.epsilon=null" if name == "noise_multiplier" else ""
        if (name, bad) != ("tolerated", "0"):  # nobody drops out
            with pytest.raises(ConfigError, match=rf"privacy\.{name}\b"):
                config.job(config.compose(f"{base} {instead} privacy.{name}={bad}"))


def test_a_model_with_other_state_is_refused() -> None:
    job = job_of("privacy=central_gaussian task=digits model=resnet18 model.norm=batch")
    with pytest.raises(ConfigError, match=r"has other state too .*: use model.norm=group"):
        job.prepare()


def test_plans_count_the_rounds_of_who_is_drawn_most() -> None:
    job = job_of("privacy=local_gaussian clients=10 cohort=3 rounds=20")
    times = [sum(i in job.cohorts.draw(r, 10) for r in range(1, 21)) for i in range(10)]
    chosen: Mechanism | None = job.mechanism
    assert isinstance(chosen, LocalGaussian)
    assert chosen.plan is not None
    assert chosen.plan.most == max(times) < 20
