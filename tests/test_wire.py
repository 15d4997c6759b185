"""The wire: golden bytes, hostile bytes, exact sums, and what each strategy makes of a round's replies."""

import gc
import itertools
import math
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import OmegaConf

from fedapp import config, records, vector
from fedapp.codec import Codec, Layout, Slot
from fedapp.codec.chain import Chain, ErrorFeedback, Identity, pipeline, staged
from fedapp.codec.entropy import Ans
from fedapp.codec.founding import FixedPoint, RandomPrune, rules
from fedapp.codec.huffman import Huffman
from fedapp.codec.lowrank import LowRank
from fedapp.codec.packet import decode_update, pack
from fedapp.codec.per_layer import PerLayer
from fedapp.codec.prune import RandomMask, TopK
from fedapp.codec.quantize import DeadZone
from fedapp.codec.rate_distortion import RateDistortion
from fedapp.codec.rotate import Eden
from fedapp.codec.sign import Sign
from fedapp.codec.ternary import Ternary
from fedapp.codec.uniform import Dither, Stochastic, Uniform
from fedapp.codec.varint import varint
from fedapp.codec.zstd import Zstd
from fedapp.cohorts import Cohort
from fedapp.engine.local import LocalGrid
from fedapp.errors import DecodeError
from fedapp.exact_sum import ExactSum
from fedapp.privacy.central import CentralGaussian
from fedapp.privacy.mechanism import Plan
from fedapp.records import ARRAYS, METRICS, STYPE, UPDATE, WEIGHT, as_bytes
from fedapp.running_sum import Reader, terms_in
from fedapp.vector import Reply, arrays_in, record_of
from fedapp.wire import Wire, compress

EVERYONE = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
STRATEGIES = sorted(path.stem for path in (config.CONF / "strategy").glob("*.yaml"))
STREAMED = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox", "scaffold")
OTHERS = ("fedmedian", "fedtrimmedavg", "multikrum", "krum", "bulyan", "qfedavg")


@pytest.fixture(autouse=True, scope="module")
def _surroundings() -> Iterator[None]:
    LocalGrid(ClientApp(), [1], workers=0)  # sets the global that messages read the run and the node from
    gc.freeze()  # some of Flower's strategies collect garbage at each reply, which all modules make slow
    yield
    gc.unfreeze()


# Golden bytes

LAYOUT = Layout((Slot("matrix", (3, 4), 0), Slot("scalar", (), 12), Slot("vector", (7,), 13)), 20)
VECTOR = np.array(
    [0.5, -1.25, 0, 3, 0.125, -0.75, 8, 0, 0, 1, -2, 0.25, 40, 0, 0.0625, -6, 0, 0, 1.5, -0.5], np.float32
)
# A changed encoding is a breaking change: clients and servers of different versions would refuse, or worse,
# misread each other. Raise the version in codec/packet.py with any change here.
GOLDEN: dict[str, tuple[Codec, str]] = {
    "identity": (
        Identity(),
        "050237a0e513000000003f0000a0bf00000000000040400000003e000040bf0000004100000000000000000000803f000000c00000803e00002042000000000000803d0000c0c000000000000000000000c03f000000bf",
    ),
    "top_k": (TopK(0.2), "0502e44266c00904246f663d050000000000404000000041000020420000c0c0"),
    "dead_zone": (
        DeadZone(0.5, 0.38),
        "0501842773790639559440f9ad000000000000000000000000010000000000000000000000020000000000000000000000000000000000000000000000090000000000000000000000ffffffff00000000000000000000000000000000",
    ),
    "dead_zone_ans": (
        Chain((DeadZone(0.1, 0.5), Ans())),
        "0500150fc026120628556d3fdd0b0a14030001030902010103090000002b000000faffffffb3950d9f43a5b70e01000000",
    ),
    "top_k_dead_zone_ans": (
        Chain((TopK(0.5), DeadZone(0.5, 0.5), Ans())),
        "0500b514e7df18090a000080354b020000060fc1d140111a060a010107010106000000b6d64c5103000000",
    ),
    "pipeline": (pipeline(), "050013176755100639559441002808140200001300010024cd8c01"),
    "pipeline_feedback": (
        pipeline(feedback=True),
        "0500d07cecb2100639559441002808140200001300010024cd8c01",
    ),
    "pipeline_top_k": (
        pipeline(keep=0.1, step=0.5, offset=0.5, feedback=True),
        "05001de812dc180502359a191a065ac166418ec60a0203000000000100010009000001",
    ),
    "error_feedback": (
        ErrorFeedback(TopK(0.2)),
        "0502b70fe78e0904246f663d050000000000404000000041000020420000c0c0",
    ),
    "prune": (
        RandomPrune(0.2),
        "0502fa274a14045f82c2d90000203f0000c8bf000000000000203e000070bf0000204100000000000000000000a03f000020c00000a03e000000000000f0c000000000000000000000f03f000020bf",
    ),
    "prune_written": (
        RandomPrune(0.5, 0.4, corrected=False),
        "0502aa49fc72055f82c2d90a0000003f0000a0bf000000000000003e000040bf0000004100000000000000000000803f000000c00000803e000000000000c0c000000000000000000000c03f000000bf",
    ),
    "fixed_point": (
        FixedPoint(127),
        "0501b838a9d8048642a13e02000000fcffffff000000000900000001000000feffffff1a000000000000000000000004000000faffffff000000007f0000000000000000000000edffffff000000000000000005000000feffffff",
    ),
    "prune_quantize_written": (
        rules("weight", alpha=0.4, levels=15, beta=0.1, corrected=False),
        "0500b931878718055f82c2d90a048988083f0c1104010000020a01010100010f000000488fd2b72d811000",
    ),
    "per_layer": (
        PerLayer((("matrix", Identity()), ("v*", rules(levels=15))), FixedPoint(7, corrected=False)),
        "0500d820c0db003102000000003f0000a0bf00000000000040400000003e000040bf0000004100000000000000000000803f000000c00000803e19000c04cdcccc3e06070101040002f1ffffff040000005e4992180901046edbb64007000000",
    ),
    "random_mask": (RandomMask(0.25), "05024584e119045f82c2d90000a0c0000000c1000000000000803e00000000"),
    "random_mask_unscaled": (
        RandomMask(0.25, unbiased=False),
        "050244c7f604045f82c2d90000a0bf000000c0000000000000803d00000000",
    ),
    "ternary": (
        staged(Ternary(0.2), entropy="ans", feedback=True),
        "05001bdbd6640c04000064410614010110030099d2330f45000000",
    ),
    "sign": (Sign(), "0500aaee986f0c0000b43f00002042b76d933f442110"),
    "sign_by_channel": (Sign("channel"), "050042905444140000983f00000e400000503f00002042b76d933f442110"),
    "uniform": (
        Uniform(8),
        "0501290068fd140783c13c0502813d0502813c8642a13e0783413d15000000cbffffff000000007f00000002000000f4ffffff7f00000000000000000000003f00000081ffffff100000007f000000000000000100000081ffffff000000000000000020000000f5ffffff",
    ),
    "uniform_huffman": (
        Chain((Uniform(4, "layer"), Huffman())),
        "0500e0bd11ff1b0c2549923f6edbb640b76d5b3f0d14070040000431444000402f004727996f28d8",
    ),
    "stochastic": (
        Chain((Stochastic(4, 8), Ans())),
        "0500b81fff081a0ca9ec0a40520a2241c262ca3e0c1404000000030c0200000300ebb59fb30f680400",
    ),
    "dither_huffman": (
        Chain((Dither(0.5), Huffman())),
        "0500ac173c3912085f82c2d93a559440081402010313331c0008000000030390a0",
    ),
    "eden": (Eden(1), "050041e0a1b409145f82c2d96416454173df597c"),
    "eden_biased": (Eden(3, unbiased=False), "05000912bf8909145f82c2d9473de840453badb7664a452dadb75689"),
    "low_rank": (
        LowRank(1),
        "0502731f7493001c18ccbd2d3e76bfbd60823e1d252ebe62e18c3f224503c1cbf370be00002042000000000000803d0000c0c000000000000000000000c03f000000bf",
    ),
    "zstd": (
        Chain((DeadZone(0.5, 0.38), Zstd())),
        "05008c557ab3080639559440f9ad0028b52ffd2050ad00006800000002000004001200000100020004a22dc005",
    ),  # bytes of another zstd may differ, and decode too
}
CODECS = [codec for codec, _ in GOLDEN.values()]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=GOLDEN.keys())


