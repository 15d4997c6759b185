"""The trellis of the default codec: what it gains, that both ends agree, and bytes that it refuses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_rate_distortion import LAYOUT, coded, every_vector, fuzz, layout_of, nmse, update

from fedapp.codec import Layout, Packet, context, trellis
from fedapp.codec.rate_distortion import RateDistortion, default
from fedapp.errors import ConfigError, DecodeError

WEIGHT = np.array([0.3], np.float32)


def levels_of(places: NDArray[np.int32]) -> NDArray[np.int64]:
    """Levels of one layer's places; fails where a place is not in the quantizer whose turn it is."""
    state, levels = 0, []
    for place in places.tolist():
        odd = state // trellis.HALF
        assert place == 0 or place % 2 == odd
        levels.append((abs(place) + odd) // 2 if place else 0)
        state = trellis.NEXT[state, levels[-1] % 2]
    return np.array(levels)


@pytest.mark.parametrize(("rate", "gain"), [(0.5, 0.25), (1, 0.3), (2, 0.6), (4, 0.9)])
def test_it_beats_the_default_at_equal_bytes(rate: float, gain: float) -> None:
    x = update(4)
    size, y = coded(RateDistortion(rate=rate, trellis=True), x)
    plain_size, plain = coded(RateDistortion(rate=rate), x)
    bits = 8 * (size - plain_size) / len(x)
    assert abs(bits) < 0.04 * rate  # each may be off by 3 %
    assert 10 * np.log10(nmse(x, plain) / nmse(x, y)) - 6 * bits > gain


def test_signs_that_alternate_cost_next_to_nothing() -> None:
    """The search knows what they cost: after a plus the next context's price of a minus is far lower."""
    rng = np.random.default_rng(0)
    shape = 60, 500
    x = (np.abs(rng.laplace(size=shape)) * np.where(np.arange(500) % 2, 1, -1)).astype(np.float32).ravel()
    errors = [
        nmse(x, coded(RateDistortion(rate=3, trellis=trellis, products=False), x, layout_of([shape]))[1])
        for trellis in (False, True)
    ]
    assert 10 * np.log10(errors[0] / errors[1]) > 4  # with no difference it would be about 1


@every_vector
@pytest.mark.parametrize("rate", [0.05, 0.2, 1, 4, 12])
def test_a_rate_is_met_in_bytes_on_the_wire(x: NDArray[np.float32], layout: Layout, rate: float) -> None:
    size, _ = coded(RateDistortion(rate=rate, trellis=True), x, layout)
    assert abs(size - rate * len(x) / 8) <= max(0.03 * rate * len(x) / 8, 32)


@every_vector
@pytest.mark.parametrize("error", [0.5, 0.1, 1e-2, 1e-4, 1e-8])
def test_an_error_is_met(x: NDArray[np.float32], layout: Layout, error: float) -> None:
    few_bytes = 0.05 if error == 0.5 else 0.03
    y = coded(RateDistortion(nmse=error, trellis=True), x, layout)[1]
    assert nmse(x, y) == pytest.approx(error, rel=few_bytes)


def test_at_fine_steps_the_error_is_that_of_a_dense_packing() -> None:
    """A packing of 32 states is 1.0 to 1.2 dB better than scalars; bits are those of a step's entropy."""
    x = np.random.default_rng(1).standard_normal(40_000).astype(np.float32)
    _, y = coded(RateDistortion(step=0.05, trellis=True), x, layout_of([(200, 200)]))
    size, _ = coded(RateDistortion(step=0.05, trellis=True), x, layout_of([(200, 200)]))
    entropy = 0.5 * np.log2(2 * np.pi * np.e / 12) + 0.5 * np.log2(12) - np.log2(0.05)
    scalar = 2.0 ** (2 * (entropy - 8 * size / len(x))) * 0.05**2 / 12
    assert 0.9 < 10 * np.log10(scalar / nmse(x, y)) < 1.4


def test_a_state_has_two_branches_out_and_two_in() -> None:
    states = 2 * trellis.HALF
    assert trellis.NEXT.shape == (states, 2)
    assert np.bincount(trellis.NEXT.ravel()).tolist() == [2] * states
    assert trellis.NEXT[0, 0] == 0


def test_places_belong_to_the_quantizer_whose_turn_it_is_and_both_are_used() -> None:
    x = update()[-4000:]
    _, places, _ = context.encode(x, 1000.0, WEIGHT, [(50, 80)], dependent=True)
    levels_of(places)
    assert 0.3 < (places[places != 0] % 2).mean() < 0.7


@pytest.mark.parametrize("shape", [(20_000, 1), (20_000,), (4000, 5), (16, 1250), (200, 100)])
def test_the_search_does_not_care_where_rows_end(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    code, places, _ = context.encode(x, 2.0, WEIGHT, [shape], dependent=True)
    levels_of(places)
    assert np.array_equal(context.decode(code, [shape], dependent=True), places)
    bits, error = 8 * len(code) / len(x), np.mean((x - places / 2) ** 2)
    assert 10 * np.log10(2.0 ** (-2 * bits) / error) > -0.75  # from the bound; scalars: -1.5


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.one_of(
            st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 5), st.integers(0, 5)),
            st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 200)),
        ),
        max_size=5,
    ),
    st.integers(0, 2**32),
    st.integers(-30, 25),
    st.floats(0.5, 30),
)  # fmt: skip
def test_any_values_in_layers_of_any_shape_come_back_as_the_encoder_rounded_them(
    shapes: list[tuple[int, ...]], seed: int, octave: int, tails: float
) -> None:
    wide = np.random.default_rng(seed).standard_t(tails, layout_of(shapes).size) * 2.0**octave
    x = np.clip(wide, -(2.0**29), 2.0**29).astype(np.float32)
    code, places, _ = context.encode(x, 1.0, WEIGHT, shapes, dependent=True)
    assert np.array_equal(context.decode(code, shapes, dependent=True), places)
    assert np.all(
        np.abs(np.abs(places) - np.abs(x)) <= np.maximum(2, np.where(places, 2, 8)) + np.abs(x) / 2**23
    )
    assert np.all(np.sign(places) * np.sign(x) >= 0)


