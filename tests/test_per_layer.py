"""Rules per layer: who codes what, state kept apart, and nothing but DecodeError from hostile bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import OmegaConf

from fedapp import config
from fedapp.codec import Codec, Layout, Packet, Slot, State
from fedapp.codec.chain import Chain, ErrorFeedback, Identity, pipeline
from fedapp.codec.entropy import Ans
from fedapp.codec.founding import RandomPrune
from fedapp.codec.layers import require_finite, require_whole
from fedapp.codec.packet import decode_update, pack
from fedapp.codec.per_layer import PerLayer
from fedapp.codec.prune import TopK
from fedapp.codec.quantize import DeadZone
from fedapp.errors import ConfigError, DecodeError

SHAPES = {
    "conv1.weight": (4, 3, 3, 3),
    "conv1.bias": (4,),
    "conv2.weight": (2, 4, 3, 3),
    "conv2.bias": (2,),
    "scale": (),
    "dense.weight": (10, 20),
    "dense.bias": (10,),
}
SIZES = [int(np.prod(shape)) for shape in SHAPES.values()]
OFFSETS = np.cumsum([0, *SIZES])
LAYOUT = Layout(tuple(map(Slot, SHAPES, SHAPES.values(), OFFSETS.tolist())), int(OFFSETS[-1]))
X = np.random.default_rng(0).standard_normal(LAYOUT.size).astype(np.float32)
LEVELS = Chain((DeadZone(1.0, 0.38), Ans()))


def of(name: str, x: NDArray[Any]) -> NDArray[Any]:
    index = list(SHAPES).index(name)
    return x[OFFSETS[index] : OFFSETS[index + 1]]


def coded(codec: Codec, state: State, x: NDArray[np.float32] = X) -> tuple[NDArray[np.float32], State, bytes]:
    packet, state = codec.encode(x, LAYOUT, state, np.random.default_rng(0))
    data = pack(packet, codec, LAYOUT)
    return decode_update(data, codec, LAYOUT), state, data


def rule(rules: dict[str, Codec], rest: Codec) -> PerLayer:
    return PerLayer(tuple(rules.items()), rest)


def test_each_layer_takes_the_first_pattern_that_matches() -> None:
    codec = rule({"*.bias": Identity(), "conv1.*": TopK(0.5), "[s]cal?": Identity()}, TopK(1e-9))
    decoded = coded(codec, {})[0]
    for name in ("conv1.bias", "conv2.bias", "dense.bias", "scale"):
        assert np.array_equal(of(name, decoded), of(name, X))
    assert np.count_nonzero(of("conv1.weight", decoded)) == 54
    rest = np.concatenate([of("conv2.weight", decoded), of("dense.weight", decoded)])
    assert np.count_nonzero(rest) == 1
    assert np.abs(rest).max() == max(np.abs(of(n, X)).max() for n in ("conv2.weight", "dense.weight"))


def test_the_order_of_rules_matters() -> None:
    decoded = coded(rule({"conv1.*": TopK(1e-9), "*.bias": Identity()}, Identity()), {})[0]
    assert np.count_nonzero(np.concatenate([of("conv1.weight", decoded), of("conv1.bias", decoded)])) == 1
    assert np.array_equal(of("dense.bias", decoded), of("dense.bias", X))


def test_a_codec_sees_its_group_as_it_would_a_model() -> None:
    """The same levels as of the group alone; and a stage that needs layers finds them."""
    decoded = coded(rule({"conv*": LEVELS}, RandomPrune(0.0)), {})[0]
    alone = Layout((Slot("x", (int(OFFSETS[4]),), 0),), int(OFFSETS[4]))
    packet, _ = LEVELS.encode(X[: OFFSETS[4]], alone, {}, np.random.default_rng(0))
    assert np.array_equal(decoded[: OFFSETS[4]], LEVELS.decode(packet, alone))
    assert np.array_equal(decoded[OFFSETS[4] :], X[OFFSETS[4] :])

    kernels = rule(
        {"conv2.weight": RandomPrune(0.5, structure="kernel"), "conv1.weight": Identity()}, Identity()
    )
    kept = of("conv2.weight", coded(kernels, {})[0]).reshape(8, 9)
    assert set((kept != 0).sum(1)) == {0, 9}


def test_states_are_kept_apart() -> None:
    inner = ErrorFeedback(TopK(0.25))
    codec = rule({"*.bias": inner, "conv*": RandomPrune(0.9, corrected=False)}, ErrorFeedback(LEVELS))
    state: State = {}
    sent = np.zeros(LAYOUT.size)
    for _ in range(40):
        decoded, state, _ = coded(codec, state)
        sent += decoded
    assert {key: len(value) for key, value in state.items()} == {
        "0.residual": 16,
        "1.left": 1,
        "2.residual": 201,
    }
    bias = np.concatenate([of(n, X) for n in ("conv1.bias", "conv2.bias", "dense.bias")])
    got = np.concatenate([of(n, sent) for n in ("conv1.bias", "conv2.bias", "dense.bias")])
    assert np.allclose(got + state["0.residual"], 40 * bias, rtol=1e-4)


def test_layers_sent_apart_cost_little_more() -> None:
    whole, apart = coded(Identity(), {})[2], coded(rule({"*.bias": Identity()}, Identity()), {})[2]
    assert len(apart) - len(whole) <= 10


def test_rules_may_hold_rules() -> None:
    codec = rule({"conv*": rule({"*.bias": Identity()}, LEVELS)}, Identity())
    decoded = coded(codec, {})[0]
    assert np.array_equal(of("conv1.bias", decoded), of("conv1.bias", X))
    assert not np.array_equal(of("conv1.weight", decoded), of("conv1.weight", X))


# Slips of the pen


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            {"cnv1.*": Identity()},
            r"'cnv1\.\*' in this model \(conv1.weight, conv1.bias, .*dense.bias\): correct",
        ),
        ({"*": Identity(), "*.bias": TopK()}, r"no layer is left for '\*\.bias'"),
        ({"CONV1.*": Identity()}, r"no layer is left for 'CONV1"),
    ],
)
def test_a_pattern_without_a_layer_is_refused(rules: dict[str, Codec], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        coded(rule(rules, Identity()), {})


def test_it_is_refused_before_the_run() -> None:
    fast = "task=digits privacy=none"
    config.job(config.compose(f"{fast} model=small_cnn codec=perlayer")).prepare()
    with pytest.raises(
        ConfigError, match=r"no layer is left for '\*conv\*' in this model \(linear1.weight"
    ) as caught:
        config.job(config.compose(f"{fast} model=mlp codec=perlayer")).prepare()
    assert "\n" not in str(caught.value)


def test_what_is_no_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"codec.rules: \*.bias must name a codec, got 3"):
        config.build(
            {"_target_": "fedapp.codec.per_layer.PerLayer", "rules": {"*.bias": 3}, "rest": {}}, "codec"
        )
    with pytest.raises(ConfigError, match=r"codec.rules: rest must name a codec, got None"):
        PerLayer((), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"codec.rules must map patterns .* got 'biases'"):
        PerLayer("biases", Identity())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"does not fit .*rest"):
        config.build({"_target_": "fedapp.codec.per_layer.PerLayer", "rules": {}}, "codec")


def test_targets_inside_rules_are_checked() -> None:
    evil = {"_target_": "os.system", "command": "true"}
    with pytest.raises(ConfigError, match="not allowed"):
        config.build(
            {"_target_": "fedapp.codec.per_layer.PerLayer", "rules": {"a.b": evil}, "rest": {}}, "codec"
        )


def test_the_example_is_what_it_says() -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(config.CONF) / "codec" / "perlayer.yaml"))
    codec = config.build(node, "codec")
    assert codec == rule({"*.bias": Identity(), "*conv*": pipeline(step=1.0)}, pipeline())
    assert hash(codec) == hash(config.build(node, "codec"))
    decoded = coded(codec, {})[0]
    assert np.array_equal(of("conv2.bias", decoded), of("conv2.bias", X))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_diverged_values_are_named_by_their_layer(bad: float) -> None:
    x = X.copy()
    x[OFFSETS[4]] = bad
    with pytest.raises(ValueError, match="in scale; training diverged"):
        require_finite(x, LAYOUT)
    with pytest.raises(ValueError, match="infinite values; training diverged"):
        require_finite(x[1:], LAYOUT)
    with pytest.raises(ValueError, match="in scale; training diverged"):
        rule({"*.weight": LEVELS}, LEVELS).encode(x, LAYOUT, {}, np.random.default_rng(0))


def test_a_part_of_the_update_has_no_layers() -> None:
    with pytest.raises(TypeError, match=r"got 5 of 397 values: put it first"):
        require_whole(X[:5], LAYOUT)
    with pytest.raises(TypeError, match="put it first"):
        rule({}, Identity()).encode(X[:5], LAYOUT, {}, np.random.default_rng(0))


# Hostile bytes

MIXED = rule({"*.bias": Identity(), "conv*": TopK(0.5), "scale": DeadZone(0.1, 0.5)}, LEVELS)


def test_packets_that_end_early_or_late_are_refused() -> None:
    packet, _ = MIXED.encode(X, LAYOUT, {}, np.random.default_rng(0))
    for length in range(0, len(packet.body), 3):
        with pytest.raises(DecodeError):
            MIXED.decode(Packet(packet.body[:length]), LAYOUT)
    for other in (
        Packet(np.append(packet.body, np.uint8(0))),
        Packet(packet.body, b"\0"),
        Packet(packet.body.astype(np.int32)),
        Packet(X),
    ):
        with pytest.raises(DecodeError):
            MIXED.decode(other, LAYOUT)


@pytest.mark.parametrize("kind", [0, 1, 3, 255])
def test_groups_of_another_type_or_size_are_refused(kind: int) -> None:
    codec = rule({}, Identity())
    body = codec.encode(X, LAYOUT, {}, np.random.default_rng(0))[0].body.copy()
    assert body[2] == 2  # a length of two bytes, then the type
    body[2] = kind
    with pytest.raises(DecodeError):
        codec.decode(Packet(body), LAYOUT)
    short = codec.encode(X[:16], Layout((Slot("x", (16,), 0),), 16), {}, np.random.default_rng(0))[0]
    with pytest.raises(DecodeError, match=r"not 397 float32"):
        codec.decode(short, LAYOUT)


@settings(deadline=None, max_examples=300)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=6
    )
)
def test_edited_bodies_are_survived(edits: list[tuple[int, int, int]]) -> None:
    data = bytearray(MIXED.encode(X, LAYOUT, {}, np.random.default_rng(0))[0].body.tobytes())
    for place, value, how in edits:
        place %= len(data)
        if how == 0:
            data[place] = value
        elif how == 1:
            data[place:place] = bytes([value])
        else:
            del data[place]
    try:
        decoded = decode_update(pack(Packet(np.frombuffer(data, np.uint8)), MIXED, LAYOUT), MIXED, LAYOUT)
    except DecodeError:
        return
    assert decoded.shape == X.shape
