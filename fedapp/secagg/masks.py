"""Masks: a key's stream of residues, added to a sum that is reduced once at the end."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

_WORDS = 1 << 16  # a block of stream and its part of the sum stay in the cache


def add_mask(total: NDArray[np.int64], key: bytes, modulus: int, sign: int) -> None:
    """Add or take off, in place, the mask of a 32-byte key: residues modulo 2 <= modulus <= 2**31.

    The stream is ChaCha20's, cut into 32-bit little-endian words. Words from the largest multiple of the
    modulus on are rejected, so residues are exactly uniform if the stream is. They stay below 2**32: a total
    holds 2**30 masks before it must be reduced.
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    limit = (1 << 32) // modulus * modulus
    done = 0
    while done < len(total):
        block = stream.update(bytes(4 * min(_WORDS, len(total) - done)))
        words = np.frombuffer(block, "<u4")
        if words.max() >= limit:
            words = words[words < limit]
        part = total[done : done + len(words)]
        if sign > 0:
            part += words
        else:
            part -= words
        done += len(words)
