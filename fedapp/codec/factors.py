"""What is of low rank in an update: a few products of a column and a row say most of a layer.

The gradient of a layer is a sum of outer products, what its outputs are to learn times what its inputs were,
over examples that are much alike. So a few leading singular triplets often hold most of a layer, at far
fewer numbers than it has. They are found by power iteration on a block of vectors; what they leave is
searched again for as long as they pay.

A triplet pays where coding its two vectors costs less than it saves in what is left. Both are counted as
reverse water-filling counts Gaussians: a value of variance v costs v where that is below the water level t,
else t (1 + ln(v / t)): distortion, and what its bits are worth.

Sources: Vogels et al. 2019, "PowerSGD: practical low-rank gradient compression for distributed optimization"
(updates are near to products); Cover and Thomas 2006, "Elements of Information Theory", section 10.3.3
(reverse water-filling).
"""

from typing import NamedTuple

import numpy as np

from fedapp.codec import Layout
from fedapp.codec.estimate import Magnitudes
from fedapp.codec.layers import energy, largest
from fedapp.codec.model import Floats, Wide
from fedapp.codec.products import Place, Products, add, magnitude, places
from fedapp.codec.subspace import basis, sample, triplets
from fedapp.jit import jit

_WATER = 0.09  # the water level in squared steps; flat from 0.07 to 0.1
_WORTH = 0.02  # of what a layer costs: where triplets save less, none are taken
_OCTAVES = 24  # of the power of rows, or columns, that are told apart


class Factors:
    """Triplets of an update's layers, as far as they pay, and what they leave (`residual`, float32 (n,)).

    Magnitudes of x, of which `most` is the largest, are to be within a few powers of ten of 1; it is left
    alone. The same bits whatever the number of threads.
    """

    def __init__(self, x: Floats, most: float, layout: Layout) -> None:
        self.residual = self._whole = x
        self._most = most
        self._magnitudes: tuple[Magnitudes, Magnitudes, float] | None = None
        self._layers = [_Layer(place) for place in places(layout)]

    def extend(self, step: float) -> bool:
        """Take those that pay at this step, too; whether there are any."""
        before = self.count
        for layer in self._layers:
            while k := layer.pays(self.residual, step):
                if self.residual is self._whole:
                    self.residual = self._whole.copy()
                if not layer.take(self.residual, k):
                    break
        if self.count == before:
            return False
        self._magnitudes = None
        return True

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(len(layer.sizes) for layer in self._layers)

    @property
    def shares(self) -> tuple[float, float]:
        """Squared norms of what is left and of all vectors, over that of x."""
        whole = energy(self._whole)
        return energy(self.residual) / whole, energy(self.vectors) / whole

    @property
    def magnitudes(self) -> tuple[Magnitudes, Magnitudes, float]:
        """Of what is left and of all vectors; and the largest, of x or of these."""
        if self._magnitudes is None:
            vectors = self.vectors
            most = max(self._most, largest(vectors))
            self._magnitudes = Magnitudes(self.residual, self._most), Magnitudes(vectors, 0.0), most
        return self._magnitudes

    @property
    def vectors(self) -> Floats:
        """All vectors, each as long as its singular value."""
        both = [side.reshape(-1) for layer in self._layers for side in (layer.left, layer.right)]
        return np.concatenate([*both, np.zeros(0, np.float32)])

    def at(self, step: float) -> tuple[Products, Floats]:
        """What a packet of this step says, and the vectors that it holds, in steps."""
        exponents, vectors = [], [np.zeros(0, np.float32)]
        for layer in self._layers:
            exponent = np.clip(np.rint(4 * np.log2(layer.sizes / step)), 0, 255).astype(np.uint8)
            share = np.sqrt(magnitude(exponent) * step / layer.sizes)[:, None] / step
            vectors += [(side * share.astype(np.float32)).reshape(-1) for side in (layer.left, layer.right)]
            exponents.append(exponent)
        products = Products(tuple(layer.place for layer in self._layers), tuple(exponents))
        return products, np.concatenate(vectors)


class _Found(NamedTuple):
    """Triplets of a matrix, as `subspace` has them, and the power of its rows and columns.

    stride: how many rows each of its rows stands for, which then are those of the longer side.
    """

    left: Floats
    right: Floats
    sizes: Wide
    rows: Wide
    columns: Wide
    stride: int = 1

    def paying(self, water: float, most: int, worth: float) -> int:
        """How many, the largest first, are best taken, `most` at most; 0 where that is not worth it."""
        costs = _costs(self.left[:most], self.right[:most], self.rows, self.columns, self.stride, water)
        best = int(np.argmin(costs))
        return best if costs[best] < (1 - worth) * costs[0] else 0

    def without(self, k: int) -> "_Found":
        """Those but for the first k, of what these leave."""
        powers = (
            np.maximum(power - np.square(side[:k], dtype=np.float64).sum(axis=0), 0)
            for power, side in ((self.rows, self.left), (self.columns, self.right))
        )
        return _Found(self.left[k:], self.right[k:], self.sizes[k:], *powers)


