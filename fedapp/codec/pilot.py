"""What an estimate of the bits of a long update misses: told from a part of it, which is coded."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from fedapp.codec import Layout
from fedapp.codec.estimate import Like, Magnitudes
from fedapp.codec.factors import Factors
from fedapp.codec.layers import shapes
from fedapp.codec.model import BLOCK, Floats
from fedapp.codec.quantizer import Quantizer

_EIGHTH = 8
# Columns taken in a row, the coder's block or a part of it: the most of which there are so many.
_TOGETHER, _FEWEST = (BLOCK, BLOCK // 2, BLOCK // 4, BLOCK // 8), 4
_NINTH = 9  # of narrow layers: odd, as what repeats itself often does every so many even ones
# Log of what it takes more than its share, of 2^20 values: rows learn from fewer columns; and the same where
# products have said already what rows have in common.
_DEARER, _LEFT_DEARER = 0.055, 0.01
_FEW = 256  # bits, that tell nothing


class Layers(NamedTuple):
    """Values of layers, end to end, and their shapes."""

    values: Floats
    shapes: Sequence[tuple[int, ...]]

    def apart(self) -> list[Floats]:
        """The values of each."""
        return np.split(self.values, np.cumsum([prod(shape) for shape in self.shapes])[:-1])


def pilot(
    factors: Factors, layout: Layout, coder: Quantizer, like: Like, beyond: float
) -> Callable[[float], float] | None:
    """What says how far the estimate is off at a step: log of bits taken over estimated ones.

    An eighth of the columns is coded, of what the products leave and of their vectors: each is learned over
    all rows, and neighbours stay together. Of narrow layers all is coded, and about as much of it counts.
    `beyond`: log of what such a part is known to miss. None where a part would be most of what there is.
    """
    x, (left, vectors, _) = factors.residual, factors.magnitudes
    dearer = _LEFT_DEARER if factors.count else _DEARER
    share = np.exp(-dearer * (2**20 / len(x)) ** 0.5)
    part = eighth(Layers(x, shapes(layout)))
    if len(part[0].values) > len(x) / 4:
        return None

    def off(part: Layers, whole: Sequence[bool], scale: float) -> float:
        """Bits taken over estimated ones; 1 where so few are expected that they tell nothing."""
        evenly = [x[::_NINTH] if narrow else x for x, narrow in zip(part.apart(), whole, strict=True)]
        expected = Magnitudes(np.concatenate(evenly), 0.0).bits(1 / scale, like)
        if expected < _FEW:
            return 1.0
        lengths = coder.lengths(part.values, scale, part.shapes)
        taken = sum(bits / _NINTH if narrow else bits for bits, narrow in zip(lengths, whole, strict=True))
        return max(taken, 1.0) / expected

    def miss(step: float) -> float:
        products, values = factors.at(step)
        rest, those = left.bits(step, like), vectors.bits(step, like)
        taken = off(*part, 1 / step) * share * rest
        if those:
            taken += off(*eighth(Layers(values, products.shapes)), 1.0) * those
        return float(np.log(taken / (rest + those))) + beyond if rest + those > 0 else 0.0

    return miss


def eighth(layers: Layers) -> tuple[Layers, list[bool]]:
    """Some columns of each layer that holds something, as layers of their own; which of these are all."""
    grids = [_grid(x, shape) for x, shape in zip(layers.apart(), layers.shapes, strict=True) if len(x)]
    parts = [_columns(grid) for grid in grids]
    values = np.concatenate([part.ravel() for part in parts])
    whole = [part is grid for part, grid in zip(parts, grids, strict=True)]
    return Layers(values, [part.shape for part in parts]), whole


def _grid(x: Floats, shape: tuple[int, ...]) -> Floats:
    """A layer as a matrix; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return x.reshape(rows, len(x) // rows)


def _columns(grid: Floats) -> Floats:
    """Some columns of each so many, if there are many of them; else all, the matrix itself."""
    rows, columns = grid.shape
    block = next((size for size in _TOGETHER if columns >= _FEWEST * size * _EIGHTH), None)
    if block is None:
        return grid
    blocks, every, first = columns // (block * _EIGHTH), block * _EIGHTH, _EIGHTH // 2 * block
    those = grid[:, : blocks * every].reshape(rows, blocks, every)[:, :, first : first + block]
    return those.reshape(rows, blocks * block)
