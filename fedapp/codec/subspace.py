"""Leading singular triplets of a matrix: power iteration on a block of vectors.

All sums have one order, so that results are the same whatever the number of threads.
Source: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", section 4.5.
"""

import numpy as np
from numpy.typing import NDArray

from fedapp.jit import jit

BLOCK = 16  # triplets searched at once
_TURNS = 3  # of the power iteration
_SEEN = 512  # rows, or columns, of a long matrix that it looks at
_NOISE = 1e-11  # power relative to the largest that float32 may have made

Floats = NDArray[np.float32]
Triplets = tuple[Floats, Floats, NDArray[np.float64]]
"""Left (k, rows) and right vectors (k, columns), as long as the singular values; these, largest first."""


def sample(x: Floats) -> tuple[Floats, int]:
    """Every so many rows or columns of a long matrix, and how many: its short side is the second one."""
    rows, columns = x.shape
    stride = max(max(rows, columns) // _SEEN, 1)
    return np.ascontiguousarray(x[::stride] if rows >= columns else x[:, ::stride].T), stride


def basis(part: Floats) -> Floats:
    """Basis (columns, BLOCK) of what most of the rows lie in."""
    start = np.random.default_rng(0).standard_normal((part.shape[1], BLOCK)).astype(np.float32)
    for _ in range(_TURNS):
        images = _transposed_times(part, _times(part, start))
        turn, powers = _axes(images)  # of squares of singular values, once the basis is orthonormal
        start = _times(images, (turn / np.sqrt(powers)).astype(np.float32))
    return start


def triplets(x: Floats, short: Floats) -> Triplets:
    """Those of x projected on the basis of its short side."""
    tall = x.shape[0] >= x.shape[1]
    images = _times(x, short) if tall else _transposed_times(x, short)
    turn, powers = _axes(images)
    sizes = np.sqrt(powers[powers < np.inf])
    image = np.ascontiguousarray(_times(images, turn).T[: len(sizes)])
    vectors = np.ascontiguousarray(_times(short, turn).T[: len(sizes)]) * sizes[:, None].astype(np.float32)
    return (image, vectors, sizes) if tall else (vectors, image, sizes)


def _axes(images: Floats) -> tuple[Floats, NDArray[np.float64]]:
    """Principal axes (BLOCK, BLOCK) of columns, and power along each, largest first; what is lost in noise
    has the axis 0 and infinite power."""
    powers, axes = np.linalg.eigh(_gram(images))
    powers, axes = powers[::-1].copy(), axes[:, ::-1].copy()
    lost = powers <= _NOISE * powers[0]
    powers[lost], axes[:, lost] = np.inf, 0
    return axes.astype(np.float32), powers


@jit
def _gram(x: Floats) -> NDArray[np.float64]:
    """x^T x."""
    gram = np.zeros((BLOCK, BLOCK))
    for row in range(len(x)):
        for a in range(BLOCK):
            for b in range(BLOCK):
                gram[a, b] += np.float64(x[row, a]) * np.float64(x[row, b])
    return gram


@jit
def _times(x: Floats, y: Floats) -> Floats:
    """x y for y of BLOCK columns, four rows at a time: sums wait for each other."""
    product = np.zeros((len(x), BLOCK), np.float32)
    whole = len(x) // 4 * 4
    sums = np.zeros((4, BLOCK), np.float32)
    for row in range(0, whole, 4):
        sums[:] = 0
        for j in range(len(y)):
            a, b, c, d = x[row, j], x[row + 1, j], x[row + 2, j], x[row + 3, j]
            for k in range(BLOCK):
                v = y[j, k]
                sums[0, k] += a * v
                sums[1, k] += b * v
                sums[2, k] += c * v
                sums[3, k] += d * v
        product[row : row + 4] = sums
    for row in range(whole, len(x)):
        for j in range(len(y)):
            for k in range(BLOCK):
                product[row, k] += x[row, j] * y[j, k]
    return product


@jit
def _transposed_times(x: Floats, y: Floats) -> Floats:
    """x^T y for y of BLOCK columns."""
    product = np.zeros((BLOCK, x.shape[1]), np.float32)
    whole = len(x) // 4 * 4
    for row in range(0, whole, 4):
        for k in range(BLOCK):
            a, b, c, d = y[row, k], y[row + 1, k], y[row + 2, k], y[row + 3, k]
            for j in range(x.shape[1]):
                product[k, j] += (a * x[row, j] + b * x[row + 1, j]) + (c * x[row + 2, j] + d * x[row + 3, j])
    for row in range(whole, len(x)):
        for k in range(BLOCK):
            for j in range(x.shape[1]):
                product[k, j] += y[row, k] * x[row, j]
    return np.ascontiguousarray(product.T)
