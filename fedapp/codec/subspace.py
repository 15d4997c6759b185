"""Leading singular triplets of a matrix: power iteration on a block of vectors.

All sums have one order, so that results are the same whatever the number of threads.
Source: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", section 4.5.
"""

import numpy as np

from fedapp.codec.model import Floats, Wide
from fedapp.jit import jit

_BLOCK = 16  # triplets searched at once
_TURNS = 2  # of the power iteration
_SEEN = 256  # rows, or columns, of a long matrix that it looks at
_TILE = 1024  # columns that are at hand together, for caches
_RUN = 16  # columns that are looked at in a row
_NOISE = 1e-11  # power relative to the largest that float32 may have made

Triplets = tuple[Floats, Floats, Wide]
"""Left (k, rows) and right vectors (k, columns), as long as the singular values; these, largest first."""


def sample(x: Floats) -> tuple[Floats, int]:
    """One of so many rows or columns of a long matrix, and how many: its short side is the second one.

    Columns come in runs, since memory does.
    """
    rows, columns = x.shape
    stride = max(max(rows, columns) // _SEEN, 1)
    if rows >= columns:
        return np.ascontiguousarray(x[::stride]), stride
    if stride == 1:
        return np.ascontiguousarray(x.T), stride
    runs = x[:, : columns // (_RUN * stride) * _RUN * stride].reshape(rows, -1, _RUN * stride)[:, :, :_RUN]
    return np.ascontiguousarray(runs.reshape(rows, -1).T), stride


def basis(part: Floats) -> Floats:
    """Basis (columns, _BLOCK) of what most of the rows lie in."""
    start = np.random.default_rng(0).standard_normal((part.shape[1], _BLOCK)).astype(np.float32)
    for _ in range(_TURNS):
        start = _orthonormal(_transposed_times(part, _times(part, start)))
    return start


def triplets(x: Floats, short: Floats, more: bool = False) -> Triplets:
    """Those of x projected on the basis of its short side.

    With `more` half a turn of the iteration comes first, over all of x: the basis is of a sample.
    """
    tall = x.shape[0] >= x.shape[1]
    there, back = (_times, _transposed_times) if tall else (_transposed_times, _times)
    base, images = short, there(x, short)
    if more:
        base = _orthonormal(images)
        images = back(x, base)
    turn, powers = _axes(images)
    sizes = np.sqrt(powers[powers < np.inf])
    image = np.ascontiguousarray(_times(images, turn).T[: len(sizes)])
    vectors = np.ascontiguousarray(_times(base, turn).T[: len(sizes)]) * sizes[:, None].astype(np.float32)
    left = tall != more  # images are of the long side, with `more` of the short one
    return (image, vectors, sizes) if left else (vectors, image, sizes)


def _orthonormal(images: Floats) -> Floats:
    """An orthonormal basis (n, _BLOCK) of what columns span; what is lost in noise is 0."""
    turn, powers = _axes(images)
    return _times(images, (turn / np.sqrt(powers)).astype(np.float32))


def _axes(images: Floats) -> tuple[Floats, Wide]:
    """Principal axes (_BLOCK, _BLOCK) of columns, and power along each, largest first; what is lost in noise
    has the axis 0 and infinite power."""
    powers, axes = np.linalg.eigh(_gram(images))
    powers, axes = powers[::-1].copy(), axes[:, ::-1].copy()
    lost = powers <= _NOISE * powers[0]
    powers[lost], axes[:, lost] = np.inf, 0
    return axes.astype(np.float32), powers


@jit
def _gram(x: Floats) -> Wide:
    """x^T x."""
    gram, wide = np.zeros((_BLOCK, _BLOCK)), np.zeros((4, _BLOCK))
    for begin in range(0, len(x), 4):
        for i in range(4):
            for b in range(_BLOCK):
                wide[i, b] = np.float64(x[begin + i, b]) if begin + i < len(x) else 0.0
        for a in range(_BLOCK):
            p, q, r, s = wide[0, a], wide[1, a], wide[2, a], wide[3, a]
            for b in range(_BLOCK):
                gram[a, b] += (p * wide[0, b] + q * wide[1, b]) + (r * wide[2, b] + s * wide[3, b])
    return gram


@jit
def _times(x: Floats, y: Floats) -> Floats:
    """x y for y of _BLOCK columns, eight rows at a time: sums wait for each other."""
    product = np.zeros((len(x), _BLOCK), np.float32)
    whole = len(x) // 8 * 8
    sums = np.zeros((8, _BLOCK), np.float32)
    for row in range(0, whole, 8):
        sums[:] = 0
        for j in range(len(y)):
            a, b, c, d = x[row, j], x[row + 1, j], x[row + 2, j], x[row + 3, j]
            e, f, g, h = x[row + 4, j], x[row + 5, j], x[row + 6, j], x[row + 7, j]
            for k in range(_BLOCK):
                v = y[j, k]
                sums[0, k] += a * v
                sums[1, k] += b * v
                sums[2, k] += c * v
                sums[3, k] += d * v
                sums[4, k] += e * v
                sums[5, k] += f * v
                sums[6, k] += g * v
                sums[7, k] += h * v
        product[row : row + 8] = sums
    for row in range(whole, len(x)):
        for j in range(len(y)):
            for k in range(_BLOCK):
                product[row, k] += x[row, j] * y[j, k]
    return product


@jit
def _transposed_times(x: Floats, y: Floats) -> Floats:
    """x^T y for y of _BLOCK columns, some columns of x at a time, for caches."""
    product = np.zeros((_BLOCK, x.shape[1]), np.float32)
    whole = len(x) // 4 * 4
    for begin in range(0, x.shape[1], _TILE):
        end = min(begin + _TILE, x.shape[1])
        for row in range(0, whole, 4):
            first, second = x[row, begin:end], x[row + 1, begin:end]
            third, fourth = x[row + 2, begin:end], x[row + 3, begin:end]
            for k in range(_BLOCK):
                a, b, c, d = y[row, k], y[row + 1, k], y[row + 2, k], y[row + 3, k]
                sums = product[k, begin:end]
                for j in range(end - begin):
                    sums[j] += (a * first[j] + b * second[j]) + (c * third[j] + d * fourth[j])
        for row in range(whole, len(x)):
            for k in range(_BLOCK):
                for j in range(begin, end):
                    product[k, j] += y[row, k] * x[row, j]
    return np.ascontiguousarray(product.T)
