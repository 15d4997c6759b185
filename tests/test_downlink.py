"""The downlink: one lattice, whichever way a node came by its version; what hostile or lost bytes cost."""

import math
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedapp import downlink, lattice
from fedapp.codec import Layout, Slot
from fedapp.codec import context as coder
from fedapp.codec.quantizer import edges
from fedapp.downlink import (
    DOWNLINK,
    HOLDS,
    INITIAL,
    LEVELS,
    NOTHING,
    VERSION,
    Coded,
    Downlink,
    receive,
)
from fedapp.engine.local import LocalGrid
from fedapp.errors import ConfigError, DecodeError
from fedapp.lattice import Version, first, peak_exponent, quantized
from fedapp.records import ARRAYS, CONFIG
from fedapp.vector import arrays_in, layout_of, ravel, record_of
from fedapp.version_packet import STYPE, VersionPacket, code_of, crc_of

SHAPES = {"conv.weight": (6, 3, 3), "bn.scale": (), "fc.weight": (20, 30), "fc.bias": (20,)}


@pytest.fixture(autouse=True, scope="module")
def _surroundings() -> None:
    LocalGrid(ClientApp(), [1], workers=0)  # sets the global that messages read the run and the node from


def model(seed: int, spread: float = 0.3) -> ArrayRecord:
    rng = np.random.default_rng(seed)
    arrays = {n: np.asarray(rng.normal(0, spread, s).astype(np.float32)) for n, s in SHAPES.items()}
    return ArrayRecord({n: Array(a) for n, a in arrays.items()} | {"bn.count": Array(np.array(seed))})


