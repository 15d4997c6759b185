"""Distributed DP-SGD: the proof's numbers, what leaves a client, the trainer's sum, and whole rounds."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from grids import rounds_on as run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import binom, norm
from test_mechanisms import WIDE, WRONG, is_noise_of
from test_secure_rounds import Watched, moved
from torch import nn

from fedapp import config
from fedapp.codec.rotate import rotated_back
from fedapp.dp_step import DpStep, Step
from fedapp.errors import ConfigError, DecodeError, FedappError
from fedapp.job import Job
from fedapp.models import Cnn, Logistic, Mlp
from fedapp.privacy import distributed_example
from fedapp.privacy.accounting import spent_by
from fedapp.privacy.distributed_example import DistributedExample, StepTerms
from fedapp.privacy.policy import Policy, PolicyRefusal
from fedapp.privacy.release import ORDERS, Gaussian
from fedapp.privacy.renyi import rdp
from fedapp.privacy.secret import source
from fedapp.tasks import Data
from fedapp.tasks.images import Digits
from fedapp.tasks.partition import Iid

Vector = NDArray[np.float64]


# --- the proof's numbers -----------------------------------------------------------------------------------


def discrete(variance: float, far: int) -> Vector:
    """The discrete Gaussian's probabilities of -far .. far."""
    law: Vector = np.exp(-(np.arange(-far, far + 1) ** 2) / (2 * variance))
    law /= law.sum()
    return law


@pytest.mark.parametrize("mean", [0, 3])
@pytest.mark.parametrize("b", [0.1, 0.3, 0.5, 1.0, 2.0])
def test_a_continuous_gaussian_rounded_at_random_is_a_discrete_one(b: float, mean: int) -> None:
    """Within the proof's factor, which falls as exp(-2 pi^2 b); at a tenth the two still differ."""
    a, far, cells = 5.0, 30, 400
    x = mean + (np.arange(-20 * cells, 20 * cells) + 0.5) / cells  # the integrand is smooth: exact to 1e-15
    y = np.arange(-far, far + 1)
    near = np.exp(-((y[:, None] - x) ** 2) / (2 * b))
    law = (near / near.sum(0)) @ (norm.pdf(x, mean, math.sqrt(a)) / cells)
    right = discrete(a + b, far)[far - 10 : far + 11]
    error = np.abs(np.log(law[far - 10 + mean : far + 11 + mean] / right)).max()
    factor = 2.1 * math.exp(-2 * math.pi**2 * b)
    assert error <= 2.1 * factor + 1e-12
    assert error > 0.01 or b > 0.1


Law = tuple[Vector, Vector]


def one_dimension(share: float, shares: int, rate: float, shift: int) -> Law:
    """With the example and without: probabilities of a sum of discrete Gaussian shares."""
    far = math.ceil(36 * math.sqrt(share))  # moments of high order lie far out
    law = one = discrete(share, far)
    for _ in range(shares - 1):
        law = np.convolve(law, one)
    zeros = np.zeros(shift)
    without, moved_ = np.concatenate([law, zeros]), np.concatenate([zeros, law])
    return (1 - rate) * without + rate * moved_, without


def two_dimensions(share: float, shares: int, rate: float, shift: tuple[int, int]) -> Law:
    (_, first), (_, second) = (one_dimension(share, shares, 0.0, s) for s in shift)
    (gone_1, _), (gone_2, _) = (one_dimension(share, shares, 1.0, s) for s in shift)
    without = np.outer(first, second).reshape(-1)
    return (1 - rate) * without + rate * np.outer(gone_1, gone_2).reshape(-1), without


LAWS = [  # the law, the shift's length, all the variance
    (one_dimension(16.0, 1, 0.2, 3), 3.0, 16.0, 0.2),
    (one_dimension(16.0, 4, 0.1, 9), 9.0, 64.0, 0.1),
    (one_dimension(16.0, 2, 1.0, 6), 6.0, 32.0, 1.0),
    (two_dimensions(16.0, 2, 0.2, (3, 4)), 5.0, 32.0, 0.2),
    (two_dimensions(16.0, 1, 0.5, (1, 1)), math.sqrt(2), 16.0, 0.5),
]


