"""Shamir's secret sharing (1979) over the field of 2**255 - 19 elements, and repair of wrong shares.

Flower's own cuts secrets into blocks of 16 bytes and believes every index it is sent. Here a secret is one
element, and so is a share: 32 bytes, which also serve as an X25519 key.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from math import comb

from fedapp.privacy.secret import Secret

PRIME = 2**255 - 19
BYTES = 32
_ATTEMPTS = 500


def draw(secret: Secret) -> int:
    """An element within 2**-128 of uniform."""
    return int.from_bytes(secret(BYTES + 16), "little") % PRIME


def share(value: int, threshold: int, points: Sequence[int], secret: Secret) -> list[int]:
    """The shares of `value` at these points, distinct and not 0; any `threshold` of them open it."""
    coefficients = [draw(secret) for _ in range(threshold - 1)]
    shares = []
    for point in points:
        total = 0
        for coefficient in reversed(coefficients):
            total = (total + coefficient) * point % PRIME
        shares.append((total + value) % PRIME)
    return shares


def interpolate(shares: Mapping[int, int], at: int = 0) -> int:
    """The value at a point of the polynomial through all of these shares; at 0 it is the secret."""
    total = 0
    for point, value in shares.items():
        above = below = 1
        for other in shares:
            if other != point:
                above = above * (at - other) % PRIME
                below = below * (point - other) % PRIME
        total += value * above * pow(below, -1, PRIME)
    return total % PRIME


def recover(
    shares: Mapping[int, int], threshold: int, right: Callable[[int], bool]
) -> tuple[int, set[int]] | None:
    """The secret that `right` confirms, and the points whose shares were wrong; None if no secret is found.

    Tries all subsets if there are at most 500, and else as many at random: with five wrong shares of 99 and a
    threshold of 60, each of those hits with chance 0.008.
    """
    points = sorted(shares)
    if len(points) < threshold:
        return None
    subsets: Iterable[Sequence[int]] = combinations(points, threshold)
    if comb(len(points), threshold) > _ATTEMPTS:
        generator = random.Random(0)  # any subsets will do
        subsets = (generator.sample(points, threshold) for _ in range(_ATTEMPTS))
    for subset in subsets:
        chosen = {point: shares[point] for point in subset}
        value = interpolate(chosen)
        if right(value):
            rest = shares.keys() - chosen.keys()
            return value, {point for point in rest if interpolate(chosen, point) != shares[point]}
    return None
