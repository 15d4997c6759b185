"""Secure aggregation: the sum and nothing else, whoever drops out, whoever lies, and what it costs."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2, hypergeom
from sessions import STAGES, Lie, Round, held, reach, vectors

from fedapp.errors import ConfigError, DecodeError, FedappError
from fedapp.privacy import secret
from fedapp.secagg import Client, Graph, Plan, Record, keys, masks, residues, shamir
from fedapp.secagg import client as client_module
from fedapp.secagg.record import split

MODULI = st.one_of(st.integers(2, 1 << 31), st.sampled_from([2, 3, 256, 2551, 2560, 2**31 - 1, 2**31]))


# The sum


@settings(deadline=None, max_examples=40)
@given(data=st.data(), count=st.integers(3, 14), size=st.integers(1, 200), modulus=MODULI)
def test_the_sum_is_exact_whoever_drops_out(data: st.DataObject, count: int, size: int, modulus: int) -> None:
    """Any number before the keys are in, and after that as many as the plan says, at any stage."""
    plan = Plan()
    numbers = data.draw(st.permutations(range(count)))
    early = data.draw(st.integers(0, count - plan.least))
    lost = {"advertise": set(numbers[:early])}
    started = numbers[early:]
    spare = int(plan.dropouts * len(started) + 1e-9)
    cuts = sorted(data.draw(st.lists(st.integers(0, spare), min_size=3, max_size=3)))
    for stage, low, high in zip(STAGES[1:], (0, *cuts), cuts, strict=False):
        lost[stage] = set(started[low:high])
    one = Round(vectors(count, size, modulus), modulus, plan)
    total = one.run(lost)
    alive = [n for n in started if n not in lost["share"] | lost["mask"]]
    assert one.server.alive == sorted(alive)
    assert total.dtype == np.uint32
    assert np.array_equal(total, one.sum(alive))


def test_sparse_graphs_sum_too() -> None:
    plan = Plan(colluding=0.05, dropouts=0.1)
    graph = plan.graph(80)
    assert graph.degree < 40
    one = Round(vectors(80, 50, 2555), 2555, plan)
    lost: dict[str, set[int]] = {"share": {3, 70}, "mask": {5, 6, 7}, "unmask": {20, 21, 22}}
    total = one.run(lost)
    assert np.array_equal(total, one.sum(set(range(80)) - lost["share"] - lost["mask"]))


@pytest.mark.parametrize("stage", ["share", "mask", "unmask"])
def test_below_the_threshold_nothing_is_unmasked(stage: str) -> None:
    one = Round(vectors(10, 20, 2560), 2560)
    with pytest.raises(FedappError, match="the round is lost"):
        one.run({stage: {0, 1, 2, 3, 4}})
    with pytest.raises(FedappError):  # and that is the end of it
        one.server.total()
    assert ("unmask" in one.sent) == (stage == "unmask")  # no client is asked for a share before that


def test_too_few_advertisements_end_the_session() -> None:
    one = Round(vectors(10, 20, 2560), 2560, Plan(least=5))
    with pytest.raises(FedappError, match="4 clients have advertised keys, at least 5 must"):
        one.run({"advertise": {0, 1, 2, 3, 4, 5}})


# What the server sees


def uniform(residue: NDArray[np.uint32], modulus: int) -> bool:
    """Chi-square at a level of 1e-6, over up to 64 classes of equal width but for the last."""
    width = -(-modulus // 64)
    counts = np.bincount(residue // width)
    edges = np.minimum(np.arange(len(counts) + 1) * width, modulus)
    expected = len(residue) * np.diff(edges) / modulus
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return statistic < float(chi2.isf(1e-6, len(counts) - 1))


def stripped(one: Round, number: int) -> NDArray[np.uint32]:
    """One masked vector without what the server can take off: its own mask, and those with the dropped."""
    server: Any = one.server
    position = server._position[number]
    session = one.session.to_bytes(8, "little")
    total = residues.unpack(
        held(one.seen["mask"][number], "values"), one.values.shape[1], one.modulus
    ).astype(np.int64)
    masks.add_mask(total, keys.self_mask(server._recover(position, set())), one.modulus, -1)
    for other in server._near(position, server._commitment.keys() - server._masked):
        masking = keys.Private(server._recover(other, set()))
        key = keys.pair_mask(masking, server._masking(position), session)
        masks.add_mask(total, key, one.modulus, 1 if other < position else -1)
    return np.remainder(total, one.modulus).astype(np.uint32)


@pytest.mark.parametrize("modulus", [2, 2551, 2560, 2**31 - 1])
@pytest.mark.parametrize("update", ["zero", "most"])
def test_what_the_server_sees_of_one_update_is_uniform(modulus: int, update: str) -> None:
    """Masked vectors, and what is left of them after unmasking, look the same whatever the update is."""
    values = np.full((6, 60_000), 0 if update == "zero" else modulus - 1, np.uint32)
    one = Round(values, modulus)
    one.run({"mask": {2}})
    for number, reply in one.seen["mask"].items():
        assert uniform(residues.unpack(held(reply, "values"), 60_000, modulus), modulus)
        assert uniform(stripped(one, number), modulus)


def test_two_clients_cannot_be_told_apart_but_by_their_sum() -> None:
    """Moving a constant from one update to another moves neither distribution, and not the sum."""
    one, other = (Round(vectors(5, 60_000, 2560), 2560, seed=seed) for seed in (1, 2))
    other.values[0] = (other.values[0] + 1000) % 2560
    other.values[1] = (other.values[1] + 1560) % 2560
    assert np.array_equal(one.run(), other.run())
    for number in (0, 1):
        assert uniform(stripped(one, number), 2560)
        assert uniform(stripped(other, number), 2560)


@pytest.mark.parametrize("removed", ["pair", "self"])
def test_the_uniformity_test_catches_missing_masks(removed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pair masks, unmasking bares each update; without any, nothing hides it."""
    add = masks.add_mask
    calls = {"left": 0}

    def only_self(total: NDArray[np.int64], key: bytes, modulus: int, sign: int) -> None:
        calls["left"] += 1
        if removed == "pair" and calls["left"] % 6 == 1:  # the first of each client's six is its own
            add(total, key, modulus, sign)

    one = Round(np.zeros((6, 60_000), np.uint32), 2560)
    monkeypatch.setattr(client_module, "add_mask", only_self)
    one.run()
    masked = residues.unpack(held(one.seen["mask"][0], "values"), 60_000, 2560)
    assert uniform(masked, 2560) == (removed == "pair")
    assert removed == "self" or not stripped(one, 0).any()