def moved(weights: ArrayRecord, seed: int, by: float = 0.01) -> ArrayRecord:
    """Some rows learn much more than others, as they do."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, array in weights.items():
        x = array.numpy()
        row = np.exp(rng.normal(0, 1.5, (*x.shape[:1], *[1] * (x.ndim - 1))))
        new = x + by * row * rng.standard_normal(x.shape) if x.dtype.kind == "f" else x + 1
        out[name] = Array(np.asarray(new).reshape(x.shape).astype(x.dtype))
    return ArrayRecord(out)


@dataclass
class Node:
    """A client that only receives; `initial` is the model that its seed gives."""

    initial: ArrayRecord
    context: Context = field(default_factory=lambda: Context(1, 2, {}, RecordDict(), {}))
    weights: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    counts: int = -1
    messages: int = 0

    def takes(self, message: Message) -> Message:
        def train(message: Message, context: Context) -> Message:
            arrays = message.content.array_records[ARRAYS]
            assert list(arrays) == list(self.initial)
            self.weights = ravel(arrays, layout_of(arrays))
            self.counts = int(arrays["bn.count"].numpy())
            return Message(RecordDict({CONFIG: ConfigRecord({"sound": True})}), reply_to=message)

        self.messages += 1
        return receive(self.initial)(message, self.context, train)

    def restarts(self) -> None:
        self.context.state = RecordDict()


def asking(nodes: list[int]) -> list[Message]:
    content = RecordDict({ARRAYS: ArrayRecord(), CONFIG: ConfigRecord({"server-round": 1})})
    return [Message(content, node, "train") for node in nodes]


def exchange(server: Downlink, weights: ArrayRecord, nodes: dict[int, Node], lost: bool = False) -> int:
    """One broadcast to these nodes, others sent where they are needed; bytes of all of it."""
    size = 0
    for message in server.send(weights, asking(list(nodes))):
        for _ in range(3):
            arrays = message.content.array_records[ARRAYS]
            size += len(arrays[VERSION].data) + (len(arrays[INITIAL].data) if INITIAL in arrays else 0)
            reply = nodes[message.metadata.dst_node_id].takes(message)
            if lost or not server.again(reply):
                break
            (message,) = server.send(weights, asking([message.metadata.dst_node_id]))
    return size


# One lattice


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.1, 1.0, 4.0, 9.0]),
    events=st.lists(
        st.tuples(st.sets(st.integers(2, 6), min_size=1),
                  st.sampled_from(["well", "lost", "restart", "same", "shrinks", "grows"])),
        min_size=1, max_size=12,
    ),
)  # fmt: skip
def test_nodes_end_bit_identical_whatever_happened(
    seed: int, rate: float, events: list[tuple[set[int], str]]
) -> None:
    """Late comers, restarts, lost replies, and one node whose seed gives another model."""
    initial, weights, by = model(0), model(0), 0.01
    nodes = {n: Node(model(0)) for n in range(2, 6)} | {6: Node(model(9))}
    server = Downlink(Coded(rate), initial)
    for number, (cohort, event) in enumerate(events):
        by *= {"shrinks": 0.1, "grows": 30.0}.get(event, 1.0)
        if event == "restart":
            nodes[min(cohort)].restarts()
        if event != "same":
            weights = moved(weights, seed + number, by)
        exchange(server, weights, {n: nodes[n] for n in cohort}, lost=event == "lost")
        now = server._now.weights(ravel(initial, layout_of(initial)))
        for n in cohort:
            if event != "lost" or nodes[n].counts == int(weights["bn.count"].numpy()):
                assert np.array_equal(nodes[n].weights, now)
                assert nodes[n].counts == int(weights["bn.count"].numpy())


def test_a_late_comer_is_sent_one_difference_not_all_of_them() -> None:
    initial = weights = model(0)
    server, nodes = Downlink(Coded(1.0), initial), {2: Node(initial), 3: Node(initial)}
    sizes = []
    for number in range(8):
        weights = moved(weights, number)
        sizes.append(exchange(server, weights, {2: nodes[2]}))
    late = exchange(server, weights, {3: nodes[3]})
    assert np.array_equal(nodes[3].weights, nodes[2].weights)
    assert late < 0.6 * sum(sizes)
    assert nodes[3].messages == 1


def test_who_has_left_is_known_no_more_whatever_it_still_says() -> None:
    server, weights = Downlink(Coded(), model(0)), moved(model(0), 1)
    nodes = {2: Node(model(0)), 3: Node(model(9))}
    replies = [nodes[m.metadata.dst_node_id].takes(m) for m in server.send(weights, asking([2, 3]))]
    for node in nodes:
        server.leave(node)
    assert [server.again(reply) for reply in replies] == [False, True]  # the second one needs our model
    assert not server._held
    assert exchange(server, weights, nodes) > 4 * len(ravel(weights, layout_of(weights)))
    assert np.array_equal(nodes[2].weights, nodes[3].weights)
    assert NOTHING not in server._made


def test_each_way_to_a_version_is_coded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many messages bring it, one by one, and while others are being made."""
    coded = list[int]()

    def counting(levels: NDArray[np.int32], layout: Layout) -> bytes:
        coded.append(len(levels))
        return code_of(levels, layout)

    monkeypatch.setattr(downlink, "code_of", counting)
    weights = model(0)
    server, nodes = Downlink(Coded(), model(0)), {n: Node(model(0)) for n in range(2, 8)}
    for seed, node in ((1, 2), (2, 3)):
        weights = moved(weights, seed)
        exchange(server, weights, {node: nodes[node]})
    weights = moved(weights, 3)
    coded.clear()
    going = server.send(weights, asking([2, 4, 3, 5]))  # who hold versions 1, 0, 2, 0
    server.again(nodes[2].takes(next(going)))
    for node in (6, 4):
        exchange(server, weights, {node: nodes[node]})
    for message in going:
        server.again(nodes[message.metadata.dst_node_id].takes(message))
    exchange(server, weights, nodes)  # those that hold it now, and number 7
    assert len(coded) == 3  # not the way from version 2: its code came with the step
    assert all(np.array_equal(node.weights, nodes[2].weights) for node in nodes.values())
    weights = moved(weights, 4)
    exchange(server, weights, nodes)
    assert all(np.array_equal(node.weights, nodes[2].weights) for node in nodes.values())


