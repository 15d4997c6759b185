"""Products of low rank: what is found, when it pays, and what the decoder takes for them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_rate_distortion import NEAREST, coded, layout_of, nmse

from fedapp.codec import Packet, context
from fedapp.codec.factors import Factors, _costs
from fedapp.codec.packet import decode_update, pack
from fedapp.codec.products import Place, Products, magnitude, places
from fedapp.codec.rate_distortion import RateDistortion
from fedapp.codec.varint import Reader, varint
from fedapp.errors import DecodeError

SHAPES = [(60, 1, 5, 9), (60,), (40, 60), (3, 40), (10, 40)]  # of which (3, 40) is too thin


def low_rank(
    rows: int, columns: int, sizes: NDArray[Any], noise: float, seed: int = 0
) -> NDArray[np.float32]:
    """A matrix with these leading singular values, and noise of so much in the mean over its rows."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, len(sizes))))
    right, _ = np.linalg.qr(rng.standard_normal((columns, len(sizes))))
    found = left * sizes @ right.T + noise / np.sqrt(columns) * rng.standard_normal((rows, columns))
    return np.asarray(found, np.float32)


def update(rank: int = 3, noise: float = 0.05, seed: int = 0) -> NDArray[np.float32]:
    """Layers of low rank, with noise."""
    parts = []
    for index, shape in enumerate(SHAPES):
        rows = shape[0] if len(shape) > 1 else 1
        grid = rows, int(np.prod(shape)) // rows
        parts.append(low_rank(*grid, 0.6 ** np.arange(min(rank, *grid)), noise, seed + index).ravel())
    return (1e-2 * np.concatenate(parts)).astype(np.float32)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (1, 700), (90, 90), (2100, 31), (31, 2100)])
def test_triplets_are_those_of_an_exact_decomposition(shape: tuple[int, int]) -> None:
    x = low_rank(*shape, 0.5 ** np.arange(min(6, *shape)), 1e-3)
    factors = Factors(x.ravel(), float(np.abs(x).max()), layout_of([shape]))
    found = factors.extend(1e-3)
    assert found == (min(shape) > 3)
    if not found:
        assert factors.residual is not x
        return
    layer = factors._layers[0]
    exact = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    k = len(layer.sizes)
    assert 4 <= k <= 6  # the last are near the noise
    assert layer.sizes == pytest.approx(exact[:k], rel=3e-4)
    for side in (layer.left, layer.right):
        assert np.linalg.norm(side, axis=1) == pytest.approx(layer.sizes, rel=1e-4)
    assert np.linalg.norm(factors.residual) == pytest.approx(np.sqrt((exact[k:] ** 2).sum()), rel=1e-3)
    together = (layer.left / layer.sizes[:, None]).T @ layer.right + factors.residual.reshape(shape)
    assert np.allclose(together, x, atol=1e-5)


@pytest.mark.parametrize("right", [False, True])
def test_vectors_are_fitted_to_rounded_ones_as_by_least_squares(right: bool) -> None:
    x = 300 * low_rank(40, 70, 0.7 ** np.arange(6), 1e-3)
    factors = Factors(x.ravel(), float(np.abs(x).max()), layout_of([(40, 70)]))
    assert factors.extend(1.0)
    products, values = factors.at(1.0)
    (k, _), _ = products.shapes
    rounded = np.rint(values / 4) * 4
    fitted = values.copy()
    products.fit(int(right), x.ravel(), fitted, products.apart(rounded)[1 - right])
    sides = [slice(0, 40 * k), slice(40 * k, 110 * k)]
    mine, other = sides[right], sides[not right]
    assert (fitted[other] == values[other]).all()

    def left_by(vectors: NDArray[Any]) -> float:
        left = x.ravel().copy()
        products.add(left, vectors, -1)
        return float(np.linalg.norm(left))

    others = rounded[other].reshape(k, -1) / magnitude(products.exponents[0])[:, None]
    grid = x if right else x.T
    best, *_ = np.linalg.lstsq(others.T, grid.astype(np.float64), rcond=None)
    least = np.linalg.norm(grid - others.T @ best)
    together = rounded.copy()
    assert left_by(rounded) > 1.2 * least  # there is something to make up for
    together[mine] = values[mine]
    before = left_by(together)
    together[mine] = fitted[mine]
    assert least * (1 - 1e-6) < left_by(together) < least + 0.05 * (before - least)


