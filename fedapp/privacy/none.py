"""No differential privacy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoPrivacy:
    """Updates leave the client as they are; the server and whoever sees the models may learn from them.

    *Formal guarantees.* None: nothing is guaranteed, at any epsilon. Adjacency and sensitivity: none, as one
    example or one client may move what is released by any amount; clipping, where a trainer or `norm_bound`
    does it, comes without noise and changes nothing of this. Released: each client's update in each round
    that it takes part in, how many examples it has, the metrics that its policy lets out, and so all that
    follows, every model. Sampling: of no use without noise. Against: nobody, neither the server nor observers
    of the models nor other clients. Not covered: everything. A codec is no protection; encryption on the way,
    and aggregation=ckks, keep single updates from whoever has no key, and say nothing of what sums and models
    tell. A ledger counts epsilon as infinite.
    """

    unit: None = None
    delta: None = None
    test_seed: None = None
    against: None = None
