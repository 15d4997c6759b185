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

ADVERTISED, SHARED, MASKED, DONE = range(1, 5)
_STAGES = ("advertise", "share", "mask", "unmask")
SHARES = 2 * shamir.BYTES  # one of the self-mask seed, one of the masking key
SEALED = SHARES + keys.TAG


@dataclass(frozen=True)
class Client:
    """One participant; its state between stages is a Record that it gives out and takes back, empty at first.

    `size` and `modulus` (2 .. 2**31) are those of the vectors to add. A long-term `signing_key` (32 bytes,
    Ed25519) signs the advertisement; a `roster`, the public keys of all participants, refuses keys that none
    of them signed. Set both or neither.

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
        session = _session(message, state, ADVERTISED)
        cohort, position = whole(message, "cohort", 1 << 20), whole(message, "position", 1 << 20)
        if not self.plan.least <= cohort or position >= cohort:
            raise FedappError(
                f"secure aggregation: position {position} in a cohort of {cohort} is refused: "
                f"at least {self.plan.least} clients have to take part"
            )
        graph = self.plan.graph(cohort)
        others = graph.neighbours(position)
        size = keys.advertisement_size(bool(self.roster))
        advertised = [
            keys.read_advertisement(one, _number(session, 8), self.roster)
            for one in split(data(message, "keys", size * len(others)), size)
        ]
        masking, sealing = data(state, "masking", keys.KEY), data(state, "sealing", keys.KEY)
        public = [keys.public(masking), keys.public(sealing), *(key for one in advertised for key in one[:2])]
        signers = [one[2] for one in advertised if self.roster]
        if len(set(public)) < len(public) or len(set(signers)) < len(signers):
            raise FedappError("secure aggregation: a key comes twice: every client must have its own")
        seed = shamir.draw(self.secret)
        points = [other + 1 for other in others]
        shares = [
            shamir.share(value, graph.threshold, points, self.secret)
            for value in (seed, int.from_bytes(masking, "little"))
        ]
        sealed = [
            keys.seal(sealing, key, _context(session, cohort, position, other), _element(one) + _element(two))
            for other, (_, key, _), one, two in zip(others, advertised, *shares, strict=True)
        ]
        state = state | {
            "stage": SHARED, "cohort": cohort, "position": position, "seed": _element(seed),
            "keys": b"".join(one + two for one, two, _ in advertised),
        }  # fmt: skip
        commitment = keys.commit(_element(seed))
        return {"session": session, "commitment": commitment, "sealed": b"".join(sealed)}, state

    def expects_values(self, message: Record, state: Record) -> None:
        """Refuse what `mask` would refuse of another session or stage, before anybody makes values for it."""
        _session(message, state, SHARED)

    def mask(self, message: Record, state: Record, values: NDArray[np.uint32]) -> tuple[Record, Record]:
        """{session, present, sealed} and values (size,) below the modulus -> {session, values}.

        `present` marks the neighbours that have shared, `sealed` is what each of them sealed for this client.
        Shares that do not open are as good as lost: the threshold is there for that.
        """
        session = _session(message, state, SHARED)
        if values.shape != (self.size,) or values.dtype != np.uint32 or values.max() >= self.modulus:
            raise FedappError(
                f"secure aggregation takes {self.size} uint32 below {self.modulus}, got {values.dtype} "
                f"{values.shape} up to {values.max(initial=0)}"
            )
        graph, position = self._graph(state), whole(state, "position")
        others = graph.neighbours(position)
        present = read_marks(message, "present", len(others))
        self._enough(sum(present), graph, "have shared")
        sealed = iter(split(data(message, "sealed", SEALED * sum(present)), SEALED))
        masking, sealing = data(state, "masking", keys.KEY), data(state, "sealing", keys.KEY)
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
        total %= self.modulus
        state = {
            "session": session, "stage": MASKED, "cohort": graph.cohort, "position": position,
            "present": marks(present), "held": marks([one is not None for one in held]),
            "shares": b"".join(one for one in held if one),
        }  # fmt: skip
        return {"session": session, "values": pack(total.astype(np.uint32), self.modulus)}, state

    def unmask(self, message: Record, state: Record) -> tuple[Record, Record]:
        """{session, alive} -> {session, held, shares}: of the seed of an alive neighbour, else of the key.

        `alive` marks the neighbours whose masked vectors arrived, among those present before; `held` those of
        which this client has shares.
        """
        session = _session(message, state, MASKED)
        graph = self._graph(state)
        count = len(graph.neighbours(whole(state, "position")))
        present, held = read_marks(state, "present", count), read_marks(state, "held", count)
        alive = read_marks(message, "alive", count)
        if any(here and not before for here, before in zip(alive, present, strict=True)):
            raise FedappError(
                "secure aggregation: a client that never shared cannot be alive: unmasking is refused"
            )
        self._enough(sum(alive), graph, "are alive")
        shares = iter(split(data(state, "shares", SHARES * sum(held)), SHARES))
        given = [
            one[: shamir.BYTES] if here else one[shamir.BYTES :]
            for here, one in zip((a for a, h in zip(alive, held, strict=True) if h), shares, strict=True)
        ]
        reply: Record = {"session": session, "held": marks(held), "shares": b"".join(given)}
        return reply, {"session": session, "stage": DONE}

    def _graph(self, state: Record) -> Graph:
        return self.plan.graph(whole(state, "cohort"))

    def _enough(self, count: int, graph: Graph, what: str) -> None:
        """The threshold; where all are neighbours, also that the sum will have its least terms."""
        complete = graph.degree == graph.cohort - 1
        least = max(graph.threshold, self.plan.least - 1 if complete else 0)
        if count < least:
            raise FedappError(f"secure aggregation: {count} neighbours {what}, at least {least} must")


def _session(message: Record, state: Record, stage: int) -> int:
    """The session, if the message belongs to it and to the stage that is next."""
    session, now = whole(message, "session"), state.get("stage")
    if not state or session != state["session"]:
        raise FedappError(f"secure aggregation: session {session} is not this client's: start a new one")
    if now != stage:
        raise FedappError(
            f"secure aggregation: session {session} is past or before the stage {_STAGES[stage]!r}, "
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
