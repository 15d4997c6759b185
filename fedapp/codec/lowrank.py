"""A matrix becomes the product of a tall and a wide one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, Slot, State
from fedapp.codec.layers import require_finite, require_whole, size
from fedapp.codec.scale import LARGEST
from fedapp.errors import DecodeError

_AT_ONCE = 2**16  # values of a product in float64


@dataclass(frozen=True)
class LowRank:
    """Sends P (out, r) and Q (rest, r) for every matrix M, where P Q^T is near M; other arrays as they are.

    One power iteration, started where the last round ended: P = orthonormal basis of M Q, then Q = M^T P, so
    that P Q^T is M projected. Kernels count as matrices of (out, rest); a matrix that its factors would not
    make smaller is sent as it is. float32 (n,) <-> float32; no header. State: `q`, float32, the factors Q of
    the last round. The error never exceeds the update: takes error feedback.
    Source: Vogels et al. 2019, "PowerSGD: practical low-rank gradient compression for distributed
    optimization", Algorithm 1 (here each client by itself: the server decodes every update anyway).
    """

    rank: int = 2

    def __post_init__(self) -> None:
        check.whole("codec.rank", self.rank, 1, 2**16)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_whole(x, layout)
        require_finite(x, layout)
        body, factors, used = [], [], 0
        for slot in layout.slots:
            values = x[slot.offset : slot.offset + size(slot)]
            if not self._splits(slot):
                body.append(values)
                continue
            matrix = values.reshape(slot.shape[0], -1).astype(np.float64)
            start = rng.standard_normal((matrix.shape[1], self.rank))
            if "q" in state:
                last = state["q"][used : used + start.size].reshape(start.shape)
                start = np.where(last.any(axis=0), last, start)  # from a zero factor no iteration gets away
            left, right = _power_iteration(matrix, start)
            body += [left.reshape(-1), right.reshape(-1)]
            factors.append(right.reshape(-1))
            used += start.size
        after = {"q": np.concatenate(factors)} if factors else {}
        return Packet(np.concatenate([*body, np.zeros(0, np.float32)]), b""), after

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        counts = [sum(self._factors(s)) if self._splits(s) else size(s) for s in layout.slots]
        if packet.body.dtype != np.float32 or len(packet.body) != sum(counts) or packet.header:
            raise DecodeError(f"packet does not hold the {sum(counts)} values of its factors")
        if not np.isfinite(packet.body).all():
            raise DecodeError("packet holds a factor that is not finite")
        x, start = np.empty(layout.size, np.float32), 0
        for slot, count in zip(layout.slots, counts, strict=True):
            sent = packet.body[start : start + count]
            if self._splits(slot):
                left, right = np.split(sent.astype(np.float64), [self._factors(slot)[0]])
                sent = _product(left.reshape(-1, self.rank), right.reshape(-1, self.rank)).reshape(-1)
            x[slot.offset : slot.offset + size(slot)] = sent
            start += count
        return x

    def _splits(self, slot: Slot) -> bool:
        """Whether factors are smaller than the array."""
        return len(slot.shape) > 1 and size(slot) > sum(self._factors(slot))

    def _factors(self, slot: Slot) -> tuple[int, int]:
        """How many values P and Q have."""
        return self.rank * slot.shape[0], self.rank * (size(slot) // max(1, slot.shape[0]))


def _power_iteration(
    matrix: NDArray[np.float64], start: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """P and Q; float64 inside, for the columns of M Q may be all but parallel."""
    left, _ = np.linalg.qr(matrix @ (start / np.linalg.norm(start.astype(np.float64), axis=0)))
    right = np.clip(matrix.T @ left, -LARGEST, LARGEST)
    return left.astype(np.float32), right.astype(np.float32)


def _product(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float32]:
    """P Q^T, one outer product after the other: a matrix product of BLAS has no fixed order of additions."""
    product = np.empty((len(left), len(right)), np.float32)
    rows = max(1, _AT_ONCE // len(right))
    for start in range(0, len(left), rows):
        part = left[start : start + rows]
        total = np.zeros((len(part), len(right)))
        for column in range(left.shape[1]):
            total += part[:, column, None] * right[:, column]
        product[start : start + rows] = np.clip(total, -LARGEST, LARGEST)
    return product