class _Layer:
    """One layer's triplets: left (k, rows) and right (k, columns), each as long as its singular value."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.left, self.right = (np.empty((0, n), np.float32) for n in (place.rows, place.columns))
        self.sizes: Wide = np.empty(0)
        self._seen: tuple[_Found, Floats] | None = None  # in a sample of what is left, and their basis
        self._found: _Found | None = None  # in all of it

    def pays(self, x: Floats, step: float) -> int:
        """How many triplets of what is left (in the vector x) pay; what is found for that is kept."""
        water, most = _WATER * step * step, self.place.most - len(self.sizes)
        worth = 0.0 if len(self.sizes) else _WORTH
        if self._found is None:
            grid = self.place.grid(x)
            if self._seen is None:
                part, stride = sample(grid)
                rows, columns = _powers(part)
                if rows.sum() * stride <= water:
                    return 0  # nothing is above it
                short = basis(part)
                self._seen = _Found(*triplets(part, short), rows, columns, stride), short
            if not self._seen[0].paying(water, most, worth):
                return 0
            self._found = _Found(*triplets(grid, self._seen[1], more=True), *_powers(grid))
        return self._found.paying(water, most, worth)

    def take(self, x: Floats, k: int) -> bool:
        """Move the first k out of the vector x; False where some were found that do not pay."""
        assert self._found is not None
        found = self._found
        left, right, sizes = found.left[:k], found.right[:k], found.sizes[:k]
        self.left, self.right = np.concatenate([self.left, left]), np.concatenate([self.right, right])
        self.sizes = np.concatenate([self.sizes, sizes])
        add(self.place.grid(x), left, right, (-1 / sizes).astype(np.float32))
        if k < len(found.sizes):
            self._found = found.without(k)
            return False
        self._found = self._seen = None
        return True


@jit
def _powers(x: Floats) -> tuple[Wide, Wide]:
    """Sum of squares by row and by column."""
    rows, columns = np.zeros(len(x)), np.zeros(x.shape[1])
    squares, sums = np.zeros(x.shape[1], np.float32), np.zeros(16, np.float32)
    for begin in range(0, len(x), 32):
        squares[:] = 0
        for row in range(begin, min(begin + 32, len(x))):
            for j in range(x.shape[1]):
                squares[j] += x[row, j] * x[row, j]
            sums[:] = 0
            whole = x.shape[1] // 16 * 16
            for j in range(0, whole, 16):
                for k in range(16):
                    sums[k] += x[row, j + k] * x[row, j + k]
            for j in range(whole, x.shape[1]):
                sums[0] += x[row, j] * x[row, j]
            rows[row] = sums.sum()
        for j in range(x.shape[1]):
            columns[j] += squares[j]
    return rows, columns


@jit
def _costs(left: Floats, right: Floats, rows: Wide, columns: Wide, stride: int, water: float) -> Wide:
    """What a layer costs with the first 0, 1, ... of its triplets taken: their vectors, and what is left.

    Values are taken for Gaussians whose variance is that of their row times that of their column: the coder
    learns as much of them.
    """
    costs = np.zeros(len(left) + 1)
    rows, columns, spent = rows.copy(), columns.copy(), 0.0
    for k in range(len(left) + 1):
        mean_r, many_r = _octaves(rows)
        mean_c, many_c = _octaves(columns)
        power = rows.sum()
        cost = 0.0
        for a in range(_OCTAVES):
            for b in range(_OCTAVES):
                if many_r[a] and many_c[b]:
                    cost += many_r[a] * many_c[b] * _cost(mean_r[a] * mean_c[b] / power, water)
        costs[k] = stride * cost + spent
        if k == len(left):
            break
        size = 0.0
        for j in range(len(columns)):
            size += np.float64(right[k, j]) ** 2
        for a in range(_OCTAVES):
            for weight, mean, many in ((stride, mean_r[a], many_r[a]), (1, mean_c[a], many_c[a])):
                spent += weight * many * _cost(size * mean / power, water)
        for i in range(len(rows)):
            rows[i] = max(rows[i] - np.float64(left[k, i]) ** 2, 0.0)
        for j in range(len(columns)):
            columns[j] = max(columns[j] - np.float64(right[k, j]) ** 2, 0.0)
    return costs


@jit
def _cost(variance: float, water: float) -> float:
    """Distortion of a Gaussian, and what its bits are worth."""
    return water * (1 + np.log(variance / water)) if variance > water else variance


@jit
def _octaves(powers: Wide) -> tuple[Wide, Wide]:
    """Mean of the powers in each octave, and how many there are: from the largest down."""
    mean, many = np.zeros(_OCTAVES), np.zeros(_OCTAVES)
    exponents = powers.view(np.int64)
    top = exponents.max() >> 52
    for i in range(len(powers)):
        k = top - (exponents[i] >> 52)
        if k < _OCTAVES:
            mean[k] += powers[i]
            many[k] += 1
    for k in range(_OCTAVES):
        mean[k] /= max(many[k], 1)
    return mean, many
