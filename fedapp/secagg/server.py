"""The server's end of secure aggregation: it asks, takes replies as they come, and adds them up."""

import os
from collections.abc import Collection, Container, Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import DecodeError, FedappError, RoundLost
from fedapp.privacy.secret import Secret
from fedapp.secagg import keys, shamir
from fedapp.secagg.client import SEALED
from fedapp.secagg.masks import add_mask
from fedapp.secagg.plan import Graph, Plan
from fedapp.secagg.record import Record, data, marks, read_marks, split, whole
from fedapp.secagg.residues import unpack


class Server:
    """One session. advertise, share, mask and unmask each end the stage before, and give what to send now.

    With a `roster`, the public Ed25519 keys of all participants, `confirm` comes before `unmask`.

    Replies go to `take` one at a time, in any order; what does not come, or what `take` raises DecodeError
    about, is a dropout. RoundLost ends the session: too few are left, and nothing was or will be unmasked;
    FedappError, where nobody is.
    Memory is one vector of `size` int64, whatever the cohort. `session` (0 .. 2**63 - 1) must be above every
    number that any of these clients has seen before.
    """

    def __init__(
        self, clients: Iterable[int], size: int, modulus: int, session: int, plan: Plan,
        secret: Secret = os.urandom, roster: frozenset[bytes] = frozenset(),
    ) -> None:  # fmt: skip
        check.whole("secagg size", size, 1)
        check.whole("secagg modulus", modulus, 2, 1 << 31)
        check.whole("secagg session", session, 0, 2**63 - 1)
        self._size, self._modulus, self._session, self._plan = size, modulus, session, plan
        self._secret, self._roster = secret, roster
        self._asked = set(clients)
        self._stage = ""
        self._advertisements: dict[int, bytes] = {}
        self._taken: set[bytes] = set()
        self._sum = np.zeros(size, np.int64)

    def advertise(self) -> dict[int, Record]:
        """Ask every client for its keys."""
        self._begin("advertise", after="")
        return {client: {"session": self._session} for client in self._asked}

    def share(self) -> dict[int, Record]:
        """Seat those who advertised on the graph, and send each the keys of its neighbours."""
        self._begin("share", after="advertise")
        clients = sorted(self._advertisements)
        if len(clients) < self._plan.least:
            raise self._failed(
                f"{len(clients)} clients have advertised keys, at least {self._plan.least} must", len(clients)
            )
        order = np.argsort(np.frombuffer(self._secret(8 * len(clients)), "<u8"), kind="stable")
        self._clients = [clients[seat] for seat in order]
        self._position = {client: position for position, client in enumerate(self._clients)}
        self._graph: Graph = self._plan.graph(len(clients), complete=self.signed)
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._commitment: dict[int, bytes] = {}
        self._asked = set(clients)
        return {
            client: {
                "session": self._session, "cohort": len(clients), "position": position,
                "keys": b"".join(
                    self._advertisements[self._clients[other]] for other in self._graph.neighbours(position)
                ),
            }
            for client, position in self._position.items()
        }  # fmt: skip

    def mask(self) -> dict[int, Record]:
        """Pass on the sealed shares."""
        self._begin("mask", after="share")
        self._require(self._commitment.keys(), of=self._commitment.keys(), what="have shared")
        messages: dict[int, Record] = {}
        for position in self._commitment:
            present = [other in self._sealed for other in self._graph.neighbours(position)]
            shares = [self._sealed[other].pop(position) for other in self._near(position, self._commitment)]
            sealed = b"".join(shares)
            messages[self._clients[position]] = {
                "session": self._session, "present": marks(present), "sealed": sealed
            }  # fmt: skip
        self._asked = set(messages)
        self._masked: set[int] = set()
        return messages

    def confirm(self) -> dict[int, Record]:
        """Say who is alive, and ask for signatures of that."""
        self._begin("confirm", after="mask")
        messages = self._say_who_is_alive()
        signed = [self._advertisements[client][: keys.SIGNED] for client in self._clients]
        survivors = marks([position in self._masked for position in range(len(self._clients))])
        self._agreed = keys.view(self._number, signed), survivors
        self._signatures: dict[int, bytes] = {}
        return messages

    def unmask(self) -> dict[int, Record]:
        """Ask for the shares that who is alive makes due: of all who are, or of those who signed that."""
        self._begin("unmask", after="confirm" if self.signed else "mask")
        messages = self._pass_on_signatures() if self.signed else self._say_who_is_alive()
        self._shares: dict[int, dict[int, int]] = {position: {} for position in self._commitment}
        return messages

    def _pass_on_signatures(self) -> dict[int, Record]:
        self._require(self._signatures, of=self._commitment.keys(), what="confirmed who is alive", least=0)
        messages: dict[int, Record] = {}
        for position in self._signatures:
            confirmed = [other in self._signatures for other in self._graph.neighbours(position)]
            signatures = [self._signatures[other] for other in self._near(position, self._signatures)]
            messages[self._clients[position]] = {
                "session": self._session, "confirmed": marks(confirmed), "signatures": b"".join(signatures)
            }  # fmt: skip
        self._asked = set(messages)
        return messages

    def _say_who_is_alive(self) -> dict[int, Record]:
        self._require(self._masked, of=self._commitment.keys(), what="have sent masked vectors")
        messages: dict[int, Record] = {}
        for position in self._masked:
            alive = [other in self._masked for other in self._graph.neighbours(position)]
            messages[self._clients[position]] = {"session": self._session, "alive": marks(alive)}
        self._asked = set(messages)
        return messages

    def take(self, client: int, reply: Record) -> None:
        """A client's reply to the present stage; raises DecodeError, and then it counts as none."""
        if client not in self._asked:
            raise DecodeError(
                f"secure aggregation: no reply to {self._stage!r} is expected from client {client}"
            )
        if (session := whole(reply, "session")) != self._session:
            raise DecodeError(
                f"secure aggregation: the reply belongs to session {session}, not {self._session}"
            )
        if self._stage == "advertise":
            self._take_keys(client, reply)
        else:
            take = {
                "share": self._take_sealed, "mask": self._take_values,
                "confirm": self._take_signature, "unmask": self._take_shares,
            }  # fmt: skip
            take[self._stage](self._position[client], reply)
        self._asked.remove(client)

    def _take_keys(self, client: int, reply: Record) -> None:
        one = data(reply, "keys", keys.advertisement_size(self.signed))
        keys.read_advertisement(one, self._number, self._roster)
        # Neighbours refuse a key that comes twice: who brings it second must not cost them the round.
        parts = split(one[: keys.SIGNED], keys.KEY)
        if len(set(parts)) < len(parts) or not self._taken.isdisjoint(parts):
            raise DecodeError(f"secure aggregation: client {client} advertises a key that is already in use")
        self._taken.update(parts)
        self._advertisements[client] = one

    def _take_sealed(self, position: int, reply: Record) -> None:
        others = self._graph.neighbours(position)
        sealed = split(data(reply, "sealed", SEALED * len(others)), SEALED)
        self._commitment[position] = data(reply, "commitment", keys.COMMITMENT)
        self._sealed[position] = dict(zip(others, sealed, strict=True))

    def _take_values(self, position: int, reply: Record) -> None:
        value = reply.get("values")
        if not isinstance(value, bytes):
            raise DecodeError("secure aggregation: values must be bytes")
        self._sum += unpack(value, self._size, self._modulus)
        self._masked.add(position)

    def _take_signature(self, position: int, reply: Record) -> None:
        signature = data(reply, "signature", keys.SIGNATURE)
        signer = self._advertisements[self._clients[position]][2 * keys.KEY : keys.SIGNED]
        keys.read_confirmation(signer, signature, *self._agreed)
        self._signatures[position] = signature

    def _take_shares(self, position: int, reply: Record) -> None:
        others = self._graph.neighbours(position)
        held = [
            other for other, has in zip(others, read_marks(reply, "held", len(others)), strict=True) if has
        ]
        if not self._commitment.keys() >= set(held):
            raise DecodeError("secure aggregation: shares of clients that never shared")
        values = [int.from_bytes(one, "little") for one in split(
            data(reply, "shares", shamir.BYTES * len(held)), shamir.BYTES)]  # fmt: skip
        if any(value >= shamir.PRIME for value in values):
            raise DecodeError("secure aggregation: a share is not an element of the field")
        for other, value in zip(held, values, strict=True):
            self._shares[other][position + 1] = value

    def total(self) -> NDArray[np.uint32]:
        """The sum modulo m over `alive`: uint32 (size,)."""
        self._begin("total", after="unmask")
        liars: set[int] = set()
        for position in self._commitment:
            secret = self._recover(position, liars)
            if position in self._masked:
                add_mask(self._sum, keys.self_mask(secret), self._modulus, -1)
                continue
            masking = keys.Private(secret)
            for other in self._near(position, self._masked):
                # The other has added this mask if it sits before the one that dropped out, else taken it off.
                key = keys.pair_mask(masking, self._masking(other), self._number)
                add_mask(self._sum, key, self._modulus, -1 if other < position else 1)
        return np.remainder(self._sum, self._modulus).astype(np.uint32)

    @property
    def signed(self) -> bool:
        """Whether clients sign what they say, and confirm who is alive."""
        return bool(self._roster)

    @property
    def alive(self) -> list[int]:
        """The clients whose vectors are in the sum."""
        return sorted(self._clients[position] for position in self._masked)

    def _recover(self, position: int, liars: set[int]) -> bytes:
        """The self-mask seed of a client that is alive, the masking key of another; learns who lies."""
        if position in self._masked:
            right = partial(_commits, self._commitment[position])
        else:
            right = partial(_opens, self._masking(position))
        shares, threshold = self._shares[position], self._graph.threshold
        trusted = {point: value for point, value in shares.items() if point not in liars}
        # Whoever dealt wrong shares made liars of those who pass them on, who may be needed after all.
        found = shamir.recover(trusted, threshold, right) or shamir.recover(shares, threshold, right)
        if found is None:
            raise self._failed(
                f"{len(shares)} shares of client {self._clients[position]} do not open its secret, "
                f"{threshold} sound ones must: it has lied, or its neighbours have",
                len(shares),
            )
        liars |= found[1]
        return found[0].to_bytes(shamir.BYTES, "little")

    def _masking(self, position: int) -> bytes:
        return self._advertisements[self._clients[position]][: keys.KEY]

    def _near(self, position: int, among: Container[int]) -> list[int]:
        return [other for other in self._graph.neighbours(position) if other in among]

    def _require(self, left: Collection[int], of: Iterable[int], what: str, least: int | None = None) -> None:
        """Everyone in `of` must have enough neighbours left to open its secret, and `least` be left."""
        least = self._plan.least if least is None else least
        for position in of:
            if (count := len(self._near(position, left))) < self._graph.threshold:
                raise self._failed(
                    f"{count} neighbours of client {self._clients[position]} {what}, "
                    f"{self._graph.threshold} must",
                    len(left),
                )
        if len(left) < least:
            raise self._failed(f"{len(left)} clients {what}, at least {least} must", len(left))

    def _begin(self, stage: str, after: str) -> None:
        if self._stage != after:
            raise FedappError(f"secure aggregation: {stage!r} comes after {after!r}, not {self._stage!r}")
        self._stage = stage

    def _failed(self, why: str, left: int) -> FedappError:
        self._stage, self._asked = "failed", set()
        lost = f"secure aggregation has failed: {why}: the round is lost, and a new session may begin"
        return RoundLost(lost) if left else FedappError(lost)

    @property
    def _number(self) -> bytes:
        return self._session.to_bytes(8, "little")


def _commits(commitment: bytes, seed: int) -> bool:
    return keys.commit(seed.to_bytes(shamir.BYTES, "little")) == commitment


def _opens(public: bytes, private: int) -> bool:
    return keys.Private(private.to_bytes(shamir.BYTES, "little")).public == public