def test_the_step_to_a_version_is_sent_as_it_was_made() -> None:
    """To who holds the version before: the same bytes as if its levels were coded once more."""
    weights, sent = model(0), list[list[bytes]]()
    servers, node = [Downlink(Coded(0.5), model(0)) for _ in range(2)], Node(model(0))
    for number in range(12):
        weights = moved(weights, number, 0.5 ** (number % 5))
        for server in servers:
            server._publish(weights)
        servers[1]._step.clear()
        pairs = zip(*(server.send(weights, asking([2])) for server in servers), strict=True)
        for message, other in pairs:
            arrays = (m.content.array_records[ARRAYS] for m in (message, other))
            sent.append([one[VERSION].data for one in arrays])
            reply = node.takes(message)
            assert not any(server.again(reply) for server in servers)
    assert [ours for ours, _ in sent] == [theirs for _, theirs in sent]


def test_who_holds_the_latest_version_is_asked_first() -> None:
    weights, server = model(0), Downlink(Coded(), model(0))
    nodes = {n: Node(model(0)) for n in range(2, 6)}
    for seed, those in ((1, [3, 4]), (2, [4])):
        weights = moved(weights, seed)
        exchange(server, weights, {n: nodes[n] for n in those})
    order = [m.metadata.dst_node_id for m in server.nearest_first(asking([2, 3, 4, 5]))]
    assert order == [4, 3, 2, 5]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 3.0])
