"""Public randomness of a run: whoever knows its seed draws the same, on any machine."""

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What is drawn for; each use has a stream of its own."""

    TRAINING = 0  # order of batches, dropout
    CODEC = 1
    COHORT = 2
    SUM = 3  # the rotation that all of a cohort share where sums alone are seen
    FREE = 4  # who is asked next in asynchronous rounds
    SPEED = 5
    LINK = 6
    HELD_OUT = 7


def public_rng(seed: int, server_round: int, partition: int, use: Use) -> np.random.Generator:
    """The stream of one use, of one client in one round; where there is no round or client, of 0."""
    return np.random.default_rng([seed, server_round, partition, use])
