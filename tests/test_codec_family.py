"""The family of codecs against the numbers of its papers."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from omegaconf import OmegaConf
from scipy.stats import norm

from fedapp import config
from fedapp.codec import Codec, Layout, Packet, Slot, State, lloyd_max, seed
from fedapp.codec.bits import pack_bits, unpack_bits
from fedapp.codec.chain import ErrorFeedback, staged
from fedapp.codec.entropy import Ans
from fedapp.codec.huffman import Huffman, code_lengths
from fedapp.codec.lowrank import LowRank
from fedapp.codec.prune import RandomMask, TopK, largest
from fedapp.codec.public_step import PublicStep
from fedapp.codec.quantize import DeadZone
from fedapp.codec.rotate import Eden, hadamard, rotated
from fedapp.codec.sign import Sign
from fedapp.codec.ternary import Ternary
from fedapp.codec.uniform import Dither, Stochastic, Uniform
from fedapp.codec.zstd import Zstd
from fedapp.errors import DecodeError

FAMILY = ("randommask", "stc", "qsgd", "dither", "sign", "binary", "perchannel", "eden", "powersgd")
BIASED = ("stc", "sign", "binary", "perchannel", "powersgd")
CODERS = (Ans(), Huffman(), Zstd())
every_coder = pytest.mark.parametrize("coder", CODERS, ids=["ans", "huffman", "zstd"])


def one_layer(size: int) -> Layout:
    return Layout((Slot("x", (size,), 0),), size)


def of_matrices(*shapes: tuple[int, ...]) -> Layout:
    return Layout.of((f"layer{index}", shape) for index, shape in enumerate(shapes))


def gaussian(size: int, start: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(start).standard_normal(size).astype(np.float32)


def decoded(
    codec: Codec, x: NDArray[np.float32], layout: Layout | None = None, start: int = 0
) -> NDArray[np.float64]:
    layout = layout or one_layer(len(x))
    packet, _ = codec.encode(x, layout, {}, np.random.default_rng(start))
    back: NDArray[np.float64] = codec.decode(packet, layout).astype(np.float64)
    return back


def nmse(codec: Codec, x: NDArray[np.float32], layout: Layout | None = None, start: int = 0) -> float:
    """Squared error over squared norm."""
    error = decoded(codec, x, layout, start) - x
    return float(np.sum(error**2) / np.sum(x.astype(np.float64) ** 2))


def length(codec: Codec, x: NDArray[np.float32]) -> int:
    packet, _ = codec.encode(x, one_layer(len(x)), {}, np.random.default_rng(0))
    return packet.body.nbytes + len(packet.header)


# Shared randomness


def test_a_seed_draws_the_same_for_ever() -> None:
    shared = b"\1\2\3\4"
    assert seed.words(shared, 2).tolist() == [6185388659387029186, 8033540457904901595]
    assert seed.centred(shared, 3).tolist() == [
        0.31442776322364807,
        -0.16468939185142517,
        0.13340076804161072,
    ]
    assert seed.signs(shared, 8).tolist() == [-1, -1, 1, 1, 1, 1, -1, 1]
    assert np.flatnonzero(seed.places(shared, 20, 5)).tolist() == [0, 3, 5, 12, 14]


def test_shared_draws_are_uniform() -> None:
    dither = seed.centred(b"abcd", 100_000)
    assert np.abs(dither).max() < 0.5
    assert dither.mean() == pytest.approx(0, abs=0.004)
    assert dither.var() == pytest.approx(1 / 12, rel=0.02)
    assert seed.signs(b"abcd", 100_000).mean() == pytest.approx(0, abs=0.015)


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (10, 3), (10, 10), (1000, 100)])
def test_a_mask_keeps_exactly_so_many_anywhere(count: int, kept: int) -> None:
    masks = np.stack([seed.places(i.to_bytes(4, "little"), count, kept) for i in range(2000)])
    assert (masks.sum(axis=1) == kept).all()
    if count:
        share = masks.mean(axis=0)
        assert np.abs(share - kept / count).max() <= 5 * np.sqrt(kept / count * (1 - kept / count) / 2000)


# Random mask, top-k, ternary


def test_a_random_mask_sends_no_indices() -> None:
    assert length(RandomMask(0.1), gaussian(1000)) == 4 + 4 * 100


def test_the_error_of_a_random_mask_is_that_of_sampling() -> None:
    x = gaussian(5000)
    errors = [nmse(RandomMask(0.1), x, start=start) for start in range(60)]
    assert np.mean(errors) == pytest.approx(1 / 0.1 - 1, rel=0.02)
    unscaled = [nmse(RandomMask(0.1, unbiased=False), x, start=start) for start in range(60)]
    assert np.mean(unscaled) == pytest.approx(1 - 0.1, rel=0.02)


@settings(deadline=None, max_examples=200)
@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=16)), st.floats(0.01, 1))
def test_the_largest_are_those_of_a_stable_sort(x: NDArray[np.float32], fraction: float) -> None:
    keep = min(len(x), max(1, round(fraction * len(x))))
    expected = np.sort(np.argsort(-np.abs(x), kind="stable")[:keep])
    assert np.flatnonzero(largest(x, fraction)).tolist() == expected.tolist()


def test_ternary_sends_the_mean_magnitude_of_what_it_keeps() -> None:
    x = np.array([0.1, -4, 2, 0, -0.2, 0.3, 3, -0.1], np.float32)
    assert decoded(Ternary(0.375), x).tolist() == [0, -3, 3, 0, 0, 0, 3, 0]
    one = np.array([0, 0, 5, 0], np.float32)
    assert decoded(Ternary(1.0), one).tolist() == one.tolist()  # zeros do not lower the magnitude


def test_ternary_codes_its_places_below_the_golomb_code_of_its_paper() -> None:
    x = gaussian(1_000_000)
    low = 1 + int(np.log2(np.log((np.sqrt(5) - 1) / 2) / np.log(0.99)))  # the best Golomb parameter is 2**low
    place = low + 1 / (1 - 0.99 ** (2**low))  # bits on average, the distance to the place before
    assert place == pytest.approx(8.108, abs=1e-3)
    assert 8 * length(staged(Ternary(0.01), entropy="ans"), x) < (place + 1) * 10_000


# Sign and binary


def test_the_error_of_scaled_signs_is_that_of_the_paper() -> None:
    x = gaussian(10_000)
    exact = 1 - np.abs(x).sum(dtype=np.float64) ** 2 / (len(x) * np.sum(x.astype(np.float64) ** 2))
    assert nmse(Sign(), x) == pytest.approx(exact, rel=1e-6)
    assert exact == pytest.approx(1 - 2 / np.pi, rel=0.03)
    assert length(Sign(), x) == 10_000 / 8 + 4


def test_layers_and_channels_have_scales_of_their_own() -> None:
    layout = of_matrices((2, 3), (2,), (), (1, 2, 1, 2))
    x = np.array([1, -1, 1, 4, 4, -4, 5, -7, -0.5, 1, 2, 3, -2], np.float32)
    by_layer = [2.5, -2.5, 2.5, 2.5, 2.5, -2.5, 6, -6, -0.5, 2, 2, 2, -2]
    by_channel = [1, -1, 1, 4, 4, -4, 6, -6, -0.5, 2, 2, 2, -2]
    assert decoded(Sign("layer"), x, layout).tolist() == by_layer
    assert decoded(Sign("channel"), x, layout).tolist() == by_channel
    assert len(Sign("channel").encode(x, layout, {}, np.random.default_rng(0))[0].header) == 4 * 5


@pytest.mark.parametrize("codec", [Sign(), Uniform(), LowRank()])
def test_a_stage_that_needs_layers_comes_first(codec: Codec) -> None:
    with pytest.raises(TypeError, match="put it first"):
        codec.encode(gaussian(5), one_layer(6), {}, np.random.default_rng(0))


# Uniform, stochastic, dithered


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("scale", ["layer", "channel"])
def test_uniform_levels_err_by_half_a_step(bits: int, scale: str) -> None:
    layout = of_matrices((8, 25), (40,), (4, 3, 3))
    x = gaussian(layout.size) * np.repeat([1, 100, 0.01], [200, 40, 36]).astype(np.float32)
    lengths = [*[25] * 8, 40, *[9] * 4] if scale == "channel" else [200, 40, 36]
    most = [np.abs(part).max() for part in np.split(x, np.cumsum(lengths)[:-1])]
    step = np.repeat(most, lengths) / (2 ** (bits - 1) - 1)
    assert (np.abs(decoded(Uniform(bits, scale), x, layout) - x) <= 0.5 * step * (1 + 1e-5)).all()


def test_uniform_levels_are_kept() -> None:
    levels = np.array([7, -7, 3, 0, 1, -2], np.float32)
    assert decoded(Uniform(4), 0.25 * levels).tolist() == (0.25 * levels).tolist()


@pytest.mark.parametrize(("levels", "bucket"), [(1, 64), (4, 256), (16, 1024), (64, 512)])
def test_stochastic_rounding_keeps_the_bound_of_qsgd(levels: int, bucket: int) -> None:
    x = gaussian(8192)
    bound = min(bucket / levels**2, np.sqrt(bucket) / levels)
    assert np.mean([nmse(Stochastic(levels, bucket), x, start=start) for start in range(10)]) <= bound


def test_stochastic_rounding_keeps_what_lies_on_a_level() -> None:
    x = np.array([3, 0, -4, 0], np.float32)  # of norm 5
    for start in range(20):
        assert decoded(Stochastic(5, 4), x, start=start).tolist() == x.tolist()


def test_stochastic_rounding_has_the_variance_of_a_coin() -> None:
    x = np.array([1, 0.8], np.float32)
    length = float(np.linalg.norm(x))
    draws = np.stack([decoded(Stochastic(1, 2), x, start=start) for start in range(4000)])
    assert draws.mean(axis=0) == pytest.approx(x, abs=5 * length * 0.5 / np.sqrt(4000))
    assert draws.var(axis=0) == pytest.approx(x * (length - x), rel=0.15)


def dither_variance_is(x: NDArray[np.float32], step: float, share: float) -> bool:
    """Whether the error of a dither of this step looks like `share` * step^2, within 5 standard errors."""
    width = step * np.sqrt(np.mean(x.astype(np.float64) ** 2))
    square = np.mean((decoded(Dither(step), x) - x) ** 2) / width**2
    return bool(abs(square - share) < 5 * np.sqrt(1 / 180 / len(x)))  # of the square of a uniform error


@pytest.mark.parametrize("step", [0.1, 1.0, 4.0, 20.0])
def test_the_error_of_a_dither_is_a_twelfth_of_its_step_squared(step: float) -> None:
    vectors = gaussian(30_000), np.full(30_000, 0.37, np.float32), np.eye(1, 30_000, dtype=np.float32)[0]
    for x in vectors:
        assert dither_variance_is(x, step, 1 / 12)
        assert not dither_variance_is(x, step, 2 / 3 / 12)
        assert not dither_variance_is(x, step, 3 / 2 / 12)
        error = decoded(Dither(step), x) - x
        if np.ptp(x):
            assert np.abs(np.corrcoef(error, x)[0, 1]) < 0.03


# EDEN


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_points_are_the_means_of_their_cells(bits: int) -> None:
    points, edges = lloyd_max.points(bits), np.concatenate([[-np.inf], lloyd_max.edges(bits), [np.inf]])
    assert len(points) == 2**bits
    assert (np.diff(points) > 0).all()
    means = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
    assert points == pytest.approx(means, abs=2e-8)


@pytest.mark.parametrize(
    ("bits", "unbiased", "biased"),
    [(1, 0.5708, 0.3634), (2, 0.1331, 0.1175), (3, 0.03578, 0.03454), (4, 0.00959, 0.00950)],
)
def test_the_error_of_eden_is_that_of_its_paper(bits: int, unbiased: float, biased: float) -> None:
    x = gaussian(32 * 4096)
    assert nmse(Eden(bits), x) == pytest.approx(unbiased, rel=0.02)
    assert nmse(Eden(bits, unbiased=False), x) == pytest.approx(biased, rel=0.02)
    assert length(Eden(bits), x) == 32 * 4096 * bits / 8 + 3 + 4 + 4 * 32


def test_eden_makes_heavy_tails_gaussian() -> None:
    x = np.random.default_rng(0).standard_t(2, 16 * 4096).astype(np.float32)
    assert nmse(Eden(2), x) == pytest.approx(0.1331, rel=0.05)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 4095, 4096, 4097, 5000, 9000])
def test_the_last_block_of_eden_is_a_power_of_two(size: int) -> None:
    x = gaussian(size)
    assert nmse(Eden(8), x) < 1e-3
    last = size % 4096
    codes = size - last + (2 ** int(np.ceil(np.log2(last))) if last else 0)
    packet, _ = Eden(8).encode(x, one_layer(size), {}, np.random.default_rng(0))
    assert len(packet.body) == codes


# Public steps


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packets_of_a_public_step_have_one_size_whatever_is_in_them(bits: int) -> None:
    codec = PublicStep(bits)
    vectors = np.zeros(5000), np.full(5000, 1e30), np.eye(5000)[7], gaussian(5000), 1e-30 * gaussian(5000)
    assert {length(codec, x.astype(np.float32)) for x in vectors} == {4 + -(-5000 * bits // 8)}


@pytest.mark.parametrize(("share", "squared"), [(1.0, 0.06), (0.1, 0.038), (0.0, 0.0)])
def test_a_public_step_is_the_same_for_any_vector(share: float, squared: float) -> None:
    """Fractions f of a step err by f (1 - f) squared steps in the mean: a sixth, or less of short vectors."""
    x = gaussian(20_000)
    x *= np.float32(3 * share / np.linalg.norm(x))
    steps = PublicStep(4, 0.6, norm=3.0)
    packet, _ = steps.encode(x, one_layer(len(x)), {}, np.random.default_rng(0))
    levels = rotated(decoded(steps, x), packet.header) / (0.6 * 3 / np.sqrt(len(x)))
    assert levels == pytest.approx(np.rint(levels), abs=1e-3)
    error = float(np.sum((decoded(steps, x) - x) ** 2)) / 9
    assert error == pytest.approx(squared, rel=0.05)


def test_a_public_step_is_fine_enough_for_an_update_of_one_value() -> None:
    x = np.eye(26_146, dtype=np.float32)[5]
    means = np.mean([decoded(PublicStep(), x, start=start) for start in range(40)], axis=0)
    assert means[5] == pytest.approx(1, abs=0.02)
    assert np.abs(np.delete(means, 5)).max() < 0.01


def test_codes_that_stand_for_no_level_are_refused() -> None:
    layout = one_layer(8)
    good, _ = PublicStep(2).encode(gaussian(8), layout, {}, np.random.default_rng(0))
    for bad in (replace(good, header=b"abc"), replace(good, body=np.full(2, 255, np.uint8)),
                replace(good, body=good.body[:1])):  # fmt: skip
        with pytest.raises(DecodeError, match="packet"):
            PublicStep(2).decode(bad, layout)


def test_the_hadamard_transform_is_its_own_inverse() -> None:
    x = gaussian(4096 + 8).astype(np.float64)
    turned = x.copy()
    hadamard(turned)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(x))
    assert turned[4096] == pytest.approx(x[4096:].sum() / np.sqrt(8))
    hadamard(turned)
    assert turned == pytest.approx(x)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_packed_codes_come_back(bits: int, count: int, start: int) -> None:
    codes = np.random.default_rng(start).integers(0, 2**bits, count, dtype=np.uint8)
    data = pack_bits(codes, bits)
    assert len(data) == (count * bits + 7) // 8
    assert unpack_bits(data, count, bits).tolist() == codes.tolist()
    with pytest.raises(DecodeError):
        unpack_bits(np.append(data, np.uint8(0)), count, bits)


def test_bits_behind_the_last_code_are_refused() -> None:
    with pytest.raises(DecodeError, match="behind its last code"):
        unpack_bits(np.array([0b10100001], np.uint8), 3, 2)


# Low rank


def test_a_matrix_of_low_rank_is_kept() -> None:
    rng = np.random.default_rng(0)
    layout = of_matrices((30, 5, 2, 2), (30,))
    matrix = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 20))
    x = np.concatenate([matrix.ravel(), rng.standard_normal(30)]).astype(np.float32)
    assert nmse(LowRank(2), x, layout) < 1e-12
    packet, _ = LowRank(2).encode(x, layout, {}, rng)
    assert len(packet.body) == 2 * (30 + 20) + 30
    assert nmse(LowRank(1), x, layout) > 0.01


def test_a_warm_start_finds_the_best_factors() -> None:
    layout = of_matrices((40, 60))
    x = gaussian(2400)
    values = np.linalg.svd(x.reshape(40, 60).astype(np.float64), compute_uv=False)
    best = 1 - np.sum(values[:3] ** 2) / np.sum(values**2)
    codec, errors = LowRank(3), []
    state: State = {}
    for _ in range(60):
        packet, state = codec.encode(x, layout, state, np.random.default_rng(0))
        error = codec.decode(packet, layout).astype(np.float64) - x
        errors.append(np.sum(error**2) / np.sum(x.astype(np.float64) ** 2))
    assert errors[0] > errors[5] > errors[-1] >= best - 1e-6
    assert errors[-1] == pytest.approx(best, rel=0.005)


def test_a_zero_update_does_not_freeze_the_factors() -> None:
    layout = of_matrices((40, 60))
    codec, rng = LowRank(3), np.random.default_rng(0)
    _, state = codec.encode(np.zeros(2400, np.float32), layout, {}, rng)
    packet, _ = codec.encode(gaussian(2400), layout, state, rng)
    assert codec.decode(packet, layout).any()


# Entropy coders


LEVELS: dict[str, Callable[[np.random.Generator, int], NDArray[Any]]] = {
    "laplace": lambda rng, size: np.rint(rng.laplace(0, 2, size)),
    "sparse": lambda rng, size: (rng.random(size) < 0.02) * rng.integers(-3, 4, size),
    "outliers": lambda rng, size: np.rint(rng.standard_cauchy(size) * 5),
    "constant": lambda rng, size: np.full(size, -3),
    "wide": lambda rng, size: rng.integers(-(2**30), 2**30, size),
    "two": lambda rng, size: rng.integers(0, 2, size),
}


@every_coder
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 5000, 20_001])
def test_levels_come_back(coder: Codec, kind: str, size: int) -> None:
    level = np.clip(LEVELS[kind](np.random.default_rng(size), size), -(2**30), 2**30).astype(np.int32)
    packet, _ = coder.encode(level, one_layer(size), {}, np.random.default_rng(0))
    back = coder.decode(packet, one_layer(size))
    assert back.dtype == np.int32
    assert np.array_equal(back, level)
    with pytest.raises(DecodeError):
        coder.decode(packet, one_layer(size - 1))


@every_coder
@settings(deadline=None, max_examples=60)
@given(arrays(np.int32, st.integers(0, 80), elements=st.integers(-(2**30), 2**30) | st.integers(-2, 2)))
def test_any_levels_come_back(coder: Codec, level: NDArray[np.int32]) -> None:
    packet, _ = coder.encode(level, one_layer(len(level)), {}, np.random.default_rng(0))
    assert np.array_equal(coder.decode(packet, one_layer(len(level))), level)


@every_coder
def test_a_coder_wants_levels(coder: Codec) -> None:
    with pytest.raises(TypeError, match="put a quantizer before it"):
        coder.encode(gaussian(10), one_layer(10), {}, np.random.default_rng(0))


def test_code_lengths_are_those_of_huffman() -> None:
    assert code_lengths(np.array([5, 9, 12, 13, 16, 45])).tolist() == [4, 4, 3, 3, 3, 1]
    assert code_lengths(np.array([0, 7, 0])).tolist() == [0, 1, 0]
    assert code_lengths(np.array([0, 0])).tolist() == [0, 0]
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    limited = code_lengths(np.array(fibonacci))
    assert limited.max() == 15
    assert np.sum(0.5**limited) == 1


@pytest.mark.parametrize("scale", [0.5, 2.0, 20.0])
def test_huffman_is_near_the_entropy_above_two_bits(scale: float) -> None:
    level = np.rint(np.random.default_rng(0).laplace(0, scale, 50_000)).astype(np.int32)
    packet, _ = Huffman().encode(level, one_layer(len(level)), {}, np.random.default_rng(0))
    _, counts = np.unique(level, return_counts=True)
    entropy = -np.sum(counts * np.log2(counts / len(level)))
    bits = 8 * len(packet.body)
    assert entropy <= bits <= (1.02 if scale >= 2 else 1.08) * entropy
    assert len(packet.header) < 2 * 49 + 270


def test_a_frame_that_claims_too_much_is_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(10**7))
    with pytest.raises(DecodeError, match="claims 10000000 bytes for 20 levels"):
        Zstd().decode(Packet(np.frombuffer(bomb, np.uint8)), one_layer(20))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10**7))
    with pytest.raises(DecodeError):
        Zstd().decode(Packet(np.frombuffer(streamed, np.uint8)), one_layer(20))


# Settings, and other processes


@pytest.mark.parametrize("name", FAMILY)
def test_each_has_a_yaml_that_codes_an_update(name: str) -> None:
    path = config.CONF / "codec" / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    codec = config.build(OmegaConf.to_container(OmegaConf.load(path)), "codec")
    layout = of_matrices((16, 6, 5, 5), (16,), (84, 120), (84,), ())
    x = gaussian(layout.size)
    packet, _ = codec.encode(x, layout, {}, np.random.default_rng(0))
    assert codec.decode(packet, layout).shape == x.shape
    assert packet.body.nbytes + len(packet.header) < x.nbytes / 4
    assert isinstance(codec, ErrorFeedback) == (name in BIASED)


@pytest.mark.parametrize("entropy", ["ans", "huffman", "zstd"])
def test_the_entropy_coder_is_chosen_by_name(entropy: str) -> None:
    chosen = config.job(config.compose(f"codec=perchannel codec.entropy={entropy} codec.stage.bits=3")).codec
    assert chosen == staged(Uniform(3), entropy=entropy, feedback=True)


DIGEST = """
import sys
sys.path.insert(0, sys.argv[1])
import test_codec_family
print(test_codec_family.digest())
"""


def digest() -> str:
    """Of what every codec of the family makes of one vector at the other end."""
    layout, total = of_matrices((16, 6, 5, 5), (16,), (84, 120), (84,)), hashlib.sha256()
    x = gaussian(layout.size)
    for codec in (RandomMask(), Ternary(), Sign(), Uniform(), Stochastic(), Dither(), Eden(3), LowRank(),
                  TopK(), staged(DeadZone(), entropy="huffman")):  # fmt: skip
        packet, _ = codec.encode(x, layout, {}, np.random.default_rng(0))
        total.update(codec.decode(packet, layout).tobytes())
    return total.hexdigest()


def test_another_process_with_other_threads_decodes_the_same() -> None:
    run = subprocess.run(
        [sys.executable, "-c", DIGEST, str(Path(__file__).parent)],
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == digest()