def packed(codec: Codec, x: NDArray[np.float32] = VECTOR, layout: Layout = LAYOUT) -> bytes:
    return pack(codec.encode(x, layout, {}, np.random.default_rng(0))[0], codec, layout)


def repaired(data: bytes, codec: Codec, layout: Layout = LAYOUT) -> bytes:
    """The same bytes with a CRC that fits them, so that damage reaches the stages."""
    seed = zlib.crc32(repr((codec, layout)).encode())
    return data[:2] + struct.pack("<I", zlib.crc32(data[6:], seed)) + data[6:]


@pytest.mark.parametrize(("codec", "golden"), GOLDEN.values(), ids=GOLDEN.keys())
def test_golden_bytes(codec: Codec, golden: str) -> None:
    assert packed(codec).hex() == golden


DECODED = {  # CRC-32 of the vector, on any machine
    "identity": 0xCA81CEA5,
    "top_k": 0xA68D073E,
    "dead_zone": 0x44C02E3C,
    "dead_zone_ans": 0xBA48200B,
    "top_k_dead_zone_ans": 0x222708ED,
    "pipeline": 0xE550210A,
    "pipeline_feedback": 0xE550210A,
    "pipeline_top_k": 0xA41A9DD8,
    "error_feedback": 0xA68D073E,
    "random_mask": 0x38A1F274,
    "random_mask_unscaled": 0x15D8C90B,
    "ternary": 0x39E9C160,
    "sign": 0x1C59717C,
    "sign_by_channel": 0x53741C1F,
    "uniform": 0x98237F4E,
    "uniform_huffman": 0x198AA66F,
    "stochastic": 0x0E246D35,
    "dither_huffman": 0x99A2D743,
    "eden": 0xB9312015,
    "eden_biased": 0xB4679B02,
    "low_rank": 0x3F65AE40,
    "zstd": 0x44C02E3C,
    "prune": 0x691A35A4,
    "prune_written": 0x3864DFFA,
    "fixed_point": 0x24E8DAAF,
    "prune_quantize_written": 0x5AF64D7A,
    "per_layer": 0x6097A044,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_decode_to_the_same_bits(name: str) -> None:
    codec, golden = GOLDEN[name]
    decoded = decode_update(bytes.fromhex(golden), codec, LAYOUT)
    assert zlib.crc32(decoded.astype("<f4").tobytes()) == DECODED[name]


# Hostile bytes


def survives(data: bytes, codec: Codec, layout: Layout = LAYOUT) -> bool:
    """Whether the bytes decode; anything but a finite vector or a DecodeError fails the test."""
    try:
        x = decode_update(data, codec, layout)
    except DecodeError:
        return False
    assert x.shape == (layout.size,)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    return True


@every_codec
def test_truncated_packets_are_refused_at_every_length(codec: Codec) -> None:
    data = packed(codec)
    for length in range(len(data)):
        assert not survives(data[:length], codec)
        if length >= 6:
            assert not survives(repaired(data[:length], codec), codec)
    assert not survives(data + b"\0", codec)
    assert not survives(repaired(data + b"\0", codec), codec)


@every_codec
def test_every_flipped_bit_is_noticed(codec: Codec) -> None:
    data = packed(codec)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not survives(bytes(flipped), codec)


@every_codec
def test_every_flipped_bit_behind_a_good_checksum_is_survived(codec: Codec) -> None:
    data = packed(codec)
    for bit in range(48, 8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        survives(repaired(bytes(flipped), codec), codec)


@every_codec
@settings(deadline=None, max_examples=150)
@given(data=st.binary(max_size=120), kind=st.integers(0, 3))
def test_random_bytes_are_survived(codec: Codec, data: bytes, kind: int) -> None:
    survives(data, codec)
    survives(repaired(bytes([1, kind]) + b"\0\0\0\0" + data, codec), codec)


@every_codec
@settings(deadline=None, max_examples=150)
@given(edits=st.lists(st.tuples(st.integers(6, 200), st.integers(0, 255), st.integers(0, 2)), max_size=6))
def test_edited_packets_are_survived(codec: Codec, edits: list[tuple[int, int, int]]) -> None:
    data = bytearray(packed(codec))
    for place, value, how in edits:
        place %= len(data)
        if how == 0:
            data[place] = value
        elif how == 1:
            data[place:place] = bytes([value])
        elif len(data) > 8:
            del data[place]
    if len(data) >= 6:
        data[:2] = packed(codec)[:2]
        survives(repaired(bytes(data), codec), codec)


@pytest.mark.parametrize("name", sorted(path.stem for path in (config.CONF / "codec").glob("*.yaml")))
def test_decoding_takes_at_most_three_float32_vectors(name: str) -> None:
    shapes = {"conv.weight": (8, 4, 3, 3), "conv.bias": (8,), "a.weight": (900, 1000), "b.weight": (10, 900)}
    offsets = np.cumsum([0, *(math.prod(shape) for shape in shapes.values())]).tolist()
    layout = Layout(tuple(map(Slot, shapes, shapes.values(), offsets)), offsets[-1])
    x = np.random.default_rng(0).laplace(0, 1e-3, layout.size).astype(np.float32)
    codec = config.job_of(f"task=digits privacy=none codec={name}").codec
    data = pack(codec.encode(x, layout, {}, np.random.default_rng(0))[0], codec, layout)
    decode_update(data, codec, layout)  # imports and caches are not counted
    tracemalloc.start()
    try:
        decode_update(data, codec, layout)
        assert tracemalloc.get_traced_memory()[1] < 3 * x.nbytes
    finally:
        tracemalloc.stop()


@every_codec
@settings(deadline=None, max_examples=60)
@given(header=st.lists(st.integers(0, 2**40), max_size=12), body=st.binary(max_size=40))
def test_huge_counts_allocate_nothing_beyond_the_model(codec: Codec, header: list[int], body: bytes) -> None:
    fields = b"".join(map(varint, header))
    data = b"\2\0\0\0\0\0" + varint(len(fields)) + fields + body
    survives(packed(codec), codec)  # imports and caches are not counted
    tracemalloc.start()
    try:
        survives(repaired(data, codec), codec)
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


@every_codec
def test_packets_of_another_codec_or_model_are_refused(codec: Codec) -> None:
    data = packed(codec)
    for other in CODECS:
        if other != codec:
            assert not survives(data, other)
    renamed = Layout((Slot("matrix", (4, 3), 0), *LAYOUT.slots[1:]), 20)
    assert not survives(data, codec, renamed)
    assert not survives(repaired(data, codec, renamed), codec)
    smaller = Layout(LAYOUT.slots[:1], 12)
    assert not survives(repaired(data, codec, smaller), codec, smaller)


def test_another_version_is_named() -> None:
    data = packed(Identity())
    with pytest.raises(DecodeError, match="version 9, this fedapp reads 5"):
        decode_update(b"\x09" + data[1:], Identity(), LAYOUT)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = VECTOR.copy()
    x[5] = bad
    assert not survives(packed(Identity(), x), Identity())


def test_a_body_of_another_type_is_no_packet() -> None:
    with pytest.raises(TypeError, match="uint8, int32 or float32"):
        packed(Identity(), VECTOR.astype(np.float64))


# Weights and vectors


def model(seed: int = 0, buffers: bool = False) -> ArrayRecord:
    """Weights with a matrix, a vector, a 0-d array and, if asked for, BatchNorm's counter and a mask."""
    rng = np.random.default_rng(seed)
    arrays = {
        "matrix": rng.standard_normal((5, 3)).astype(np.float32),
        "scalar": np.array(rng.standard_normal(), np.float32),
        "vector": rng.standard_normal(40).astype(np.float32),
    }
    if buffers:
        arrays |= {"counter": np.array(100 + seed, np.int64), "last": np.ones(2, np.float32)}
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def trained_from(weights: ArrayRecord, seed: int) -> ArrayRecord:
    rng = np.random.default_rng(seed)
    trained = {}
    for name, array in weights.items():
        value = array.numpy()
        if value.dtype.kind == "f":
            trained[name] = (value + 0.1 * rng.standard_normal(value.shape)).astype(value.dtype)
        else:
            trained[name] = (value + seed).astype(value.dtype)
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in trained.items()})


