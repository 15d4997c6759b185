"""Products of a column and a row of a layer, as a packet holds them and the decoder puts them together."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import Layout
from fedapp.codec.layers import size
from fedapp.codec.model import Floats, Wide
from fedapp.codec.varint import Reader
from fedapp.errors import DecodeError
from fedapp.jit import jit

_LEAST = 4  # rows and columns of a layer that may have products
_LONGEST = 2.0**28  # steps of a value that is fitted: the coder takes 2^30 half ones
_TILE = 1024  # columns that are made together, for caches


class Place(NamedTuple):
    """Where a layer lies in the vector, and its two sides."""

    start: int
    rows: int
    columns: int

    @property
    def most(self) -> int:
        """How many products it may have: they are to hold half as many numbers as the layer at most."""
        return min(self.rows * self.columns // (2 * (self.rows + self.columns)), 255)

    def grid(self, x: Floats) -> Floats:
        """The layer in the vector, as a matrix."""
        return x[self.start : self.start + self.rows * self.columns].reshape(self.rows, self.columns)


def places(layout: Layout) -> Iterator[Place]:
    """Of the layers that may have products; kernels count as matrices of (out, rest)."""
    for slot in layout.slots:
        rows = slot.shape[0] if slot.shape else 0
        columns = size(slot) // max(rows, 1)
        if min(rows, columns) >= _LEAST:
            yield Place(slot.offset, rows, columns)


@dataclass(frozen=True)
class Products:
    """How many products each layer has, and how large they are: exponents, quarter octaves of a step.

    A product is left * right / 2^(exponent / 4), all in steps: the two vectors come as levels. As bytes: a
    count for every place, then the exponents.
    """

    places: tuple[Place, ...]
    exponents: tuple[NDArray[np.uint8], ...]

    def to_bytes(self) -> bytes:
        return bytes(len(e) for e in self.exponents) + b"".join(e.tobytes() for e in self.exponents)

    @classmethod
    def read(cls, reader: Reader, layout: Layout) -> "Products":
        """Undo `to_bytes`; raises DecodeError for more products than a layer may have."""
        of = tuple(places(layout))
        counts = reader.take(len(of))
        for count, place in zip(counts, of, strict=True):
            if count > place.most:
                raise DecodeError(
                    f"packet has {count} products for a layer of {place.rows} x {place.columns}, "
                    f"which may have {place.most}"
                )
        return cls(of, tuple(np.frombuffer(reader.take(count), np.uint8) for count in counts))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of their vectors: all left ones of a layer, then all right ones."""
        pairs = zip(self.places, self.exponents, strict=True)
        return [(len(e), side) for place, e in pairs if len(e) for side in (place.rows, place.columns)]

    def add(self, x: Floats, vectors: Floats, sign: int) -> None:
        """Add them to x (n,), or take them away; in steps, as the vectors, which lie as `shapes` says.

        One after the other in float32, so that the sum is the same on any machine.
        """
        sides = self.apart(vectors)
        for (place, factor), left, right in zip(self._layers, sides[::2], sides[1::2], strict=True):
            add(place.grid(x), left, right, sign * factor)

    def fit(self, side: int, x: Floats, values: Floats, other: Floats) -> None:
        """Change the values of a side, of `shapes`, such that the layer's products come nearest to x.

        That is with the points of the other side (k, n): what that lost by rounding is made up for, as far as
        it can be. It does not always pay: the bits change too. One sweep of Gauss-Seidel through the least
        squares, since vectors of one side are nearly orthogonal.
        """
        place, factor = self._layers[side // 2]
        grid = place.grid(x) if side % 2 else np.ascontiguousarray(place.grid(x).T)
        _fit(grid, other * factor[:, None], self.apart(values)[side])

    def apart(self, vectors: NDArray[Any]) -> list[NDArray[Any]]:
        """Each side's vectors, or their levels: views, of `shapes`."""
        sizes = [prod(shape) for shape in self.shapes]
        of = zip(self.shapes, sizes, np.cumsum(sizes), strict=True)
        return [vectors[end - size : end].reshape(shape) for shape, size, end in of]

    @cached_property
    def _layers(self) -> list[tuple[Place, Floats]]:
        """Where those are that have products, and the factors of these."""
        return [
            (place, (1 / magnitude(exponent)).astype(np.float32))
            for place, exponent in zip(self.places, self.exponents, strict=True)
            if len(exponent)
        ]


def _fit(x: Floats, other: Floats, mine: Floats) -> None:
    """Change `mine` (k, columns), one vector after the other, such that other^T mine comes nearest to x."""
    across, ones = np.ascontiguousarray(other.T), np.ones(max(x.shape[0], len(mine)), np.float32)
    images, gram = np.zeros_like(mine), np.zeros((len(mine), len(mine)), np.float32)
    add(images, across, x, ones)
    add(gram, across, across, ones)
    for i in range(len(mine)):
        shared, own = gram[i].copy(), gram[i, i]
        shared[i] = 0
        add(images[i : i + 1], shared[:, None], mine, -ones)
        if not own:
            mine[i] = 0  # what it is multiplied by is 0
        elif np.abs(images[i]).max() < own * _LONGEST:
            mine[i] = images[i] / own


def magnitude(exponent: NDArray[np.uint8]) -> Wide:
    """2^(exponent / 4): square roots are the same on any machine."""
    whole, quarter = np.divmod(exponent.astype(np.int32), 4)
    return np.ldexp(np.sqrt(np.sqrt(2.0**quarter)), whole)


@jit
def add(x: Floats, left: Floats, right: Floats, factor: Floats) -> None:
    """x += left^T diag(factor) right, in place, product by product, four while a value is at hand."""
    k, columns = right.shape
    for begin in range(0, columns, _TILE):
        end = min(begin + _TILE, columns)
        for row in range(len(x)):
            values = x[row, begin:end]
            whole = k // 4 * 4
            for i in range(0, whole, 4):
                a, b = left[i, row] * factor[i], left[i + 1, row] * factor[i + 1]
                c, d = left[i + 2, row] * factor[i + 2], left[i + 3, row] * factor[i + 3]
                first, second = right[i, begin:end], right[i + 1, begin:end]
                third, fourth = right[i + 2, begin:end], right[i + 3, begin:end]
                for j in range(end - begin):
                    values[j] = (((values[j] + a * first[j]) + b * second[j]) + c * third[j]) + d * fourth[j]
            for i in range(whole, k):
                a, first = left[i, row] * factor[i], right[i, begin:end]
                for j in range(end - begin):
                    values[j] += a * first[j]