def test_vectors_whose_other_side_is_lost_are_not_fitted() -> None:
    """What came to nothing says nothing; and nothing gets as large as no level may be."""
    products = Products((Place(0, 4, 6),), (np.array([9, 9], np.uint8),))
    values = np.arange(1, 21, dtype=np.float32)
    vectors = values.copy()
    vectors[:4], vectors[4:8] = 0, 1e-9
    x = np.full(24, 1e6, np.float32)
    fitted = values.copy()
    products.fit(1, x, fitted, products.apart(vectors)[0])
    assert not fitted[8:14].any()
    assert (fitted[14:] == values[14:]).all()


def test_more_than_a_block_is_found_in_turns() -> None:
    x = low_rank(200, 300, 0.85 ** np.arange(36), 1e-5)
    factors = Factors(x.ravel(), float(np.abs(x).max()), layout_of([x.shape]))
    assert factors.extend(1e-5)
    assert factors.count == 36
    assert np.linalg.norm(factors.residual) < 2e-4


def test_finer_steps_take_more_and_nothing_is_found_twice() -> None:
    x = low_rank(80, 120, 0.7 ** np.arange(12), 1e-3)
    factors, counts = Factors(x.ravel(), 1.0, layout_of([x.shape])), []
    for step in (1.0, 0.1, 0.03, 0.01, 0.01):
        before = factors.count
        assert factors.extend(step) == (factors.count > before)
        counts.append(factors.count)
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[1] < counts[3] == counts[4]
    sizes = factors._layers[0].sizes
    assert (np.diff(sizes) < 0).all()


