"""Secure aggregation among clients that know each other: what a server that lies learns; files of keys."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sessions import SIGNED, Round, held, reach, vectors

from fedapp.errors import ConfigError, DecodeError, FedappError, RoundLost
from fedapp.secagg import Client, Plan, Record, keys, shamir
from fedapp.secagg.record import marks
from fedapp.secagg.roster import read_identity, read_roster


def rounds(count: int = 10, session: int = 1) -> Round:
    return Round(vectors(count, 20, 2560), 2560, session=session, signed=True)


# The sum


def test_the_sum_is_the_same_with_a_stage_more() -> None:
    one = rounds()
    assert np.array_equal(one.run(), one.sum(range(10)))


@pytest.mark.parametrize("stage", SIGNED)
def test_dropouts_at_any_stage(stage: str) -> None:
    """Up to three of ten; whoever sent a masked vector is in the sum, though it confirms or opens nothing."""
    one = rounds()
    total = one.run({stage: {2, 5, 9}})
    alive = set(range(10)) - ({2, 5, 9} if stage in SIGNED[:3] else set())
    assert one.server.alive == sorted(alive)
    assert np.array_equal(total, one.sum(alive))


@pytest.mark.parametrize("stage", SIGNED[1:])
def test_too_many_dropouts_lose_the_round(stage: str) -> None:
    one = rounds()
    with pytest.raises(RoundLost):
        one.run({stage: {0, 1, 2, 3, 4}})
    assert ("unmask" in one.sent) == (stage == "unmask")


def test_where_nobody_is_left_it_is_no_lost_round() -> None:
    with pytest.raises(FedappError) as failed:
        rounds().run({"mask": set(range(10))})
    assert not isinstance(failed.value, RoundLost)


# A server that lies about who is alive


def told(one: Round, number: int, survivors: set[int]) -> bytes:
    """The message's marks where the server says that these clients are alive."""
    server = one.server
    others = server._graph.neighbours(server._position[number])
    return marks([server._clients[other] in survivors for other in others])


def opened(one: Round, stories: dict[int, set[int]], everybodys: bool = False) -> dict[int, Record]:
    """Every client is told its own story, and gets the signatures of that, or all there are. Who unmasks."""
    if one.signed:
        signed: dict[int, bytes] = {}
        for number, alive in stories.items():
            reply = one.answer("confirm", number, {"session": 1, "alive": told(one, number, alive)})
            signed[number] = held(reply, "signature")
    shares: dict[int, Record] = {}
    for number, alive in stories.items():
        message: Record = {"session": 1, "alive": told(one, number, alive)}
        if one.signed:
            fitting = {other for other, story in stories.items() if everybodys or story == alive}
            confirmed = alive & fitting - {number}
            ordered = sorted(confirmed, key=one.server._position.__getitem__)
            signatures = b"".join(signed[other] for other in ordered)
            message = {"session": 1, "confirmed": told(one, number, confirmed), "signatures": signatures}
        try:
            shares[number] = one.answer("unmask", number, message)
        except FedappError:
            continue
    return shares


def halves(one: Round) -> dict[int, set[int]]:
    """Two stories of ten clients: to half of them 9 is alive, to the others it dropped out."""
    return {number: set(range(10)) - ({9} if number % 2 else set()) for number in range(9)}


@pytest.mark.parametrize("everybodys", [False, True])
def test_two_stories_of_who_is_alive_open_nothing(everybodys: bool) -> None:
    """Nobody unmasks; without a roster all do, and the server has shares of both secrets of one client."""
    one, _ = reach("confirm", 10, signed=True)
    assert not opened(one, halves(one), everybodys)
    trusting, _ = reach("unmask", 10)
    assert len(opened(trusting, halves(trusting))) == 9


def test_the_story_that_enough_have_signed_is_the_only_one_opened() -> None:
    """Seven of nine hear one story, two another: those two learn that they stand alone."""
    one, _ = reach("confirm", 10, signed=True)
    stories = {number: set(range(10)) - ({9} if number < 2 else set()) for number in range(9)}
    assert sorted(opened(one, stories)) == list(range(2, 9))


def test_no_two_stories_have_enough_signatures() -> None:
    """Of t + 1 signers of each, more are in both than collude, and who is honest signs once."""
    for count in range(3, 250):
        for share in (0.0, 0.1, 0.2, 0.4):
            graph = Plan(colluding=share, dropouts=0.0).graph(count, complete=True)
            assert graph.degree == count - 1
            assert 2 * (graph.threshold + 1) - count > math.floor(share * count + 1e-9)


@pytest.fixture
def due() -> tuple[Round, Record]:
    """A round whose clients have confirmed, and the message that asks client 0 to unmask."""
    one, messages = reach("unmask", 10, signed=True)
    return one, messages[0]