def test_a_biased_residue_is_caught() -> None:
    """A plain remainder of 12-bit words modulo 2560 favours the low ones; rejection does not."""
    plain = np.random.default_rng(0).integers(0, 4096, 60_000) % 2560
    assert not uniform(plain.astype(np.uint32), 2560)


def test_two_rounds_share_no_masks() -> None:
    """Zero updates are all mask: what two sessions have in common must look uniform too."""
    rounds = [Round(np.zeros((4, 60_000), np.uint32), 2560, session=session) for session in (1, 2)]
    for one in rounds:
        one.run()
    for number in range(4):
        first, second = (
            residues.unpack(held(o.seen["mask"][number], "values"), 60_000, 2560) for o in rounds
        )
        assert uniform(((first.astype(np.int64) - second) % 2560).astype(np.uint32), 2560)
        assert np.mean(first == second) < 0.01
    advertised = [held(r, "keys") for o in rounds for r in o.seen["advertise"].values()]
    public = [part for one in advertised for part in (one[:32], one[32:])]
    assert len(set(public)) == 16


def test_a_session_that_breaks_off_leaves_no_key_to_the_next() -> None:
    client = Client(10, 2560)
    first, state = client.advertise({"session": 1}, {})
    second, _ = client.advertise({"session": 2}, state)
    public = [part for one in (first, second) for part in split(held(one, "keys"), keys.KEY)]
    assert len(set(public)) == 4


def test_the_mask_of_two_clients_is_one_at_both_and_another_in_each_session() -> None:
    one, other = (keys.Private(bytes([n]) * keys.KEY) for n in (1, 2))
    sessions = [number.to_bytes(8, "little") for number in (1, 2)]
    made = [keys.pair_mask(one, other.public, session) for session in sessions]
    assert made == [keys.pair_mask(other, one.public, session) for session in sessions]
    assert made[0] != made[1]


# What clients refuse


def test_no_stage_is_answered_twice() -> None:
    """A second unmask could ask for the other secret, a second mask would bare a difference."""
    one = Round(vectors(6, 10, 2560), 2560)
    one.run()
    for stage in STAGES[1:]:
        with pytest.raises(FedappError, match="no stage is answered twice"):
            one.answer(stage, 0, one.sent[stage][0])
    with pytest.raises(FedappError, match="session 1 does not come after 1"):
        one.answer("advertise", 0, {"session": 1})
    one.answer("advertise", 0, {"session": 2})
    with pytest.raises(FedappError, match="session 1 is not this client's"):
        one.answer("unmask", 0, one.sent["unmask"][0])


