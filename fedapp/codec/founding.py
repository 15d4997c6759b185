"""The rules of the project's founding document: random pruning and fixed point, as written and corrected.

`corrected=False` runs a rule as the document states it; `corrected=True` the sound form of the same idea.
Both errors are known in closed form; they stand with each class and tests/test_founding.py measures them.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Codec, Layout, Packet, State, seed
from fedapp.codec.chain import Chain, with_feedback
from fedapp.codec.entropy import Ans
from fedapp.codec.layers import require_finite, require_whole
from fedapp.codec.prune import put_back
from fedapp.codec.scale import LARGEST, read_scales, round_up, times
from fedapp.codec.varint import Reader, varint
from fedapp.errors import ConfigError, DecodeError

_STEP = struct.Struct("<f")


@dataclass(frozen=True)
class RandomPrune:
    """Drops weights, or convolution kernels whole, by draws that both ends make from one 4-byte seed.

    As written: of n units k are to go, r_k = sqrt(n / (n + k)); a unit is dropped when u <= alpha * r_k,
    u ~ U(0, 1); it ends when no unit is left to prune. A unit is a weight, or a kernel: one (out, in) slice
    of a 4-d array, zeroed with its shape kept, while arrays of other shapes pass.

    Our reading: an update is a new vector each round, so what is dropped in one round is back in the next,
    and k can only be a budget of drops. It starts at round(share * n), r_k holds for a round, k falls by what
    the round dropped (state `left`, int64 (1,)); a round that reaches k drops its first k hits in the order
    of the vector, as a loop that stops there would; at k = 0 updates pass whole, and nothing is saved.

    What is unsound: r_k falls from 1 to 0.71 as k grows, so the more is to go, the less is dropped; the share
    dropped in a round is p = alpha * r_k, whatever k / n is, until k ends it; and E[decoded] = (1 - p) x,
    NMSE = p: the mean of any number of clients is too short.

    Corrected: p = share in every round, and what is left is scaled by 1 / (1 - p). Then E[decoded] = x and
    E||decoded - x||^2 = p / (1 - p) ||x||^2, which the mean of m clients divides by m.

    float32 (size,) <-> float32 (kept,). Header: the seed and, as written, k as a varint. No places are sent.
    """

    share: float = 0.5
    alpha: float = 0.5
    structure: str = "weight"
    corrected: bool = True

    def __post_init__(self) -> None:
        check.flag("codec.corrected", self.corrected)
        check.real("codec.share", self.share, low=0.0, high=1.0 if not self.corrected else 0.999)
        check.real("codec.alpha", self.alpha, low=0.0, high=1.0)
        check.choice("codec.structure", self.structure, ("weight", "kernel"))

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_whole(x, layout)
        require_finite(x, layout)
        shared = seed.draw(rng)
        if self.corrected:
            scaled = x.astype(np.float64)
            for offset, count, weights in self._rows(layout):
                scaled[offset : offset + count * weights] *= 2**32 / (2**32 - _threshold(self.share))
            survivors = scaled[self._kept(layout, self._hits(layout, shared, None))]
            return Packet(np.clip(survivors, -LARGEST, LARGEST).astype(np.float32), shared), {}
        units = _count(self._rows(layout))
        left = min(int(state["left"][0]), units) if "left" in state else round(self.share * units)
        hits = self._hits(layout, shared, left)
        after = {"left": np.array([left - np.count_nonzero(hits)], np.int64)}
        return Packet(x[self._kept(layout, hits)], shared + varint(left)), after

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        reader = Reader(packet.header)
        shared = reader.take(seed.SIZE)
        left = None if self.corrected else reader.varint(_count(self._rows(layout)))
        reader.end()
        return put_back(packet.body, self._kept(layout, self._hits(layout, shared, left)))

    def _rows(self, layout: Layout) -> list[tuple[int, int, int]]:
        """Units that lie in a row: the offset of the first, how many, and the weights of each."""
        if self.structure == "weight":
            return [(0, layout.size, 1)]
        convolutions = [slot for slot in layout.slots if len(slot.shape) == 4]
        return [(s.offset, s.shape[0] * s.shape[1], s.shape[2] * s.shape[3]) for s in convolutions]

    def _hits(self, layout: Layout, shared: bytes, left: int | None) -> NDArray[np.bool_]:
        """Bool (units,): which are dropped; `left` is k as written, None where the rule is corrected.

        The same on any machine, since quotients and square roots are correctly rounded everywhere.
        """
        units = _count(self._rows(layout))
        u = seed.words(shared, (units + 1) // 2).astype("<u8", copy=False).view("<u4")[:units]
        if left is None:
            return u < _threshold(self.share)
        ratio = math.sqrt(units / (units + left)) if left else 0.0
        hits = u < _threshold(self.alpha * ratio)
        hits[np.flatnonzero(hits)[left:]] = False
        return hits

    def _kept(self, layout: Layout, hits: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Bool (size,): all weights but those of the units hit."""
        kept = np.ones(layout.size, np.bool_)
        for offset, count, weights in self._rows(layout):
            kept[offset : offset + count * weights] = np.repeat(~hits[:count], weights)
            hits = hits[count:]
        return kept


