"""The distributed discrete Gaussian: what leaves a client, what the server reads, and what that costs."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp
from test_mechanisms import WRONG, is_noise_of

from fedapp.codec.rotate import rotated, rotated_back
from fedapp.errors import ConfigError, DecodeError, FedappError
from fedapp.privacy import distributed, renyi
from fedapp.privacy.discrete import discrete_gaussian
from fedapp.privacy.distributed import DistributedGaussian, Terms
from fedapp.privacy.release import ORDERS
from fedapp.privacy.secret import Secret, source

Vector = NDArray[np.float32]


def terms(size: int, cohort: int, noise: float = 1.0, **settings: Any) -> Terms:
    return DistributedGaussian(epsilon=None, noise_multiplier=noise, **settings).terms(size, cohort, 1)


def public(number: int = 0) -> np.random.Generator:
    return np.random.default_rng([7, number])


def whole(terms: Terms, update: Vector, noise: bool = True, client: int = 0, round_: int = 0) -> NDArray[Any]:
    """What a client sends before the modulus takes its sign: int64 (kept,)."""
    with pytest.MonkeyPatch.context() as patch:
        if not noise:
            patch.setattr(distributed, "discrete_gaussian", lambda size, *_: np.zeros(size, np.int64))
        sent = replace(terms, bits=31).encode(update, public(round_), source(1, round_, client))
    lifted: NDArray[np.int64] = (sent.astype(np.int64) + 2**30 & 2**31 - 1) - 2**30
    return lifted


def total(terms: Terms, updates: list[Vector], noise: bool = True, round_: int = 0) -> NDArray[np.int64]:
    sent = [whole(terms, x, noise, client, round_) for client, x in enumerate(updates)]
    sums: NDArray[np.int64] = np.sum(sent, axis=0) % terms.modulus
    return sums


def gaussian(size: int, norm: float, seed: int) -> Vector:
    x = np.random.default_rng(seed).standard_normal(size)
    return (x * (norm / math.sqrt(x @ x))).astype(np.float32)


def spike(size: int, norm: float) -> Vector:
    x = np.zeros(size, np.float32)
    x[size // 3] = norm
    return x


def clipped(x: Vector, clip: float) -> Vector:
    short = min(1.0, clip / float(np.linalg.norm(x.astype(np.float64))))
    return (x * np.float64(short)).astype(np.float32)


# --- the client --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300),
    norm=st.floats(0, 1e30),
    keep=st.sampled_from([0.1, 0.5, 1.0]),
    spiked=st.booleans(),
    noise=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_rounded_norm_never_exceeds_the_bound(
    size: int, norm: float, keep: float, spiked: bool, noise: float, seed: int
) -> None:
    """The bound that the noise is made for holds on the integers, whatever the update."""
    agreed = terms(size, 4, noise, keep=keep)
    x = spike(size, norm) if spiked else gaussian(size, norm, seed)
    sent = whole(agreed, x, noise=False, round_=seed)
    assert sent @ sent <= agreed.most
    assert agreed.most <= 1.05**2 * (agreed.clip / agreed.step) ** 2
    assert agreed.noise >= noise * math.sqrt(agreed.most) * agreed.step * (1 - 1e-9)


def test_rounding_is_repeated_until_it_keeps_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value lies half a step from a whole one, the worst case, and the bound is the mean: half fail."""
    agreed = Terms(1024, 1024, 1, 1, 20, 1.0, 1.0, 1024 * (3**2 + 4**2) // 2, Fraction(1, 4))
    tries, rounded = [0], distributed._round

    def counted(x: NDArray[np.float64], secret: Secret) -> NDArray[np.int64]:
        tries[0] += 1
        return rounded(x, secret)

    monkeypatch.setattr(distributed, "_round", counted)
    monkeypatch.setattr(distributed, "rotated", lambda x, turn: np.full(1024, 3.5))
    for client in range(200):
        sent = whole(agreed, gaussian(1024, 1.0, client), noise=False, client=client)
        assert sent @ sent <= agreed.most
    assert 300 < tries[0] < 500


def test_rounding_has_no_bias() -> None:
    """The mean of many encodings of one update is that update, within what chance allows."""
    agreed, x = terms(300, 1, bits=None), gaussian(300, 0.7, 0)
    each = [whole(agreed, x, noise=False, client=client) for client in range(4000)]
    mean = agreed.decode(np.mean(each, axis=0).round(0).astype(np.int64), 1, public())
    assert np.abs(mean - x).max() < agreed.step  # one rounded mean; the finer test follows
    error = np.mean(each, axis=0) * agreed.step - rotated(x.astype(float), agreed._public(public())[1])
    assert np.abs(error).max() < 4.5 * agreed.step / 2 / math.sqrt(4000)


def test_what_is_not_finite_counts_as_zero() -> None:
    agreed, x = terms(1000, 4), gaussian(1000, 1.0, 0)
    for bad in (math.nan, math.inf, -math.inf):
        x[3] = bad
        assert not whole(agreed, x, noise=False).any()
        assert (whole(agreed, x) == whole(agreed, np.zeros(1000, np.float32))).all()
    assert not whole(agreed, np.zeros(1000, np.float32), noise=False).any()
    with pytest.raises(ValueError, match=r"\(1000,\)"):
        agreed.encode(x[:-1], public(), source(0))


def test_residues_are_the_integers_modulo_the_modulus() -> None:
    agreed, x = terms(5000, 10), gaussian(5000, 3.0, 0)
    sent = agreed.encode(x, public(), source(1, 0, 0))
    assert sent.dtype == np.uint32
    assert sent.max() < agreed.modulus
    assert (sent == whole(agreed, x) % agreed.modulus).all()
    other = agreed.encode(x, public(), source(1, 0, 1))
    assert (sent != other).mean() > 0.9


# --- the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100, 4097, 26_146])
@pytest.mark.parametrize("cohort", [1, 7])
def test_sum_decodes_to_the_mean_of_clipped_updates(size: int, cohort: int) -> None:
    """Without noise what is left is rounding: of each client at most a step, on average half of one."""
    agreed = terms(size, cohort, clip=2.0)
    updates = [
        gaussian(size, norm, seed)
        for seed, norm in enumerate([0.5, 1.9, 2.0, 7.0, 1e20, 0.0, 1e-30][:cohort])
    ]
    mean = np.mean([clipped(x, 2.0) if x.any() else x for x in updates], axis=0)
    error = agreed.decode(total(agreed, updates, noise=False), cohort, public()) - mean
    assert np.linalg.norm(error) <= agreed.step * math.sqrt(size)
    if size > 100:
        assert np.linalg.norm(error) <= 0.5 * agreed.step * math.sqrt(size / cohort) * 1.05


def test_a_lost_reply_counts_as_zero() -> None:
    """Divided by the public cohort, not by who replied."""
    agreed, x = terms(3000, 10, tolerated=0.3), gaussian(3000, 0.9, 0)
    mean = agreed.decode(total(agreed, [x] * 7, noise=False), 7, public())
    assert np.linalg.norm(mean - 0.7 * x) < 0.7 * agreed.step * math.sqrt(3000 / 7)


def test_kept_places_are_scaled_to_an_unbiased_mean() -> None:
    """A tenth of the values a round: over many rounds their mean is the update."""
    size, rounds = 500, 600
    agreed, x = terms(size, 1, keep=0.1), gaussian(size, 0.5, 0)
    got = [agreed.decode(total(agreed, [x], False, r), 1, public(r)) for r in range(rounds)]
    assert agreed.kept == 50
    assert all(np.count_nonzero(one) <= 50 for one in got)
    spread = np.abs(x) * math.sqrt(9 / rounds) + 10 * agreed.step / math.sqrt(10 * rounds)
    assert (np.abs(np.mean(got, axis=0) - x) < 5 * spread).all()
    assert float(np.mean(got, axis=0) @ x / (x @ x)) == pytest.approx(1, abs=0.06)


def noise_in(agreed: Terms, sums: NDArray[np.int64], replies: int, mean: Vector) -> NDArray[np.float64]:
    """What the server reads beside its mean, times the cohort."""
    return (agreed.decode(sums, replies, public()).astype(np.float64) - mean) * agreed.cohort


@pytest.mark.parametrize("norm", [0.0, 0.9, 1000.0])
def test_noise_of_the_sum_is_the_stated_one(norm: float) -> None:
    """In units of the update, whatever its size; only tolerated losses bring it down to that."""
    size, cohort, sigma = 250_000, 5, 1.3
    agreed, x = terms(size, cohort, sigma, tolerated=0.2), gaussian(size, norm, 0)
    mean = clipped(x, 1.0) * (4 / 5) if norm else x
    sums = total(agreed, [x] * 4)
    found = noise_in(agreed, sums, 4, mean)
    assert is_noise_of(found, agreed.noise)
    assert sigma <= agreed.noise <= 1.05 * sigma * 1.002
    assert not any(is_noise_of(found, wrong * agreed.noise) for wrong in (*WRONG, 4 / 5, 5 / 4))
    fifth = whole(agreed, x, client=4)
    whole_cohort = noise_in(agreed, (sums + fifth) % agreed.modulus, 5, mean * (5 / 4))
    assert is_noise_of(whole_cohort, agreed.noise * math.sqrt(5 / 4))
    assert whole_cohort.std() > found.std()


def noise_first(terms: Terms, x: Vector, client: int) -> NDArray[np.int64]:
    """Wrong: clips after the noise."""
    sent = whole(terms, x, client=client).astype(np.float64)
    return np.rint(sent * (math.sqrt(terms.most) / np.linalg.norm(sent))).astype(np.int64)


def halved(terms: Terms, x: Vector, client: int) -> NDArray[np.int64]:
    """Wrong: half of each share."""
    return whole(terms, x, noise=False) + discrete_gaussian(
        terms.kept, Fraction(math.ceil(terms.share / 2)), source(2, client)
    )


def no_rounding_bound(terms: Terms, x: Vector, client: int) -> NDArray[np.int64]:
    """Wrong: the noise for the clip norm before rounding."""
    share = Fraction(math.ceil((terms.clip / terms.step) ** 2 / terms.honest))
    return whole(terms, x, noise=False) + discrete_gaussian(terms.kept, share, source(3, client))


@pytest.mark.parametrize("wrong", [noise_first, halved, no_rounding_bound])
def test_wrong_clients_do_not_pass(wrong: Callable[[Terms, Vector, int], NDArray[np.int64]]) -> None:
    agreed, x = terms(250_000, 3, tolerated=0.0), gaussian(250_000, 0.9, 0)
    sums = np.sum([wrong(agreed, x, client) for client in range(3)], axis=0)
    assert not is_noise_of(noise_in(agreed, sums, 3, x), agreed.noise)
    assert is_noise_of(noise_in(agreed, total(agreed, [x] * 3), 3, x), agreed.noise)


@pytest.mark.parametrize(("cohort", "noise", "keep"), [(10, 1.0, 1.0), (100, 0.1, 1.0), (50, 0.3, 0.2)])
def test_no_sum_wraps_and_three_bits_fewer_would(cohort: int, noise: float, keep: float) -> None:
    """The worst updates: all the same, at the clip norm, all replying; spread out or in one value."""
    size = 3000
    agreed = terms(size, cohort, noise, keep=keep)
    fewer = 0
    for x in (gaussian(size, 1e3, 0), np.full(size, 1e3, np.float32), spike(size, 1e3)):
        for round_ in range(3):
            sums = np.sum([whole(agreed, x, client=c, round_=round_) for c in range(cohort)], axis=0)
            assert np.abs(sums).max() < agreed.modulus // 2
            fewer += int(np.count_nonzero(np.abs(sums) >= agreed.modulus // 16))
    assert fewer > 10


@pytest.mark.parametrize(
    ("size", "cohort", "noise", "keep"),
    [
        (26_146, 10, 1.0, 1.0), (3000, 100, 0.1, 1.0), (650, 3, 5.0, 1.0), (30, 4, 0.3, 1.0),
        (5000, 50, 0.3, 0.2), (1_200_000, 1000, 1.0, 0.1),
    ],
)  # fmt: skip
def test_a_sum_wraps_with_the_stated_chance_at_most(
    size: int, cohort: int, noise: float, keep: float
) -> None:
    """With the noise counted: over rotation and noise of the worst updates; of that chance little is wasted.

    Each value is sub-Gaussian around 0, next to which each client's rounding is less than one.
    """
    agreed = terms(size, cohort, noise, keep=keep)
    norm = cohort * agreed.clip / agreed.step
    variance = norm**2 / 2 ** int(math.log2(agreed.kept)) + cohort * agreed.share
    chance = 2 * agreed.kept * math.exp(-((agreed.modulus / 2 - cohort) ** 2) / (2 * variance))
    assert 9e-7 < chance <= 1e-6


def test_too_few_or_too_many_replies_are_refused() -> None:
    agreed = terms(100, 10, tolerated=0.25)
    assert agreed.honest == 7
    sums = np.zeros(100, np.int64)
    for replies in (7, 10):
        agreed.decode(sums, replies, public())
    for replies in (0, 6, 11):
        with pytest.raises(
            FedappError, match=f"{replies} of 10 clients replied, and the noise takes at least 7"
        ):
            agreed.decode(sums, replies, public())
    wrong: list[NDArray[Any]] = [sums[:-1], sums.astype(np.float64), sums[None]]
    for bad in wrong:
        with pytest.raises(DecodeError, match=r"whole numbers \(100,\)"):
            agreed.decode(bad, 10, public())


@pytest.mark.parametrize("kind", ["uint32", "int64", "uint64"])
def test_sums_of_residues_are_read_whether_reduced_or_not(kind: str) -> None:
    agreed, x = terms(100, 10), gaussian(100, 1.0, 0)
    sent = [agreed.encode(x, public(), source(1, 0, client)) for client in range(10)]
    plain: NDArray[np.int64] = np.sum(sent, axis=0, dtype=np.int64)
    reduced: NDArray[Any] = (plain % agreed.modulus).astype(kind)
    assert (agreed.decode(plain, 10, public()) == agreed.decode(reduced, 10, public())).all()


# --- the rotation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 64, 100, 4096, 5000])
def test_rotation_keeps_norms_and_comes_back(size: int) -> None:
    x = np.random.default_rng(0).standard_normal(size)
    turned = rotated(x, b"abcd")
    assert turned @ turned == pytest.approx(x @ x, rel=1e-12)
    assert rotated_back(turned, b"abcd") == pytest.approx(x, abs=1e-12)
    if size >= 64:
        assert np.abs(turned - x).max() > 0.5


def test_rotation_spreads_a_spike_over_all_values() -> None:
    for place in (0, 2999, 1700):
        turned = rotated(np.eye(3000)[place], b"abcd")
        assert np.abs(turned).max() < 6 / math.sqrt(2048)


# --- what it costs -----------------------------------------------------------------------------------------


def divergence(variance: float, shares: int, shift: int, order: float) -> float:
    """Renyi divergence of a sum of discrete Gaussians from itself shifted, summed over its law."""
    most = math.ceil(36 * math.sqrt(variance)) + 1
    one = np.exp(-(np.arange(-most, most + 1) ** 2) / (2 * variance))
    one /= one.sum()
    law = one
    for _ in range(shares - 1):
        law = np.convolve(law, one)
    with np.errstate(divide="ignore"):
        log = np.log(law)
    p, q = log[shift:], log[:-shift]
    seen = np.isfinite(p) & np.isfinite(q)
    return float(logsumexp(order * p[seen] + (1 - order) * q[seen]) / (order - 1))


def rdp(terms: Terms, *orders: float) -> NDArray[np.float64]:
    """Float64 (len(orders),): what the accountants take one round's sum for."""
    return renyi.rdp(terms.release(1))[[ORDERS.index(order) for order in orders]]


@pytest.mark.parametrize("variance", [0.25, 0.5, 1.0, 4.0, 25.0])
@pytest.mark.parametrize("honest", [1, 2, 9])
@pytest.mark.parametrize("norm", [1, 2])
def test_divergence_against_the_law_of_the_sum(variance: float, honest: int, norm: int) -> None:
    """Never below the divergence summed in one dimension; equal to it where shares are not tiny."""
    agreed = Terms(1, 1, honest, honest, 20, 1.0, 1.0, norm**2, Fraction(variance))
    for order in (1.1, 1.5, 2.0, 5.0, 16.0):
        exact, (bound,) = divergence(variance, honest, 2 * norm, order), rdp(agreed, order)
        assert bound >= exact * (1 - 1e-9)
        if variance >= 4:
            assert bound == pytest.approx(exact, rel=1e-6)


def test_sums_of_tiny_shares_lack_something() -> None:
    """Of variance 1/4 each: a sum costs more than one draw of the whole variance, and the bound knows."""
    one = Terms(1, 1, 1, 1, 20, 1.0, 1.0, 1, Fraction(9, 4))
    nine = replace(one, cohort=9, honest=9, share=Fraction(1, 4))
    assert (rdp(nine, 2.0, 8.0) > rdp(one, 2.0, 8.0)).all()
    assert divergence(0.25, 2, 1, 8.0) > 1.02 * divergence(0.5, 1, 1, 8.0)


def test_divergence_is_the_gaussian_one_at_the_noise_multiplier() -> None:
    """Sensitivity 2C: order * (2 / z)^2 / 2, the rounding being in the noise; more shares cost no more."""
    for size, cohort, keep in ((26_146, 10, 1.0), (1_200_000, 1000, 0.1), (30, 4, 1.0)):
        agreed = terms(size, cohort, 3.0, keep=keep)
        got = rdp(agreed, 1.5, 2.0, 64.0)
        assert got == pytest.approx(np.array([1.5, 2.0, 64.0]) * (2 / 3) ** 2 / 2, rel=3e-3)
        assert (got <= np.array([1.5, 2.0, 64.0]) * (2 / 3) ** 2 / 2 * (1 + 1e-9)).all()
    halved = replace(agreed, share=agreed.share / 2)
    assert (rdp(halved, 2.0) > 1.9 * rdp(agreed, 2.0)).all()


@pytest.mark.parametrize("budget", [0.5, 8.0, 100.0])
@pytest.mark.parametrize("rounds", [1, 50])
def test_noise_keeps_the_budget_and_little_more(budget: float, rounds: int) -> None:
    privacy = DistributedGaussian(epsilon=budget, delta=1e-5)
    agreed = privacy.terms(26_146, 20, rounds)
    assert 0.98 * budget < agreed.epsilon(rounds, 1e-5) <= budget
    assert agreed.release(rounds).count == rounds
    assert agreed.epsilon(rounds + 1, 1e-5) > agreed.epsilon(rounds, 1e-5)


@pytest.mark.parametrize(
    ("size", "keep", "bits"),
    [(26_146, 1.0, 12), (26_146, 0.1, 11), (1_200_000, 1.0, 15), (1_200_000, 0.1, 14)],
)
def test_bits_of_ten_clients(size: int, keep: float, bits: int) -> None:
    """Noise of one clip norm. These are on the wire: a change is a break."""
    agreed = terms(size, 10, keep=keep)
    assert agreed.bits == bits
    a_parameter = bits * agreed.kept / size
    print(f"{size} values, keep {keep}: modulus {agreed.modulus}, {a_parameter:.2f} bits a parameter")
    with pytest.raises(ConfigError, match="set more bits"):
        terms(size, 10, keep=keep, bits=bits - 3)


def test_bits_given_make_the_finest_grid_that_fits() -> None:
    coarse, fine = terms(5000, 10, bits=12), terms(5000, 10, bits=16)
    assert fine.step < coarse.step / 12
    assert fine.noise < coarse.noise


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"epsilon": None}, "exactly one of privacy.epsilon"),
        ({"noise_multiplier": 1.0}, "exactly one of privacy.epsilon"),
        ({"epsilon": 0.0}, "privacy.epsilon must be a number at least 0.01"),
        ({"epsilon": None, "noise_multiplier": 0.0}, "privacy.noise_multiplier"),
        ({"delta": 1.0}, "privacy.delta"),
        ({"clip": 0.0}, "privacy.clip"),
        ({"keep": 0.0}, "privacy.keep"),
        ({"keep": 1.1}, "privacy.keep"),
        ({"tolerated": 1.0}, "privacy.tolerated"),
        ({"bits": 25}, "privacy.bits must be a whole number from 1 to 24"),
        ({"bits": 2.0}, "privacy.bits"),
        ({"test_seed": -1}, "privacy.test_seed"),
    ],
)
def test_settings_out_of_range(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistributedGaussian(**bad)


@pytest.mark.parametrize(("size", "cohort"), [(0, 10), (10, 0)])
def test_empty_terms_are_refused(size: int, cohort: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        terms(size, cohort)


@pytest.mark.parametrize(("tolerated", "honest"), [(0.0, 10), (0.1, 9), (0.29, 7), (0.3, 7)])
def test_at_least_the_tolerated_share_may_be_missing(tolerated: float, honest: int) -> None:
    agreed = terms(100, 10, tolerated=tolerated)
    assert agreed.honest == honest
    assert agreed.noise >= math.sqrt(agreed.most) * agreed.step