@pytest.mark.parametrize("stage", STAGES[1:])
def test_another_session_is_refused(stage: str) -> None:
    one, messages = reach(stage)
    before = dict(one.states)
    with pytest.raises(FedappError, match="session 7 is not this client's"):
        one.answer(stage, 0, messages[0] | {"session": 7})
    with pytest.raises(FedappError, match="is not this client's"):
        one.clients[0].unmask(messages[0], {})
    assert one.states == before
    one.answer(stage, 0, messages[0])  # a refusal costs nothing


def test_the_second_secret_of_a_client_is_refused() -> None:
    """One bit cannot name a neighbour alive and dropped, and a request with the bit turned comes late."""
    one, messages = reach("unmask")
    turned = bytes(byte ^ bit for byte, bit in zip(held(messages[0], "alive"), b"\x80", strict=True))
    reply = one.answer("unmask", 0, messages[0])
    assert len(held(reply, "shares")) == 5 * shamir.BYTES
    with pytest.raises(FedappError, match="no stage is answered twice"):
        one.answer("unmask", 0, messages[0] | {"alive": turned})
    assert set(one.states[0]) == {"session", "stage"}  # nothing is left to give


def test_stories_that_differ_open_one_secret_at_most() -> None:
    """On the complete graph one share of each honest client, and both of each colluder, fall short."""
    for count in range(3, 200):
        graph, colluders = Plan(colluding=0.1, dropouts=0.2).graph(count), int(0.1 * count + 1e-9)
        if graph.degree == count - 1:
            assert (graph.degree - colluders) + 2 * colluders < 2 * graph.threshold


def test_fewer_alive_than_the_threshold_are_refused() -> None:
    one, messages = reach("unmask")
    with pytest.raises(FedappError, match="3 neighbours are alive, at least 4 must"):
        one.answer("unmask", 0, messages[0] | {"alive": b"\xe0"})
    one, messages = reach("mask")
    shares = held(messages[0], "sealed")[: 3 * client_module.SEALED]
    with pytest.raises(FedappError, match="3 neighbours have shared, at least 4 must"):
        one.answer("mask", 0, messages[0] | {"present": b"\xe0", "sealed": shares})


def test_on_the_complete_graph_clients_too_count_the_terms_of_a_sum() -> None:
    one, messages = reach("unmask")
    one.clients[0] = replace(one.clients[0], plan=Plan(least=6))
    with pytest.raises(FedappError, match="4 neighbours are alive, at least 5 must"):
        one.answer("unmask", 0, messages[0] | {"alive": b"\xf0"})
    one.answer("unmask", 0, messages[0])


def test_a_client_that_never_shared_cannot_be_alive() -> None:
    one, messages = reach("unmask", 7, {"share": {6}})
    with pytest.raises(FedappError, match="never shared cannot be alive"):
        one.answer("unmask", 0, messages[0] | {"alive": b"\xfc"})


def test_too_few_neighbours_and_repeated_keys_are_refused() -> None:
    one, messages = reach("share")
    own = held(one.seen["advertise"][0], "keys")
    given = held(messages[0], "keys")
    with pytest.raises(DecodeError, match="keys must be 320 bytes, got 256"):
        one.answer("share", 0, messages[0] | {"keys": given[64:]})
    with pytest.raises(FedappError, match="at least 3 clients"):
        one.answer("share", 0, messages[0] | {"cohort": 2, "position": 0, "keys": given[:64]})
    with pytest.raises(FedappError, match="position 6 in a cohort of 6"):
        one.answer("share", 0, messages[0] | {"position": 6})
    for twice in (given[:64], own, given[32:64] + given[:32], own[:32] + bytes(range(32))):
        with pytest.raises(FedappError, match="a key comes twice"):
            one.answer("share", 0, messages[0] | {"keys": given[:-64] + twice})
    with pytest.raises(DecodeError, match="large order"):
        one.answer("share", 0, messages[0] | {"keys": given[:-32] + bytes(32)})


