"""How loops over values are compiled: once, kept on the disk, and the same everywhere."""

from numba import njit

jit = njit(cache=True, error_model="numpy", nogil=True)