@pytest.mark.parametrize("missing", [range(4), range(9)])
def test_missing_signatures_are_refused(due: tuple[Round, Record], missing: range) -> None:
    one, message = due
    left = [place not in missing for place in range(9)]
    signatures = held(message, "signatures")[64 * len(missing) :]
    few = message | {"confirmed": marks(left), "signatures": signatures}
    with pytest.raises(
        FedappError, match=f"{9 - len(missing)} neighbours confirmed who is alive, at least 6"
    ):
        one.answer("unmask", 0, few)
    one.answer("unmask", 0, message)  # a refusal costs nothing


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: bytes(len(b)),
        lambda b: b[64:128] + b[64:],  # one signer's, twice
    ],
)
def test_wrong_signatures_are_refused(due: tuple[Round, Record], change: Callable[[bytes], bytes]) -> None:
    one, message = due
    with pytest.raises(DecodeError, match="who is alive carries a wrong signature"):
        one.answer("unmask", 0, message | {"signatures": change(held(message, "signatures"))})
    one.answer("unmask", 0, message)


def test_signatures_of_another_session_are_refused(due: tuple[Round, Record]) -> None:
    """Of the same number, clients and survivors: but keys are fresh, and signed with who is alive."""
    one, message = due
    other, again = reach("unmask", 10, signed=True)
    other.clients = one.clients
    with pytest.raises(DecodeError, match="wrong signature"):
        one.answer("unmask", 0, message | {"signatures": held(again[0], "signatures")})


def test_stages_come_once_and_in_order() -> None:
    one, messages = reach("confirm", 10, signed=True)
    with pytest.raises(FedappError, match="past or before the stage 'unmask'"):
        one.answer("unmask", 0, messages[0])
    one.answer("confirm", 0, messages[0])
    with pytest.raises(FedappError, match="past or before the stage 'confirm'"):
        one.answer("confirm", 0, messages[0] | {"alive": b"\xff\x00"})
    plain, _ = reach("unmask", 10)
    with pytest.raises(FedappError, match="not confirmed without a roster"):
        plain.answer("confirm", 0, messages[0])


def test_the_dead_confirm_nothing() -> None:
    one, messages = reach("unmask", 10, {"mask": {9}}, signed=True)
    seat = one.server._graph.neighbours(one.server._position[0]).index(one.server._position[9])
    confirmed = np.unpackbits(np.frombuffer(held(messages[0], "confirmed"), np.uint8))[:9].astype(bool)
    assert not confirmed[seat]
    confirmed[seat] = True
    extra: Record = {
        "confirmed": marks(confirmed.tolist()),
        "signatures": held(messages[0], "signatures") + bytes(64),
    }
    with pytest.raises(FedappError, match="who is not alive cannot confirm"):
        one.answer("unmask", 0, messages[0] | extra)


def test_a_wrong_signature_costs_a_client_its_confirmation() -> None:
    def lie(stage: str, number: int, reply: Record) -> Record:
        return reply | {"signature": bytes(64)} if (stage, number) == ("confirm", 4) else reply

    one = rounds()
    total = one.run(lie=lie, lost={"unmask": {4}})
    assert 4 not in one.sent["unmask"]
    assert np.array_equal(total, one.sum(range(10)))


# A server that puts others in the place of clients


def test_keys_that_a_server_made_up_are_refused() -> None:
    one = rounds(5)
    one.run()
    own = keys.advertise(b"a" * 32, b"b" * 32, (1).to_bytes(8, "little"), None)
    stranger = keys.advertise(b"a" * 32, b"b" * 32, (1).to_bytes(8, "little"), b"c" * 32)
    one.states, message = {}, one.sent["share"][0]
    one.answer("advertise", 0, {"session": 1})
    given = held(message, "keys")
    for first, said in ((own + given[64:160], "wrong signature"), (stranger, "nobody on the roster")):
        with pytest.raises(DecodeError, match=said):
            one.answer("share", 0, message | {"keys": first + given[160:]})
    one.answer("advertise", 0, {"session": 2})
    with pytest.raises(DecodeError, match="wrong signature"):  # signed, but for another session
        one.answer("share", 0, message | {"session": 2})
    with pytest.raises(ConfigError, match="set both or neither"):
        Client(10, 2560, roster=one.clients[0].roster)
    second = (2).to_bytes(8, "little")
    signers = (one.clients[n].signing_key for n in (1, 2, 3, 0))  # the last one is its own
    others = [
        keys.advertise(bytes([n]) * 32, bytes([n + 9]) * 32, second, key) for n, key in enumerate(signers)
    ]
    with pytest.raises(FedappError, match="a key comes twice"):
        one.answer("share", 0, message | {"session": 2, "keys": b"".join(others)})