def structured(rows: int, columns: int) -> NDArray[np.float32]:
    """Some rows and some columns move much more than others, without low rank."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal((rows, 1)) + rng.standard_normal(columns))
    return (scale * rng.standard_normal((rows, columns))).astype(np.float32)


@pytest.mark.parametrize("step", [0.05, 0.3, 1.0, 3.0])
def test_what_has_no_low_rank_has_no_products(step: float) -> None:
    noise = np.random.default_rng(0).standard_normal((100, 200)).astype(np.float32)
    for x in (noise, structured(100, 200)):
        factors = Factors(x.ravel(), float(np.abs(x).max()), layout_of([x.shape]))
        assert not factors.extend(step * float(x.std()))
        assert factors.residual.base is x


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize(("rate", "gain"), [(0.2, 0.5), (0.5, 5.0), (2.0, 4.0)])
def test_they_lower_the_error_at_equal_bytes(trellis: bool, rate: float, gain: float) -> None:
    x, layout = update(), layout_of(SHAPES)
    size, y = coded(RateDistortion(rate=rate, trellis=trellis), x, layout)
    plain_size, plain = coded(RateDistortion(rate=rate, trellis=trellis, products=False), x, layout)
    assert size <= 1.03 * plain_size + 32
    assert 10 * np.log10(nmse(x, plain) / nmse(x, y)) > gain


def test_costs_are_those_of_reverse_water_filling() -> None:
    """Cover and Thomas 2006, section 10.3.3: below the water the power, above it what bits are worth.

    Rows and columns alike in power fall into one octave, so that sums over octaves are exact.
    """
    rows, columns, power, water = 8, 16, 50.0, 0.01
    left = np.full((1, rows), np.sqrt(40.0 / rows), np.float32)
    right = np.full((1, columns), np.sqrt(40.0 / columns), np.float32)
    costs = _costs(left, right, np.full(rows, power / rows), np.full(columns, power / columns), 1, water)

    def gaussian(variance: float) -> float:
        return water * (1 + np.log(variance / water)) if variance > water else variance

    values = rows * columns
    vectors = rows * gaussian(40 / rows) + columns * gaussian(40 / columns)
    assert costs == pytest.approx(
        [values * gaussian(power / values), values * gaussian(10 / values) + vectors]
    )
    flooded = _costs(left, right, np.full(rows, power / rows), np.full(columns, power / columns), 1, 10.0)
    assert flooded == pytest.approx([power, 10 + 40 + 40])


def test_layers_that_may_have_products() -> None:
    layout = layout_of(SHAPES)
    assert list(places(layout)) == [Place(0, 60, 45), Place(2760, 40, 60), Place(5280, 10, 40)]
    assert [place.most for place in places(layout)] == [12, 12, 4]
    assert Place(0, 4000, 4000).most == 255  # a byte


@settings(deadline=None)
@given(st.data())
def test_what_is_said_of_products_comes_back(data: st.DataObject) -> None:
    layout = layout_of(SHAPES)
    of = tuple(places(layout))
    byte = st.integers(0, 255)
    exponents = tuple(np.array(data.draw(st.lists(byte, max_size=place.most)), np.uint8) for place in of)
    reader = Reader(Products(of, exponents).to_bytes() + b"rest")
    again = Products.read(reader, layout)
    assert reader.rest() == b"rest"
    assert again.places == of
    assert [e.tolist() for e in again.exponents] == [e.tolist() for e in exponents]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\x0d\0\0", "13 products for a layer of 60 x 45, which may have 12"),
        (b"\x01\0", "ends 1 bytes early"),
        (b"\x02\0\0\x01", "ends 1 bytes early"),
        (b"\x01\0\0\x04\xff\xff\x7f", "above 7"),
        (b"\0\0\0\x05\0", "ends 4 bytes early"),
    ],
)
def test_packets_with_products_that_no_encoder_makes_are_refused(body: bytes, said: str) -> None:
    packet = Packet(np.frombuffer(body, np.uint8), b"\0\0\x80?\0\0\0\0")
    with pytest.raises(DecodeError, match=said):
        RateDistortion().decode(packet, layout_of(SHAPES))


def test_products_beyond_float32_are_refused() -> None:
    layout = layout_of([(4, 6)])
    first, _, _ = context.encode(np.full(10, 2.0**29, np.float32), 1.0, NEAREST, [(1, 4), (1, 6)])
    rest, _, _ = context.encode(np.zeros(24, np.float32), 1.0, NEAREST, [(4, 6)])
    body = np.frombuffer(b"\x01\0" + varint(len(first)) + first + rest, np.uint8)
    header = np.float32(1e25).tobytes() + bytes(4)
    with pytest.raises(DecodeError, match="beyond float32"):
        RateDistortion().decode(Packet(body, header), layout)


def test_golden_bytes() -> None:
    """A changed bitstream needs a new version number."""
    layout, rng = layout_of([(6, 8), (6,)]), np.random.default_rng(0)
    vectors = rng.integers(-9, 10, 14).astype(np.float32)
    rest = rng.integers(-1, 2, layout.size).astype(np.float32)
    first, _, _ = context.encode(vectors, 1.0, NEAREST, [(1, 6), (1, 8)])
    code, _, _ = context.encode(rest, 1.0, NEAREST, [(6, 8), (6,)])
    body = b"\x01\x09" + varint(len(first)) + first + code  # one product, of 2^(9 / 4) steps
    header = np.float32(0.25).tobytes() + bytes([0, 0, 64, 240])  # vectors' points move by 64/256, -16/256
    assert body.hex() == GOLDEN
    x = RateDistortion().decode(Packet(np.frombuffer(body, np.uint8), header), layout)
    magnitude = np.abs(vectors)
    points = np.sign(vectors) * np.where(magnitude > 1, magnitude - np.float32(1 / 16), magnitude * 1.25)
    product = np.outer(points[:6], points[6:]) * np.float32(2**-2.25)
    assert x == pytest.approx(0.25 * (rest + np.append(product, np.zeros(6))), rel=1e-6, abs=1e-7)


GOLDEN = "01090a000120cb9e20edc32d1d03d16abfd8b5fd5c126393855f31c2"


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e36])
@pytest.mark.parametrize(
    "codec", [RateDistortion(rate=0.5), RateDistortion(step=0.5), RateDistortion(nmse=0.01)]
)
def test_scale_changes_nothing(codec: RateDistortion, scale: float) -> None:
    x, layout = update(), layout_of(SHAPES)
    error = nmse(x, coded(codec, x, layout)[1])
    scaled = x * np.float32(scale)
    packet, _ = codec.encode(scaled, layout, {}, np.random.default_rng(0))
    y = decode_update(pack(packet, codec, layout), codec, layout)
    assert nmse(scaled, y) == pytest.approx(error, rel=0.1)
    assert len(packet.header) == 8  # there are products


def test_a_layer_of_huge_values_does_not_hide_small_ones() -> None:
    """Nothing under- or overflows where layers lie far apart, and the small ones just are not sent."""
    x, layout = update(), layout_of(SHAPES)
    x[:2700] *= np.float32(1e20)
    x[5280:] *= np.float32(1e-15)
    _, y = coded(RateDistortion(rate=1.0), x, layout)
    assert nmse(x, y) < 0.05
    assert not y[5280:].any()
