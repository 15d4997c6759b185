"""Laws that every codec keeps, over one table: a new codec joins with one row of `CODECS`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout, Packet, Slot, State
from fedapp.codec.chain import Chain, ErrorFeedback, Identity, pipeline, staged
from fedapp.codec.entropy import Ans, decode_symbols
from fedapp.codec.founding import FixedPoint, RandomPrune, rules
from fedapp.codec.huffman import Huffman
from fedapp.codec.lowrank import LowRank
from fedapp.codec.packet import decode_update, pack, unpack
from fedapp.codec.per_layer import PerLayer
from fedapp.codec.prune import RandomMask, TopK
from fedapp.codec.public_step import PublicStep
from fedapp.codec.quantize import DeadZone
from fedapp.codec.rate_distortion import RateDistortion, default  # noqa: F401  (by name in eval)
from fedapp.codec.rotate import Eden
from fedapp.codec.sign import Sign
from fedapp.codec.ternary import Ternary
from fedapp.codec.uniform import Dither, Stochastic, Uniform
from fedapp.codec.varint import Reader, varint
from fedapp.codec.zstd import Zstd
from fedapp.errors import ConfigError, DecodeError

CODECS: dict[str, Codec] = {
    "identity": Identity(),
    "chain_of_identities": Chain((Identity(), Identity())),
    "dead_zone": Chain((DeadZone(1.0, 0.38),)),
    "dead_zone_plain": Chain((DeadZone(0.01, 0.5),)),
    "dead_zone_ans": Chain((DeadZone(1.0, 0.38), Ans())),
    "top_k": TopK(0.1),
    "top_k_all": TopK(1.0),
    "top_k_dead_zone_ans": Chain((TopK(0.1), DeadZone(0.5, 0.5), Ans())),
    "default": default(),
    "default_step": default(step=0.5),
    "default_error": default(nmse=0.02),
    "default_low_rate": default(rate=0.1),
    "default_feedback": default(feedback=True),
    "trellis": default(trellis=True),
    "trellis_step": default(step=0.5, trellis=True),
    "trellis_error": default(nmse=0.02, trellis=True),
    "trellis_low_rate": default(rate=0.1, trellis=True),
    "trellis_feedback": default(feedback=True, trellis=True),
    "pipeline": pipeline(),
    "pipeline_feedback": pipeline(feedback=True),
    "pipeline_top_k": pipeline(keep=0.1, step=0.5, offset=0.5, feedback=True),
    "prune": RandomPrune(0.5),
    "prune_written": RandomPrune(0.9, 0.5, corrected=False),
    "prune_kernels": RandomPrune(0.5, structure="kernel"),
    "prune_kernels_written": RandomPrune(0.9, 0.5, "kernel", corrected=False),
    "prune_quantize": rules("weight", share=0.3, beta=0.1),
    "prune_quantize_written_feedback": rules("weight", beta=0.1, corrected=False, feedback=True),
    "fixed_point": FixedPoint(15),
    "fixed_point_drop": FixedPoint(15, 0.2),
    "fixed_point_written": FixedPoint(15, 0.2, corrected=False),
    "fixed_point_ans": rules(beta=0.5),
    "per_layer": PerLayer((("rest", Chain((DeadZone(1.0, 0.38), Ans()))),), RandomPrune(structure="kernel")),
    "per_layer_lossless": PerLayer((("r*", Identity()),), TopK(1.0)),
    "per_layer_feedback": PerLayer((("*", ErrorFeedback(TopK(0.25))),), Identity()),
    "feedback_per_layer": ErrorFeedback(PerLayer((("rest", TopK(0.25)),), DeadZone(1.0, 0.5))),
    "feedback_identity": ErrorFeedback(Identity()),
    "feedback_top_k": ErrorFeedback(TopK(0.25)),
    "feedback_of_feedback": ErrorFeedback(Chain((ErrorFeedback(TopK(0.5)), DeadZone(1.0, 0.5), Ans()))),
    "dead_zone_huffman": Chain((DeadZone(1.0, 0.38), Huffman())),
    "dead_zone_zstd": Chain((DeadZone(1.0, 0.38), Zstd())),
    "random_mask": RandomMask(0.1),
    "random_mask_all": RandomMask(1.0),
    "random_mask_unscaled": RandomMask(0.1, unbiased=False),
    "random_mask_dither": staged(Dither(1.0), RandomMask(0.25), "ans"),
    "feedback_random_mask": staged(Dither(0.5), RandomMask(0.5, unbiased=False), feedback=True),
    "ternary": staged(Ternary(0.1), entropy="ans"),
    "feedback_ternary": staged(Ternary(0.1), entropy="zstd", feedback=True),
    "sign": Sign(),
    "sign_by_channel": Sign("channel"),
    "feedback_sign": staged(Sign(), feedback=True),
    "uniform": Uniform(3),
    "uniform_by_layer": staged(Uniform(8, "layer"), entropy="zstd"),
    "feedback_uniform": staged(Uniform(4), entropy="huffman", feedback=True),
    "stochastic": Stochastic(),
    "stochastic_of_one_level": Stochastic(1, 64),
    "dither": Dither(2.0),
    "dither_fine": Dither(0.01),
    "eden": Eden(1),
    "eden_of_four_bits": Eden(4),
    "eden_biased": Eden(2, unbiased=False),
    "feedback_eden": staged(Eden(1, unbiased=False), feedback=True),
    "public_step": PublicStep(),
    "public_step_fine": PublicStep(8, 0.05, norm=2000.0),
    "low_rank": LowRank(2),
    "feedback_low_rank": staged(LowRank(2), feedback=True),
}
START: State = {}
LOSSLESS = ("identity", "chain_of_identities", "top_k_all", "feedback_identity", "random_mask_all",
            "per_layer_lossless")  # fmt: skip
FEEDBACK = ("default_feedback", "trellis_feedback", "pipeline_feedback", "pipeline_top_k", "feedback_top_k",
            "feedback_random_mask", "feedback_ternary", "feedback_sign", "feedback_uniform", "feedback_eden",
            "feedback_low_rank", "prune_quantize_written_feedback", "feedback_per_layer")  # fmt: skip
LOSSY = ("default", "default_low_rate", "trellis", "trellis_low_rate", "dead_zone", "dead_zone_ans",
         "top_k", "top_k_dead_zone_ans", "pipeline", "dead_zone_huffman", "dead_zone_zstd",
         "random_mask_unscaled", "ternary", "sign", "eden_biased", "uniform", "prune", "prune_quantize",
         "fixed_point_drop", "per_layer")  # fmt: skip
UNBIASED = ("identity", "random_mask", "random_mask_dither", "stochastic", "stochastic_of_one_level",
            "dither", "dither_fine", "eden", "eden_of_four_bits", "prune", "prune_kernels", "prune_quantize",
            "fixed_point", "fixed_point_drop", "fixed_point_ans", "public_step_fine")  # fmt: skip
BIASED = ("default_low_rate", "dead_zone", "top_k", "random_mask_unscaled", "ternary", "sign", "uniform",
          "eden_biased", "prune_written", "prune_kernels_written", "fixed_point_written")  # fmt: skip
CONTRACTION: dict[str, Callable[[int], float]] = {  # the delta of a vector of n values
    "default": lambda n: 0.0,
    "default_low_rate": lambda n: 0.0,
    "trellis": lambda n: 0.0,
    "trellis_low_rate": lambda n: 0.0,
    "top_k": lambda n: 0.1,
    "ternary": lambda n: 1 / n,
    "sign": lambda n: 1 / n,
    "sign_by_channel": lambda n: 1 / n,
    "random_mask_unscaled": lambda n: 0.0,
    "eden_biased": lambda n: 0.8,
    "uniform": lambda n: 0.0,
    "low_rank": lambda n: 0.0,
    "prune_written": lambda n: 0.0,
    "prune_kernels_written": lambda n: 0.0,
    "fixed_point_written": lambda n: 0.0,
}

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def layout_for(size: int) -> Layout:
    """A layout with a matrix, a 0-d array, kernels and the rest, as far as there is room for them."""
    slots, offset = [], 0
    kernels = size // 200, 4, 5, 5
    rest = (max(0, size - 7 - size // 200 * 100),)
    for name, shape in (("matrix", (2, 3)), ("scalar", ()), ("kernels", kernels), ("rest", rest)):
        count = int(np.prod(shape, dtype=np.int64))
        if offset + count <= size:
            slots.append(Slot(name, shape, offset))
            offset += count
    if offset < size:
        slots.append(Slot("few", (size - offset,), offset))
    return Layout(tuple(slots), size)


def gaussian(size: int = 4000, scale: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def heavy_tailed(size: int = 20_000) -> NDArray[np.float32]:
    x = np.random.default_rng(1).standard_t(2, size).astype(np.float32)
    x[7] = 600 * np.abs(x).mean()
    kurtosis = np.mean((x - x.mean()) ** 4) / np.var(x) ** 2
    assert kurtosis > 1000
    return x


def with_outlier(size: int = 4000) -> NDArray[np.float32]:
    x = gaussian(size)
    x[size // 2] = -1e6
    return x


VECTORS: dict[str, Callable[[], NDArray[np.float32]]] = {
    "empty": lambda: np.zeros(0, np.float32),
    "one": lambda: np.array([0.3], np.float32),
    "one_negative": lambda: np.array([-7e-9], np.float32),
    "one_zero": lambda: np.zeros(1, np.float32),
    "zeros": lambda: np.zeros(500, np.float32),
    "constant": lambda: np.full(500, -0.25, np.float32),
    "two_values": lambda: np.tile(np.array([-1, 1], np.float32), 300),
    "one_of_many": lambda: np.eye(1, 3000, 1234, dtype=np.float32)[0],
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "outlier_of_1e6_rms": with_outlier,
    "huge": lambda: gaussian(scale=1e30),
    "tiny": lambda: gaussian(scale=1e-30),
    "subnormal": lambda: gaussian(scale=1e-42),
    "largest": lambda: np.full(300, np.finfo(np.float32).max / 2, np.float32),
}
every_vector = pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS.keys())


def fresh(seed: int = 5) -> np.random.Generator:
    return np.random.default_rng(seed)


def through(
    codec: Codec, x: NDArray[np.float32], state: State, seed: int = 5
) -> tuple[NDArray[np.float32], State, int]:
    """Encode, pack, unpack, decode: the vector on the server, the next state, bytes on the wire."""
    layout = layout_for(len(x))
    packet, state = codec.encode(x, layout, state, fresh(seed))
    data = pack(packet, codec, layout)
    return decode_update(data, codec, layout), state, len(data)


# Laws of every codec


@every_vector
@every_codec
def test_round_trip_gives_a_finite_vector_of_the_same_shape(
    codec: Codec, make: Callable[[], NDArray[np.float32]]
) -> None:
    x = make()
    decoded, state, _ = through(codec, x, {})
    assert decoded.shape == x.shape
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    assert np.isfinite(np.concatenate([np.zeros(1), *state.values()])).all()


@every_vector
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_codecs_lose_nothing(name: str, make: Callable[[], NDArray[np.float32]]) -> None:
    x = make()
    assert np.array_equal(through(CODECS[name], x, {})[0], x)


@every_codec
def test_encode_leaves_its_arguments_alone(codec: Codec) -> None:
    x, state = gaussian(), codec.encode(gaussian(), layout_for(4000), {}, fresh())[1]
    before, kept = x.copy(), {key: value.copy() for key, value in state.items()}
    x.flags.writeable = False
    for value in state.values():
        value.flags.writeable = False
    codec.encode(x, layout_for(4000), state, fresh())
    assert np.array_equal(x, before)
    assert all(np.array_equal(state[key], kept[key]) for key in kept)
    assert state.keys() == kept.keys()


@every_codec
def test_same_input_state_and_randomness_give_the_same_bytes(codec: Codec) -> None:
    layout = layout_for(4000)
    state = codec.encode(gaussian(seed=1), layout, {}, fresh())[1]
    first, again = (codec.encode(gaussian(), layout, state, fresh()) for _ in range(2))
    assert pack(first[0], codec, layout) == pack(again[0], codec, layout)
    assert first[1].keys() == again[1].keys()
    assert all(np.array_equal(first[1][key], again[1][key]) for key in first[1])


@every_codec
def test_decoding_needs_no_memory_of_the_client(codec: Codec) -> None:
    layout, state = layout_for(4000), START
    for seed in range(3):
        packet, state = codec.encode(gaussian(seed=seed), layout, state, fresh())
    data = pack(packet, codec, layout)
    again = decode_update(data, codec, layout)
    assert np.array_equal(codec.decode(unpack(data, codec, layout), layout), again)
    assert np.array_equal(codec.decode(packet, layout), again)


@every_codec
def test_a_codec_prints_and_compares_by_its_settings(codec: Codec) -> None:
    assert eval(repr(codec), globals()) == codec
    assert hash(codec) == hash(eval(repr(codec), globals()))


@every_codec
def test_decoding_does_not_write_into_received_bytes(codec: Codec) -> None:
    layout = layout_for(4000)
    data = pack(codec.encode(gaussian(), layout, {}, fresh())[0], codec, layout)
    copy = bytes(bytearray(data))
    decode_update(data, codec, layout)
    assert data == copy


@settings(deadline=None, max_examples=40)
@given(
    x=arrays(np.float32, st.integers(0, 60), elements=st.floats(-(2.0**120), 2.0**120, width=32)),
    name=st.sampled_from(sorted(CODECS)),
)
def test_any_float32_vector_survives_two_rounds(x: NDArray[np.float32], name: str) -> None:
    codec, state = CODECS[name], START
    for _ in range(2):
        decoded, state, _ = through(codec, x, state)
        assert decoded.shape == x.shape
        assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", [name for name in CODECS if "identit" not in name])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_update_is_not_encoded(name: str, bad: float) -> None:
    x = gaussian()
    x[6] = bad
    with pytest.raises(ValueError, match="in scalar; training diverged"):
        CODECS[name].encode(x, layout_for(4000), {}, fresh())


# Bias and contraction


def bias(codec: Codec, x: NDArray[np.float32], rounds: int = 300) -> float:
    """How many standard errors the mean of many decoded vectors is off, along the worst of some directions.

    Shrinking shows along x and its signs, pruning along its smaller half, anything else along random ones.
    """
    small = np.where(np.abs(x) <= np.median(np.abs(x)), x, 0)
    directions = np.stack([x, np.sign(x), small, *np.random.default_rng(7).standard_normal((20, len(x)))])
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    layout = layout_for(len(x))
    along = np.empty((rounds, len(directions)))
    for seed in range(rounds):
        decoded = codec.decode(codec.encode(x, layout, {}, fresh(seed))[0], layout)
        along[seed] = directions @ (decoded.astype(np.float64) - x)
    rounding = 1e-6 * np.linalg.norm(x.astype(np.float64))
    return float(np.max(np.abs(along.mean(axis=0)) / (along.std(axis=0) / np.sqrt(rounds) + rounding)))


SPREAD: dict[str, Callable[[], NDArray[np.float32]]] = {
    "gaussian": lambda: gaussian(),
    "heavy_tailed": lambda: heavy_tailed(4000),
    "skewed": lambda: np.random.default_rng(3).exponential(size=3000).astype(np.float32),
}


@pytest.mark.parametrize("vector", SPREAD)
@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_of_many_unbiased_packets_is_the_update(name: str, vector: str) -> None:
    assert bias(CODECS[name], SPREAD[vector]()) < 5


@pytest.mark.parametrize("vector", SPREAD)
@pytest.mark.parametrize("name", BIASED)
def test_the_mean_of_many_biased_packets_is_not(name: str, vector: str) -> None:
    assert bias(CODECS[name], SPREAD[vector](), 30) > 10


@every_vector
@pytest.mark.parametrize("name", CONTRACTION)
def test_a_contraction_never_errs_by_more_than_the_update(
    name: str, make: Callable[[], NDArray[np.float32]]
) -> None:
    x = make()
    decoded, _, _ = through(CODECS[name], x, {})
    error = np.sum((decoded.astype(np.float64) - x) ** 2)
    left = 1 - CONTRACTION[name](max(1, len(x)))
    assert error <= left * np.sum(x.astype(np.float64) ** 2) * (1 + 1e-6)


# Quantizing


@pytest.mark.parametrize("step", [0.01, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 0.2, 0.38, 0.5])
def test_quantizing_errs_by_less_than_its_cells(step: float, offset: float) -> None:
    for x in (gaussian(), heavy_tailed(), gaussian(scale=1e-30), gaussian(scale=1e30), with_outlier()):
        decoded = through(Chain((DeadZone(step, offset),)), x, {})[0].astype(np.float64)
        width = min(step * np.sqrt(np.mean(x.astype(np.float64) ** 2)), float(np.abs(x).max()))
        error = np.abs(decoded - x)
        rounding = 1e-6 * np.abs(x)
        zeros = decoded == 0
        assert (error[zeros] <= (1 - offset) * width * (1 + 1e-6)).all()  # the dead zone
        assert (
            error <= 1.0 * width * (1 + 1e-6) + rounding
        ).all()  # point and value share a cell of one step
        assert (np.sign(decoded[~zeros]) == np.sign(x[~zeros])).all()


def test_plain_rounding_errs_by_at_most_about_half_a_step() -> None:
    x = np.random.default_rng(2).uniform(-1, 1, 5000).astype(np.float32)
    error = np.abs(through(Chain((DeadZone(0.1, 0.5),)), x, {})[0] - x)
    width = 0.1 * np.sqrt(np.mean(x.astype(np.float64) ** 2))
    assert error.max() < 0.55 * width  # the points move by the mean of their cells, here next to nothing
    assert np.sqrt(np.mean(error**2)) == pytest.approx(width / np.sqrt(12), rel=0.03)


def test_the_points_of_the_decoder_are_the_means_of_their_cells() -> None:
    x = gaussian(50_000)
    packet, _ = DeadZone(2.0, 0.38).encode(x, layout_for(len(x)), {}, fresh())
    decoded = DeadZone(2.0, 0.38).decode(packet, layout_for(len(x)))
    width = 2 * np.sqrt(np.mean(x.astype(np.float64) ** 2))
    for cell in (np.abs(packet.body) == 1, np.abs(packet.body) > 1):
        assert np.abs(decoded[cell]).mean() == pytest.approx(np.abs(x[cell]).mean(), abs=width / 256)


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("step", [1.0, 2.0, 1e6])
def test_an_even_vector_is_not_pruned_away(size: int, step: float) -> None:
    x = np.full(size, -0.7, np.float32)
    assert np.array_equal(through(Chain((DeadZone(step, 0.0),)), x, {})[0], x)


def test_top_k_keeps_the_largest_and_breaks_ties_by_place() -> None:
    x = np.array([1, -3, 2, 0, -2, 2, 0.5, 1], np.float32)
    assert through(TopK(0.5), x, {})[0].tolist() == [0, -3, 2, 0, -2, 2, 0, 0]
    tied = np.ones(8, np.float32)
    assert through(TopK(0.25), tied, {})[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert np.count_nonzero(through(TopK(1e-9), gaussian(), {})[0]) == 1


# Error feedback


# A value 600 times the mean, sent at the common magnitude, takes some hundreds of rounds.
ONE_MAGNITUDE = (("feedback_sign", "heavy_tailed"), ("feedback_ternary", "heavy_tailed"))


@pytest.mark.parametrize("name", FEEDBACK)
@pytest.mark.parametrize("vector", ["gaussian", "heavy_tailed", "constant", "one", "tiny", "two_values"])
def test_error_feedback_sends_everything_in_the_long_run(name: str, vector: str) -> None:
    x, state, rounds = VECTORS[vector](), START, 60
    sent = np.zeros(len(x))
    for seed in range(rounds):
        decoded, state, _ = through(CODECS[name], x, state, seed)
        sent += decoded
    rounding = 1e-4 * np.abs(x.astype(np.float64)).max()
    assert np.allclose(sent + state["residual"], rounds * x.astype(np.float64), rtol=1e-4, atol=rounding)
    left = 0.95 if (name, vector) in ONE_MAGNITUDE else 0.2
    assert np.linalg.norm(sent / rounds - x) < left * np.linalg.norm(x.astype(np.float64))


@pytest.mark.parametrize("name", LOSSY)
def test_without_error_feedback_the_loss_stays(name: str) -> None:
    x = gaussian()
    decoded, state, _ = through(CODECS[name], x, {})
    assert not state.keys() - {"miss", "step"}
    assert np.linalg.norm(decoded - x) > 0.2 * np.linalg.norm(x)


def test_the_residual_stays_bounded() -> None:
    state: State = {}
    norms = []
    for seed in range(200):
        _, state, _ = through(pipeline(feedback=True), gaussian(seed=seed), state)
        norms.append(float(np.linalg.norm(state["residual"])))
    assert max(norms[100:]) < 1.5 * max(norms[:20])


@dataclass(frozen=True)
class Counting:
    """Counts its rounds, in steps of its own."""

    step: int

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        return Packet(x), {"count": state.get("count", np.zeros(1)) + self.step}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        return packet.body


def test_a_chain_keeps_the_states_of_its_stages_apart() -> None:
    codec = ErrorFeedback(Chain(tuple(Counting(step) for step in range(12))))
    state: State = {}
    for _ in range(3):
        _, state, _ = through(codec, gaussian(), state)
    assert {key: float(state[f"codec.{key}"][0]) for key in (f"{i}.count" for i in range(12))} == {
        f"{i}.count": 3.0 * i for i in range(12)
    }


# Entropy coding


@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0, 40.0])
def test_lossless_stage_is_within_a_percent_of_the_entropy(draw: str, scale: float) -> None:
    rng = np.random.default_rng(3)
    level = np.rint(getattr(rng, draw)(0, scale, 26_010)).astype(np.int32)
    packet, _ = Ans().encode(level, layout_for(len(level)), {}, fresh())
    _, counts = np.unique(level, return_counts=True)
    entropy = -(counts * np.log2(counts / len(level))).sum() / 8
    reader = Reader(packet.header)
    reader.varint(2**20)
    most = reader.varint(255)
    escapes = int((np.abs(level) > most).sum())
    assert len(packet.body) <= 1.01 * entropy + 4 * escapes + 4
    assert len(packet.header) <= 3 + 2 + 2 * (2 * most + 2)
    assert np.array_equal(Ans().decode(packet, layout_for(len(level))), level)


@settings(deadline=None, max_examples=60)
@given(arrays(np.int32, st.integers(0, 80), elements=st.integers(-(2**30), 2**30)))
def test_any_levels_survive_entropy_coding(level: NDArray[np.int32]) -> None:
    packet, _ = Ans().encode(level, layout_for(len(level)), {}, fresh())
    assert np.array_equal(Ans().decode(packet, layout_for(len(level))), level)


def test_sparse_levels_with_outliers_use_escapes_and_little_room() -> None:
    level = np.zeros(20_000, np.int32)
    level[[5, 700]] = 2**30, -(2**30)
    packet, _ = Ans().encode(level, layout_for(len(level)), {}, fresh())
    assert len(packet.header) + len(packet.body) < 40
    assert np.array_equal(Ans().decode(packet, layout_for(len(level))), level)


def test_a_coder_without_a_quantizer_before_it_says_so() -> None:
    with pytest.raises(TypeError, match="put a quantizer before it"):
        Ans().encode(gaussian(), layout_for(4000), {}, fresh())


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        (b"\0\0\0\0", [5, 0]),
        (b"\0\0\0", [5, 5]),
        (b"", [5, 5]),
        (b"\0" * 8, [5, 5]),
        (b"\xff" * 64, [5, 5]),
        (b"\1\0\0\0", [1, 2**22]),
    ],
)
def test_symbols_that_no_coder_wrote_are_refused(data: bytes, counts: list[int]) -> None:
    with pytest.raises(DecodeError):
        decode_symbols(data, np.array(counts, np.int64))


# Varints


@given(st.integers(0, 2**62))
def test_varints_round_trip_in_as_few_bytes_as_they_need(value: int) -> None:
    data = varint(value)
    reader = Reader(data)
    assert reader.varint(value) == value
    reader.end()
    assert len(data) == max(1, -(-value.bit_length() // 7))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80" * 100, b"\xff" * 9 + b"\x01", b"\x65"])
def test_a_varint_that_ends_never_or_says_too_much_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Reader(data).varint(100)


def test_a_reader_ends_where_its_bytes_end() -> None:
    reader = Reader(b"abc")
    assert reader.take(2) == b"ab"
    with pytest.raises(DecodeError, match="1 bytes too many"):
        reader.end()
    assert reader.rest() == b"c"
    with pytest.raises(DecodeError, match="1 bytes early"):
        reader.take(1)


# Settings


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TopK(0.0), r"codec.fraction .* above 0 and at most 1, got 0.0"),
        (lambda: TopK(1.5), r"codec.fraction .* at most 1, got 1.5"),
        (lambda: TopK(float("nan")), r"codec.fraction .* got nan"),
        (lambda: TopK("half"), r"codec.fraction .* got 'half'"),  # type: ignore[arg-type]
        (lambda: TopK(True), r"codec.fraction .* got True"),
        (lambda: RandomMask(0.0), r"codec.fraction .* above 0 .* got 0.0"),
        (lambda: RandomMask(0.1, unbiased=1), r"codec.unbiased .* got 1"),  # type: ignore[arg-type]
        (lambda: Ternary(2.0), r"codec.fraction .* at most 1, got 2.0"),
        (lambda: Sign("row"), r"codec.scale must be one of layer, channel, got 'row'"),
        (lambda: Uniform(bits=1), r"codec.bits .* from 2 to 16, got 1"),
        (lambda: Uniform(scale="model"), r"codec.scale .* got 'model'"),
        (lambda: Stochastic(levels=0), r"codec.levels .* got 0"),
        (lambda: Stochastic(bucket=0), r"codec.bucket .* got 0"),
        (lambda: Dither(step=0.0), r"codec.step .* at least 0.001 .* got 0.0"),
        (lambda: Eden(bits=9), r"codec.bits .* from 1 to 8, got 9"),
        (lambda: Eden(unbiased="no"), r"codec.unbiased .* got 'no'"),  # type: ignore[arg-type]
        (lambda: LowRank(rank=0), r"codec.rank .* got 0"),
        (lambda: Zstd(effort=23), r"codec.effort .* from 1 to 22, got 23"),
        (lambda: staged(Sign(), entropy="rle"), r"codec.entropy must be one of none, ans, huffman, zstd"),
        (lambda: staged(Sign(), feedback=1), r"codec.feedback .* got 1"),  # type: ignore[arg-type]
        (lambda: DeadZone(step=0), r"codec.step .* at least 1e-06 .* got 0"),
        (lambda: DeadZone(step=float("inf")), r"codec.step .* got inf"),
        (lambda: DeadZone(offset=0.6), r"codec.offset .* at least 0 and at most 0.5, got 0.6"),
        (lambda: DeadZone(offset=-0.1), r"codec.offset .* got -0.1"),
        (lambda: Chain(()), r"codec.stages must name at least one stage, got none"),
        (lambda: pipeline(keep=2.0), r"codec.keep .* at most 1, got 2.0"),
        (lambda: pipeline(keep=0), r"codec.keep .* above 0 .* got 0"),
        (lambda: pipeline(step=-1.0), r"codec.step .* got -1.0"),
        (lambda: pipeline(offset=1.0), r"codec.offset .* got 1.0"),
        (lambda: pipeline(feedback="no"), r"codec.feedback .* got 'no'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_named_with_their_bound(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_header_of_the_wrong_length_is_refused_by_every_stage() -> None:
    layout = layout_for(8)
    level = Packet(np.zeros(8, np.int32), b"\0" * 5)
    with pytest.raises(DecodeError):
        DeadZone().decode(level, layout)
    with pytest.raises(DecodeError):
        TopK().decode(Packet(np.zeros(8, np.float32), varint(9)), layout)
    with pytest.raises(DecodeError):
        Ans().decode(Packet(np.zeros(0, np.uint8), varint(9)), layout)
    with pytest.raises(DecodeError):
        Chain((Identity(),)).decode(Packet(np.zeros(8, np.float32), b"\0\0"), layout)