def test_ravel_and_unravel_keep_shapes_and_types() -> None:
    arrays = ArrayRecord(
        {
            "single": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
            "counter": Array(np.array(7, np.int64)),
            "double": Array(np.array([[0.1], [0.2]])),
            "scalar": Array(np.array(2.5, np.float32)),
            "empty": Array(np.zeros((0, 3), np.float32)),
            "half": Array(np.array([1.5], np.float16)),
        }
    )
    layout = vector.layout_of(arrays)
    assert [slot.name for slot in layout.slots] == ["single", "double", "scalar", "empty", "half"]
    assert layout.size == 10
    flat = vector.ravel(arrays, layout)
    assert flat.dtype == np.float32
    back = vector.unravel(flat, layout, arrays)
    for name, value in back.items():
        assert value.dtype == arrays[name].numpy().dtype
        assert value.shape == arrays[name].numpy().shape
        assert np.allclose(value, arrays[name].numpy(), rtol=1e-7)


def test_ravel_refuses_other_shapes() -> None:
    layout = vector.layout_of(model())
    other = model()
    other["vector"] = Array(np.zeros(41, np.float32))
    with pytest.raises(DecodeError, match="vector has shape"):
        vector.ravel(other, layout)


# Exact sums


def test_the_sum_is_the_same_in_any_order() -> None:
    rng = np.random.default_rng(0)
    terms = [(rng.standard_t(2, 50).astype(np.float32), int(w)) for w in rng.integers(0, 6000, 6)]
    sums = set()
    for order in itertools.permutations(terms):
        total = ExactSum(50)
        for x, weight in order:
            total.add(x, weight)
        sums.add(total.total().tobytes())
    assert len(sums) == 1


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 60_000)), min_size=1, max_size=30))
def test_the_sum_agrees_with_fsum(terms: list[tuple[float, int]]) -> None:
    total = ExactSum(1)
    for x, weight in terms:
        total.add(np.array([x], np.float32), weight)
    exact = math.fsum(x * weight for x, weight in terms)
    assert total.weight == sum(weight for _, weight in terms)
    assert total.total()[0] == pytest.approx(exact, rel=1e-15, abs=len(terms) * 2.0**-60)