def test_a_client_of_another_run_cannot_be_alive() -> None:
    """Its old keys are signed, and the server may know them; but nobody seals shares with them any more."""
    one = rounds()
    one.stage("advertise")
    one.stage("share")
    messages = one.server.mask()
    server = one.server
    for number, message in messages.items():
        others = server._graph.neighbours(server._position[number])
        sealed = held(message, "sealed")
        if number != 9:
            place = others.index(server._position[9])
            sealed = sealed[: 80 * place] + bytes(80) + sealed[80 * (place + 1) :]
        server.take(number, one.answer("mask", number, message | {"sealed": sealed}))
    for number, message in server.confirm().items():
        if number == 9:
            continue
        with pytest.raises(FedappError, match="never shared cannot be alive"):
            one.answer("confirm", number, message)
        one.answer("confirm", number, message | {"alive": told(one, number, set(range(9)))})


def test_shares_that_do_not_open_are_no_neighbours() -> None:
    one, messages = reach("mask", 10, signed=True)
    sealed = held(messages[0], "sealed")
    with pytest.raises(FedappError, match="5 neighbours have shared, at least 6 must"):
        one.answer("mask", 0, messages[0] | {"sealed": bytes(4 * 80) + sealed[4 * 80 :]})
    one.answer("mask", 0, messages[0])


# Files


def write(key: Ed25519PrivateKey, folder: Path, name: str) -> bytes:
    """As ssh-keygen does; returns the line of the public key."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (folder / name).write_bytes(private)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" somebody@somewhere\n"


def test_files_of_ssh_keygen_are_read(tmp_path: Path) -> None:
    all_keys = [Ed25519PrivateKey.generate() for _ in range(3)]
    lines = [write(key, tmp_path, f"key{n}") for n, key in enumerate(all_keys)]
    (tmp_path / "roster").write_bytes(b"\n".join(lines))
    own = read_identity(tmp_path / "key1", tmp_path / "roster")
    assert own.signing_key == all_keys[1].private_bytes_raw()
    assert own.roster == {key.public_key().public_bytes_raw() for key in all_keys}
    assert own.signing_key.hex() not in repr(own)
    assert repr(own.signing_key) not in repr(own)
    (tmp_path / "roster").write_bytes(lines[0] + lines[2])
    with pytest.raises(ConfigError, match="own signing key is not on its roster"):
        read_identity(tmp_path / "key1", tmp_path / "roster")


def test_files_that_hold_no_keys_are_named(tmp_path: Path) -> None:
    line = write(Ed25519PrivateKey.generate(), tmp_path, "key")
    other = generate_private_key(SECP256R1())
    ecdsa = other.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    for content, said in (
        (b"", "each once"), (line * 2, "each once"), (line + ecdsa, "ssh-keygen"), (b"key\n", "read"),
    ):  # fmt: skip
        (tmp_path / "roster").write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            read_roster(tmp_path / "roster")
    with pytest.raises(ConfigError, match=r"the roster .* cannot be read"):
        read_roster(tmp_path / "none")
    (tmp_path / "roster").write_bytes(line)
    (tmp_path / "ecdsa").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    for name, said in (("ecdsa", "not of Ed25519"), ("roster", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            read_identity(tmp_path / name, tmp_path / "roster")


# What it costs


def test_bits_per_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    """As without a roster: 10 clients, a tenth of 1.2 million parameters, 12 bits each."""
    one = Round(vectors(10, 120_000, 4096), 4096, signed=True)
    one.run()
    up, down = (8 * b / 10 / 1_200_000 for b in (one.bytes_up, one.bytes_down))
    with capsys.disabled():
        print(f"\nroster: {up:.4f} bits up, {down:.4f} down a parameter")
    assert up + down <= 1.25


def test_a_signature_and_signatures_of_all_are_what_it_adds() -> None:
    plain, signed = Round(vectors(10, 20, 2560), 2560), rounds()
    plain.run()
    signed.run()
    assert 10 * (96 + 64) < signed.bytes_up - plain.bytes_up < 10 * (96 + 64 + 60)
    assert 10 * 9 * (96 + 64) < signed.bytes_down - plain.bytes_down < 10 * (9 * (96 + 64) + 80)
    assert len(held(signed.seen["unmask"][0], "shares")) == 9 * shamir.BYTES


def test_a_client_without_keys_does_not_go_with_those_that_have_them() -> None:
    """Whatever the server says: an advertisement is of another size."""
    one = rounds(5)
    one.clients[3] = replace(one.clients[3], signing_key=None, roster=frozenset())
    one.stage("advertise", lie=lambda stage, number, reply: reply)
    assert sorted(one.seen["advertise"]) == [0, 1, 2, 4]