@pytest.mark.parametrize(("law", "length", "variance", "rate"), LAWS)
@pytest.mark.parametrize("joins", [True, False])
def test_delta_is_at_most_that_of_the_continuous_gaussian(
    law: Law, length: float, variance: float, rate: float, joins: bool
) -> None:
    """At each epsilon, both ways round, of the variance that lacks 8; with half as much more noise not."""
    p, q = law if joins else law[::-1]
    way = AdjacencyType.REMOVE if joins else AdjacencyType.ADD

    def continuous(deviation: float, at: float) -> float:
        loss = GaussianPrivacyLoss(deviation / length, sampling_prob=rate, adjacency_type=way)
        return float(loss.get_delta_for_epsilon(at))

    stated, above = math.sqrt(variance - 8), 0
    for at in (0.0, 0.01, 0.05, 0.1, 0.3, 1.0):
        exact = float(np.maximum(p - math.exp(at) * q, 0).sum())
        assert exact <= continuous(stated, at) + 1e-13
        above += exact > continuous(1.5 * stated, at) + 1e-13
    assert above >= 2


@pytest.mark.parametrize(("law", "length", "variance", "rate"), LAWS)
def test_renyi_divergence_at_whole_orders_is_that_of_the_same_variance(
    law: Law, length: float, variance: float, rate: float
) -> None:
    """Sums over whole numbers see no shift by a whole vector: the formula of Mironov, Talwar and Zhang 2019
    holds exactly. The other way round it bounds (their Theorem 5)."""
    stated, more = (
        rdp(Gaussian(times * math.sqrt(variance) / length, "poisson", rate, 1, "add_remove"))
        for times in (1.0, 1.5)
    )
    with np.errstate(divide="ignore"):
        p, q = np.log(law[0]), np.log(law[1])
    seen = np.isfinite(p) & np.isfinite(q)
    for k in (2, 3, 4, 8, 16):
        right = stated[ORDERS.index(float(k))]
        goes, comes = (
            float(logsumexp(k * one[seen] + (1 - k) * two[seen]) / (k - 1)) for one, two in ((p, q), (q, p))
        )
        assert goes == pytest.approx(right, rel=1e-6)
        assert comes <= right * (1 + 1e-6)
        assert goes > 1.5 * more[ORDERS.index(float(k))]


# --- the terms ---------------------------------------------------------------------------------------------


def terms(size: int, cohort: int = 10, noise: float = 4.0, **given: Any) -> StepTerms:
    privacy = DistributedExample(epsilon=None, noise_multiplier=noise, tolerated=given.pop("tolerated", 0.1))
    return privacy.terms(size, cohort, 1, **({"clip": 0.1, "rate": 0.1, "examples": 6000} | given))


def public(number: int = 0) -> np.random.Generator:
    return np.random.default_rng([7, number])


@pytest.mark.parametrize("size", [1, 2, 30, 650, 39_700])
@pytest.mark.parametrize("noise", [0.01, 0.5, 4.05, 100.0])
def test_noise_is_the_stated_multiple_of_the_sensitivity(size: int, noise: float) -> None:
    agreed = terms(size, noise=noise)
    sensitivity = 0.1 / agreed.step + 1.001 * math.sqrt(size)
    assert agreed.multiplier >= noise
    assert agreed.multiplier <= 1.003 * noise or agreed.share == 16
    assert agreed.multiplier == pytest.approx(math.sqrt(9 * agreed.share - 8) / sensitivity, rel=1e-12)
    assert agreed.share >= 16  # of which sums are as good as one
    assert sensitivity <= 1.0201 * 0.1 / agreed.step
    assert agreed.release(7) == Gaussian(agreed.multiplier, "poisson", 0.1, 7, "add_remove")


@pytest.mark.parametrize("budget", [0.5, 2.44, 8.0])
@pytest.mark.parametrize("rounds", [1, 293])
def test_noise_keeps_the_budget_and_little_more(budget: float, rounds: int) -> None:
    privacy = DistributedExample(epsilon=budget)
    agreed = privacy.terms(39_700, 10, rounds, clip=0.1, rate=8192 / 60_000, examples=6000)
    spent = spent_by((agreed.release(rounds),), 1e-5)
    assert 0.98 * budget < spent.epsilon <= budget
    assert spent.accountant == "PLD (dp-accounting)"


