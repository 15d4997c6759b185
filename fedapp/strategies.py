"""What is known of Flower's strategies, by name: what they need of a round, keep, and return."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedapp.vector import arrays_in, record_of, values

STREAMED = frozenset({"FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedProx", "Scaffold"})
"""The linear ones: the mean of the updates is all that they need of a round."""

ROBUST = frozenset({"FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"})
"""Those that weigh updates against each other."""

_WEIGHTS = "current_arrays"
_LASTING = ("momentum_vector", "m_t", "v_t")  # one array for each of the weights, from round to round


def kept_by(strategy: Strategy) -> dict[str, Any]:
    """What a strategy keeps from round to round, for a checkpoint."""
    kept = {name: getattr(strategy, name, None) for name in _LASTING}
    weights = getattr(strategy, _WEIGHTS, None)  # FedAvgM's own; the others set it each round
    if isinstance(weights, ArrayRecord):
        kept[_WEIGHTS] = arrays_in(weights)
    return {name: value for name, value in kept.items() if value is not None}


def restore(strategy: Strategy, kept: Mapping[str, Any]) -> None:
    """Give back what `kept_by` returned: whatever else such a strategy keeps is as it was at first."""
    for name in (*_LASTING, _WEIGHTS):
        if hasattr(strategy, name):
            value = kept.get(name)
            setattr(strategy, name, record_of(value) if name == _WEIGHTS and value is not None else value)


def finite(arrays: ArrayRecord) -> bool:
    """Whether all floating-point values are."""
    found = (values(array) for array in arrays.values())
    return all(np.isfinite(array).all() for array in found if array.dtype.kind == "f")


def in_dtypes_of(weights: ArrayRecord, arrays: ArrayRecord) -> ArrayRecord:
    """The arrays in the dtypes of the weights: Flower's means turn integer buffers into float64."""
    out = ArrayRecord()
    for name, array in arrays.items():
        if array.dtype == weights[name].dtype:
            out[name] = array
        else:
            found, dtype = values(array), np.dtype(weights[name].dtype)
            out[name] = Array(np.asarray(np.rint(found) if dtype.kind in "iub" else found).astype(dtype))
    return out
