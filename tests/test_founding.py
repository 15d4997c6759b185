"""The founding document's rules: what each form does, and its error and bias against their closed forms."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout, Packet, Slot, State
from fedapp.codec.entropy import Ans
from fedapp.codec.founding import FixedPoint, RandomPrune, rules
from fedapp.codec.packet import pack
from fedapp.codec.varint import Reader, varint
from fedapp.errors import ConfigError, DecodeError

SIZE = 3000
CONVOLUTIONS = Layout((Slot("conv", (20, 25, 2, 3), 0),), SIZE)  # 500 kernels, no other layer
MODEL = Layout((Slot("dense", (10, 7), 0), Slot("conv", (4, 5, 3, 3), 70), Slot("bias", (), 250)), 251)


def gaussian(size: int = SIZE, scale: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def coded(
    codec: Codec, x: NDArray[np.float32], rng: np.random.Generator, layout: Layout = CONVOLUTIONS
) -> NDArray[np.float64]:
    return codec.decode(codec.encode(x, layout, {}, rng)[0], layout).astype(np.float64)


# Error and bias, measured and in closed form


def expected(codec: RandomPrune | FixedPoint, x: NDArray[np.float64]) -> tuple[float, float]:
    """What E[decoded] is of x, and E||decoded - x||^2 / ||x||^2, as the classes say."""
    if isinstance(codec, RandomPrune):
        units = 500 if codec.structure == "kernel" else SIZE
        r_k = math.sqrt(units / (units + round(codec.share * units)))
        p = codec.share if codec.corrected else codec.alpha * r_k
        return (1.0, p / (1 - p)) if codec.corrected else (1 - p, p)
    q, beta, power = np.abs(x).max() / codec.levels, codec.beta, np.mean(x**2)
    if codec.corrected:
        q /= 1 - beta
        return 1.0, beta / (1 - beta) + (1 - beta) * q**2 / 6 / power
    return 1 - beta, beta + (1 - beta) * q**2 / 12 / power


def measured(codec: Codec, x: NDArray[np.float32], rounds: int = 300) -> NDArray[np.float64]:
    """The same two of each round, (2, rounds)."""
    rng, power = np.random.default_rng(7), float(x.astype(np.float64) @ x)
    decoded = (coded(codec, x, rng) for _ in range(rounds))
    return np.array([(d @ x / power, np.sum((d - x) ** 2) / power) for d in decoded]).T


def fits(draws: NDArray[np.float64], value: float) -> bool:
    """Whether their mean is within five standard errors, or 1 %, of the value."""
    error = draws.std(ddof=1) / math.sqrt(len(draws))
    return bool(abs(draws.mean() - value) < max(5 * error, 0.01 * value))


FORMS: list[RandomPrune | FixedPoint] = [
    *(RandomPrune(p, corrected=True) for p in (0.1, 0.5, 0.9)),
    *(RandomPrune(share, alpha, corrected=False) for share, alpha in ((0.6, 0.3), (0.9, 0.5), (0.9, 0.9))),
    *(RandomPrune(p, structure="kernel") for p in (0.2, 0.7)),
    *(RandomPrune(share, 0.6, "kernel", corrected=False) for share in (0.6, 1.0)),
    *(FixedPoint(levels, beta) for levels in (15, 127) for beta in (0.0, 0.1, 0.5)),
    *(FixedPoint(levels, beta, corrected=False) for levels in (15, 127) for beta in (0.0, 0.1, 0.5)),
]


@pytest.mark.parametrize("codec", FORMS, ids=repr)
def test_bias_and_error_are_those_of_the_closed_forms(codec: RandomPrune | FixedPoint) -> None:
    x = gaussian()
    kept, nmse = expected(codec, x.astype(np.float64))
    kepts, nmses = measured(codec, x)
    print(f"{codec}: E[decoded]/x {kepts.mean():.4f} ({kept:.4f}), NMSE {nmses.mean():.5f} ({nmse:.5f})")
    assert fits(kepts, kept)
    for wrong in (2 / 3, 3 / 2):
        assert not fits(kepts, wrong * kept)
        assert not fits(nmses, wrong * nmse)
    # Rounding to the nearest is no draw: its error is that of this vector, q^2 / 12 in the mean over vectors.
    assert fits(nmses, nmse) or (not codec.corrected and nmses.mean() == pytest.approx(nmse, rel=0.05))


def test_what_the_yaml_says_of_the_default_settings() -> None:
    """share = alpha = 1/2: as written p is 0.41, of which everything lacks; corrected the error is 1."""
    x = gaussian()
    assert measured(RandomPrune(0.5, 0.5, corrected=False), x).mean(1) == pytest.approx(
        [0.592, 0.408], abs=5e-3
    )
    assert measured(RandomPrune(0.5), x).mean(1) == pytest.approx([1.0, 1.0], abs=5e-3)


@pytest.mark.parametrize("kind", ["prune", "fixed"])
def test_over_clients_the_corrected_error_falls_and_the_written_stays(kind: str) -> None:
    x, clients = gaussian(), 50
    for corrected in (True, False):
        codec = (
            RandomPrune(0.5, 0.5, corrected=corrected) if kind == "prune" else FixedPoint(127, 0.4, corrected)
        )
        kept, nmse = expected(codec, x.astype(np.float64))
        rng = np.random.default_rng(3)
        mean = np.mean([coded(codec, x, rng) for _ in range(clients)], axis=0)
        error = np.sum((mean - x) ** 2) / np.sum(x.astype(np.float64) ** 2)
        variance = nmse - (1 - kept) ** 2
        assert error == pytest.approx((1 - kept) ** 2 + variance / clients, rel=0.1)
        assert error < 0.05 if corrected else error > 0.15


@pytest.mark.parametrize("structure", ["none", "weight", "kernel"])
def test_the_whole_chain_is_right_in_the_mean_as_corrected_only(structure: str) -> None:
    x = gaussian()
    for corrected in (True, False):
        kepts, _ = measured(rules(structure, share=0.4, levels=31, beta=0.2, corrected=corrected), x, 200)
        assert fits(kepts, 1.0) == corrected


# Pruning


def test_pruning_as_written_spends_a_budget_and_stops() -> None:
    """k falls by what each round dropped; all in all exactly share * n are dropped, then updates pass."""
    state: State = {}
    codec, lefts, total = RandomPrune(0.9, 0.5, corrected=False), [2700], 0
    rng = np.random.default_rng(1)
    for number in range(8):
        x = gaussian(seed=number)
        packet, state = codec.encode(x, CONVOLUTIONS, state, rng)
        dropped = SIZE - len(packet.body)
        r_k = math.sqrt(SIZE / (SIZE + lefts[-1]))
        if lefts[-1] > 0.5 * SIZE:
            assert dropped == pytest.approx(0.5 * r_k * SIZE, rel=0.1)
        total += dropped
        lefts.append(int(state["left"][0]))
        assert lefts[-1] == 2700 - total
        assert np.array_equal(
            codec.decode(packet, CONVOLUTIONS) == 0, codec.decode(packet, CONVOLUTIONS) != x
        )
    assert total == 2700
    assert lefts[-1] == 0
    assert np.array_equal(codec.decode(packet, CONVOLUTIONS), x)


def test_pruning_as_written_drops_less_the_more_is_to_go() -> None:
    """Which is why k / n is no ratio of it: r_k falls from 1 to 0.71."""
    x, dropped = gaussian(), []
    for share in (0.5, 0.75, 1.0):
        packet, _ = RandomPrune(share, 0.4, corrected=False).encode(
            x, MODEL_OF_ALL, {}, np.random.default_rng(2)
        )
        dropped.append(1 - len(packet.body) / SIZE)
    assert dropped[0] > dropped[1] > dropped[2]
    assert dropped[2] == pytest.approx(0.4 * math.sqrt(0.5), abs=0.03)


MODEL_OF_ALL = Layout((Slot("all", (SIZE,), 0),), SIZE)


@pytest.mark.parametrize("corrected", [True, False])
def test_kernels_go_whole_and_other_layers_pass(corrected: bool) -> None:
    x = gaussian(251)
    codec = RandomPrune(0.5, 0.9, "kernel", corrected)
    decoded = coded(codec, x, np.random.default_rng(0), MODEL)
    kernels, scale = decoded[70:250].reshape(20, 9), 2.0 if corrected else 1.0
    gone = (kernels == 0).all(1)
    assert 3 <= gone.sum() <= 15
    assert np.array_equal(kernels[~gone], scale * x[70:250].reshape(20, 9)[~gone])
    assert np.array_equal(decoded[:70], x[:70])
    assert decoded[250] == x[250]


@pytest.mark.parametrize("corrected", [True, False])
def test_a_model_without_convolutions_has_no_kernels_to_go(corrected: bool) -> None:
    x, codec = gaussian(), RandomPrune(0.5, 0.5, "kernel", corrected)
    assert np.array_equal(coded(codec, x, np.random.default_rng(0), MODEL_OF_ALL), x)


def test_no_places_are_sent() -> None:
    layout, x = CONVOLUTIONS, gaussian()
    for structure in ("weight", "kernel"):
        corrected, _ = RandomPrune(0.9, structure=structure).encode(x, layout, {}, np.random.default_rng(0))
        assert len(corrected.header) == 4
        written, _ = RandomPrune(0.9, 0.5, structure, False).encode(x, layout, {}, np.random.default_rng(0))
        assert len(written.header) == 6
    assert len(RandomPrune(0.9).encode(x, layout, {}, np.random.default_rng(0))[0].body) < 0.13 * SIZE


def test_seeds_are_fresh_each_time() -> None:
    rng, x = np.random.default_rng(0), gaussian()
    first, again = (coded(RandomPrune(0.5), x, rng) == 0 for _ in range(2))
    assert np.mean(first == again) == pytest.approx(0.5, abs=0.05)


def test_a_mask_is_the_same_on_every_machine() -> None:
    """Golden bytes of seed, k and values; and the kernels that they stand for."""
    x = np.arange(1, 252, dtype=np.float32)
    codec = RandomPrune(0.5, 0.9, "kernel", corrected=False)
    packet, state = codec.encode(x, MODEL, {}, np.random.default_rng(0))
    decoded = codec.decode(packet, MODEL)
    assert packet.header.hex() == GOLDEN_HEADER
    assert np.flatnonzero(decoded[70:250:9] == 0).tolist() == GOLDEN_KERNELS
    assert state["left"].tolist() == [10 - len(GOLDEN_KERNELS)]


GOLDEN_HEADER = "5f82c2d90a"
GOLDEN_KERNELS = [0, 2, 3, 4, 5, 6, 9, 12, 14, 17]


@pytest.mark.parametrize(
    ("codec", "packet"),
    [
        (RandomPrune(), Packet(gaussian(), b"\0\0\0")),
        (RandomPrune(), Packet(gaussian(), b"\0\0\0\0")),
        (RandomPrune(), Packet(gaussian(), b"\0\0\0\0\0")),
        (RandomPrune(), Packet(np.zeros(SIZE, np.int32), b"\0\0\0\0")),
        (RandomPrune(0.0), Packet(np.zeros(SIZE, np.int32), b"\0\0\0\0")),
        (RandomPrune(0.0), Packet(gaussian(SIZE + 1), b"\0\0\0\0")),
        (RandomPrune(0.0, corrected=False), Packet(gaussian(), b"\0\0\0\0" + varint(SIZE + 1))),
        (RandomPrune(0.0, corrected=False), Packet(gaussian(), b"\0\0\0\0" + varint(2**60))),
        (
            RandomPrune(0.0, structure="kernel", corrected=False),
            Packet(gaussian(), b"\0\0\0\0" + varint(501)),
        ),
        (FixedPoint(), Packet(np.zeros(SIZE, np.int32), b"\0\0\0")),
        (FixedPoint(), Packet(gaussian(), b"\0\0\0\0")),
        (FixedPoint(), Packet(np.ones(SIZE, np.int32), b"\0\0\0\0")),
        (FixedPoint(), Packet(np.full(SIZE, 128, np.int32), np.float32(1).tobytes())),
        (FixedPoint(), Packet(np.full(SIZE, -(2**31), np.int32), np.float32(1).tobytes())),
        *(
            (FixedPoint(), Packet(np.zeros(SIZE, np.int32), np.float32(bad).tobytes()))
            for bad in (np.nan, np.inf, -1.0)
        ),
    ],
)
def test_what_encode_cannot_have_made_is_refused(codec: Codec, packet: Packet) -> None:
    with pytest.raises(DecodeError):
        codec.decode(packet, CONVOLUTIONS)


def test_pruning_of_a_part_says_where_it_belongs() -> None:
    with pytest.raises(TypeError, match="put it first"):
        RandomPrune().encode(gaussian(10), MODEL, {}, np.random.default_rng(0))


# Fixed point


@pytest.mark.parametrize("levels", [2, 7, 127, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-42])
@pytest.mark.parametrize("corrected", [True, False])
def test_the_step_follows_the_largest_value(levels: int, scale: float, corrected: bool) -> None:
    x = gaussian(scale=scale)
    codec, largest = FixedPoint(levels, corrected=corrected), float(np.abs(x).max())
    packet, state = codec.encode(x, CONVOLUTIONS, {}, np.random.default_rng(0))
    q = float(np.frombuffer(packet.header, "<f4")[0])
    assert not state
    assert q / largest < 1
    assert q == pytest.approx(largest / levels, rel=1e-6, abs=1.5e-45)
    assert np.abs(packet.body).max() <= levels
    error = np.abs(codec.decode(packet, CONVOLUTIONS).astype(np.float64) - x)
    assert error.max() <= (q if corrected else q / 2) * (1 + 1e-5)


@pytest.mark.parametrize("corrected", [True, False])
def test_multiples_of_the_step_are_kept_as_they_are(corrected: bool) -> None:
    x = (np.arange(-127, 128) / 8).astype(np.float32)
    codec = FixedPoint(127, corrected=corrected)
    layout = Layout((Slot("x", (255,), 0),), 255)
    assert np.array_equal(coded(codec, x, np.random.default_rng(0), layout), x)


def test_small_weights_vanish_as_written_only() -> None:
    x = np.full(SIZE, 0.001, np.float32)
    x[0] = 1.0
    assert np.count_nonzero(coded(FixedPoint(127, corrected=False), x, np.random.default_rng(0))) == 1
    corrected = coded(FixedPoint(127), x, np.random.default_rng(0))
    assert corrected[1:].mean() == pytest.approx(0.001, rel=0.2)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("corrected", [True, False])
def test_the_largest_float_does_not_overflow(beta: float, corrected: bool) -> None:
    x = np.full(SIZE, np.finfo(np.float32).max, np.float32)
    for levels in (2, 3, 127):
        decoded = coded(FixedPoint(levels, beta, corrected), x, np.random.default_rng(0))
        assert np.isfinite(decoded).all()
        assert decoded.max() == pytest.approx(float(x[0]), rel=1e-6)
    assert np.isfinite(coded(RandomPrune(0.9, corrected=corrected), x, np.random.default_rng(0))).all()


def test_a_drop_saves_fewer_bits_than_its_error_costs() -> None:
    """Why beta is 0 by default: at the same bytes, coarser steps err less than drops do."""
    x, layout, rng = gaussian(50_000), Layout((Slot("x", (50_000,), 0),), 50_000), np.random.default_rng(0)
    points = []
    for codec in (rules(levels=63, beta=0.1), rules(levels=40)):
        packet, _ = codec.encode(x, layout, {}, rng)
        error = np.mean((codec.decode(packet, layout) - x) ** 2)
        points.append((8 * len(pack(packet, codec, layout)) / 50_000, float(error)))
    (dropped_bits, dropped_error), (coarse_bits, coarse_error) = points
    assert coarse_bits < dropped_bits
    assert coarse_error < 0.1 * dropped_error


# Feedback, settings


def test_as_written_error_feedback_makes_up_for_the_bias() -> None:
    x = gaussian()
    codec = rules("weight", share=1.0, alpha=0.3, beta=0.1, corrected=False, feedback=True)
    rng, sent = np.random.default_rng(0), np.zeros(SIZE)
    after: State = {}
    for _ in range(30):
        packet, after = codec.encode(x, CONVOLUTIONS, after, rng)
        sent += codec.decode(packet, CONVOLUTIONS)
    assert np.sum((sent / 30 - x) ** 2) < 0.01 * np.sum(x**2)
    assert set(after) == {"residual", "codec.0.left"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RandomPrune(1.0), r"codec.share .* at most 0.999, got 1.0"),
        (lambda: RandomPrune(1.1, corrected=False), r"codec.share .* at most 1, got 1.1"),
        (lambda: RandomPrune(-0.1), r"codec.share .* at least 0 .* got -0.1"),
        (lambda: RandomPrune(alpha=2), r"codec.alpha .* at most 1, got 2"),
        (
            lambda: RandomPrune(structure="filter"),
            r"codec.structure must be one of weight, kernel, got 'filter'",
        ),
        (lambda: RandomPrune(corrected="yes"), r"codec.corrected must be true or false, got 'yes'"),  # type: ignore[arg-type]
        (lambda: FixedPoint(1), r"codec.levels .* from 2 to 65536, got 1"),
        (lambda: FixedPoint(beta=1.0), r"codec.beta .* below 1, got 1.0"),
        (lambda: FixedPoint(corrected=1), r"codec.corrected must be true or false, got 1"),  # type: ignore[arg-type]
        (lambda: rules("filter"), r"codec.structure must be one of none, weight, kernel, got 'filter'"),
        (
            lambda: rules(feedback=True),
            r"codec.feedback must be false where codec.corrected is true",
        ),
        (lambda: rules(feedback="no"), r"codec.feedback .* got 'no'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_named_with_their_bound(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_levels_are_entropy_coded() -> None:
    packet, _ = rules(levels=7).encode(gaussian(), CONVOLUTIONS, {}, np.random.default_rng(0))
    reader = Reader(packet.header)
    reader.take(reader.varint(9))
    coder = Packet(packet.body, reader.take(reader.varint(99)))
    assert np.abs(Ans().decode(coder, CONVOLUTIONS)).max() == 7
    assert len(packet.body) < SIZE * 3 / 8