def test_the_terms_of_the_anchor() -> None:
    """Tramer and Boneh 2021: noise of 4.05 at epsilon 2.44. The bits are on the wire: a change is a break."""
    agreed = DistributedExample(epsilon=2.44).terms(
        39_700, 10, 293, clip=0.1, rate=8192 / 60_000, examples=6000
    )
    assert agreed.multiplier == pytest.approx(4.05, rel=0.01)
    assert (agreed.bits, agreed.honest, agreed.kept) == (23, 9, 39_700)


def test_a_sum_that_no_bits_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes 3\d bits, and there are 31: set a smaller trainer.sampl"):
        terms(39_700, 1000, rate=1.0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"epsilon": None}, "exactly one of privacy.epsilon"),
        ({"epsilon": 0.0}, "privacy.epsilon must be a number at least 0.01"),
        ({"epsilon": None, "noise_multiplier": 0.0}, "privacy.noise_multiplier"),
        ({"delta": 1.0}, "privacy.delta"),
        ({"tolerated": 1.0}, "privacy.tolerated"),
        ({"test_seed": -1}, "privacy.test_seed"),
    ],
)
def test_settings_out_of_range(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistributedExample(**bad)


# --- the client --------------------------------------------------------------------------------------------


def gradient(size: int, length: float, seed: int, spiked: bool = False) -> Vector:
    x = np.random.default_rng(seed).standard_normal(size)
    if spiked:
        x[1:] = 0
    return x * (length / math.sqrt(x @ x))


def sensitivity(agreed: StepTerms) -> float:
    return distributed_example._sensitivity(agreed.size)


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 300),
    others=st.floats(0, 1e4),
    length=st.floats(0, 0.1),
    spiked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_one_more_gradient_moves_the_rounded_sum_by_the_sensitivity_at_most(
    size: int, others: float, length: float, spiked: bool, seed: int
) -> None:
    agreed, turn = terms(size), seed.to_bytes(4, "little")
    total = gradient(size, others, seed)
    more = total + gradient(size, length, seed + 1, spiked)
    moved_ = agreed._rounded(more, turn) - agreed._rounded(total, turn)
    assert math.sqrt(moved_ @ moved_) <= sensitivity(agreed)


def test_rounding_can_use_all_of_the_sensitivity() -> None:
    """A total just below half steps everywhere, and a gradient that pushes each value: one step more each."""
    agreed, size = terms(1000), 1000
    total = rotated_back(np.full(size, 7.5 - 1e-6), b"abcd") * agreed.step
    push = rotated_back(np.full(size, 0.1 / math.sqrt(size)), b"abcd")
    assert math.sqrt(push @ push) == pytest.approx(0.1)
    for share, steps in ((1.0, 51.0), (1e-4, 1.0)):
        moved_ = agreed._rounded(total + share * push, b"abcd") - agreed._rounded(total, b"abcd")
        assert math.sqrt(moved_ @ moved_) == pytest.approx(steps * math.sqrt(size), rel=0.02)
    assert math.sqrt(size) * 51 <= sensitivity(agreed) < math.sqrt(size) * 51.01


@pytest.mark.parametrize("bad", [np.zeros(9), np.zeros(10, np.float32), np.full(10, np.nan)])
def test_what_is_no_sum_of_gradients_is_refused(bad: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"finite float64 \(10,\)"):
        terms(10).encode(bad, public(), source(0))


def total_of(agreed: StepTerms, sums: list[Vector], round_: int = 0) -> NDArray[np.int64]:
    sent = [agreed.encode(x, public(round_), source(1, round_, i)) for i, x in enumerate(sums)]
    assert all(one.dtype == np.uint32 and one.max() < agreed.modulus for one in sent)
    added: NDArray[np.int64] = np.remainder(np.sum(sent, axis=0, dtype=np.int64), agreed.modulus)
    return added