@settings(deadline=None, max_examples=100)
@given(data=st.data(), stage=st.sampled_from(STAGES))
def test_garbage_from_the_server_is_refused(data: st.DataObject, stage: str) -> None:
    """Every message either is answered or raises FedappError; nothing else."""
    one, messages = reach(stage, 4)
    message = dict(messages[0])
    name = data.draw(st.sampled_from(sorted(message)))
    junk = st.one_of(
        st.integers(-(2**63), 2**63 - 1), st.binary(max_size=400), st.none(), st.text(max_size=3)
    )
    value = data.draw(junk)
    if value is None:
        del message[name]
    else:
        message[name] = value  # type: ignore[assignment]
    with suppress(FedappError):
        one.answer(stage, 0, message)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(9, np.uint32),
        np.zeros(10, np.int64),
        np.full(10, 2560, np.uint32),
        np.zeros((2, 5), np.uint32),
    ],
)
def test_vectors_that_do_not_fit_are_refused(values: NDArray[Any]) -> None:
    one, messages = reach("mask")
    with pytest.raises(FedappError, match="takes 10 uint32 below 2560"):
        one.clients[0].mask(messages[0], one.states[0], values)


# What lies cost


def lying(at: str, name: str, number: int, change: Callable[[bytes], bytes]) -> Lie:
    def lie(stage: str, who: int, reply: Record) -> Record:
        return reply | {name: change(held(reply, name))} if (stage, who) == (at, number) else reply

    return lie


@pytest.mark.parametrize(
    ("at", "name", "change"),
    [
        ("advertise", "keys", lambda b: b[:-1]),
        ("advertise", "keys", lambda b: bytes(64)),
        ("advertise", "keys", lambda b: b[:32] * 2),
        ("share", "sealed", lambda b: b[1:]),
        ("share", "commitment", lambda b: b + b"x"),
        ("mask", "values", lambda b: b[:-1]),
        ("mask", "values", lambda b: b"\xff" * len(b)),
    ],
)  # fmt: skip
def test_a_lie_costs_the_liar_its_reply(at: str, name: str, change: Callable[[bytes], bytes]) -> None:
    one = Round(vectors(10, 20, 2560), 2560)
    gone = {stage: {4} for stage in STAGES[STAGES.index(at) + 1 :]}
    total = one.run(gone, lying(at, name, 4, change))
    assert one.server.alive == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert np.array_equal(total, one.sum(one.server.alive))


@pytest.mark.parametrize("change", [lambda b: b[1:], lambda b: bytes(len(b)), lambda b: b"\xff" * len(b)])
@pytest.mark.parametrize("lost", [set(), {7, 8}])
def test_wrong_shares_are_found_and_done_without(change: Callable[[bytes], bytes], lost: set[int]) -> None:
    """Shares that are refused, and those that turn out wrong: of nine, or of seven, where six will do."""
    one = Round(vectors(10, 20, 2560), 2560)
    assert np.array_equal(one.run({"unmask": lost}, lying("unmask", "shares", 4, change)), one.sum(range(10)))


def test_a_dealer_of_garbage_ends_the_round_and_is_named() -> None:
    """Masks with it are in every vector, and nobody can take them off: no sum, and no wrong sum either."""
    for change in (lambda b: bytes(len(b)), lambda b: b[:-1] + bytes([b[-1] ^ 1])):
        one = Round(vectors(10, 20, 2560), 2560)
        garbled = lying("share", "sealed", 4, change)
        if change(b"ab") == bytes(2):
            with pytest.raises(FedappError, match="shares of client 4 do not open its secret"):
                one.run(lie=garbled)
        else:  # one neighbour's share is lost, eight are left
            assert np.array_equal(one.run(lie=garbled), one.sum(range(10)))
    one = Round(vectors(10, 20, 2560), 2560)
    with pytest.raises(FedappError, match="shares of client 4 do not open its secret"):
        one.run(lie=lying("share", "commitment", 4, lambda b: bytes(16)))