@pytest.mark.parametrize("value", [2.0**30, np.inf, np.nan])
def test_values_beyond_the_largest_place_are_refused(value: float) -> None:
    x = np.zeros(9, np.float32)
    x[4] = value
    with pytest.raises(ValueError, match="not finite or beyond 2\\^30 steps"):
        context.encode(x, 1.0, WEIGHT, [(9,)], dependent=True)


def test_outliers_neither_wrap_nor_cost_the_others() -> None:
    x = np.zeros(3000, np.float32)
    x[[7, 1500]] = 40_000, -(2.0**30) + 128
    code, places, _ = context.encode(x, 1.0, WEIGHT, [(50, 60)], dependent=True)
    assert np.all(np.abs(places[[7, 1500]] - x[[7, 1500]]) <= 2)
    assert np.count_nonzero(places) == 2
    assert len(code) <= 70


def test_the_only_value_is_sent_however_low_the_rate() -> None:
    for at in (0, 1234, 2999):
        x = np.zeros(3000, np.float32)
        x[at] = -3e-4
        _, y = coded(RateDistortion(rate=0.001, trellis=True), x, layout_of([(50, 60)]))
        assert np.flatnonzero(y).tolist() == [at]


def test_golden_bytes() -> None:
    """A changed bitstream needs a new version number."""
    packet = Packet(np.frombuffer(bytes.fromhex(GOLDEN), np.uint8), b"\xcd\xcc\xcc\x3d\x40\xf0\x08")
    x = RateDistortion(trellis=True).decode(packet, layout_of([(4, 4), (), (3,)]))
    place = np.array(PLACES, np.float32)
    moved = np.abs(place) + np.select([np.abs(place) == 1, np.abs(place) == 2], [0.5, -0.125], 0.0625)
    assert np.array_equal(x, (np.sign(place) * moved).astype(np.float32) / 2 * np.float32(0.1))


GOLDEN = "18b2378be97f5e064aa2244078d0"
PLACES = [0, 0, 0, -2, 0, 2, 0, 0, -4, 0, 0, 0, 40001, 2, 0, 0, -2, 0, 0, 8]


@pytest.mark.parametrize("count", [3000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_damaged_packets_decode_to_something_finite_or_raise_one_error(count: int) -> None:
    fuzz(count, least_rate=1.5, trellis=True)


@pytest.mark.parametrize(
    ("header", "body", "said"),
    [
        (b"\0\0\x80?\0\0", np.zeros(4, np.uint8), "does not hold a header"),  # the default's
        (b"\0\0\x80\xff\0\0\0", np.zeros(4, np.uint8), "step of -inf"),
        (b"\0\0\0\0\0\0\0", np.zeros(1, np.uint8), "levels without a step"),
        (b"\0\0\x80?\0\0\0", np.zeros(900, np.uint8), "no encoder makes"),
        (b"\0\0\x80?\0\0\0", np.full(9000, 255, np.uint8), "packet"),
    ],
)
def test_packets_that_no_encoder_makes_are_refused(header: bytes, body: NDArray[Any], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        RateDistortion(trellis=True).decode(Packet(body, header), LAYOUT)


def test_a_trellis_is_on_or_off() -> None:
    with pytest.raises(ConfigError, match=r"codec.trellis .* got 1"):
        default(trellis=1)  # type: ignore[arg-type]
    assert repr(default()) == "RateDistortion(step=None, rate=1.0, nmse=None)"  # seeds the CRC
    assert repr(default(trellis=True)) != repr(default())