def test_a_step_onto_the_lattice_takes_few_tries(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes near to its rate, from the exponent of the step before."""
    x = np.random.default_rng(1).standard_t(3, 60_000).astype(np.float32)
    layout = layout_of(ArrayRecord({"w": Array(x.reshape(200, 300))}))
    begin, *_ = quantized(x, layout, rate, -3, -30)
    tries, coded = list[int](), lattice._coded

    def counting(*terms: Any) -> tuple[bytes, NDArray[np.int32]]:
        tries.append(1)
        return coded(*terms)

    monkeypatch.setattr(lattice, "_coded", counting)
    for scale in (1.0, 0.8, 0.6, 1.3):
        tries.clear()
        _, _, code, _ = quantized(x * np.float32(scale), layout, rate, begin, -30)
        assert 8 * len(code) / len(x) == pytest.approx(rate, rel=0.021)
        assert len(tries) <= 7


def test_the_first_model_comes_from_the_seed_and_unchanged_weights_cost_next_to_nothing() -> None:
    initial = model(0)
    server, node = Downlink(Coded(1.0), initial), Node(initial)
    assert exchange(server, initial, {2: node}) < 24
    assert np.array_equal(node.weights, ravel(initial, layout_of(initial)))
    weights = moved(initial, 1)
    assert exchange(server, weights, {2: node}) > 60
    assert exchange(server, weights, {2: node}) < 24  # an evaluation, then the next round
    assert server._now.number == 1


def test_a_node_with_another_model_from_the_seed_is_given_ours_once() -> None:
    initial = weights = model(0)
    server, node = Downlink(Coded(1.0), initial), Node(model(5))
    raw = 4 * layout_of(initial).size
    assert exchange(server, weights, {2: node}) > raw
    assert node.messages == 2
    for number in range(3):
        weights = moved(weights, number)
        assert exchange(server, weights, {2: node}) < raw / 8
        assert np.array_equal(node.weights, server._now.weights(ravel(initial, layout_of(initial))))
    assert node.messages == 5


def test_a_restarted_node_gets_the_version_and_not_the_model() -> None:
    initial = weights = model(0)
    server, node = Downlink(Coded(1.0), initial), Node(initial)
    for number in range(4):
        weights = moved(weights, number)
        exchange(server, weights, {2: node})
    node.restarts()
    weights = moved(weights, 9)
    assert exchange(server, weights, {2: node}) < layout_of(initial).size  # two messages, under a byte each
    assert np.array_equal(node.weights, server._now.weights(ravel(initial, layout_of(initial))))
    assert node.messages == 6


def test_what_a_version_lacks_the_next_ones_tell() -> None:
    """Weights that stand still are reached to the last bits that matter; weights that move are followed."""
    initial = model(0)
    still, server, node = moved(initial, 1), Downlink(Coded(0.5), initial), Node(initial)
    layout = layout_of(initial)
    errors = []
    for _ in range(40):
        exchange(server, ArrayRecord(dict(still)), {2: node})  # a new record of the same weights
        errors.append(float(np.linalg.norm(node.weights - ravel(still, layout))))
    assert errors[0] < float(np.linalg.norm(ravel(still, layout) - ravel(initial, layout)))
    assert errors[-1] < 0.01 * errors[0]


@pytest.mark.parametrize("rate", [0.3, 1.0, 3.0])
def test_the_rate_is_about_what_was_asked(rate: float) -> None:
    rng = np.random.default_rng(0)
    shape = (200, 300)
    x = np.zeros(shape, np.float32)
    initial = ArrayRecord({"w": Array(x), "bn.count": Array(np.array(0))})
    server, node = Downlink(Coded(rate), initial), Node(initial)
    sizes = []
    for number in range(12):
        x = x + (0.99**number * np.exp(rng.normal(0, 1, (200, 1))) * rng.normal(0, 1e-2, shape)).astype("f4")
        weights = ArrayRecord({"w": Array(x), "bn.count": Array(np.array(0))})
        sizes.append(8 * exchange(server, weights, {2: node}) / x.size)
    assert np.mean(sizes) == pytest.approx(rate, rel=0.15)
    assert max(sizes) < 1.6 * rate


@pytest.mark.parametrize(("rate", "most"), [(0.1, 0.45), (1.0, 0.04), (3.0, 0.0015)])
@pytest.mark.parametrize("kind", ["alike", "one column in eight", "one layer"])
def test_a_long_update_is_quantized_by_an_eighth_of_it_where_that_is_like_the_rest(
    kind: str, rate: float, most: float
) -> None:
    shapes = {"a": (64, 288), "b": (128, 5000)}
    layout = layout_of(ArrayRecord({name: Array(np.zeros(s, np.float32)) for name, s in shapes.items()}))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s) * np.exp(rng.normal(0, 1.5, (s[0], 1))) for s in shapes.values())
    b[:, np.arange(5000) // 16 % 8 == 4] *= 1e-6 if kind == "one column in eight" else 1.0
    b *= 1e-3 if kind == "one layer" else 1.0
    x = np.concatenate([a.ravel(), b.ravel()]).astype(np.float32)
    terms = x, layout, rate, -3, peak_exponent(x) - 20
    *_, share = quantized(*terms)
    exponent, levels, *_ = quantized(*terms, share)
    code, *_ = coder.encode(levels.astype(np.float32), 1.0, edges(0.0), list(shapes.values()))
    assert 8 * len(code) / len(x) == pytest.approx(rate, rel=0.5)
    error = float(np.sum((x - np.ldexp(levels.astype(np.float32), exponent)) ** 2) / np.sum(x**2))
    assert error < most


@pytest.mark.parametrize("way", [0.01, 1e4])
def test_a_version_at_hand_is_what_its_code_says(way: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of levels that two bytes hold, and of others."""
    kept = {room: Downlink(Coded(4.0), model(0)) for room in (0, 2**26)}
    nodes = {room: {node: Node(model(0)) for node in (2, 3, 4)} for room in kept}
    far, sizes = moved(model(0), 9, way), list[dict[int, int]]()
    for round_, asked in enumerate(([2], [3], [2, 4], [3, 4, 2]) * 2):
        sizes.append({})
        for room, server in kept.items():
            monkeypatch.setattr("fedapp.downlink._READY", room)
            weights = moved(far, round_) if round_ else far
            those = {node: nodes[room][node] for node in asked}
            sizes[-1][room] = exchange(server, weights, those)
            assert bool(server._ready) == bool(room)
            assert server._codes.keys() | server._ready.keys() == server._versions >= {0, round_ + 1}
    assert all(len(set(size.values())) == 1 for size in sizes)
    for node in (2, 3, 4):
        assert np.array_equal(nodes[0][node].weights, nodes[2**26][node].weights)
    longest = kept[2**26]._ready[max(kept[2**26]._ready)][1].dtype
    assert longest == (np.int16 if way < 1 else np.int32)


def test_versions_that_nobody_holds_are_forgotten() -> None:
    initial = weights = model(0)
    server = Downlink(Coded(1.0), initial)
    nodes = {n: Node(initial) for n in range(2, 5)}
    exchange(server, moved(weights, 50), nodes)
    for number in range(20):
        weights = moved(weights, number)
        exchange(server, weights, {2: nodes[2]})
    assert server._versions == {0, 1, 20, 21}


def test_ever_finer_steps_and_then_a_long_way_start_anew() -> None:
    initial = weights = model(0)
    server, node = Downlink(Coded(4.0), initial), Node(initial)
    for number, by in enumerate((1e-4, 1e-7, 1e3, 1e-3, 1e-2)):
        weights = moved(weights, number, by)
        exchange(server, weights, {2: node})
        layout = layout_of(initial)
        assert np.array_equal(node.weights, server._now.weights(ravel(initial, layout)))
        assert np.abs(server._now.levels).max() < 2**23
    apart = node.weights - ravel(weights, layout)
    assert np.linalg.norm(apart) < 0.05 * np.linalg.norm(node.weights)


def test_one_weight_that_goes_a_long_way_and_comes_back_starts_anew() -> None:
    """What is coded is then longer than the way from the initial model, which sets the finest step."""
    initial = weights = model(0)
    server, node, layout = Downlink(Coded(3.0), initial), Node(initial), layout_of(initial)
    for number, by in enumerate((2.0**31, -(2.0**31), 0.0)):
        weights = moved(weights, number, 1e-3)
        arrays = arrays_in(weights)
        name = next(iter(arrays))
        arrays[name] = arrays[name].copy()
        arrays[name].ravel()[0] += np.float32(by)
        weights = record_of(arrays)
        exchange(server, weights, {2: node})
        assert np.array_equal(node.weights, server._now.weights(ravel(initial, layout)))
    apart = node.weights - ravel(weights, layout)
    assert np.linalg.norm(apart) < 0.1 * np.linalg.norm(node.weights)


# Arithmetic of versions

levels = st.lists(st.integers(-(2**21), 2**21), min_size=1, max_size=6)


@given(levels, st.integers(-40, 5), st.integers(-40, 5), st.randoms())
def test_minus_undoes_plus(values: list[int], a: int, b: int, random: Any) -> None:
    one = first(Layout((), len(values))).plus(1, a, np.array(values, np.int32))
    step = np.array([random.randint(-100, 100) for _ in values], np.int32)
    try:
        other = one.plus(2, b, step)
        exponent, way = other.minus(one)
    except OverflowError:
        reach = (3 * max(map(abs, values)) << max(0, a - b)) + (2 * 100 << max(0, b - a))
        assert reach >= 2**23
        return
    assert [Fraction(2) ** exponent * int(w) for w in way] == [Fraction(2) ** b * int(s) for s in step]
    assert not way.any() or (way & 1).any()  # as coarse as can be
    again = one.plus(2, exponent, way)
    start = np.linspace(-1, 1, len(values), dtype=np.float32)
    assert np.array_equal(again.weights(start), other.weights(start))


@given(levels, st.integers(-140, 90))
def test_weights_are_rounded_once(values: list[int], exponent: int) -> None:
    start = np.random.default_rng(len(values)).normal(0, 1, len(values)).astype(np.float32)
    got = Version(1, exponent, np.array(values, np.int32)).weights(start)
    for s, v, w in zip(start, values, got, strict=True):
        exact = Fraction(float(s)) + Fraction(2) ** exponent * v
        others = [np.nextafter(w, np.float32(side)) for side in (-np.inf, np.inf)]
        off = abs(Fraction(float(w)) - exact)
        assert all(off <= abs(Fraction(float(other)) - exact) for other in others if math.isfinite(other))


def test_the_largest_odd_levels_survive_their_code() -> None:
    levels = np.array([2**23 - 1, -(2**23) + 1, 2**22 + 1, 1, 0], np.int32)
    layout = Layout((Slot("w", (5,), 0),), 5)
    assert np.array_equal(coder.decode(code_of(levels, layout), [(5,)]), levels)


def test_levels_beyond_float32_are_refused() -> None:
    far = Version(1, 0, np.array([2**23 - 1], np.int32))
    for step in ((0, 1), (-1, 0), (-40, 0), (30, 1)):
        with pytest.raises(OverflowError):
            far.plus(2, step[0], np.array([step[1]], np.int32))
    with pytest.raises(OverflowError):
        far.minus(Version(2, -200, np.array([1], np.int32)))


# Hostile and lost bytes

LAYOUT = Layout((Slot("fc.weight", (4, 3), 0), Slot("fc.bias", (2,), 12)), 14)
GOLDEN = "053e95135cfaff000105b5087a2190ab2182"


def packet() -> tuple[ArrayRecord, bytes]:
    initial = ArrayRecord({s.name: Array(np.zeros(s.shape, np.float32)) for s in LAYOUT.slots})
    x = np.array([0.5, -1.25, 0, 3, 0.125, -0.75, 8, 0, 0, 1, -2, 0.25, 4, 0], np.float32) / 64
    weights = ArrayRecord({s.name: Array(x[s.offset :][: math.prod(s.shape)].reshape(s.shape))
                           for s in LAYOUT.slots})  # fmt: skip
    server = Downlink(Coded(4.0), initial)
    (message,) = server.send(weights, asking([2]))
    return initial, bytes(message.content.array_records[ARRAYS][VERSION].data)


def result(data: bytes, initial: ArrayRecord, stype: str = STYPE) -> NDArray[np.float32] | None:
    """The weights that a new node makes of it; None where it says what it holds instead."""
    content = RecordDict({ARRAYS: ArrayRecord({VERSION: Array("uint8", (len(data),), stype, data)})})
    got: list[NDArray[np.float32]] = []

    def train(message: Message, context: Context) -> Message:
        got.append(ravel(message.content.array_records[ARRAYS], LAYOUT))
        return Message(RecordDict(), reply_to=message)

    context = Context(1, 2, {}, RecordDict(), {})
    reply = receive(initial)(Message(content, 2, "train"), context, train)
    if not got:
        assert reply.content.config_records[CONFIG][HOLDS] == 0
        assert not context.state
    return got[0] if got else None


def test_nodes_of_a_process_that_come_to_one_version_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they held before; but for one whose message names another checksum."""
    initial, codes, decoded, decode = model(0), list[bytes](), list[int](), coder.decode
    monkeypatch.setattr(coder, "decode", lambda code, *those: codes.append(code) or decode(code, *those))  # type: ignore[func-returns-value]
    server, mod = Downlink(Coded(2.0), initial), receive(initial)
    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in (2, 3, 4)}

    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    for round_, nodes in ((1, [2]), (2, [3, 2, 4])):
        for message in server.send(moved(initial, round_), asking(nodes)):
            if message.metadata.dst_node_id == 4:
                array = message.content.array_records[ARRAYS][VERSION]
                other = bytearray(array.data)
                other[1] ^= 1
                arrays = ArrayRecord(
                    {**message.content[ARRAYS], VERSION: Array("uint8", array.shape, STYPE, bytes(other))}
                )
                message.content = RecordDict({**message.content, ARRAYS: arrays})
            server.again(mod(message, contexts[message.metadata.dst_node_id], train))
            decoded.append(len(codes))
    assert decoded == [1, 2, 2, 3]  # 2 held another version than 3, and needs what 3 made; 4 differs
    held = {node: context.state.array_records.get(DOWNLINK) for node, context in contexts.items()}
    assert held[2] is not None
    assert held[3] is not None
    assert held[2][LEVELS].data is held[3][LEVELS].data
    assert held[4] is None


def test_golden_bytes_of_a_version() -> None:
    """Both ways; which levels a version has is the server's to choose."""
    initial, golden = packet()[0], bytes.fromhex(GOLDEN)
    levels = np.array([0, -1, 0, 3, 0, 0, 8, 0, 0, 0, -2, 0, 4, 0], np.int32)
    version = Version(1, -6, levels)
    crc = crc_of(version.weights(ravel(initial, LAYOUT)))
    assert VersionPacket(crc, -6, 0, 1, code_of(levels, LAYOUT)).to_array().data == golden
    made = result(golden, initial)
    assert made is not None
    assert np.array_equal(made, levels.astype(np.float32) / 64)


def test_damage_is_noticed_at_every_bit_and_length() -> None:
    """A damaged version is refused, or asked for again; what is accepted is what was sent."""
    initial, data = packet()
    sound = result(data, initial)
    assert sound is not None
    damaged = [data[:n] for n in range(len(data))] + [data + b"\1"]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for bad in damaged:
        try:
            got = result(bad, initial)
        except DecodeError:
            continue
        assert got is None or np.array_equal(got, sound)  # the version's number alone may differ


@settings(deadline=None, max_examples=300)
@given(head=st.binary(min_size=0, max_size=12), body=st.binary(max_size=60))
def test_random_bytes_are_survived(head: bytes, body: bytes) -> None:
    initial, sound = packet()
    for data in (
        head + body,
        sound[:1] + head + body,
        sound[:1] + struct.pack("<Ih", 0, -6) + b"\0\1" + body,
    ):
        with suppress(DecodeError):
            assert result(data, initial) is None


def test_another_format_and_another_kind_of_array_are_named() -> None:
    initial, data = packet()
    with pytest.raises(DecodeError, match="format 9, this fedapp reads 5"):
        result(b"\x09" + data[1:], initial)
    with pytest.raises(DecodeError, match=r"serialization type 'numpy\.ndarray'"):
        result(data, initial, "numpy.ndarray")


def test_a_node_that_never_understands_is_given_up() -> None:
    initial = weights = model(0)
    server = Downlink(Coded(1.0), initial)
    exchange(server, moved(weights, 1), {2: Node(initial), 3: Node(initial)})
    (message,) = server.send(moved(weights, 2), asking([2]))
    for said in (1, 0, 7, -5):
        reply = Message(RecordDict({CONFIG: ConfigRecord({HOLDS: said})}), reply_to=message)
        if not (helps := server.again(reply)):
            break
        (message,) = server.send(server._weights, asking([2]))
    assert INITIAL in message.content.array_records[ARRAYS]
    assert not helps


def test_an_error_says_nothing_of_what_a_node_holds() -> None:
    initial = model(0)
    server, node = Downlink(Coded(1.0), initial), Node(initial)
    (message,) = server.send(moved(initial, 1), asking([2]))
    assert not server.again(Message(Error(1, "failed"), reply_to=message))
    assert server._held == {}
    assert exchange(server, moved(initial, 2), {2: node}) > 60


def test_decoding_takes_at_most_three_times_the_memory_of_the_weights() -> None:
    shape, rng = (300, 1000), np.random.default_rng(0)
    initial = ArrayRecord({"w": Array(np.zeros(shape, np.float32))})
    server, layout = Downlink(Coded(1.0), initial), layout_of(initial)
    (message,) = server.send(ArrayRecord({"w": Array(rng.normal(0, 1, shape).astype("f4"))}), asking([2]))
    array, held = message.content.array_records[ARRAYS][VERSION], first(layout)
    VersionPacket.read(array).onto(held, layout)  # imports and caches are not counted
    tracemalloc.start()
    try:
        VersionPacket.read(array).onto(held, layout)
        assert tracemalloc.get_traced_memory()[1] < 3.1 * 4 * layout.size
    finally:
        tracemalloc.stop()


def test_what_claims_more_than_the_model_allocates_nothing() -> None:
    _, data = packet()
    held = first(LAYOUT)
    for tail in (b"\xff" * 9, b"\0\1" + b"\xff" * 40, b"\0\1" + bytes(40)):
        array = Array("uint8", (1,), STYPE, data[:7] + tail)
        tracemalloc.start()
        try:
            with suppress(DecodeError):
                VersionPacket.read(array).onto(held, LAYOUT)
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


# Settings


@pytest.mark.parametrize("rate", [0, -1.0, 13, math.nan, math.inf, "much", True])
def test_rates_out_of_range_are_named(rate: Any) -> None:
    with pytest.raises(ConfigError, match=r"downlink.rate must be a number above 0 and at most 12, got"):
        Coded(rate)