@pytest.mark.parametrize("x", [2.0**32, -(2.0**32), np.nan, np.inf, 1e300])
def test_values_that_could_wrap_are_refused(x: float) -> None:
    limbs = np.zeros((2, 2), np.int64)
    total = ExactSum(2, limbs)
    with pytest.raises(DecodeError, match="must stay below"):
        total.add(np.array([1, x]), 1)
    assert total.weight == 0
    assert not limbs.any()


def test_a_term_that_is_refused_at_its_end_leaves_nothing() -> None:
    """Of values whose fixed point is rounded, at ties too, in several parts."""
    rng, size = np.random.default_rng(0), 10_000
    x = np.concatenate([rng.standard_cauchy(size - 3) * 1e-9, [1.5 * 2.0**-60, -0.5 * 2.0**-60, np.nan]])
    limbs = rng.integers(-(2**40), 2**40, (2, size))
    before = limbs.copy()
    with pytest.raises(DecodeError, match="must stay below"):
        ExactSum(size, limbs).add(x, 3)
    assert np.array_equal(limbs, before)


def test_the_largest_sum_that_is_promised_does_not_wrap() -> None:
    limbs = np.zeros((2, 2), np.int64)
    total = ExactSum(2, limbs)
    largest = np.array([np.nextafter(2.0**32, 0), -np.nextafter(2.0**32, 0)])
    total.add(largest, 1)
    limbs *= 2**16 - 1  # as if so many had come
    total.add(largest, 1)
    total.weight = 2**16
    assert np.array_equal(total.total() / total.weight, largest)


# One round


def asked(strategy: Strategy, weights: ArrayRecord, server_round: int = 1, clients: int = 8) -> list[Message]:
    """The round's messages, by node."""
    view: Any = Cohort(list(range(2, 2 + clients)))
    messages = strategy.configure_train(server_round, weights, ConfigRecord(), view)
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def answer(
    message: Message,
    arrays: ArrayRecord,
    weight: Any = 10,
    codec: Codec | None = None,
    mechanism: Any = None,
    **metrics: Any,
) -> Message:
    """A client's reply to a train message: plain, or through the mod."""
    context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
    told = MetricRecord({WEIGHT: weight, "train_loss": 0.5, **metrics})

    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({ARRAYS: arrays, METRICS: told}), reply_to=message)

    if codec is None:
        return train(message, context)
    return compress(codec, np.random.default_rng(0), mechanism)(message, context, train)


def replying(content: RecordDict) -> Callable[[Message, Context], Message]:
    """A client that answers the same to everything."""
    return lambda message, context: Message(content, reply_to=message)


def round_of(
    strategy: Strategy, weights: ArrayRecord, codec: Codec | None, server_round: int = 1
) -> ArrayRecord:
    replies = [
        answer(message, trained_from(weights, seed), 10 + 7 * seed, codec)
        for seed, message in enumerate(asked(strategy, weights, server_round))
    ]
    arrays, _ = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    return arrays


def built(name: str) -> Strategy:
    node = OmegaConf.to_container(OmegaConf.load(config.CONF / "strategy" / f"{name}.yaml"))
    strategy: Strategy = config.build(node, "strategy", **EVERYONE)
    return strategy


def same(a: ArrayRecord, b: ArrayRecord) -> bool:
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and a[name].data == b[name].data for name in a
    )


def close(a: ArrayRecord, b: ArrayRecord, rel: float) -> bool:
    return all(
        np.abs(a[n].numpy() - b[n].numpy()).max(initial=0) <= rel * np.abs(b[n].numpy()).max(initial=0)
        for n in b
    )


def test_the_table_of_strategies_is_whole() -> None:
    assert sorted([*STREAMED, *OTHERS, "fedbuff"]) == STRATEGIES  # tests/test_asynchronous.py has the last


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_without_a_codec_the_wrapper_is_plain_flower(name: str) -> None:
    """Bit for bit; but where Flower's step widens the weights to float64, ours keep the model's dtype."""
    stock, wrapped = built(name), Wire(built(name), None)
    weights = model()
    for server_round in (1, 2, 3):
        expected = round_of(stock, weights, None, server_round)
        expected = ArrayRecord({n: Array(np.asarray(a.numpy(), np.float32)) for n, a in expected.items()})
        weights = round_of(wrapped, weights, None, server_round)
        assert same(weights, expected)