def test_a_dealer_can_wrong_as_many_as_the_threshold_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that pass on its wrong shares look like liars, but their other shares are not lost."""
    one = Round(vectors(10, 20, 2560), 2560)
    one.stage("advertise")
    deal = shamir.share
    for number, message in one.server.share().items():
        with monkeypatch.context() as patch:
            if number in (4, 5):
                bad = (0, 3, 6) if number == 4 else (1, 4, 7)
                patch.setattr(
                    shamir, "share", lambda *a, bad=bad: [s ^ (i in bad) for i, s in enumerate(deal(*a))]
                )
            one.server.take(number, one.answer("share", number, message))
    one.stage("mask")
    one.stage("unmask")
    assert np.array_equal(one.server.total(), one.sum(range(10)))


def test_the_server_takes_one_reply_of_those_it_asked() -> None:
    one, messages = reach("mask", 7, {"share": {5}})
    reply = one.answer("mask", 1, messages[1])
    one.server.take(1, reply)
    with pytest.raises(DecodeError, match="no reply to 'mask' is expected from client 1"):
        one.server.take(1, reply)
    with pytest.raises(DecodeError, match="no reply to 'mask' is expected from client 5"):
        one.server.take(5, {"session": 1})
    with pytest.raises(DecodeError, match="belongs to session 2"):
        one.server.take(0, {"session": 2})


@settings(deadline=None, max_examples=100)
@given(data=st.data(), stage=st.sampled_from(STAGES))
def test_garbage_from_a_client_is_a_decode_error(data: st.DataObject, stage: str) -> None:
    one, messages = reach(stage, 4)
    reply = one.answer(stage, 0, messages[0])
    name = data.draw(st.sampled_from(sorted(reply)))
    junk = st.one_of(
        st.integers(-(2**63), 2**63 - 1), st.binary(max_size=400), st.none(), st.text(max_size=3)
    )
    value = data.draw(junk)
    garbled = {k: v for k, v in reply.items() if k != name} | ({} if value is None else {name: value})
    try:
        one.server.take(0, cast(Record, garbled))
    except DecodeError:
        one.server.take(0, reply)  # it was as if nothing had come


# Plans


def test_complete_graphs_need_no_luck() -> None:
    assert Plan().graph(10) == Graph(10, 9, 6)
    for count in range(3, 140):
        graph = Plan().graph(count)
        colluders, dropouts = int(0.2 * count + 1e-9), int(0.3 * count + 1e-9)
        if count <= 104:
            assert graph.degree == count - 1
        if graph.degree == count - 1:
            assert colluders < graph.threshold <= count - 1 - dropouts


@pytest.mark.parametrize(
    ("count", "colluding", "dropouts"), [(200, 0.2, 0.3), (200, 0.1, 0.1), (1000, 0.05, 0.05)]
)
def test_sparse_graphs_fail_as_seldom_as_they_say(count: int, colluding: float, dropouts: float) -> None:
    graph = Plan(colluding=colluding, dropouts=dropouts).graph(count)
    assert graph.degree < count - 1
    bad, gone = round(colluding * count), round(dropouts * count)
    assert count * hypergeom.sf(graph.threshold - 1, count - 1, bad, graph.degree) < 2.0**-40
    assert count * hypergeom.cdf(graph.threshold - 1, count - 1, count - 1 - gone, graph.degree) < 2.0**-20
    seats = [graph.neighbours(p) for p in range(count)]
    assert all(len(set(near)) == graph.degree and p not in near for p, near in enumerate(seats))
    assert all(p in seats[other] for p in range(count) for other in seats[p])


def test_a_ring_falls_apart_only_by_two_stretches_of_half_its_degree() -> None:
    """The bound on how the honest survivors are cut, by brute force: 9 seats, degree 4."""
    graph = Graph(9, 4, 2)
    for size in range(8):
        for gone in combinations(range(9), size):
            left = set(range(9)) - set(gone)
            reached, new = set(), {min(left)}
            while new:
                reached |= new
                new = {o for p in new for o in graph.neighbours(p)} & left - reached
            stretches = sum(all((p + step) % 9 in gone for step in range(2)) for p in range(9))
            assert reached == left or stretches >= 2


def test_plans_that_nothing_stands_are_named() -> None:
    with pytest.raises(ConfigError, match=r"set secagg\.dropouts or secagg\.colluding lower"):
        Plan(colluding=0.3, dropouts=0.5).require(10)
    assert Plan(colluding=0.3, dropouts=0.5).graph(10).threshold == 7  # who is left, in the midst of a round
    Plan(colluding=0.3, dropouts=0.2).require(10)
    for bad in ({"least": 2}, {"colluding": 1.0}, {"dropouts": -0.1}):
        with pytest.raises(ConfigError, match=f"secagg.{next(iter(bad))}"):
            Plan(**bad)


# Parts


@settings(deadline=None)
@given(
    value=st.integers(0, shamir.PRIME - 1),
    threshold=st.integers(1, 8),
    extra=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_shares_open_the_secret(value: int, threshold: int, extra: int, seed: int) -> None:
    points = [3 * p + 1 for p in range(threshold + extra)]
    shares = dict(zip(points, shamir.share(value, threshold, points, secret.source(seed)), strict=True))
    assert shamir.polynomial(dict(list(shares.items())[extra:]))(0) == value
    assert shamir.recover(shares, threshold, lambda v: v == value) == (value, set())
    if extra > 1:
        wrong = shares | {points[0]: shares[points[0]] ^ 1}
        assert shamir.recover(wrong, threshold, lambda v: v == value) == (value, {points[0]})
        unseen = shares | {points[-1]: shares[points[-1]] ^ 1}
        assert shamir.recover(unseen, threshold, lambda v: v == value) == (value, set())
    if threshold > 1:
        few = dict(list(shares.items())[: threshold - 1])
        assert shamir.recover(few, threshold, lambda _: True) is None
        # One share less fits every secret: with the value at 0 free, the polynomial goes through all of them.
        assert shamir.polynomial(few | {0: 12345})(0) == 12345


def test_known_shares() -> None:
    """A line by hand: 42 + 10 x at 1 and 3."""
    assert shamir.polynomial({1: 52, 3: 72})(0) == 42
    assert shamir.polynomial({1: 52, 3: 72})(2) == 62


def test_the_mask_is_chacha20_rejected_and_reduced() -> None:
    """RFC 8439, appendix A.1, test vector 1: the stream of a zero key and nonce starts 76b8e0ad a0f13d90."""
    words = np.array([0xADE0B876, 0x903DF1A0], np.uint64)
    total = np.zeros(2, np.int64)
    masks.add_mask(total, bytes(32), 2560, 1)
    assert np.array_equal(total % 2560, words % np.uint64(2560))
    modulus = 2**31 - 2**29 + 1  # two of it leave a quarter of the words to be rejected
    total = np.zeros(200_000, np.int64)
    masks.add_mask(total, b"k" * 32, modulus, 1)
    assert total.max() < 2 * modulus
    assert uniform((total % modulus).astype(np.uint32), modulus)
    short = np.zeros(1000, np.int64)
    masks.add_mask(short, b"k" * 32, modulus, 1)
    assert np.array_equal(short, total[:1000])
    masks.add_mask(total, b"k" * 32, modulus, -1)
    assert not total.any()


@settings(deadline=None)
@given(size=st.integers(0, 300), modulus=MODULI, seed=st.integers(0, 99))
def test_residues_pack_and_unpack(size: int, modulus: int, seed: int) -> None:
    values = vectors(1, size, modulus, seed)[0]
    packed = residues.pack(values, modulus)
    assert len(packed) == residues.packed_size(size, modulus)
    assert np.array_equal(residues.unpack(packed, size, modulus), values)
    count, bits = residues.form(modulus)
    assert bits / count < math.log2(modulus) + 0.5
    assert bits / count <= (modulus - 1).bit_length()


def test_residues_pack_across_blocks() -> None:
    for modulus in (3, 2551, 2**31):
        values = vectors(1, 250_001, modulus)[0]
        assert np.array_equal(residues.unpack(residues.pack(values, modulus), len(values), modulus), values)


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=30), size=st.integers(1, 40), modulus=st.one_of(st.integers(2, 30), MODULI))
def test_bytes_are_residues_that_pack_to_them_or_a_decode_error(data: bytes, size: int, modulus: int) -> None:
    try:
        values = residues.unpack(data, size, modulus)
    except DecodeError:
        return
    assert values.max() < modulus
    assert residues.pack(values, modulus) == data


# What it costs


@pytest.mark.parametrize(("parameters", "most"), [(1_200_000, 1.25), (26_146, 2.2)])
def test_bits_per_parameter(parameters: int, most: float, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of the parameters at 10 clients: all bytes of all messages, as Flower serializes them."""
    size, clients = math.ceil(parameters / 10), 10
    for modulus in (2551, 2560):
        one = Round(vectors(clients, size, modulus), modulus)
        one.run()
        up, down = (8 * b / clients / parameters for b in (one.bytes_up, one.bytes_down))
        with capsys.disabled():
            print(f"\nm {modulus}, {parameters} parameters: {up:.4f} bits up, {down:.4f} down a parameter")
        assert up + down <= most


def test_the_client_is_quick() -> None:
    """Ten masks of 1.2 million residues take 0.05 s of a core; here is room for a busy machine."""
    one = Round(vectors(10, 1_200_000, 2560), 2560)
    one.stage("advertise")
    one.stage("share")
    messages = one.server.mask()
    begin = time.perf_counter()
    one.answer("mask", 0, messages[0])
    assert time.perf_counter() - begin < 1.0
