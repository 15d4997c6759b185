"""The client's end of secure aggregation: in each stage (message, state) -> (reply, state)."""

import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, FedappError
from fedapp.privacy.secret import Secret
from fedapp.secagg import keys, shamir
from fedapp.secagg.masks import add_mask
from fedapp.secagg.plan import Graph, Plan
from fedapp.secagg.record import Record, data, marks, read_marks, split, whole
from fedapp.secagg.residues import pack

ADVERTISED, SHARED, MASKED, CONFIRMED, DONE = range(1, 6)
SHARES = 2 * shamir.BYTES  # one of the self-mask seed, one of the masking key
SEALED = SHARES + keys.TAG


@dataclass(frozen=True)
class Client:
    """One participant; its state between stages is a Record that it gives out and takes back, empty at first.

    `size` and `modulus` (2 .. 2**31) are those of the vectors to add. A long-term `signing_key` (32 bytes,
    Ed25519) signs the advertisement and who is alive; a `roster`, the public keys of all participants,
    refuses what none of them signed. Set both or neither: with them the graph is complete, and `confirm` is
    one stage more.

    Every stage raises FedappError where this client refuses to go on, and DecodeError, one of them, on a
    message that no server makes. Nothing has left the client then, and the state that it had still holds.
    """

    size: int
    modulus: int
    plan: Plan = field(default_factory=Plan)
    secret: Secret = os.urandom
    signing_key: bytes | None = field(default=None, repr=False)
    roster: frozenset[bytes] = frozenset()

    def __post_init__(self) -> None:
        check.whole("secagg size", self.size, 1)
        check.whole("secagg modulus", self.modulus, 2, 1 << 31)
        if (self.signing_key is None) == bool(self.roster):
            raise ConfigError(
                "secure aggregation takes a signing key and a roster together: set both or neither"
            )

    def advertise(self, message: Record, state: Record) -> tuple[Record, Record]:
        """{session} -> {session, keys}; a session is a number above that of the one before."""
        session = whole(message, "session")
        if state and session <= (last := whole(state, "session")):
            raise FedappError(
                f"secure aggregation: session {session} does not come after {last}: start a later one"
            )
        masking, sealing = (_element(shamir.draw(self.secret)) for _ in range(2))
        advertisement = keys.advertise(masking, sealing, _number(session, 8), self.signing_key)
        state = {"session": session, "stage": ADVERTISED, "masking": masking, "sealing": sealing}
        return {"session": session, "keys": advertisement}, state

    def share(self, message: Record, state: Record) -> tuple[Record, Record]:
        """{session, cohort, position, keys} -> {session, commitment, sealed}; keys of neighbours."""
        session = _session(message, state, ADVERTISED, "share")
        cohort, position = whole(message, "cohort", 1 << 20), whole(message, "position", 1 << 20)
        if not self.plan.least <= cohort or position >= cohort:
            raise FedappError(
                f"secure aggregation: position {position} in a cohort of {cohort} is refused: "
                f"at least {self.plan.least} clients have to take part"
            )
        graph = self._graph(cohort)
        others = graph.neighbours(position)
        size = keys.advertisement_size(bool(self.roster))
        advertised = [
            keys.read_advertisement(one, _number(session, 8), self.roster)
            for one in split(data(message, "keys", size * len(others)), size)
        ]
        masking, sealing = (keys.Private(data(state, name, keys.KEY)) for name in ("masking", "sealing"))
        public = [masking.public, sealing.public, *(key for one in advertised for key in one[:2])]
        own = (*public[:2], b"" if self.signing_key is None else keys.signer(self.signing_key))
        everyone = [*advertised[:position], own, *advertised[position:]]  # by position, if all are neighbours
        signers = [one[2] for one in everyone if self.roster]
        if len(set(public)) < len(public) or len(set(signers)) < len(signers):
            raise FedappError("secure aggregation: a key comes twice: every client must have its own")
        seed = shamir.draw(self.secret)
        points = [other + 1 for other in others]
        shares = [
            shamir.share(value, graph.threshold, points, self.secret)
            for value in (seed, int.from_bytes(data(state, "masking", keys.KEY), "little"))
        ]
        sealed = [
            keys.seal(sealing, key, _context(session, cohort, position, other), _element(one) + _element(two))
            for other, (_, key, _), one, two in zip(others, advertised, *shares, strict=True)
        ]
        state = state | {
            "stage": SHARED, "cohort": cohort, "position": position, "seed": _element(seed),
            "keys": b"".join(one + two for one, two, _ in advertised),
        }  # fmt: skip
        if self.roster:
            state["view"] = keys.view(_number(session, 8), map(b"".join, everyone))
            state["signers"] = b"".join(one[2] for one in advertised)
        commitment = keys.commit(_element(seed))
        return {"session": session, "commitment": commitment, "sealed": b"".join(sealed)}, state

    def expects_values(self, message: Record, state: Record) -> None:
        """Refuse what `mask` would refuse of another session or stage, before anybody makes values for it."""
        _session(message, state, SHARED, "mask")

    def mask(self, message: Record, state: Record, values: NDArray[np.uint32]) -> tuple[Record, Record]:
        """{session, present, sealed} and values (size,) below the modulus -> {session, values}.

        `present` marks the neighbours that have shared, `sealed` is what each of them sealed for this client.
        Shares that do not open are as good as lost: the threshold counts those that do, which only a client
        that takes part now can have sealed.
        """
        session = _session(message, state, SHARED, "mask")
        if values.shape != (self.size,) or values.dtype != np.uint32 or values.max() >= self.modulus:
            raise FedappError(
                f"secure aggregation takes {self.size} uint32 below {self.modulus}, got {values.dtype} "
                f"{values.shape} up to {values.max(initial=0)}"
            )
        graph, position = self._graph(whole(state, "cohort")), whole(state, "position")
        others = graph.neighbours(position)
        present = read_marks(message, "present", len(others))
        sealed = iter(split(data(message, "sealed", SEALED * sum(present)), SEALED))
        masking, sealing = (keys.Private(data(state, name, keys.KEY)) for name in ("masking", "sealing"))
        public = split(data(state, "keys", 2 * keys.KEY * len(others)), 2 * keys.KEY)
        total = values.astype(np.int64)
        add_mask(total, keys.self_mask(data(state, "seed", keys.KEY)), self.modulus, 1)
        held: list[bytes | None] = []
        for other, pair, here in zip(others, public, present, strict=True):
            if here:
                key = keys.pair_mask(masking, pair[: keys.KEY], _number(session, 8))
                add_mask(total, key, self.modulus, 1 if position < other else -1)
                context = _context(session, graph.cohort, other, position)
                opened = keys.unseal(sealing, pair[keys.KEY :], context, next(sealed))
            held.append(opened if here and opened and len(opened) == SHARES else None)
        self._enough(sum(one is not None for one in held), graph, "have shared")
        total %= self.modulus
        state = {name: state[name] for name in ("view", "signers") if name in state} | {
            "session": session, "stage": MASKED, "cohort": graph.cohort, "position": position,
            "present": marks(present), "held": marks([one is not None for one in held]),
            "shares": b"".join(one for one in held if one),
        }  # fmt: skip
        return {"session": session, "values": pack(total.astype(np.uint32), self.modulus)}, state

    def confirm(self, message: Record, state: Record) -> tuple[Record, Record]:
        """{session, alive} -> {session, signature}: with a roster, before `unmask`, which is for these then.

        `alive` marks the neighbours whose masked vectors arrived, among those whose shares this client has.
        """
        session = _session(message, state, MASKED, "confirm")
        if self.signing_key is None:
            raise FedappError("secure aggregation: who is alive is not confirmed without a roster")
        alive = self._alive(message, state, among="held")
        position = whole(state, "position")
        survivors = marks([*alive[:position], True, *alive[position:]])
        signature = keys.confirm(self.signing_key, data(state, "view", keys.KEY), survivors)
        state = state | {"stage": CONFIRMED, "alive": marks(alive), "survivors": survivors}
        return {"session": session, "signature": signature}, state

    def unmask(self, message: Record, state: Record) -> tuple[Record, Record]:
        """{session, alive} -> {session, held, shares}: of the seed of an alive neighbour, else of the key.

        `alive` marks the neighbours whose masked vectors arrived, among those present before; `held` those of
        which this client has shares. With a roster the message is {session, confirmed, signatures}: marks of
        those alive who confirmed what this client did, and what they signed.
        """
        session = _session(message, state, CONFIRMED if self.roster else MASKED, "unmask")
        count = self._graph(whole(state, "cohort")).degree
        held = read_marks(state, "held", count)
        if self.roster:
            alive = read_marks(state, "alive", count)
            self._agree(message, state, alive)
        else:
            alive = self._alive(message, state, among="present")
        shares = iter(split(data(state, "shares", SHARES * sum(held)), SHARES))
        given = [
            one[: shamir.BYTES] if here else one[shamir.BYTES :]
            for here, one in zip((a for a, h in zip(alive, held, strict=True) if h), shares, strict=True)
        ]
        reply: Record = {"session": session, "held": marks(held), "shares": b"".join(given)}
        return reply, {"session": session, "stage": DONE}

    def _graph(self, cohort: int) -> Graph:
        return self.plan.graph(cohort, complete=bool(self.roster))

    def _alive(self, message: Record, state: Record, among: str) -> list[bool]:
        """The neighbours that a message marks as alive; FedappError if they cannot be, or are too few."""
        graph = self._graph(whole(state, "cohort"))
        alive, before = read_marks(message, "alive", graph.degree), read_marks(state, among, graph.degree)
        if any(here and not was for here, was in zip(alive, before, strict=True)):
            raise FedappError(
                "secure aggregation: a client that never shared cannot be alive: unmasking is refused"
            )
        self._enough(sum(alive), graph, "are alive")
        return alive

    def _agree(self, message: Record, state: Record, alive: list[bool]) -> None:
        """Refuse to unmask unless enough of those alive have signed the same survivors."""
        graph = self._graph(whole(state, "cohort"))
        confirmed = read_marks(message, "confirmed", graph.degree)
        signers = split(data(state, "signers", keys.KEY * graph.degree), keys.KEY)
        signatures = data(message, "signatures", keys.SIGNATURE * sum(confirmed))
        view, survivors = data(state, "view", keys.KEY), data(state, "survivors", (graph.cohort + 7) // 8)
        if any(has and not here for has, here in zip(confirmed, alive, strict=True)):
            raise FedappError("secure aggregation: who is not alive cannot confirm: unmasking is refused")
        signed = (signer for signer, has in zip(signers, confirmed, strict=True) if has)
        for signer, signature in zip(signed, split(signatures, keys.SIGNATURE), strict=True):
            keys.read_confirmation(signer, signature, view, survivors)
        if sum(confirmed) < graph.threshold:
            raise FedappError(
                f"secure aggregation: {sum(confirmed)} neighbours confirmed who is alive, "
                f"at least {graph.threshold} must"
            )

    def _enough(self, count: int, graph: Graph, what: str) -> None:
        """The threshold; where all are neighbours, also that the sum will have its least terms."""
        complete = graph.degree == graph.cohort - 1
        least = max(graph.threshold, self.plan.least - 1 if complete else 0)
        if count < least:
            raise FedappError(f"secure aggregation: {count} neighbours {what}, at least {least} must")


def _session(message: Record, state: Record, after: int, stage: str) -> int:
    """The session, if the message belongs to it and this stage is next."""
    session, now = whole(message, "session"), state.get("stage")
    if not state or session != state["session"]:
        raise FedappError(f"secure aggregation: session {session} is not this client's: start a new one")
    if now != after:
        raise FedappError(
            f"secure aggregation: session {session} is past or before the stage {stage!r}, "
            f"and no stage is answered twice: start a new session"
        )
    return session


def _element(value: int) -> bytes:
    return value.to_bytes(shamir.BYTES, "little")


def _number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def _context(session: int, cohort: int, sender: int, receiver: int) -> bytes:
    """What sealed shares are bound to."""
    return _number(session, 8) + b"".join(_number(n, 4) for n in (cohort, sender, receiver))
