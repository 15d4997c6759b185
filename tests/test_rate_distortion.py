"""The default codec: targets it meets, bits it saves, and bytes that it refuses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedapp.codec import Codec, Layout, Packet, State, context, encode_known
from fedapp.codec import quantizer as module
from fedapp.codec.model import (
    BLOCK,
    CONTEXTS,
    FLAGS,
    FLAGS_FROM,
    SIGNS,
    SIGNS_FROM,
    SYMBOLS,
    Model,
    after_empty,
    context_in,
    context_of,
    flag_context,
    lean_after,
    row_factor,
    sign_context,
)
from fedapp.codec.packet import decode_update, pack
from fedapp.codec.per_layer import PerLayer
from fedapp.codec.quantizer import LAMBDA, Quantizer, edges
from fedapp.codec.range_coder import FULL, WORD, narrow
from fedapp.codec.rate_distortion import RateDistortion, default
from fedapp.codec.rounding import _half_octave
from fedapp.errors import ConfigError, DecodeError

SHAPES: list[tuple[int, ...]] = [(16, 1, 5, 5), (16,), (), (40, 256), (40,), (10, 40), (10,)]
# Edges: every value goes to its nearest level, but 1 from 1/2 on; flags weigh nothing.
NEAREST = np.append(np.full(2048, 0.5, np.float32), np.float32(0))


def layout_of(shapes: list[tuple[int, ...]]) -> Layout:
    return Layout.of((str(index), shape) for index, shape in enumerate(shapes))


LAYOUT = layout_of(SHAPES)


def update(seed: int = 0, activity: float = 1.0) -> NDArray[np.float32]:
    """What updates look like: some rows and some columns move much more than others."""
    rng = np.random.default_rng(seed)
    parts = []
    for shape in SHAPES:
        rows = shape[0] if len(shape) > 1 else 1
        grid = (rows, int(np.prod(shape, dtype=np.int64)) // rows)
        scale = np.exp(activity * (rng.standard_normal((grid[0], 1)) + rng.standard_normal((1, grid[1]))))
        parts.append((scale * rng.standard_normal(grid)).ravel())
    return (1e-3 * np.concatenate(parts)).astype(np.float32)


def coded(codec: Codec, x: NDArray[np.float32], layout: Layout = LAYOUT) -> tuple[int, NDArray[np.float32]]:
    """Bytes on the wire, and the vector on the server."""
    data = pack(codec.encode(x, layout, {}, np.random.default_rng(0))[0], codec, layout)
    return len(data), decode_update(data, codec, layout)


def nmse(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    wide = x.astype(np.float64)
    return float(np.sum((wide - y) ** 2) / np.sum(wide**2))


def low_rank() -> NDArray[np.float32]:
    """A few outer products, of ever smaller size, and noise."""
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((120, 8)) * 0.7 ** np.arange(8), rng.standard_normal((8, 200))
    return (left @ right + 0.1 * rng.standard_normal((120, 200))).ravel().astype(np.float32)


VECTORS = {
    "low rank": (low_rank(), layout_of([(120, 200)])),
    "structured": (update(), LAYOUT),
    "white": (np.random.default_rng(1).standard_normal(26_010).astype(np.float32), layout_of([(26_010,)])),
    "heavy": (np.random.default_rng(2).standard_t(2, 20_000).astype(np.float32), layout_of([(100, 200)])),
}
RATES, ERRORS = (0.05, 0.1, 0.3, 0.5, 1, 2, 4, 8, 12), (0.5, 0.1, 1e-2, 1e-4, 1e-6, 1e-8)
every_vector = pytest.mark.parametrize(("x", "layout"), VECTORS.values(), ids=VECTORS)


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts encodes of whole updates: the vectors of their products are fewer values."""
    counted, longest, encode = [0], [0], context.encode

    def counting(x: NDArray[np.float32], *given: Any, **named: Any) -> Any:
        if len(x) > longest[0]:
            longest[0], counted[0] = len(x), 0
        counted[0] += len(x) == longest[0]
        return encode(x, *given, **named)

    monkeypatch.setattr(context, "encode", counting)
    return counted


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each encode is of, until it is cleared."""
    counted, encode = list[int](), context.encode

    def counting(x: NDArray[np.float32], *given: Any, **named: Any) -> Any:
        counted.append(len(x))
        return encode(x, *given, **named)

    monkeypatch.setattr(context, "encode", counting)
    return counted


@every_vector
@pytest.mark.parametrize("rate", RATES)
def test_a_rate_is_met_in_bytes_on_the_wire(
    x: NDArray[np.float32], layout: Layout, rate: float, encodes: list[int]
) -> None:
    size, _ = coded(RateDistortion(rate=rate), x, layout)
    wanted = rate * len(x) / 8
    assert abs(size - wanted) <= max(0.03 * wanted, 32)
    assert encodes[0] <= 3


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.0])
def test_a_long_update_is_coded_once_after_a_part_of_it(rate: float, lengths: list[int]) -> None:
    layout = layout_of([(32, 1, 3, 3), (192, 6144), (192,)])
    rng = np.random.default_rng(0)
    grid = rng.standard_normal((192, 6144)) * np.exp(
        rng.standard_normal((192, 1)) + rng.standard_normal(6144)
    )
    x = np.concatenate([rng.standard_normal(288), grid.ravel(), rng.standard_normal(192)]).astype(np.float32)
    codec = RateDistortion(rate=rate)
    state: State = {}
    for _ in range(2):  # the second time the state misleads by ten percent, as it does where updates change
        lengths.clear()
        packet, state = codec.encode(x, layout, state, rng)
        assert len(pack(packet, codec, layout)) == pytest.approx(rate * len(x) / 8, rel=0.03)
        assert sum(lengths) < (1.3 if rate < 1 else 1.15) * len(x)
        assert abs(state["part"]) < 0.03
        state = {**state, "miss": state["miss"] - 0.1, "step": state["step"] * 1.1}


@every_vector
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_met(x: NDArray[np.float32], layout: Layout, error: float, encodes: list[int]) -> None:
    assert nmse(x, coded(RateDistortion(nmse=error), x, layout)[1]) == pytest.approx(error, rel=0.03)
    assert encodes[0] <= 3


anything = st.one_of(
    st.none(),
    st.floats(-1, 1).map(lambda miss: np.array([miss])),
    st.floats().map(lambda miss: np.array([miss])),
    arrays(st.sampled_from([np.float32, np.int64, np.uint8]), st.integers(0, 3)),
    arrays(np.float64, st.sampled_from([(), (0,), (2,), (1, 1)])),
)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(sorted(VECTORS)),
    st.sampled_from([*(("rate", rate) for rate in RATES), *(("nmse", error) for error in ERRORS)]),
    anything,
)
@example("heavy", ("rate", 12), np.array([0.75]))  # the first step is far too coarse
def test_a_target_is_met_whatever_the_state_says(
    vector: str, target: tuple[str, float], miss: NDArray[Any] | None
) -> None:
    (x, layout), (kind, wanted) = VECTORS[vector], target
    codec = RateDistortion(rate=wanted) if kind == "rate" else RateDistortion(nmse=wanted)
    packet, after = codec.encode(x, layout, {} if miss is None else {"miss": miss}, np.random.default_rng(0))
    if kind == "rate":
        size = wanted * len(x) / 8
        assert abs(len(pack(packet, codec, layout)) - size) <= max(0.03 * size, 32)
    else:
        assert nmse(x, codec.decode(packet, layout)) == pytest.approx(wanted, rel=0.03)
    assert after["miss"].shape == (1,)


@pytest.mark.parametrize(
    "codec",
    [
        RateDistortion(rate=0.5), RateDistortion(rate=2.0), RateDistortion(nmse=0.1),
        RateDistortion(rate=0.5, trellis=True), RateDistortion(rate=2.0, trellis=True),
    ],
    ids=repr,
)  # fmt: skip
def test_later_rounds_remember_what_the_estimate_missed(codec: Codec, encodes: list[int]) -> None:
    state: State = {}
    counts, change = [], np.random.default_rng(0)
    for _ in range(6):
        x = update() * change.normal(1, 0.3, LAYOUT.size).astype(np.float32)
        before = encodes[0]
        _, state = codec.encode(x, LAYOUT, state, change)
        counts.append(encodes[0] - before)
    assert counts[0] > 1
    assert sum(counts[1:]) <= 7


def test_what_is_remembered_passes_through_error_feedback_and_rules_per_layer() -> None:
    x, rng = update(), np.random.default_rng(0)
    state = default(feedback=True).encode(x, LAYOUT, {}, rng)[1]
    assert set(state) == {"residual", "codec.miss", "codec.step"}
    codec = PerLayer((("[0-2]", default(rate=2.0)),), default())
    state = codec.encode(x, LAYOUT, {}, rng)[1]
    assert set(state) == {"0.miss", "0.step", "1.miss", "1.step"}
    again, _ = codec.encode(x, LAYOUT, state, rng)
    wanted = (2 * LAYOUT.slots[3].offset + LAYOUT.size - LAYOUT.slots[3].offset) / 8
    assert len(again.body) == pytest.approx(wanted, rel=0.05)


def test_a_step_wins_over_a_rate_and_is_relative() -> None:
    x = VECTORS["white"][0]
    layout = VECTORS["white"][1]
    for scale in (1.0, 1e-20, 1e20):
        y = coded(RateDistortion(step=0.1), x * np.float32(scale), layout)[1]
        assert np.sqrt(nmse(x * np.float32(scale), y)) == pytest.approx(0.1 / np.sqrt(12), rel=0.03)


def test_a_target_out_of_reach_gets_the_nearest_packet_and_a_warning_that_names_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), 8000)
    size, y = coded(RateDistortion(rate=0.25), x, layout_of([(8000,)]))
    assert nmse(x, y) < 1e-4
    assert f"the target is 250 and the nearest that this update allows {size}" in caplog.text


@every_vector
@pytest.mark.parametrize(
    "codec",
    [
        default(rate=0.05), default(rate=1.0), default(nmse=0.1), default(step=0.5),
        default(rate=0.2, feedback=True), default(rate=1.0, trellis=True),
        default(step=3.0, trellis=True, feedback=True),
    ],
    ids=repr,
)  # fmt: skip
def test_an_encoder_that_is_asked_knows_what_its_packet_decodes_to(
    codec: Codec, x: NDArray[np.float32], layout: Layout
) -> None:
    rng, state = np.random.default_rng(0), {"residual": x[::-1].copy()}
    for vector in (x, np.zeros_like(x), x * np.float32(1e-38)):
        packet, after = encode_known(codec, vector, layout, state, rng)
        plain, same = codec.encode(vector, layout, state, rng)
        assert packet.known is not None
        assert packet.known.tobytes() == decode_update(pack(packet, codec, layout), codec, layout).tobytes()
        assert pack(packet, codec, layout) == pack(plain, codec, layout)
        assert {name: value.tobytes() for name, value in after.items()} == {
            name: value.tobytes() for name, value in same.items()
        }


@pytest.mark.parametrize("trellis", [False, True])
def test_what_no_float32_can_say_is_refused_by_the_encoder(trellis: bool) -> None:
    """Points of values near the largest float32 may lie beyond it; the server would refuse the packet."""
    x = np.full(64, np.finfo(np.float32).max, np.float32)
    x[::2] *= np.float32(0.4)
    layout, rng, refused = layout_of([(64,)]), np.random.default_rng(0), 0
    for step in np.linspace(0.3, 1.2, 40):
        codec = RateDistortion(step=step, trellis=trellis)
        try:
            packet, _ = encode_known(codec, x, layout, {}, rng)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="too near the largest float32"):
                codec.encode(x, layout, {}, rng)
        else:
            assert packet.known is not None
            assert (packet.known == codec.decode(packet, layout)).all()
    assert 0 < refused < 40
    packet, _ = RateDistortion(step=0.3, trellis=trellis).encode(x / 4, layout, {}, rng)
    coarser = Packet(packet.body, np.float32(3e38).tobytes() + packet.header[4:])
    with pytest.raises(DecodeError, match="beyond float32"):
        codec.decode(coarser, layout)


def test_products_too_near_the_largest_float32_are_refused() -> None:
    """Their vectors are longer than the largest value of what they are of, and so may the step be."""
    layout, rng = layout_of([(8, 400)]), np.random.default_rng(0)
    x = np.outer(rng.choice([-1, 1], 8), rng.choice([-1, 1], 400)) + 1e-3 * rng.standard_normal((8, 400))
    unit = (x / np.abs(x).max()).astype(np.float32).ravel()
    packet, _ = encode_known(RateDistortion(rate=0.05), np.ldexp(unit, 120), layout, {}, rng)
    assert packet.known is not None
    assert np.isfinite(packet.known).all()
    with pytest.raises(ValueError, match="too near the largest float32"):
        encode_known(RateDistortion(rate=0.05), np.ldexp(unit, 127), layout, {}, rng)


def test_the_frame_takes_thirteen_bytes() -> None:
    packet, _ = default().encode(update(), LAYOUT, {}, np.random.default_rng(0))
    assert len(pack(packet, default(), LAYOUT)) == len(packet.body) + 13


def entropy(level: NDArray[np.int32]) -> float:
    """Bytes of levels coded one by one, with a table that costs nothing."""
    counts = np.unique(level, return_counts=True)[1]
    return float(-(counts * np.log2(counts / len(level))).sum() / 8)


@pytest.mark.parametrize("scale", [0.2, 0.5, 2.0, 30.0, 3000.0])
@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_levels_without_structure_take_their_entropy(draw: str, scale: float) -> None:
    level = np.rint(getattr(np.random.default_rng(3), draw)(0, scale, 40_000)).astype(np.float32)
    code, found, _ = context.encode(level, 1.0, NEAREST, [(200, 200)])
    assert np.array_equal(found, level)
    source = np.rint(getattr(np.random.default_rng(4), draw)(0, scale, 2_000_000)).astype(np.int32)
    assert len(code) <= 1.015 * max(entropy(level.astype(np.int32)), entropy(source) / 50) + 32


def test_levels_with_active_rows_and_columns_take_less() -> None:
    level = np.rint(update() / 2e-3).astype(np.float32)
    shapes = SHAPES
    alone = sum(
        entropy(part.astype(np.int32)) for part in np.split(level, [s.offset for s in LAYOUT.slots][1:])
    )
    assert len(context.encode(level, 1.0, NEAREST, shapes)[0]) < 0.85 * alone
    shuffled = np.random.default_rng(0).permutation(level)
    assert len(context.encode(shuffled, 1.0, NEAREST, shapes)[0]) > 0.95 * entropy(shuffled.astype(np.int32))


def test_weighing_bits_against_distance_beats_the_nearest_level(monkeypatch: pytest.MonkeyPatch) -> None:
    x = update()
    size, y = coded(RateDistortion(rate=0.7), x)
    monkeypatch.setattr(module, "LAMBDA", 0.0)
    plain_size, plain = coded(RateDistortion(rate=0.7), x)
    assert size == pytest.approx(plain_size, rel=0.02)
    assert nmse(x, y) < 0.98 * nmse(x, plain)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.one_of(
            st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 5), st.integers(0, 5)),
            st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)),
        ),
        max_size=5,
    ),
    st.data(),
)  # fmt: skip
def test_any_levels_in_layers_of_any_shape_come_back(
    shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    size = layout_of(shapes).size
    few = st.integers(-3, 3)
    level = data.draw(arrays(np.int32, size, elements=st.one_of(few, st.integers(-(2**22), 2**22))))
    code, found, _ = context.encode(level.astype(np.float32), 1.0, NEAREST, shapes)
    assert np.array_equal(found, level)
    assert np.array_equal(context.decode(code, shapes), level)


def edge_of(dependent: bool) -> NDArray[np.float32]:
    """What tells an encoder where levels begin; under a trellis, what a bit costs."""
    return np.array([0.5], np.float32) if dependent else NEAREST


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 65]),
            st.sampled_from([1, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 257, 511, 513, 559, 560, 561]),
        ),
        min_size=1, max_size=3,
    ),
    st.integers(0, 2**32), st.integers(-4, 22), st.booleans(),
)  # fmt: skip
def test_wide_layers_come_back_block_by_block(
    shapes: list[tuple[int, ...]], seed: int, octave: int, dependent: bool
) -> None:
    rng = np.random.default_rng(seed)
    wide = rng.standard_t(2, layout_of(shapes).size) * 2.0**octave
    x = np.clip(wide, -(2.0**28), 2.0**28).astype(np.float32)
    code, levels, _ = context.encode(x, 1.0, edge_of(dependent), shapes, dependent)
    assert np.array_equal(context.decode(code, shapes, dependent), levels)
    assert context.encode(x, 1.0, edge_of(dependent), shapes, dependent, keep=False)[0] == code
    if not dependent:
        assert np.abs(levels - x.astype(np.float64)).max() <= 1


@pytest.mark.parametrize("dependent", [False, True])
def test_a_row_that_wakes_up_is_expected_within_bounds(dependent: bool) -> None:
    """Factors at their bound, magnitudes at theirs."""
    rng = np.random.default_rng(0)
    x = np.zeros((60, 300), np.float32)
    x[50:52] = 2.0**25
    x[52:] = rng.choice([-1, 1], (8, 300)) * rng.integers(2**28, 2**29, (8, 300))
    code, levels, _ = context.encode(x.ravel(), 1.0, edge_of(dependent), [x.shape], dependent)
    assert np.array_equal(context.decode(code, [x.shape], dependent), levels)
    assert np.abs(levels.reshape(x.shape) - x.astype(np.float64)).max() <= 2


@pytest.mark.parametrize("dependent", [False, True])
def test_where_there_is_no_room_encoding_begins_anew(dependent: bool) -> None:
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], 32_000) * rng.integers(2**28, 2**29, 32_000)).astype(np.float32)
    code, levels, _ = context.encode(x, 1.0, edge_of(dependent), [(8, 4000)], dependent)
    assert len(code) > 4 * (len(x) + 2048)
    assert np.array_equal(context.decode(code, [(8, 4000)], dependent), levels)
    assert np.abs(levels - x.astype(np.float64)).max() <= 2


@pytest.mark.parametrize("dependent", [False, True])
def test_zeros_with_a_sign_come_back_as_what_they_were_sent_as(dependent: bool) -> None:
    """A trellis may send something for a zero, to get where it wants to be."""
    rng, other = np.random.default_rng(0), 0
    for _ in range(20):
        x = (4 * rng.standard_normal(192)).astype(np.float32)
        x[rng.random(192) < 0.3] = -0.0
        edge = edges(LAMBDA) if not dependent else np.array([0.3], np.float32)
        code, levels, _ = context.encode(x, 1.0, edge, [(1, 192)], dependent)
        assert np.array_equal(context.decode(code, [(1, 192)], dependent), levels)
        other += int(np.count_nonzero(levels[x == 0]))
    assert (other > 0) == dependent


def test_signs_and_flags_always_have_a_context() -> None:
    leans, new = {0}, {0}
    while new:
        new = {int(lean_after(lean, minus)) for lean in new for minus in (0, 1)} - leans
        leans |= new
    assert {int(sign_context(lean)) for lean in leans} == set(range(SIGNS))
    found = [int(flag_context(promised, 2**12)) for promised in (0, 2**9, 2**10, 2**12, 2**14, 2**30)]
    assert found == [
        0,
        1,
        2,
        4,
        6,
        FLAGS - 1,
    ]  # of nothing, 1/8, 1/4, 1 and 4 levels, and of all there can be
    assert flag_context(2**30, 2**24) == FLAGS - 1
    assert flag_context(2**30, 0) == 0


def test_after_empty_blocks_a_row_expects_what_its_columns_promise_and_finds_nothing() -> None:
    for n, mean in ((128, 4096), (16, 4096), (1, 7), (128, 0)):
        found, expected = 401, 401
        for _ in range(20):
            found, expected = after_empty(n * mean, n, found, expected)
            assert expected >= 1  # it divides
        assert found == 0
        assert abs(expected - 64 * mean) <= 8


def test_lengths_of_layers_add_up_to_that_of_the_code() -> None:
    x, shapes = update(), [(), *SHAPES, (0, 4)]
    x = np.append(np.float32(2e-3), x)
    lengths = context.lengths(x, 1e3, edges(LAMBDA), shapes)
    code, *_ = context.encode(x, 1e3, edges(LAMBDA), shapes)
    assert len(lengths) == len(SHAPES) + 1
    assert min(lengths) >= 0
    assert 0 <= 8 * len(code) - sum(lengths) <= 24


def test_a_lone_level_pays_for_the_flag_of_its_block() -> None:
    """In white noise, of which 1.92 % fit into 0.02 bits, fewer blocks have one than where flags are free."""
    x = np.random.default_rng(0).standard_normal(600_000).astype(np.float32)
    low, high, coder, shape = 3.0, 6.0, Quantizer(trellis=False), (600, 1000)
    for _ in range(18):
        step = (low + high) / 2
        code, levels, moves = coder.encode(x, 1 / step, [shape])
        low, high = (step, high) if 8 * len(code) > 0.02 * len(x) else (low, step)
    free = edges(LAMBDA)
    free[-1] = 0.0
    others = context.encode(x, 1 / step, free, [shape])[1]
    filled, freely = (
        np.count_nonzero(found.reshape(shape)[:, :896].reshape(-1, BLOCK).any(axis=1))
        for found in (levels, others)
    )
    assert filled < 0.9 * freely
    assert 1 - nmse(x, coder.points(levels, moves) * np.float32(step)) > 0.0185


def test_rounding_knows_the_contexts_about_as_they_are() -> None:
    for e in (*range(1, 300), *range(300, 2**21, 1111)):
        assert abs(_half_octave(np.float32(e / 256)) - context_in(e)) <= 1


@pytest.mark.parametrize("outlier", [40_000, 2**20 + 1, 2**30])
def test_outliers_neither_wrap_nor_cost_the_others(outlier: int) -> None:
    level = np.zeros(3000, np.float32)
    level[[7, 1500]] = outlier, -outlier
    code, found, _ = context.encode(level, 1.0, NEAREST, [(50, 60)])
    assert found[[7, 1500]].tolist() == [outlier, -outlier]
    assert np.array_equal(context.decode(code, [(50, 60)]), level.astype(np.int32))
    assert len(code) <= 64


@pytest.mark.parametrize("value", [2.0**31, np.inf, np.nan])
def test_levels_beyond_the_largest_are_refused(value: float) -> None:
    x = np.zeros(9, np.float32)
    x[4] = value
    with pytest.raises(ValueError, match="not finite or beyond 2\\^30 steps"):
        context.encode(x, 1.0, NEAREST, [(9,)])


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(("shape", "value"), [((1, 60_000), 10.0), ((1000, 100), 1e4)])
def test_a_symbol_that_has_become_as_rare_as_can_be_comes_back(
    dependent: bool, shape: tuple[int, int], value: float
) -> None:
    """It narrows the interval by 2^20."""
    x = np.full(shape, value, np.float32).ravel()
    x[-140::7] = 0
    code, levels, _ = context.encode(x, 1.0, edge_of(dependent), [shape], dependent)
    assert np.count_nonzero(levels == 0) == 20
    assert np.array_equal(context.decode(code, [shape], dependent), levels)


@pytest.mark.parametrize("dependent", [False, True])
def test_codes_that_point_where_no_symbol_lies_end_in_an_error(dependent: bool) -> None:
    tried, refused = 0, 0
    for values in ([3], [3, -3, 0]):
        code, *_ = context.encode(
            np.resize(np.array(values, np.float32), 5000), 1.0, edge_of(dependent), [(1, 5000)], dependent
        )
        for length in range(min(len(code), 100)):
            for tail in (b"\xff" * 400, b"\xff\xfe" * 50):
                tried += 1
                try:
                    levels = context.decode(code[:length] + b"\xff" + tail, [(1, 5000)], dependent)
                    assert np.abs(levels).max() <= 2**30
                except DecodeError:
                    refused += 1
    assert refused > 0.9 * tried


def test_golden_bytes() -> None:
    """A changed bitstream needs a new version number."""
    level = np.array([0, 0, 1, -1, 0, 2, 0, 0, -3, 0, 0, 0, 40_000, 1, 0, 0, -1, 0, 0, 5], np.float32)
    code, _, _ = context.encode(level, 1.0, NEAREST, [(4, 4), (), (3,)])
    assert code.hex() == "06e57743f75300b5098079d9a68da9b93e"
    header = b"\xcd\xcc\xcc\x3d\x40\xf0"  # step 0.1, points of 1 and of more moved by 64/256 and -16/256
    packet = Packet(np.frombuffer(code, np.uint8), header)
    x = RateDistortion().decode(packet, layout_of([(4, 4), (), (3,)]))
    point = np.where(np.abs(level) > 1, np.abs(level) - np.float32(1 / 16), np.abs(level) * np.float32(1.25))
    assert np.array_equal(x, np.sign(level) * point * np.float32(0.1))


def pointing(*symbols: tuple[int, int]) -> bytes:
    """A code that points at the low end of what these symbols, each in its context, leave of all there is."""
    intervals, low, span = Model(False).intervals.reshape(-1, SYMBOLS), 0, FULL
    for context_, symbol in symbols:
        low, span = narrow(True, intervals[context_, symbol], low, span)
        assert span >= WORD
    return int(low << 2).to_bytes(8, "big")  # 62 bits


def test_codes_that_no_encoder_makes_are_refused_where_they_show_it() -> None:
    """Of one value: a flag or a sign leaves 14 in 2^20 of its space to nobody; a flag may lie."""
    promised, row = 401, 402  # what the first column of a first layer promises, and its row
    flag = FLAGS_FROM + flag_context(promised, row_factor(row, row))
    e = (promised * row_factor(row, row)) >> 16
    magnitude = context_in(e - ((e + 15) >> 4))  # with no magnitude left of it
    minus = SIGNS_FROM[0] + sign_context(0), 1
    for code in (pointing((flag, 0)), pointing((flag, 1), (magnitude, 1), minus)):
        with pytest.raises(DecodeError, match="does not end where"):  # an encoder names them in fewer bytes
            context.decode(code, [(1,)])
    for code in (
        bytes(8),  # below both flags
        pointing((flag, 1), (magnitude, 0)),
        pointing((flag, 1), (magnitude, 1)),  # below both signs
    ):
        with pytest.raises(DecodeError, match="no encoder makes"):
            context.decode(code, [(1,)])


def test_what_lies_together_takes_less() -> None:
    """Empty blocks say so at once, and what lies in the others is learned of these alone."""
    rng = np.random.default_rng(0)
    level = rng.integers(-1, 2, (64, 16, 128)).astype(np.float32)
    level *= rng.random((64, 16, 1)) < 0.25
    code, levels, _ = context.encode(level.ravel(), 1.0, NEAREST, [(64, 2048)])
    assert np.array_equal(context.decode(code, [(64, 2048)]), levels)
    filled = np.count_nonzero(level.any(axis=2))
    assert 8 * len(code) < 1.04 * (filled * 128 * np.log2(3) + 0.82 * 1024)
    alone = context.encode(rng.permutation(level.ravel()), 1.0, NEAREST, [(64, 2048)])[0]
    assert len(code) < 0.65 * len(alone)
    nothing = context.encode(np.zeros(64 * 2048, np.float32), 1.0, NEAREST, [(64, 2048)])[0]
    assert len(nothing) < 24


def damaged(code: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, lost, doubled or added."""
    out = bytearray(code)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(out) + 1))
        kind = rng.integers(0, 4)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del out[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            out = bytearray(rng.bytes(at))
    return bytes(out)


def fuzz(count: int, least_rate: float, trellis: bool) -> None:
    """Damage so many packets: each decodes to something finite, or raises the one error."""
    rng = np.random.default_rng(0)
    codec, layout = RateDistortion(trellis=trellis), layout_of([(8, 9), (8,), ()])
    refused = products = 0
    for number in range(count):
        x = rng.standard_t(1.2, layout.size)
        if number % 100 == 0:  # of low rank, nearly
            x = np.append(np.outer(rng.normal(4, 1, 8), rng.normal(4, 1, 9)), 0.01 * x[72:])
        x = (x * 10.0 ** rng.integers(-40, 30)).astype(np.float32)
        if number % 50 == 0:
            sent = RateDistortion(rate=float(rng.uniform(least_rate, 8)), trellis=trellis)
            packet, _ = sent.encode(x, layout, {}, rng)
            products += len(packet.header) > 7
        body, header = packet.body.tobytes(), packet.header
        body, header = (damaged(body, rng), header) if number % 8 else (body, damaged(header, rng))
        try:
            y = codec.decode(Packet(np.frombuffer(body, np.uint8), header), layout)
            assert y.shape == (layout.size,)
            assert np.isfinite(y).all()
        except DecodeError:
            refused += 1
    assert refused > count / 4
    assert products > count / 200


@pytest.mark.parametrize("count", [4000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_damaged_packets_decode_to_something_finite_or_raise_one_error(count: int) -> None:
    fuzz(count, least_rate=1, trellis=False)


@pytest.mark.parametrize(
    ("header", "body", "said"),
    [
        (b"\0\0\x80?\0\0", np.zeros(4, np.float32), "does not hold a header"),
        (b"\0\0\x80?\0", np.zeros(4, np.uint8), "does not hold a header"),
        (b"\0\0\x80\xff\0\0", np.zeros(4, np.uint8), "step of -inf"),
        (b"\0\0\xc0\x7f\0\0", np.zeros(4, np.uint8), "step of nan"),
        (b"\0\0\0\0\0\0", np.zeros(1, np.uint8), "levels without a step"),
        (b"\0\0\x80?\0\0", np.zeros(900, np.uint8), "no encoder makes"),
    ],
)
def test_packets_that_no_encoder_makes_are_refused(header: bytes, body: NDArray[Any], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        RateDistortion().decode(Packet(body, header), LAYOUT)


def test_a_part_of_a_vector_is_no_update() -> None:
    with pytest.raises(TypeError, match="needs the layers"):
        default().encode(update()[:-1], LAYOUT, {}, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rate": 0}, r"codec.rate .* above 0 and at most 12, got 0"),
        ({"rate": 13}, r"codec.rate .* got 13"),
        ({"step": 0.0}, r"codec.step .* at least 1e-06 .* got 0.0"),
        ({"nmse": 1.0}, r"codec.nmse .* below 1, got 1.0"),
        ({"nmse": 0.0}, r"codec.nmse .* at least 1e-09 .* got 0.0"),
        ({"feedback": 1}, r"codec.feedback .* got 1"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        default(**given)


def mostly_nothing(kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """(1024, 600), of which an eighth of the columns holds nothing, or next to nothing."""
    grid = np.zeros((1024, 600), np.float32)
    if kind == "one value":
        grid[0, 0] = 1
    elif kind == "some columns":
        grid[:, :16] = rng.standard_normal((1024, 16))
    else:
        grid += 1e-3 * rng.standard_normal(grid.shape)
        grid.ravel()[rng.choice(grid.size, 300, replace=False)] = 3 * rng.standard_normal(300)
    return grid


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.005, 0.0003])
@pytest.mark.parametrize("kind", ["one value", "some columns", "outliers"])
def test_a_part_that_holds_nothing_tells_nothing(kind: str, rate: float, products: bool) -> None:
    layout, rng = layout_of([(1024, 600)]), np.random.default_rng(0)
    codec, x = RateDistortion(rate=rate, products=products), mostly_nothing(kind, rng).ravel()
    packet, state = codec.encode(x, layout, {}, rng)
    again, _ = codec.encode(x, layout, state, rng)
    for one in (packet, again):
        assert nmse(x, codec.decode(one, layout)) <= 1
        assert len(pack(one, codec, layout)) < 1.03 * rate * len(x) / 8 + 64


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize("miss", [None, -0.3, 0.4])
def test_a_rate_is_met_where_most_values_begin_to_be_sent_at_once(
    rate: float, share: float, miss: float | None
) -> None:
    """As under error feedback: what was just below the first level is now a little above."""
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, 100_000)
    owed = rng.random(len(x)) < share
    x[owed] = 6 * (1 - 0.1 * rng.random(owed.sum())) * rng.choice([-1, 1], owed.sum())
    x, layout = x.astype(np.float32), layout_of([(250, 400)])
    state = {} if miss is None else {"miss": np.array([miss])}
    packet, _ = RateDistortion(rate=rate).encode(x, layout, state, rng)
    size = len(pack(packet, RateDistortion(rate=rate), layout))
    assert abs(size - rate * len(x) / 8) <= max(0.03 * rate * len(x) / 8, 32)


@pytest.mark.parametrize(("rate", "met"), [(1.0, True), (0.25, False)])  # all of it takes 1 bit a value
@pytest.mark.parametrize("feedback", [False, True])
def test_magnitudes_that_are_all_alike_are_sent(rate: float, met: bool, feedback: bool) -> None:
    rng, layout = np.random.default_rng(0), layout_of([(20, 1000)])
    codec = default(rate=rate, products=False, feedback=feedback)
    state: State = {}
    for _ in range(4):
        x = (1e-3 * rng.choice([-1, 1], layout.size)).astype(np.float32)
        packet, state = codec.encode(x, layout, state, rng)
        assert codec.decode(packet, layout).any()
        if met and not feedback:
            assert len(pack(packet, codec, layout)) == pytest.approx(rate * len(x) / 8, rel=0.03)


def test_layers_too_narrow_to_have_a_part_are_coded_once_in_later_rounds(lengths: list[int]) -> None:
    layout, rng, codec = layout_of([(10_000, 64)]), np.random.default_rng(0), RateDistortion(rate=1.0)
    state: State = {}
    for number in range(3):
        lengths.clear()
        x = rng.standard_normal(layout.size).astype(np.float32)
        _, state = codec.encode(x, layout, state, rng)
        assert number == 0 or sum(lengths) < 1.05 * layout.size


def test_both_ends_find_the_same_contexts() -> None:
    """At all expectations that are told apart, and where the last one ends."""
    expectations = [*range(5000), *range(5000, 2**22, 300), 2**22 - 1, 2**22, 2**28]
    looked_up = [context_in(e) for e in expectations]
    assert looked_up == [context_of(np.int32(e)) for e in expectations]
    assert looked_up == sorted(looked_up)
    assert looked_up[-1] == CONTEXTS - 1
