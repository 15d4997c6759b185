"""Finding the step at which a packet has the size, or the error, that it shall have."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Packet

_SAMPLE = 8192  # magnitudes that the estimate looks at
_log = logging.getLogger("fedapp.codec")


@dataclass(frozen=True)
class Target:
    """What a packet shall have, an estimate of it (from a sample of magnitudes, in steps), and what it has.

    falls: it becomes less as steps grow. tolerance: relative, where the usual one percent is too strict; from
    the third encode on thrice of it will do. encodes: how many at most.
    """

    name: str
    goal: float
    estimate: Callable[[NDArray[np.float64]], float]
    of: Callable[[Packet], float]
    falls: bool
    tolerance: float = 0.01
    encodes: int = 3

    def miss(self, packet: Packet) -> float:
        return abs(float(np.log(self.of(packet) / self.goal)))


def meet(
    target: Target,
    x: NDArray[np.float32],
    code: Callable[[float], Packet],
    finest: float,
    coarsest: float,
) -> Packet:
    """The packet nearest to the target of a few, each of which corrects the estimate for the next.

    `code` encodes at a step in [finest, coarsest]. A target that lies beyond these gets the packet of that
    limit, and a warning in the log names what it has.
    """
    sample = np.abs(x[:: -(-len(x) // _SAMPLE)].astype(np.float64)) / coarsest
    sample = np.append(sample, np.abs(x).max() / coarsest)  # never all zero
    low, high = float(np.log2(finest / coarsest)), 0.0
    missed: list[tuple[float, float]] = []  # log2 of a step, log of what the estimate missed there
    packets: list[Packet] = []
    while len(packets) < target.encodes:
        at = _solve(target, sample, missed, low, high)
        if any(abs(at - earlier) < 1e-4 for earlier, _ in missed):
            break  # a limit, or as near as it gets
        packets.append(code(2.0**at * coarsest))
        found = target.of(packets[-1])
        if target.miss(packets[-1]) < target.tolerance * (1 if len(packets) < 3 else 3):
            return packets[-1]
        missed.append((at, float(np.log(found / target.estimate(sample / 2.0**at)))))
        low, high = (at, high) if (found > target.goal) == target.falls else (low, at)
    best = min(packets, key=target.miss)
    if target.miss(best) > 3 * target.tolerance:
        _log.warning("%s: the target is %.6g and the nearest that this update allows %.6g",
                     target.name, target.goal, target.of(best))  # fmt: skip
    return best


def _solve(
    target: Target, sample: NDArray[np.float64], missed: list[tuple[float, float]], low: float, high: float
) -> float:
    """Log2 of the step in [2^low, 2^high] where the corrected estimate meets the goal, by bisection."""

    here, miss = missed[-1] if missed else (0.0, 0.0)
    before, other = next(((at, m) for at, m in missed if at in (low, high) and at != here), (here - 1, miss))
    slope = (other - miss) / (before - here)  # between two steps that enclose the goal, else none

    def corrected(at: float) -> float:
        away = min(max(at - here, -1.0), 1.0)
        return target.estimate(sample / 2.0**at) * float(np.exp(miss + slope * away))

    for _ in range(18):
        middle = (low + high) / 2
        if (corrected(middle) > target.goal) == target.falls:
            low = middle
        else:
            high = middle
    return (low + high) / 2
