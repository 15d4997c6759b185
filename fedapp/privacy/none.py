"""No differential privacy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoPrivacy:
    """Updates leave the client as they are; the server and whoever sees the models may learn from them."""

    unit: None = None
    delta: None = None
    against: None = None