def test_the_sum_decodes_to_a_step_against_the_mean_gradient_with_the_stated_noise() -> None:
    """Of those who must reply; what all shares make is larger by as much as was tolerated."""
    size, cohort = 250_000, 5
    agreed = terms(size, cohort, 4.0, tolerated=0.2, examples=100)
    sums = [gradient(size, 0.1 * length, length) for length in (0, 1, 5, 10)]
    batch = 0.1 * 5 * 100
    step = agreed.decode(total_of(agreed, sums), 4, public())
    assert step.dtype == np.float32
    error = (step + np.sum(sums, axis=0) / batch) * batch
    stated = 4.0 * 0.1 * 1.0201
    assert is_noise_of(error, stated)
    assert not any(is_noise_of(error, wrong * stated) for wrong in WRONG)
    all_five = agreed.decode(total_of(agreed, [np.zeros(size)] * 5), 5, public()) * batch
    assert is_noise_of(all_five, stated * math.sqrt(5 / 4))
    assert not any(is_noise_of(all_five, wrong * stated * math.sqrt(5 / 4)) for wrong in WRONG)


@pytest.mark.parametrize("cohort", [3, 10])
def test_no_sum_wraps_and_three_bits_fewer_would(cohort: int) -> None:
    """The worst batches: as large as they get, and every gradient the same."""
    agreed, fewer = terms(3000, cohort, examples=1000), 0
    longest = distributed_example._most(agreed.batch)
    for round_, spiked in ((0, False), (1, True), (2, False), (3, True)):
        one = gradient(3000, 0.1, 5, spiked) * longest / cohort
        sums = agreed._rounded(one * cohort, bytes([round_] * 4))
        assert np.abs(sums).max() < agreed.modulus // 2
        fewer += int(np.count_nonzero(np.abs(sums) >= agreed.modulus // 16))
    assert fewer > 5


@pytest.mark.parametrize("cohort", [1, 3, 100])
@pytest.mark.parametrize("rate", [1e-5, 1e-3, 0.12, 1.0])
def test_no_more_examples_join_than_the_modulus_is_made_for(cohort: int, rate: float) -> None:
    """By the law of examples that join each by itself, of 1000 a client."""
    most = distributed_example._most(rate * cohort * 1000)
    assert binom.sf(most, cohort * 1000, rate) <= 1e-9


@pytest.mark.parametrize("mean", [1e-3, 0.1, 1.0, 2.5, 40.0])
def test_the_count_of_a_small_batch_has_a_long_tail(mean: float) -> None:
    """Summed here. Six deviations above a mean of 1, for example, are exceeded once in 100,000 rounds."""

    def exceeds(count: float) -> float:
        logs = [k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(math.floor(count) + 1, 200)]
        return math.fsum(map(math.exp, logs))

    most = distributed_example._most(mean)
    assert exceeds(most) <= 1e-9 < exceeds(most - 1)
    assert exceeds(mean + 6 * math.sqrt(mean)) > 1e-9
    assert mean != 1 or exceeds(mean + 6 * math.sqrt(mean)) == pytest.approx(1.02e-5, rel=0.01)


def wraps(agreed: StepTerms, examples: int) -> float:
    """At most the chance that a value of a sum leaves the modulus, over who joins, rotation and noise.

    Each value is sub-Gaussian around 0, next to which each client's rounding is less than one.
    """
    counts = np.arange(agreed.cohort * examples + 1)
    norms = counts * 0.1 / agreed.step
    variances = norms**2 / 2 ** int(math.log2(agreed.size)) + agreed.cohort * float(agreed.share)
    values = 2 * agreed.size * np.exp(-((agreed.modulus / 2 - agreed.cohort) ** 2) / (2 * variances))
    return float(binom.pmf(counts, agreed.cohort * examples, agreed.rate) @ np.minimum(values, 1))


@pytest.mark.parametrize("size", [30, 650, 39_700])
@pytest.mark.parametrize("cohort", [3, 10])
def test_a_sum_wraps_with_the_stated_chance_at_most(size: int, cohort: int) -> None:
    """With the noise counted; and one bit fewer would be too few, where batches vary little."""
    for noise in (0.01, 4.0, 100.0):
        for rate, examples in ((1.0, 6000), (0.1, 6000), (0.02, 100)):
            agreed = terms(size, cohort, noise, rate=rate, examples=examples)
            assert wraps(agreed, examples) <= 1e-6
            assert wraps(replace(agreed, bits=agreed.bits - 1), examples) > 1e-6 or agreed.batch < 100


def test_too_few_or_wrong_sums_are_refused() -> None:
    agreed, sums = terms(100, tolerated=0.25), np.zeros(100, np.int64)
    for replies in (0, 6, 11):
        with pytest.raises(FedappError, match=f"{replies} of 10 clients replied, .* at least 7"):
            agreed.decode(sums, replies, public())
    with pytest.raises(DecodeError, match=r"whole numbers \(100,\)"):
        agreed.decode(sums[:-1], 10, public())


# --- the trainer -------------------------------------------------------------------------------------------

LINEAR = Logistic()
TASK = Digits(build=LINEAR, partition=Iid(), clients=4, seed=0)
DP = DpStep(max_grad_norm=0.5, sampling_rate=1.0)


def data(count: int) -> Data:
    whole = TASK.train_data()
    return Data(whole.x[:count], whole.y[:count])


def with_outlier(few: Data, value: float) -> Data:
    outlier = Data(torch.full((1, 1, 8, 8), value), torch.tensor([3]))
    return Data(torch.cat([few.x, outlier.x]), torch.cat([few.y, outlier.y]))


def total(dp: DpStep, examples: Data, build: Any = LINEAR, seed: int = 0) -> Vector:
    task = replace(TASK, build=build)
    return dp.total(task, task.model(0), examples, source(seed, 0))


def by_hand(model: nn.Module, examples: Data, clip: float) -> Vector:
    """The same sum, by a pass for each example."""
    model, each = model.double(), []
    for x, y in zip(examples.x.double(), examples.y, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    flat: Vector = torch.stack(each).numpy()
    short: Vector = np.minimum(
        1, clip / (np.linalg.norm(flat, axis=1) + 1e-6)
    )  # as Opacus guards its division
    sums: Vector = short @ flat
    return sums


BUILDS = [LINEAR, Mlp(), Cnn(dropout=(0.0, 0.0))]
every_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: type(build).__name__)


@every_build
@pytest.mark.usefixtures("clipping")
def test_the_total_is_the_sum_of_clipped_gradients(build: Any) -> None:
    """Whoever clips, in physical batches of any size; all far below a thousandth of a step."""
    right = by_hand(replace(TASK, build=build).model(0), data(40), 0.5)
    for size in (512, 7):
        found = total(replace(DP, physical_batch_size=size), data(40), build)
        assert found.dtype == np.float64
        assert np.abs(found - right).max() < 1e-12 * np.linalg.norm(right)


@every_build
@pytest.mark.parametrize("value", [0.0, 1.0, 1e3, 1e28, 1e30])
def test_one_example_moves_the_rounded_sum_by_the_sensitivity_at_most(
    build: Any, value: float, clipping: str
) -> None:
    few, more = total(DP, data(50), build), total(DP, with_outlier(data(50), value), build)
    agreed = terms(len(few), clip=0.5)
    moved_ = agreed._rounded(more, b"abcd") - agreed._rounded(few, b"abcd")
    length = math.sqrt(moved_ @ moved_) / sensitivity(agreed)
    assert length <= 1
    if clipping == "fedapp" and value == 1e30 and build is LINEAR:
        assert length == 0  # it is beyond what counts as finite
    else:
        assert length > 0.95 or value < 1e3 or build is not LINEAR  # others may be too sure to learn


def test_single_precision_would_not_keep_the_sensitivity() -> None:
    """What the double precision is for: float32 sums of a real batch differ by more than the slack."""
    right = by_hand(TASK.model(0), data(1400), 0.5)
    slack = 0.001 * terms(len(right), clip=0.5).step
    assert np.abs(right.astype(np.float32) - right).max() > slack
    whole, parts = (total(replace(DP, physical_batch_size=size), data(1400)) for size in (1400, 9))
    assert np.abs(whole - parts).max() < slack / 1000


@pytest.mark.usefixtures("clipping")
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_example_whose_gradient_is_not_finite_counts_as_zero(value: float) -> None:
    for few in (data(20), data(0)):
        assert np.abs(total(DP, with_outlier(few, value), Mlp()) - total(DP, few, Mlp())).max() < 1e-12


@pytest.mark.usefixtures("clipping")
def test_empty_batches_sum_to_zero() -> None:
    for dp, count in ((DP, 0), (replace(DP, sampling_rate=1e-9), 30)):
        found = total(dp, data(count))
        assert found.shape == (650,)
        assert not found.any()


@pytest.mark.usefixtures("clipping")
def test_the_model_stays_as_it_is() -> None:
    model = TASK.model(0)
    DP.total(TASK, model, data(20), source(0))
    fresh = TASK.model(0).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("claimed", [2 / 3, 1.0, 3 / 2])
def test_each_example_joins_with_the_stated_probability(
    monkeypatch: pytest.MonkeyPatch, claimed: float
) -> None:
    """By the operating system's bytes: draws differ, their sizes fit a binomial law, judged at 1e-6."""
    drawn: list[tuple[int, ...]] = []
    backward = Step.total

    def watched(self: Step, data: Data, batch: torch.Tensor) -> torch.Tensor:
        drawn.append(tuple(batch.tolist()))
        return backward(self, data, batch[:1])

    monkeypatch.setattr(Step, "total", watched)
    dp = replace(DP, sampling_rate=0.2)
    for _ in range(40):
        dp.total(TASK, TASK.model(0), data(1000), source(None))
    assert len(set(drawn)) == 40
    low, high = binom.ppf([5e-7, 1 - 5e-7], 40 * 1000, claimed * 0.2)
    assert (low <= sum(map(len, drawn)) <= high) == (claimed == 1.0)


def test_dropout_is_as_secret_as_the_draws() -> None:
    one, other = (total(DP, data(20), Cnn(), seed) for seed in (1, 2))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, total(DP, data(20), Cnn(), 1))


@pytest.mark.parametrize(
    "bad", [{"max_grad_norm": 0}, {"sampling_rate": 1.5}, {"examples_per_client": 0},
            {"physical_batch_size": 0}],
)  # fmt: skip
def test_bad_settings_of_the_trainer_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"trainer.{next(iter(bad))}"):
        DpStep(**bad)


