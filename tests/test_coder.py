"""The loops of the default codec, one by one, against what each says it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedapp.codec.encoder import _place_signs
from fedapp.codec.estimate import Like, Magnitudes
from fedapp.codec.expected import expect, factors_by_four, factors_of
from fedapp.codec.layers import energy, largest
from fedapp.codec.model import ONE, SYMBOLS, UPPER, lean_after, sign_context
from fedapp.codec.quantizer import LAMBDA, Quantizer
from fedapp.codec.range_coder import FULL, WORD, begin, bits, ended, finish, narrow, shift

MOST_NEAR, MOST_COLUMN = 2**20, 2047 << 12
slowly = settings(deadline=None)  # the first example compiles
FRESH = np.iinfo(np.int32).max  # no loop may read what it has not written


# What is expected


@slowly
@given(st.integers(1, 32), st.integers(0, 2**32 - 1), st.sampled_from([1, 300, MOST_NEAR]), st.floats(0, 1))
def test_row_factors_by_fours_are_those_one_by_one(fours: int, seed: int, most: int, share: float) -> None:
    n, rng = 4 * fours, np.random.default_rng(seed)
    near = np.empty(n + 2, np.int32)[1:]
    near[:] = rng.integers(0, most, n + 1, endpoint=True) * (rng.random(n + 1) < share)
    column = np.exp(rng.uniform(0, np.log(MOST_COLUMN), n)).astype(np.int32)
    start = rng.integers(1, [16 * MOST_NEAR << 12, 16 * 4 * MOST_COLUMN])
    found, wanted, (sums, after) = (
        np.full(n, FRESH, np.int32),
        np.full(n, FRESH, np.int32),
        start[None].repeat(2, 0),
    )
    factors_of(near, column, 4, 4, 4, after, wanted)
    factors_by_four(near, column, 4, sums, found, np.full((3, 128), 7))
    assert np.array_equal(found, wanted)
    assert np.array_equal(sums, after)


def test_a_magnitude_is_expected_of_its_column_its_row_and_its_left_neighbour() -> None:
    rng = np.random.default_rng(0)
    near, column = rng.integers(0, MOST_NEAR, 129), rng.integers(0, MOST_COLUMN, 128)
    factors, e = rng.integers(0, 2**24, 128), np.empty(128, np.int32)
    of_all = expect(near.astype(np.int32), column.astype(np.int32), factors.astype(np.int32), 4, e)
    mean = np.minimum(column * factors >> 16, 1 << 27)
    assert np.array_equal(e, mean + (((near[:128] << 8) - mean) >> 4))
    assert of_all == np.bitwise_or.reduce(e)


@slowly
@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(-4096, 4095))
def test_signs_lie_where_the_balance_before_them_says(n: int, seed: int, share: float, lean: int) -> None:
    rng = np.random.default_rng(seed)
    x, level = rng.standard_normal(n).astype(np.float32), (rng.random(n) < share).astype(np.int32) * 3
    places = np.zeros(n, np.uint16)
    sent, after = _place_signs(
        x, level, 46, lean, np.full(n, FRESH, np.int32), np.full(n, FRESH, np.int32), places
    )
    wanted = []
    for minus in (x < 0)[level > 0].tolist():
        wanted.append((46 + sign_context(np.int32(lean))) * SYMBOLS + minus)
        lean = lean_after(lean, int(minus))
    assert (sent, after, places[:sent].tolist()) == (len(wanted), lean, wanted)


# The range coder


def written(intervals: NDArray[np.uint64]) -> bytes:
    """The code of these intervals."""
    (low, span, at), words = (0, FULL, 0), np.zeros(len(intervals) + 1, np.uint64)
    for interval in intervals:
        low, span = narrow(True, interval, low, span)
        if span < WORD:
            low, span, at = shift(True, low, span, at, words)
        assert 0 <= low < low + span < 2**63
    coder = np.array([low, span, at])
    code = finish(coder, words)
    assert 8 * len(code) < bits(coder) + 16
    return code


def read(code: bytes, intervals: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The coder after these intervals, each of which the code points into."""
    coder, words = begin(code)
    low, span, at = (int(v) for v in coder)
    for interval in intervals:
        low, span = narrow(False, interval, low, span)
        assert 0 <= low < span
        if span < WORD:
            low, span, at = shift(False, low, span, at, words)
    return np.array([low, span, at])


def share_of(width: int, below: int) -> np.uint64:
    return np.uint64(width) << UPPER | np.uint64(below)


@given(st.lists(st.tuples(st.integers(1, 2**ONE), st.floats(0, 1)), max_size=120))
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read_and_no_byte_is_too_many(symbols: list[tuple[int, float]]) -> None:
    intervals = np.array([share_of(w, round(share * (2**ONE - w))) for w, share in symbols], np.uint64)
    code = written(intervals)
    coder = read(code, intervals)
    assert ended(coder, code)
    assert not ended(coder, code + bytes(5))