@pytest.mark.parametrize("name", STREAMED)
def test_the_streamed_mean_agrees_with_plain_flower(name: str) -> None:
    stock, streamed = built(name), Wire(built(name), Identity())
    assert streamed.streams
    weights = model()
    for server_round in (1, 2):
        # Adaptive strategies divide by the square root of a square: differences in the last bit grow there.
        expected = round_of(stock, weights, None, server_round)
        found = round_of(streamed, weights, Identity(), server_round)
        assert close(found, expected, 1e-6 if name in ("fedavg", "fedavgm", "fedprox", "scaffold") else 1e-4)
        weights = expected


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("codec", [None, Identity(), pipeline(step=0.5)], ids=["plain", "lossless", "lossy"])
def test_every_strategy_steps_on_what_came(name: str, codec: Codec | None) -> None:
    strategy, weights = Wire(built(name), codec), model(buffers=True)
    assert strategy.streams == (codec is not None and name in STREAMED)
    for server_round in (1, 2):
        stepped = round_of(strategy, weights, codec, server_round)
        assert strategy.failures == 0
        assert list(stepped) == list(weights)
        for array_name, array in stepped.items():
            value = array.numpy()
            assert value.dtype == weights[array_name].numpy().dtype
            assert value.shape == weights[array_name].numpy().shape
            assert np.isfinite(value).all()
        assert not np.array_equal(stepped["vector"].numpy(), weights["vector"].numpy())
        weights = stepped


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "qfedavg"])
def test_a_step_to_weights_that_are_not_finite_is_not_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far(*given: Any) -> Any:
        stepped, means = step(*given)
        assert stepped is not None
        for kept in ("m_t", "v_t", "momentum_vector"):
            if isinstance(found := getattr(strategy.inner, kept, None), list):
                setattr(strategy.inner, kept, [array * np.nan for array in found])
        return record_of({key: value * np.inf for key, value in arrays_in(stepped).items()}), means

    strategy, twin, weights = Wire(built(name), Identity()), Wire(built(name), Identity()), model()
    step = strategy.inner.aggregate_train
    for server_round in (1, 2):
        with monkeypatch.context() as patch, np.errstate(invalid="ignore"):
            patch.setattr(strategy.inner, "aggregate_train", far)
            replies = [
                answer(message, trained_from(weights, seed), 10, Identity())
                for seed, message in enumerate(asked(strategy, weights, server_round))
            ]
            assert strategy.aggregate_train(server_round, replies) == (None, None)
            assert strategy.dropped
        expected = round_of(twin, weights, Identity(), server_round)
        assert same(round_of(strategy, weights, Identity(), server_round), expected)
        assert not strategy.dropped
        weights = expected


@pytest.mark.parametrize("name", ["fedmedian", "multikrum", "qfedavg"])
def test_robust_strategies_agree_with_plain_flower(name: str) -> None:
    weights = model()
    expected = round_of(built(name), weights, None)
    assert close(round_of(Wire(built(name), Identity()), weights, Identity()), expected, 1e-5)