# --- whole rounds ------------------------------------------------------------------------------------------

FAST = (
    "task=digits model=logistic clients=6 rounds=2 evaluate=none privacy=distributed_example "
    "trainer.examples_per_client=240 strategy=fedavg"
)
SHARP = "privacy.epsilon=null privacy.noise_multiplier=0.01"


def job_of(overrides: str) -> Job:
    job = config.job(config.compose(f"{FAST} {overrides}"))
    job.prepare()
    return job


@pytest.mark.parametrize("downlink", ["plain", "fine"])
def test_with_next_to_no_noise_a_round_is_one_step_over_all_examples(downlink: str) -> None:
    job = job_of(f"{SHARP} rounds=1 trainer.sampling_rate=1.0 trainer.max_grad_norm=0.5 downlink={downlink}")
    federation, (record,) = run(job, Watched(job))
    assert (record.replies, record.failures) == (6, 0)
    whole = TASK.train_data()
    right = -by_hand(job.task.model(job.seed), whole, 0.5) / (6 * 240)
    assert np.linalg.norm(moved(federation) - right) < 0.02 * np.linalg.norm(right)


def test_noise_arrives_in_the_step_as_the_terms_say() -> None:
    """Under noise next to which gradients are nothing; divided by the public batch, whoever drew what."""
    job = job_of(f"rounds=1 {WIDE} privacy.epsilon=null privacy.noise_multiplier=1000 privacy.test_seed=1")
    noise = moved(run(job, Watched(job))[0])
    assert isinstance(job.terms, StepTerms)
    stated = job.terms.step * math.sqrt(6 * job.terms.share) / (0.12 * 6 * 240)  # all replied
    assert is_noise_of(noise, stated)
    assert not any(is_noise_of(noise, wrong * stated) for wrong in WRONG)
    assert noise.std() > 1000 * 0.1 / (0.12 * 6 * 240)


