"""Finding the step at which a packet has the size, or the error, that it shall have."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedapp.codec import Packet

# Log of what the estimate often misses in long updates (-0.3 to -0.5 with a CNN of 1.2 million parameters and
# 60 examples a client), and what is as good as the same.
_OFTEN, _CLOSE = -0.35, 0.12
_ABOUT = 0.03  # log of estimate over goal that is as good as met where a step is only a beginning
# Log2 of how far beyond the steps that were tried the next one may lie; and log of the sizes of two packets
# between which no line tells anything.
_STRIDE, _CLIFF = 1.0, 1.4
_THINNER = 9  # tries of a least magnitude
_COARSEST, _FINEST = 0.9, 2.0**-24  # steps, of the largest magnitude: below, some value is always sent
_BOTTOM = float(np.log2(_FINEST / _COARSEST))  # log2 of the finest over the coarsest
_log = logging.getLogger("fedapp.codec")


@dataclass(frozen=True)
class Target:
    """What a packet shall have, an estimate of it by the step, and what it has.

    most: the largest magnitude of what is quantized. falls: it becomes less as steps grow. tolerance:
    relative, where the usual one percent is too strict; from the third encode on, and in later rounds, thrice
    of it will do. encodes: how many at most.
    """

    name: str
    goal: float
    estimate: Callable[[float], float]
    of: Callable[[Packet], float]
    most: float
    falls: bool
    tolerance: float = 0.01
    encodes: int = 3

    def miss(self, found: float) -> float:
        """How far from the goal a packet is that has so much."""
        return abs(found / self.goal - 1)

    def over(self, found: float) -> float:
        """Log of what it has over the goal."""
        return float(np.log(max(found, 1e-300) / self.goal))


class Tried(NamedTuple):
    """A packet, and what it has: an error takes a pass over all values to tell."""

    packet: Packet
    found: float


class Thin(NamedTuple):
    """Encodes at a step, and magnitudes from so many steps on; says how many are as large as a magnitude."""

    code: Callable[[float, float], Packet]
    above: Callable[[float], float]


class Met(NamedTuple):
    """A packet and its step; logs of what the estimate missed there, and of what it was foreseen to miss."""

    packet: Packet
    step: float
    miss: float
    foreseen: float


def within(step: float, most: float) -> float:
    """The step, or the nearest that is allowed where the largest magnitude is `most`."""
    return min(max(step, _FINEST * most), _COARSEST * most)


def nearest(target: Target, miss: float) -> float:
    """About the step at which the estimate, corrected by what it misses, comes nearest to the target."""
    at = _solve(target, _by_log2(target), [(0.0, miss)], _BOTTOM, 0.0, _ABOUT)
    return float(2.0**at * _COARSEST * target.most)


def meet(
    target: Target,
    code: Callable[[float], Packet],
    usual: float | None,
    thin: Thin | None = None,
    pilot: Callable[[float], float] | None = None,
) -> Met:
    """The packet nearest to the target of a few, each of which corrects the estimate for the next.

    `code` encodes at a step between limits that the largest magnitude sets. A target that lies beyond these
    gets the packet of that limit, and a warning in the log names what it has. `usual`: log of what the
    estimate missed in the update before. `pilot(step)` says what it misses in this one, from a part of it.

    What error feedback owes lies dense just below the level 1 of the round before: a little finer step sends
    most of it at once. So where no step does, `thin` has only magnitudes from so many steps on sent.
    """
    coarsest, estimate = _COARSEST * target.most, _by_log2(target)
    low, high = _BOTTOM, 0.0
    guess, near = [(0.0, usual or 0.0)], usual is not None or pilot is not None
    if pilot is not None:
        guess = [(0.0, _OFTEN if usual is None else usual)]
        for _ in range(2):  # the first may have been far away
            at = _solve(target, estimate, guess, low, high)
            off, guess = guess[-1][1], [(at, pilot(2.0**at * coarsest))]
            if abs(off - guess[-1][1]) < _CLOSE:
                break
    missed: list[tuple[float, float]] = []  # log2 of a step, log of what the estimate missed there
    tried: list[Tried] = []
    over: dict[float, float] = {}  # log of what packets have over the goal, by log2 of their step
    encodes = target.encodes + (usual is not None)  # what was usual may mislead the first
    while len(tried) < encodes:
        at = _solve(target, estimate, missed or guess, low, high)
        if tried and thin is not None:
            at = _careful(at, low, high, over)
        if any(abs(at - earlier) < 1e-4 for earlier, _ in missed):
            break  # a limit, or as near as it gets
        packet = code(2.0**at * coarsest)
        found = target.of(packet)
        tried.append(Tried(packet, found))
        over[at] = target.over(found)
        missed.append((at, float(np.log(max(found, 1e-300) / estimate(at)))))
        if target.miss(found) < target.tolerance * (3 if near or len(tried) > 2 else 1):
            return Met(packet, 2.0**at * coarsest, missed[-1][1], guess[-1][1])
        low, high = (at, high) if (found > target.goal) == target.falls else (low, at)
    best = _nearest(target, tried)
    if thin is not None and target.miss(tried[best].found) > 3 * target.tolerance:
        tried += _thinned(target, thin, low, high, over)
        best = _nearest(target, tried)
    packet, found = tried[best]
    if target.miss(found) > 3 * target.tolerance:
        _log.warning("%s: the target is %.6g and the nearest that this update allows %.6g",
                     target.name, target.goal, found)  # fmt: skip
    at, miss = missed[min(best, len(missed) - 1)]
    return Met(packet, 2.0**at * coarsest, miss, guess[-1][1])


def _by_log2(target: Target) -> Callable[[float], float]:
    """The estimate by log2 of a step over the coarsest."""
    return lambda at: target.estimate(2.0**at * _COARSEST * target.most)


def _nearest(target: Target, tried: list[Tried]) -> int:
    """Which is nearest by quotient: one that holds nothing is farther off than one four times too long."""
    return min(range(len(tried)), key=lambda i: abs(target.over(tried[i].found)))


def _careful(at: float, low: float, high: float, over: dict[float, float]) -> float:
    """The next step where sizes may jump: not far finer than what was tried, or halfway between two."""
    if high not in over:
        return at
    if low not in over:
        return max(at, high - _STRIDE)
    return (low + high) / 2 if over[low] - over[high] > _CLIFF else at


def _thinned(target: Target, thin: Thin, low: float, high: float, over: dict[float, float]) -> list[Tried]:
    """Packets at a step that gives more than the goal, of a few least magnitudes.

    Bytes are about in proportion to how many values are sent, however densely these lie. In turns the least
    magnitude is halfway between two, as those that lie most densely cannot be told apart.
    """
    tried, coarsest = list[Tried](), _COARSEST * target.most

    def over_with(at: float, least: float) -> float:
        """Try one; log of what it has over the goal."""
        packet = thin.code(2.0**at * coarsest, least)
        tried.append(Tried(packet, target.of(packet)))
        return target.over(tried[-1].found)

    def sent(at: float) -> float:
        """Log of how many values there are from so large a least magnitude on."""
        return float(np.log1p(thin.above(2.0 ** (low + at) * coarsest)))

    while low == _BOTTOM:  # no step gave more yet
        high -= 0.25
        if len(tried) == 6 or high <= _BOTTOM:
            return tried
        over[high] = over_with(high, 0.0)
        if over[high] > 0:
            low = high
    # Log2 of least magnitudes, in steps, that send too much and too little, and how much: no least at all
    # sends what the step does, and one as large as the coarser step about what that does.
    much, little = (-1.0, over.get(low, 0.0)), (min(0.2 - low, high - low + 1), over.get(high, 0.0))
    for turn in range(_THINNER):
        at = (much[0] + little[0]) / 2
        if turn % 2 == 0 and much[1] > 0 > little[1]:
            share = min(max(much[1] / (much[1] - little[1]), 0.1), 0.9)
            at = _between(sent, much[0], little[0], share)
        end = at, over_with(low, 2.0**at)
        if target.miss(tried[-1].found) < 3 * target.tolerance:
            break
        much, little = (end, little) if end[1] > 0 else (much, end)
    return tried


def _between(falling: Callable[[float], float], begin: float, end: float, share: float) -> float:
    """Where what falls from begin to end has come down so far; halfway where it does not fall."""
    first, last = falling(begin), falling(end)
    if not first - last > 1e-6:
        return (begin + end) / 2
    for _ in range(24):
        middle = (begin + end) / 2
        begin, end = (middle, end) if first - falling(middle) < share * (first - last) else (begin, middle)
    return (begin + end) / 2


def _solve(
    target: Target,
    estimate: Callable[[float], float],
    missed: list[tuple[float, float]],
    low: float,
    high: float,
    near: float = 5e-4,
) -> float:
    """Log2 of the step in [2^low, 2^high] where the corrected estimate meets the goal, or comes near.

    near: log of estimate over goal that is no better met; the estimate is off by more.
    """
    here, miss = missed[-1]
    before, other = next(((at, m) for at, m in missed if at in (low, high) and at != here), (here - 1, miss))
    slope = (other - miss) / (before - here)  # between two steps that enclose the goal, else none
    above = below = 0.0  # log of estimate over goal where the step is too fine, and too coarse; 0: not known
    way = 1 if target.falls else -1
    for turn in range(36):
        at = (low + high) / 2
        if above and below and turn % 2:  # on a straight line between both ends, but not at one of them
            share = min(max(above / (above - below), 0.02), 0.98)
            at = low + share * (high - low)
        expected = np.log(max(estimate(at), 1e-300)) + miss + slope * min(max(at - here, -1.0), 1.0)
        off = way * float(expected - np.log(target.goal))
        if abs(off) < near or high - low < 1e-4:
            return at
        if off > 0:
            low, above = at, off
        else:
            high, below = at, off
    return (low + high) / 2
