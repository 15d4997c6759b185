"""Compiled code for many numbers at once: does what the same in NumPy does."""

import numpy as np
import pytest

from fedapp.codec.lanes import permutation, select
from fedapp.codec.model import Floats
from fedapp.jit import jit


@pytest.mark.parametrize("n", [1, 4, 5, 16, 32])
def test_a_permutation_copies_in_order(n: int) -> None:
    rng = np.random.default_rng(n)
    order = rng.integers(0, n, n)
    permute = permutation(order)

    @jit
    def run(x: Floats, to: int, of: int) -> None:
        permute(x, to, of)

    x = rng.standard_normal(4 * n).astype(np.float32)
    expected = x.copy()
    expected[2 * n : 3 * n] = x[1 : n + 1][order]
    run(x, 2 * n, 1)
    assert (x == expected).all()


def test_a_selection_is_of_one_of_two() -> None:
    @jit
    def run(x: Floats, y: Floats) -> None:
        for i in range(len(x)):
            x[i] = select(x[i] > y[i], x[i], y[i])

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 1000)).astype(np.float32)
    expected = np.maximum(x, y)
    run(x, y)
    assert (x == expected).all()