def test_a_federation_learns_at_the_noise_of_one_center() -> None:
    job = job_of(
        "rounds=25 evaluate=server strategy=fedavgm strategy.server_learning_rate=16 "
        "strategy.server_momentum=0.5 trainer.sampling_rate=0.3 privacy.epsilon=8 privacy.test_seed=1"
    )
    _, rounds = run(job, Watched(job))
    accuracy = rounds[-1].accuracy
    assert accuracy is not None
    assert accuracy > 0.85


def test_a_test_seed_gives_the_same_bits_and_else_nothing_comes_twice() -> None:
    one, other = (job_of("rounds=1 privacy.test_seed=7") for _ in range(2))
    found = moved(run(one, Watched(one))[0])
    assert np.array_equal(found, moved(run(other, Watched(other))[0]))
    earnest = job_of("rounds=1")
    first, second = (moved(run(earnest, Watched(earnest))[0]) for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("stage", ["query.share", "train"])
def test_dropouts_within_what_is_tolerated_cost_a_reply_and_beyond_it_the_round(stage: str) -> None:
    job = job_of("privacy.tolerated=0.2 rounds=1")
    _, (record,) = run(job, Watched(job, {stage: {4}}))
    assert (record.replies, record.failures) == (5, 1)
    federation, (record,) = run(job, Watched(job, {stage: {4, 5}}))
    assert (record.replies, record.failures) == (0, 6)
    assert not moved(federation).any()


def test_epsilon_is_that_of_the_rounds_a_client_took_part_in() -> None:
    whole, part = job_of("rounds=6"), job_of("rounds=6 cohort=3")
    assert 0 < part.cohorts.most < 6
    assert whole.terms is not None
    assert part.terms is not None
    assert part.terms.multiplier < whole.terms.multiplier
    spent = part.spent(6, part.cohorts.most)
    assert spent is not None
    assert 0.98 * 8 < spent.epsilon <= 8


def test_a_policy_knows_its_noise_and_its_work() -> None:
    job = job_of("privacy.epsilon=null privacy.noise_multiplier=2")
    free = Policy(tasks=("digits",), privacy=("distributed_example",), metrics=(), secure_aggregation=True)
    replace(free, noise=2.0, epsilon=100.0, delta=1e-5).check(job, "train", 1, job.releases(2, 1))
    with pytest.raises(PolicyRefusal, match=r"noise multiplier is 2(\.00\d)?, at least 2.1 is due"):
        replace(free, noise=2.1).check(job, "train", 1, job.releases(2, 1))
    replace(free, steps=1, examples=29).check_work(job.trainer, 10**6)  # 0.12 * 240, whatever it holds
    with pytest.raises(PolicyRefusal, match="a round asks for more than 28"):
        replace(free, examples=28).check_work(job.trainer, 0)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("trainer=sgd", "choose trainer=dp_step, or leave trainer to the privacy choice"),
        ("trainer=dp_sgd", "trainer=dp_sgd does not go with privacy=distributed_example"),
        ("privacy=none trainer=dp_step", "choose privacy=distributed_example"),
        ("privacy=example trainer=dp_step", "trainer=dp_step does not go with privacy=example"),
        ("codec=topk", "secure aggregation takes the place of codec=topk: leave codec out"),
        ("sampling=poisson", "set sampling=fixed"),
        ("cohort=2", "set cohort=3 or more"),
        ("strategy=krum", "strategy=krum needs each update by itself"),
        ("strategy=qfedavg", "strategy=qfedavg needs the clients' losses"),
        ("strategy=fedprox", "strategy=fedprox needs trainer=sgd"),
        ("aggregation=ckks", "choose privacy=none or example"),
        ("privacy.tolerated=0.5", "set privacy.tolerated lower"),
        ("evaluate=clients", "evaluate=clients sends private accuracies"),
        ("model=resnet18 model.norm=batch", "cannot be trained under privacy=distributed_example"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(chosen: str, said: str) -> None:
    base = "task=digits model=logistic clients=6 privacy=distributed_example"
    with pytest.raises(ConfigError, match=said):
        config.job(config.compose(f"{base} {chosen}")).prepare()


def test_the_anchor_is_the_published_one() -> None:
    job = config.job(config.compose("experiment=federated_scattering"))
    assert isinstance(job.trainer, DpStep)
    assert (job.clients, job.rounds, job.in_round) == (10, 293, 10)
    assert job.trainer.sampling_rate * job.trainer.examples_per_client * 10 == pytest.approx(8192)
    assert job.trainer.max_grad_norm == 0.1
    assert job.strategy.server_learning_rate == 16  # type: ignore[attr-defined]
