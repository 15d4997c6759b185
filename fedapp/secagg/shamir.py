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


def polynomial(shares: Mapping[int, int]) -> Callable[[int], int]:
    """The polynomial through all of these shares, as a function; at 0 it is the secret.

    Made once in time by the square of the shares, and then in their number at each point: Berrut and
    Trefethen 2004, "Barycentric Lagrange interpolation", Section 3, with products in place of quotients.
    """
    terms = list[tuple[int, int]]()
    for point, value in shares.items():
        below = 1
        for other in shares:
            if other != point:
                below = below * (point - other) % PRIME
        terms.append((point, value * pow(below, -1, PRIME) % PRIME))

    def value_at(at: int) -> int:
        total, product = 0, 1  # of the terms so far, and of the distances to their points
        for point, term in terms:
            distance = at - point
            total = (total * distance + term * product) % PRIME
            product = product * distance % PRIME
        return total

    return value_at


def recover(
    shares: Mapping[int, int], threshold: int, right: Callable[[int], bool]
) -> tuple[int, set[int]] | None:
    """The secret that `right` confirms, and the points whose shares were seen to be wrong, or None.

    Tries all subsets if there are at most 500, and else as many at random: with five wrong shares of 99 and a
    threshold of 60, each of those hits with chance 0.008. Where the first one is right, no other share is
    looked at.
    """
    points = sorted(shares)
    if len(points) < threshold:
        return None
    subsets: Iterable[Sequence[int]] = combinations(points, threshold)
    if comb(len(points), threshold) > _ATTEMPTS:
        generator = random.Random(0)  # any subsets will do
        subsets = (generator.sample(points, threshold) for _ in range(_ATTEMPTS))
    for attempt, subset in enumerate(subsets):
        through = polynomial({point: shares[point] for point in subset})
        value = through(0)
        if right(value):
            others = set(points).difference(subset) if attempt else ()
            return value, {point for point in others if through(point) != shares[point]}
    return None
