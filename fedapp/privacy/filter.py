"""The privacy filter of the ledger: how releases add up, and when one more would pass a limit.

Renyi divergences add up at the orders FILTER. At one fixed order, a sum that may not pass a bound set
beforehand is a valid privacy filter, though each release is chosen in view of all earlier ones: all that
pass are together as private as the bound says (Feldman and Zrnic 2021, "Individual privacy accounting via a
Renyi filter"; Lecuyer 2021, "Practical privacy filters and odometers with Renyi differential privacy"). A
release passes if one order stays within its bound. Which one does may depend on what was released, and then
no single order's proof covers all outcomes. So each order has an equal share of delta: sums only grow, so
what ends within one order's bound was within it all along, and is an outcome of that order's own filter. By
which order an outcome counts follows from itself, and the shares add up.

The price, beside the one best order with all of delta: epsilon is a tenth to a quarter higher.
"""

import json
import math
from dataclasses import asdict, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import FedappError
from fedapp.privacy.release import ORDERS, Curve, Gaussian, Release, SharedGaussian
from fedapp.privacy.renyi import rdp

Unit = Literal["example", "client"]
UNITS: tuple[Unit, ...] = ("example", "client")
FILTER = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0, 256.0)
"""Few orders, far apart, since each takes its share of delta."""
_AT = [ORDERS.index(order) for order in FILTER]


def epsilon(total: NDArray[np.float64], delta: float) -> float:
    """The least epsilon whose filter a composed divergence, float64 (len(FILTER),), stays within.

    From Renyi divergence: Canonne, Kamath and Steinke 2020, "The discrete Gaussian", Proposition 12.
    """
    order = np.array(FILTER)
    log_delta = math.log(delta / len(FILTER))
    epsilons = total + np.log1p(-1 / order) - (log_delta + np.log(order)) / (order - 1)
    return max(0.0, float(np.min(epsilons)))


@cache
def cost(text: str | None, protects: Unit | None, unit: Unit) -> NDArray[np.float64]:
    """Float64 (len(FILTER),): what a release costs a unit, by who it protects."""
    if text is None or (protects, unit) == ("example", "client"):
        return np.full(len(FILTER), np.inf)
    release = _release(text)
    if isinstance(release, Curve):
        return rdp(release)[_AT]
    # Without one of its examples a client is still there, with another contribution.
    return rdp(release if protects == unit else replace(release, adjacency="replace"))[_AT]


def as_text(release: Release) -> str:
    """How a release is written down."""
    known = {"orders": ORDERS} if isinstance(release, Curve) else {}
    return json.dumps(asdict(release) | known, sort_keys=True)


def _release(text: str) -> Release:
    fields = json.loads(text)
    if "shares" in fields:
        return SharedGaussian(**fields)
    if "orders" not in fields:
        return Gaussian(**fields)
    if tuple(fields.pop("orders")) != ORDERS:
        raise FedappError("the ledger holds a curve at other orders: use the fedapp that wrote it")
    return Curve(**fields | {"rdp": tuple(fields["rdp"])})