def _count(rows: list[tuple[int, int, int]]) -> int:
    return sum(count for _, count, _ in rows)


def _threshold(p: float) -> int:
    """Draws below it have probability p, in units of 2^-32; under 2^32 for p < 1."""
    return int(p * 2**32)


@dataclass(frozen=True)
class FixedPoint:
    """Rounds to multiples of a step q = s / levels, s the largest magnitude: |q / s| < 1 as the rule asks.

    As written: a weight is dropped when u <= beta, u ~ U(0, 1), else it becomes round(w / q) * q. Then
    E[decoded] is (1 - beta) x but for the rounding, NMSE = beta + (1 - beta) R with R = q^2 / (12 mean(x^2))
    for fine steps; and weights below q / 2 vanish in every round, whatever they add up to.

    Corrected: rounded up or down at random, floor(w / q + u), and what is left is scaled by 1 / (1 - beta):
    E[decoded] = x and NMSE = beta / (1 - beta) + 2 R / (1 - beta) for fine steps. beta = 0 is best: it is
    stochastic rounding alone, while a drop saves few bits for its error.

    "q is updated as updates shrink": s is that of this round's update, so q shrinks with it, and nothing is
    remembered; q travels as float32. s depends on the update: under differential privacy it comes after
    the noise.

    float32 (n,) <-> int32 (n,), levels of at most `levels`. Header: the step that a level stands for, q as
    written, q / (1 - beta) corrected.
    """

    levels: int = 127
    beta: float = 0.0
    corrected: bool = True

    def __post_init__(self) -> None:
        check.whole("codec.levels", self.levels, 2, 2**16)
        check.real("codec.beta", self.beta, low=0.0, below=1.0)
        check.flag("codec.corrected", self.corrected)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        remain = 1 - self.beta if self.corrected else 1.0
        largest = float(np.abs(x).max(initial=0.0))
        step = float(round_up(np.array(largest / self.levels / remain)))
        if not step:
            return Packet(np.zeros(len(x), np.int32), _STEP.pack(0.0)), {}
        scaled = x.astype(np.float64) / (step * remain)
        level = np.floor(scaled + rng.random(len(x))) if self.corrected else np.rint(scaled)
        if self.beta:
            level[rng.random(len(x)) <= self.beta] = 0
        level = np.clip(level, -self.levels, self.levels)  # where the sum of two floats was rounded up
        return Packet(level.astype(np.int32), _STEP.pack(step)), {}

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        level = packet.body
        if level.dtype != np.int32:
            raise DecodeError("packet does not hold fixed-point levels")
        step = read_scales(packet.header, 1)
        most = self.levels if step[0] else 0
        if level.min(initial=0) < -most or level.max(initial=0) > most:
            raise DecodeError(f"packet holds levels beyond {most}")
        return times(level, step)


def rules(
    structure: str = "none",
    share: float = 0.5,
    alpha: float = 0.5,
    levels: int = 127,
    beta: float = 0.0,
    corrected: bool = True,
    feedback: bool = False,
) -> Codec:
    """Prune, fixed point, entropy-code: `codec=prune_weights`, `prune_kernels` and `fixed_point`."""
    check.choice("codec.structure", structure, ("none", "weight", "kernel"))
    prune = (RandomPrune(share, alpha, structure, corrected),) if structure != "none" else ()
    codec = with_feedback(Chain((*prune, FixedPoint(levels, beta, corrected), Ans())), feedback)
    if feedback and corrected:
        raise ConfigError(
            "codec.feedback must be false where codec.corrected is true, got true: scaled up, an error "
            "can exceed the update itself, and feedback would let it grow; set one of them to false"
        )
    return codec
