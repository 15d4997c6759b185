"""What an estimate of the bits of a long update misses: told from a part of it, which is coded."""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from fedapp.codec import Layout
from fedapp.codec.estimate import Like, Magnitudes
from fedapp.codec.factors import Factors
from fedapp.codec.layers import shapes
from fedapp.codec.model import Floats
from fedapp.codec.quantizer import Quantizer

_EIGHTH, _TOGETHER = 8, 16  # the part: of so many times as many columns, so many in a row
_DEARER = 0.04  # log of what it takes more than its share, of 2^20 values: rows learn from fewer columns
_FEW = 256  # bits, that tell nothing

Layers = tuple[Floats, Sequence[tuple[int, ...]]]
"""Values of layers, end to end, and their shapes."""


def pilot(
    factors: Factors, layout: Layout, coder: Quantizer, like: Like, beyond: float
) -> Callable[[float], float] | None:
    """What says how far the estimate is off at a step: log of bits taken over estimated ones.

    An eighth of the columns is coded, of what the products leave and of their vectors: each is learned over
    all rows, and neighbours stay together. `beyond`: log of what such a part is known to miss.
    None where layers are so narrow that a part is most of them.
    """
    x, (left, vectors, _) = factors.residual, factors.magnitudes
    share = np.exp(-_DEARER * (2**20 / len(x)) ** 0.5)
    of = shapes(layout)
    if sum(prod(_part_of(shape)) for shape in of) > len(x) / 4:
        return None
    part = eighth((x, of))

    def off(part: Layers, scale: float) -> float:
        """Bits taken over estimated ones; 1 where so few are expected that they tell nothing."""
        values, of = part
        expected = Magnitudes(values, 0.0).bits(1 / scale, like)
        if expected < _FEW:
            return 1.0
        code, *_ = coder.encode(values, scale, of, keep=False)
        return 8 * max(len(code), 1) / expected

    def miss(step: float) -> float:
        products, values = factors.at(step)
        rest, those = left.bits(step, like), vectors.bits(step, like)
        taken = off(part, 1 / step) * share * rest
        if those:
            taken += off(eighth((values, products.shapes)), 1.0) * those
        return float(np.log(taken / (rest + those))) + beyond if rest + those > 0 else 0.0

    return miss


def eighth(layers: Layers) -> Layers:
    """Some columns of each, as layers of their own."""
    values, of = layers
    cuts = np.cumsum([prod(shape) for shape in of])[:-1]
    parts = [_columns(x, shape) for x, shape in zip(np.split(values, cuts), of, strict=True)]
    return np.concatenate([part.ravel() for part in parts]), [part.shape for part in parts]


def _part_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a layer's part: some columns of each so many, if the layer is wide; else all."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = prod(shape) // max(rows, 1)
    blocks = columns // (_TOGETHER * _EIGHTH)
    return rows, columns if blocks < 4 else blocks * _TOGETHER


def _columns(x: Floats, shape: tuple[int, ...]) -> Floats:
    """The part of a layer, as a matrix."""
    (rows, taken), every = _part_of(shape), _TOGETHER * _EIGHTH
    grid = x.reshape(rows, len(x) // max(rows, 1))
    if taken == grid.shape[1]:
        return grid
    blocks, first = taken // _TOGETHER, _EIGHTH // 2 * _TOGETHER
    those = grid[:, : blocks * every].reshape(rows, blocks, every)[:, :, first : first + _TOGETHER]
    return those.reshape(rows, taken)