@pytest.mark.parametrize("width", [1, 3, 2**10 - 1, 2**19, 2**ONE - 1])
def test_a_carry_goes_through_all_words(width: int) -> None:
    """The highest symbols leave ones, until one of them lies just above."""
    highest = [share_of(width, 2**ONE - width)] * 400
    for end in ([], [share_of(1, 2**ONE - 1)], [share_of(2**ONE - 1, 1)]):
        intervals = np.array([*highest, *end], np.uint64)
        read(written(intervals), intervals)


# Estimates, points and what is told of a vector


def entropy_of(x: NDArray[np.float64], step: float, like: Like) -> float:
    """`Magnitudes.bits` of one value, as its docstring has it, from the values themselves."""
    magnitude = np.abs(x) / step * like.finer
    halvings = max(0.0, np.floor(np.log2(magnitude.mean() / 16)))
    magnitude, edge = magnitude / 2**halvings, 0.62
    for _ in range(like.rounds):
        p = min(max((magnitude > edge).mean(), 1e-4), 0.5)
        edge = 0.5 + like.weight / 2 * (np.log2((1 - p) / p) + 1.4)
    level = np.where(magnitude > edge, np.maximum(np.rint(magnitude), 1), 0)
    share = np.unique(level, return_counts=True)[1] / len(level)
    found = -(share * np.log2(share)).sum() + (level > 0).mean() + halvings
    return float(found * (found + 0.4) / (found + 0.6))


@pytest.mark.parametrize("like", [Like(1.0, LAMBDA, 3), Like(1.6, 0.17, 8)])
@pytest.mark.parametrize("step", [1e-3, 0.2, 1.0, 3.0, 20.0])
def test_estimated_bits_are_the_entropy_of_levels(like: Like, step: float) -> None:
    x = np.random.default_rng(0).standard_normal(60_000).astype(np.float32)
    found = Magnitudes(x, float(np.abs(x).max())).bits(step, like) / len(x)
    assert found == pytest.approx(entropy_of(x.astype(np.float64), step, like), rel=0.01, abs=2e-4)


@pytest.mark.parametrize("width", [2, 3, 4, 5, 7, 9, 10, 121, 289])
def test_a_sample_sees_all_columns(width: int) -> None:
    """Sixteen magnitudes lie along a row; a stride that rows are a multiple of would see a few of them."""
    row = 2.0 ** (np.arange(width) * 16 // width)
    x = np.tile(row.astype(np.float32), 1_300_000 // width)
    found = Magnitudes(x, float(x.max()))
    for magnitude in np.unique(x)[1:]:
        share = (x >= magnitude).mean()
        assert found.above(float(magnitude) * (1 + 2**-9)) / len(x) == pytest.approx(share, abs=0.005)


@slowly
@pytest.mark.parametrize(("trellis", "apart"), [(False, 1.0), (True, 0.5)])
@given(
    levels=arrays(np.int32, st.integers(0, 40), elements=st.integers(-(2**20), 2**20)),
    step=st.floats(0.01, 100),
)
def test_points_lie_a_step_apart_and_move_away_from_zero(
    trellis: bool, apart: float, levels: NDArray[np.int32], step: float
) -> None:
    moves, scale = ([-12, 5, 100], np.float32(step)) if trellis else ([-12, 100], np.float32(step))
    magnitude = np.abs(levels.astype(np.float64))
    others = [magnitude == 0, magnitude == 1, (magnitude == 2) & trellis]
    moved = magnitude * apart + np.select(others, [0, moves[0] / 256, moves[1] / 256], moves[-1] / 256)
    wanted = (np.sign(levels) * moved).astype(np.float32)
    assert np.array_equal(Quantizer(trellis).points(levels.copy(), moves), wanted)
    assert np.array_equal(Quantizer(trellis).points(levels.copy(), moves, float(scale)), wanted * scale)


@slowly
@given(arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32)))
def test_the_largest_magnitude_is_numpys(x: NDArray[np.float32]) -> None:
    wanted = np.abs(x).max() if len(x) else 0.0
    assert largest(x) == wanted or np.isnan([largest(x), wanted]).all()


@slowly
@given(
    arrays(np.float32, st.integers(0, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.floats(1e-30, 1e3),
)
def test_energy_is_the_sum_of_squares(x: NDArray[np.float32], scale: float) -> None:
    assert energy(x, scale) == pytest.approx(((x.astype(np.float64) * scale) ** 2).sum(), rel=1e-12)
    assert energy(x[::2], scale) == pytest.approx(((x[::2].astype(np.float64) * scale) ** 2).sum(), rel=1e-12)
