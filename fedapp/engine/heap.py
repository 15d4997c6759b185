"""Memory that is freed stays with the process that freed it, and is used again."""

import ctypes

_MALLOPT = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_MOST, _MOST_OF_OLD = 1 << 30, 1 << 25  # bytes; older versions refuse a larger threshold than the second


def keep_freed_memory() -> None:
    """For this process and those that it forks later; does nothing where the C library is not glibc.

    A model's arrays come and go with each client. Else each takes fresh pages, which the system clears, and
    that takes longer than to add them up.
    """
    if _MALLOPT is not None and (_MALLOPT(_MMAP_THRESHOLD, _MOST) or _MALLOPT(_MMAP_THRESHOLD, _MOST_OF_OLD)):
        _MALLOPT(_TRIM_THRESHOLD, _MOST)  # alone it would do harm: thresholds would no longer adapt