@pytest.mark.parametrize("name", ["bulyan", "qfedavg"])
def test_garbage_is_not_collected_for_each_reply(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's `to_numpy_ndarrays(keep_input=False)` does, which is most of a round of a thousand clients."""
    collected = list[int]()
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    round_of(built(name), model(), None)
    assert len(collected) >= 4
    collected.clear()
    round_of(Wire(built(name), Identity()), model(), Identity())
    assert len(collected) <= 1  # qfedavg, for the weights of the round before


def test_arrays_that_are_taken_out_of_a_reply_are_gone() -> None:
    """As from Flower's records: else each reply's bytes and arrays are in memory at once."""
    ours, flowers = Reply({**model()}), model()
    kept = ours.to_numpy_ndarrays()
    assert len(ours) == len(flowers)
    for record in (ours, flowers):
        taken = record.to_numpy_ndarrays(keep_input=False)
        assert not record
        assert all(np.array_equal(one, two) for one, two in zip(taken, kept, strict=True))


@pytest.mark.parametrize("codec", [None, Identity()], ids=["plain", "streamed"])
def test_integer_buffers_become_their_rounded_mean(codec: Codec | None) -> None:
    weights = model(buffers=True)  # clients add 0..7 to a counter of 100, weighing 10 + 7 * seed
    stepped = round_of(Wire(built("fedavg"), codec), weights, codec)
    mean = np.average(np.arange(8), weights=10 + 7 * np.arange(8))
    assert stepped["counter"].numpy() == 100 + round(mean)
    assert stepped["counter"].dtype == "int64"


def test_large_counters_are_no_reason_to_refuse() -> None:
    weights = model(buffers=True)
    weights["counter"] = Array(np.array(3_000_000_000, np.int64))
    strategy = Wire(built("fedavg"), Identity())
    replies = [answer(m, trained_from(weights, 4), 60_000, Identity()) for m in asked(strategy, weights)]
    stepped, _ = strategy.aggregate_train(1, replies)
    assert stepped is not None
    assert strategy.failures == 0
    assert stepped["counter"].numpy() == 3_000_000_004


@pytest.mark.parametrize("codec", [Identity(), pipeline()], ids=["lossless", "lossy"])
def test_the_streamed_result_does_not_depend_on_the_order_of_arrival(codec: Codec) -> None:
    weights, results = model(buffers=True), []
    for order in (range(8), reversed(range(8)), (3, 1, 4, 0, 5, 2, 7, 6)):
        strategy = Wire(built("fedadam"), codec)
        replies = [
            answer(message, trained_from(weights, seed), 10 + seed, codec)
            for seed, message in enumerate(asked(strategy, weights))
        ]
        results.append(strategy.aggregate_train(1, [replies[i] for i in order])[0])
    assert results[0] is not None
    assert all(other is not None and same(results[0], other) for other in results[1:])


def test_replies_are_taken_one_at_a_time() -> None:
    """The streamed path has let go of a reply's update before it takes the next reply."""
    strategy, weights, kept = Wire(built("fedavg"), Identity()), model(), []
    messages = asked(strategy, weights)

    def arriving() -> Iterator[Message]:
        for seed, message in enumerate(messages):
            reply = answer(message, trained_from(weights, seed), codec=Identity())
            yield reply
            kept.append(UPDATE in _arrays(reply))

    assert strategy.aggregate_train(1, arriving())[0] is not None
    assert kept == [False] * 8


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("codec", [None, Identity()], ids=["plain", "coded"])
def test_clients_without_examples_change_nothing(name: str, codec: Codec | None) -> None:
    strategy, weights = Wire(built(name), codec), model(buffers=True)
    replies = [answer(m, trained_from(weights, i), 0, codec) for i, m in enumerate(asked(strategy, weights))]
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert strategy.failures == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_round_without_replies_changes_nothing(name: str) -> None:
    strategy = Wire(built(name), pipeline())
    asked(strategy, model())
    assert strategy.aggregate_train(1, []) == (None, None)


# Refused replies


def _arrays(reply: Message) -> ArrayRecord:
    return reply.content.array_records[ARRAYS]


def _forged(**changes: Any) -> Callable[[Message], None]:
    """Metrics as they might come off the wire, past the checks of Flower's constructors."""

    def change(reply: Message) -> None:
        dict.update(reply.content.metric_records[METRICS].__dict__["_data"], changes)

    return change


def _without(record: str) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        del reply.content[record]

    return change


def _array(name: str, array: Callable[[], Array]) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        _arrays(reply)[name] = array()

    return change


def _failed(reply: Message) -> None:
    reply.__dict__["_content"] = None
    reply.error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the client failed")


def _no_update(reply: Message) -> None:
    del _arrays(reply)[next(iter(_arrays(reply)))]


def _no_counter(reply: Message) -> None:
    del _arrays(reply)["counter"]


def _damaged(reply: Message) -> None:
    name = UPDATE if UPDATE in _arrays(reply) else "matrix"
    array = _arrays(reply)[name]
    _arrays(reply)[name] = Array(array.dtype, array.shape, array.stype, array.data[:-1])


def _other_stype(reply: Message) -> None:
    name = next(iter(_arrays(reply)))
    array = _arrays(reply)[name]
    _arrays(reply)[name] = Array(array.dtype, array.shape, "pickle", array.data)


def _npy(descr: str, shape: tuple[int, ...], data: bytes = b"\0" * 8) -> Array:
    """An array whose header says what it likes."""
    head = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return Array("int64", (), "numpy.ndarray", b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + data)


def _raw(data: bytes) -> Array:
    return Array("int64", (), "numpy.ndarray", data)


ATTACKS: dict[str, Callable[[Message], None]] = {
    "error": _failed,
    "negative weight": _forged(**{WEIGHT: -1}),
    "true weight": _forged(**{WEIGHT: True}),
    "float weight": _forged(**{WEIGHT: 10.0}),
    "nan weight": _forged(**{WEIGHT: math.nan}),
    "weight list": _forged(**{WEIGHT: [1]}),
    "huge weight": _forged(**{WEIGHT: 2**24}),
    "no metrics": _without(METRICS),
    "no arrays": _without(ARRAYS),
    "no update": _no_update,
    "damaged": _damaged,
    "other stype": _other_stype,
    "extra array": _array("extra", lambda: Array(np.zeros(3, np.float32))),
    "no counter": _no_counter,
    "float counter": _array("counter", lambda: Array(np.array(1.0))),
    "counter of another shape": _array("counter", lambda: Array(np.array([1], np.int64))),
    "huge counter": _array("counter", lambda: _npy("<i8", (10**12,))),
    "object counter": _array("counter", lambda: _npy("|O", ())),
    "short counter": _array("counter", lambda: _npy("<i8", (), b"\0")),
    "text counter": _array("counter", lambda: Array(np.array("a" * 9))),
    "zip counter": _array("counter", lambda: _raw(b"PK\3\4" + b"\0" * 60)),
    "empty counter": _array("counter", lambda: _raw(b"")),
    "code for a header": _array("counter", lambda: _raw(b"\x93NUMPY\1\0\x0a\0exit(1)  \n")),
}


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedmedian", "qfedavg"])
@pytest.mark.parametrize("codec", [None, Identity(), pipeline()], ids=["plain", "lossless", "lossy"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_bad_reply_costs_that_reply_and_nothing_else(
    attack: Callable[[Message], None], codec: Codec | None, name: str
) -> None:
    weights = model(buffers=True)
    results = []
    for with_attack in (True, False):
        strategy = Wire(built(name), codec)
        replies = [
            answer(message, trained_from(weights, seed), 10, codec)
            for seed, message in enumerate(asked(strategy, weights))
        ]
        bad = replies.pop(0)  # the first, where it could set the example for all
        if with_attack:
            attack(bad)
            replies.insert(0, bad)
        stepped, _ = strategy.aggregate_train(1, replies)
        assert strategy.failures == with_attack
        assert stepped is not None
        results.append(stepped)
    assert same(*results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_losses_that_a_strategy_weighs_by_are_checked(bad: float) -> None:
    weights, strategy = model(), Wire(built("qfedavg"), None)
    first, *rest = asked(strategy, weights)
    replies = [
        answer(first, trained_from(weights, 1), train_loss=bad),
        *(answer(m, trained_from(weights, 2)) for m in rest),
    ]
    assert strategy.aggregate_train(1, replies)[0] is not None
    assert strategy.failures == 1


@pytest.mark.parametrize("name", ["fedavg", "fedmedian", "qfedavg"])
@pytest.mark.parametrize("codec", [None, Identity()], ids=["plain", "coded"])
def test_metrics_that_nobody_asked_for_are_ignored(name: str, codec: Codec | None) -> None:
    weights, strategy = model(), Wire(built(name), codec)
    replies = [
        answer(m, trained_from(weights, i), 10, codec, **({f"mine{i}": math.nan} if i % 2 else {}))
        for i, m in enumerate(asked(strategy, weights))
    ]
    assert strategy.aggregate_train(1, replies)[0] is not None
    assert strategy.failures == 0


def test_values_beyond_the_sum_cost_the_whole_reply() -> None:
    """Neither its update nor its buffers may stay behind in the sums."""
    weights = model(buffers=True)
    results = []
    for huge in ("vector", "counter", None):
        strategy = Wire(built("fedavg"), Identity())
        first, *rest = asked(strategy, weights)
        bad = trained_from(weights, 3)
        if huge is not None:
            bad[huge] = Array(np.full_like(bad[huge].numpy(), 2**33))
        replies = [answer(first, bad, 10, Identity())] if huge else []
        replies += [answer(m, trained_from(weights, i), 10, Identity()) for i, m in enumerate(rest)]
        stepped, _ = strategy.aggregate_train(1, replies)
        assert strategy.failures == (huge is not None)
        assert stepped is not None
        results.append(stepped)
    assert same(results[0], results[2])
    assert same(results[1], results[2])


def test_a_plain_reply_to_a_coding_server_is_refused() -> None:
    weights, strategy = model(), Wire(built("fedavg"), pipeline())
    replies = [answer(m, trained_from(weights, 1)) for m in asked(strategy, weights)]
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert strategy.failures == 8


def test_reordered_weights_are_refused() -> None:
    weights, strategy = model(), Wire(built("qfedavg"), None)
    first, *rest = asked(strategy, weights)
    trained = trained_from(weights, 1)
    swapped = ArrayRecord({name: trained[name] for name in reversed(list(trained))})
    replies = [answer(first, swapped), *(answer(m, trained_from(weights, 2)) for m in rest)]
    assert strategy.aggregate_train(1, replies)[0] is not None
    assert strategy.failures == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_without_a_codec_too(bad: float) -> None:
    weights, strategy = model(), Wire(built("fedavg"), None)
    first, *rest = asked(strategy, weights)
    diverged = trained_from(weights, 1)
    diverged["scalar"] = Array(np.array(bad, np.float32))
    replies = [answer(first, diverged), *(answer(m, trained_from(weights, 2)) for m in rest)]
    stepped, _ = strategy.aggregate_train(1, replies)
    assert strategy.failures == 1
    assert stepped is not None
    assert np.isfinite(stepped["scalar"].numpy())


def test_a_diverged_client_keeps_its_residual() -> None:
    codec, weights = pipeline(feedback=True), model()
    message = asked(Wire(built("fedavg"), codec), weights)[0]
    context = Context(1, 2, {}, RecordDict(), {})
    mod = compress(codec, np.random.default_rng(0))

    trained = trained_from(weights, 1)
    mod(message, context, replying(RecordDict({ARRAYS: trained, METRICS: MetricRecord({WEIGHT: 1})})))
    before = records.load_state(context, "codec")["residual"]
    trained["scalar"] = Array(np.array(np.nan, np.float32))
    with pytest.raises(ValueError, match="diverged"):
        mod(message, context, replying(RecordDict({ARRAYS: trained, METRICS: MetricRecord({WEIGHT: 1})})))
    assert np.array_equal(records.load_state(context, "codec")["residual"], before)


# The client's end


def test_the_mod_sends_one_array_and_the_buffers() -> None:
    weights = model(buffers=True)
    message = asked(Wire(built("fedavg"), pipeline()), weights)[0]
    reply = answer(message, trained_from(weights, 3), codec=pipeline())
    arrays = _arrays(reply)
    assert list(arrays) == [UPDATE, "counter"]
    assert arrays[UPDATE].stype == STYPE
    assert arrays["counter"].numpy() == 103
    assert reply.content.metric_records[METRICS][WEIGHT] == 10


@pytest.mark.parametrize(
    ("codec", "knows"),
    [(Identity(), True), (RateDistortion(), True), (ErrorFeedback(TopK(0.1)), True), (Eden(1), False)],
)
def test_a_packet_that_its_reader_has_made_itself_is_counted_and_not_made(codec: Codec, knows: bool) -> None:
    weights, message = model(buffers=True), asked(Wire(built("fedavg"), Identity()), model(buffers=True))[0]
    trained = trained_from(weights, 3)
    there, here = (
        compress(codec, np.random.default_rng(0), here=own)(
            message,
            Context(1, 2, {}, RecordDict(), {}),
            replying(RecordDict({ARRAYS: ArrayRecord({**kept}), METRICS: MetricRecord({WEIGHT: 1})})),
        )
        for own, kept in ((False, trained), (True, {n: vector.held(a.numpy()) for n, a in trained.items()}))
    )
    made, unmade = _arrays(there)[UPDATE], _arrays(here)[UPDATE]
    if knows:
        assert isinstance(unmade, vector.Held)
        with pytest.raises(AttributeError):
            setattr(unmade, "data", b"")  # noqa: B010 - which would say what its value does not
    assert isinstance(unmade, vector.Held) == knows
    assert records.size_of(here.content) == records.size_of(there.content) == len(as_bytes(there.content))
    layout = vector.layout_of(weights)
    there_read, here_read = (Reader(codec).update_in(reply, layout, {})[0] for reply in (there, here))
    assert there_read.tobytes() == here_read.tobytes()
    assert vars(unmade).get("_made") is None
    assert unmade.data == made.data
    assert pickle.loads(pickle.dumps(unmade)) == made


def test_a_private_packet_that_does_not_fit_is_read_as_what_stands_instead() -> None:
    """Where a client's packet is padded, what it knows of another one says nothing."""
    private, codec = replace(CENTRAL, packet_bytes=128), RateDistortion(step=1e-6)
    strategy, weights = Wire(built("fedavg"), codec, private), model()
    message, trained = asked(strategy, weights)[0], trained_from(weights, 3)
    reply = compress(codec, np.random.default_rng(0), private, here=True)(
        message, Context(1, 2, {}, RecordDict(), {}), replying(RecordDict({ARRAYS: trained}))
    )
    assert len(_arrays(reply)[UPDATE].data) == 128
    assert strategy.reader is not None
    terms = terms_in(records.config_record(message.content))
    update, _ = strategy.reader.update_in(reply, vector.layout_of(weights), terms)
    assert not update.any()


CENTRAL = CentralGaussian(
    epsilon=None, noise_multiplier=0.01, clip=1.0, test_seed=1, plan=Plan("fixed", 8, 8, 1, 1)
)


@pytest.mark.parametrize("far", [0.0, 0.125, 5.0])
def test_a_mechanism_clips_a_0_d_parameter_with_the_others(far: float) -> None:
    """The update is one vector, all zeros too; what counts batches is no part of it and stays as it is."""
    start = {
        "matrix": np.zeros((2, 2), np.float32),
        "scalar": np.zeros((), np.float32),
        "counter": np.array(7),
    }
    weights, private = vector.record_of(start), Wire(built("fedavg"), Identity(), CENTRAL)
    end = start | {"matrix": np.diag([0.6 * far, 0]).astype(np.float32), "counter": np.array(9)}
    trained = vector.record_of(end | {"scalar": np.array(-0.8 * far, np.float32)})
    message = asked(private, weights)[0]
    arrays = _arrays(answer(message, trained, codec=Identity(), mechanism=CENTRAL))
    assert list(arrays) == [UPDATE]
    sent = decode_update(arrays[UPDATE].data, Identity(), vector.layout_of(weights))
    assert np.linalg.norm(sent.astype(np.float64)) <= 1
    assert sent == pytest.approx(np.array([0.6, 0, 0, 0, -0.8]) * min(far, 1), rel=1e-6)
    assert message.content.array_records[ARRAYS]["counter"].numpy() == 7


def test_a_server_under_a_mechanism_steps_a_0_d_parameter() -> None:
    weights = vector.record_of({"scalar": np.array(3, np.float32), "vector": np.zeros(3, np.float32)})
    trained = vector.record_of({"scalar": np.array(9, np.float32), "vector": np.zeros(3, np.float32)})
    private = Wire(built("fedavg"), Identity(), CENTRAL)
    replies = [answer(m, trained, codec=Identity(), mechanism=CENTRAL) for m in asked(private, weights)]
    stepped, _ = private.aggregate_train(1, replies)
    assert private.failures == 0
    assert stepped is not None
    assert stepped["scalar"].numpy().shape == ()
    assert stepped["scalar"].numpy() == pytest.approx(3 + 1, abs=0.01)  # eight deviations of the noise
    assert np.abs(stepped["vector"].numpy()).max() < 0.01


def test_the_mod_passes_errors_on() -> None:
    message = asked(Wire(built("fedavg"), pipeline()), model())[0]
    context = Context(1, 2, {}, RecordDict(), {})
    reply = compress(pipeline(), np.random.default_rng(0))(
        message, context, lambda message, _: Message(Error(1, "failed"), reply_to=message)
    )
    assert reply.has_error()
    assert not context.state


def test_the_residual_lives_in_the_context() -> None:
    """What the codec lost in one round it sends in the next."""
    codec, weights = ErrorFeedback(TopK(0.1)), model()
    strategy = Wire(built("fedavg"), codec)
    message = asked(strategy, weights)[0]
    context = Context(1, 2, {}, RecordDict(), {})
    layout = vector.layout_of(weights)
    owed = vector.ravel(trained_from(weights, 1), layout) - vector.ravel(weights, layout)
    sent = np.zeros(layout.size, np.float32)
    for number in range(15):
        trained = trained_from(weights, 1) if number == 0 else weights
        content = RecordDict({ARRAYS: trained, METRICS: MetricRecord({WEIGHT: 1})})
        reply = compress(codec, np.random.default_rng(0))(message, context, replying(content))
        sent += decode_update(_arrays(reply)[UPDATE].data, codec, layout)
    assert np.allclose(sent, owed, rtol=1e-6)


# Evaluation on clients


def told(message: Message, weight: Any = 10, **metrics: Any) -> Message:
    return Message(RecordDict({METRICS: MetricRecord({WEIGHT: weight, **metrics})}), reply_to=message)


def test_evaluation_is_the_weighted_mean_of_sound_replies() -> None:
    strategy = Wire(built("fedavg"), pipeline())
    view: Any = Cohort(list(range(2, 10)))
    m = list(strategy.configure_evaluate(1, model(), ConfigRecord(), view))
    replies = [
        told(m[0], 10, accuracy=0.5, loss=1.0),
        told(m[1], 30, accuracy=0.9, loss=2.0),
        told(m[2], 0, accuracy=0.0, loss=0.0),
        told(m[3], 10, accuracy=math.nan, loss=1.0),
        told(m[4], 10, loss=1.0),
        told(m[5], -5, accuracy=0.5, loss=1.0),
        Message(Error(1, "no"), reply_to=m[6]),
        Message(RecordDict(), reply_to=m[7]),
    ]
    means = strategy.aggregate_evaluate(1, replies)
    assert means is not None
    assert means["accuracy"] == pytest.approx(0.8)
    assert means["loss"] == pytest.approx(1.75)
    assert strategy.aggregate_evaluate(1, [told(m[2], 0, accuracy=0.0, loss=0.0)]) is None
    assert strategy.aggregate_evaluate(1, []) is None


def test_names_that_a_node_makes_up_are_not_remembered() -> None:
    def size(name: str) -> int:
        return records.size_of(RecordDict({ARRAYS: ArrayRecord({name: Array(np.zeros(3, np.float32))})}))

    size("short")
    before = records._size_of_arrays.cache_info()
    assert size("long" * 2**16) - size("gone" * 2**15) == pytest.approx(4 * 2**15, abs=16)
    after = records._size_of_arrays.cache_info()
    assert (after.currsize, after.misses) == (before.currsize, before.misses)
    size("short")
    assert records._size_of_arrays.cache_info().hits == before.hits + 1


def test_cohort_is_all_that_a_strategy_sees_of_the_grid() -> None:
    assert set(vars(Cohort([1])).keys()) == {"_nodes"}
    assert not issubclass(Cohort, Grid)
