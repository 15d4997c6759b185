"""A random rotation makes any vector look Gaussian; then one fixed quantizer fits all."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Layout, Packet, State, lloyd_max, seed
from fedapp.codec.bits import pack_bits, unpack_bits
from fedapp.codec.layers import require_finite
from fedapp.codec.scale import LARGEST, even_runs, read_scales, times
from fedapp.codec.varint import Reader, varint

_BLOCK = 4096
Real = TypeVar("Real", np.float32, np.float64)


@dataclass(frozen=True)
class Eden:
    """Rotates blocks of 4096 values, quantizes each with the Lloyd-Max points of the normal, and scales back.

    float32 (n,) <-> uint8 codes of `bits` bits, packed; header: n, the seed, one float32 scale a block. The
    last block is filled with zeros up to a power of two. The rotation is a Walsh-Hadamard transform behind
    random signs. Unbiased: the scale is x^2 / <x, quantized>, which a uniform rotation makes exact. One
    transform is far from uniform where one value outweighs its block: at 1 bit the mean of many packets is
    then off by a quarter of the norm. So there are two, which leave about 1 % where one value is all but
    everything. Biased: one transform and the scale of least squared error, which takes error feedback.
    Source: Vargaftik et al. 2022, "EDEN: communication-efficient and robust distributed mean estimation for
    federated learning", Algorithm 1.
    """

    bits: int = 1
    unbiased: bool = True

    def __post_init__(self) -> None:
        check.whole("codec.bits", self.bits, 1, 8)
        check.flag("codec.unbiased", self.unbiased)

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        require_finite(x, layout)
        shared, turned = seed.draw(rng), np.zeros(_padded(len(x)))
        turned[: len(x)] = x
        for signs in self._turns(shared, len(turned)):
            turned *= signs
            hadamard(turned)
        codes, header = np.empty(len(turned), np.uint8), varint(len(x)) + shared
        for blocks, code in zip(_blocks(turned), _blocks(codes), strict=True):
            code[:], scales = self._quantize(blocks)
            header += scales.astype("<f4").tobytes()
        return Packet(pack_bits(codes, self.bits), header), {}

    def _quantize(self, blocks: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Codes, and the scale of each block."""
        square = np.sum(blocks**2, axis=1)
        deviation = np.sqrt(square / blocks.shape[1])[:, None]
        normal = np.divide(blocks, deviation, out=np.zeros_like(blocks), where=deviation > 0)
        code = np.searchsorted(lloyd_max.edges(self.bits), normal, side="right")
        point = lloyd_max.points(self.bits)[code]
        along = np.sum(blocks * point, axis=1)
        if self.unbiased:
            scale = np.divide(square, along, out=np.zeros_like(square), where=along > 0)
        else:
            scale = along / np.sum(point**2, axis=1)
        return code, np.minimum(scale, LARGEST)

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        reader = Reader(packet.header)
        count = reader.varint(layout.size)
        shared, padded = reader.take(seed.SIZE), _padded(count)
        scales = read_scales(reader.rest(), -(-count // _BLOCK))
        codes = unpack_bits(packet.body, padded, self.bits)
        points, turned = lloyd_max.points(self.bits).astype(np.float32), np.empty(padded, np.float32)
        for start in range(0, padded, _BLOCK):  # numpy makes an int64 of each code
            turned[start : start + _BLOCK] = points[codes[start : start + _BLOCK]]
        for signs in reversed(self._turns(shared, padded)):
            hadamard(turned)
            turned *= signs
        return times(turned[:count], scales, even_runs(count, _BLOCK))

    def _turns(self, shared: bytes, padded: int) -> NDArray[np.int8]:
        """The signs before each transform, a row for each."""
        turns = 2 if self.unbiased else 1
        return seed.signs(shared, turns * padded).reshape(turns, padded)


def hadamard(x: NDArray[Any], block: int = _BLOCK) -> None:
    """Orthonormal Walsh-Hadamard transform of every block, in place; it is its own inverse.

    Additions and subtractions of pairs in a fixed order: the same bits on any machine.
    """
    for blocks in _blocks(x, block):
        half, width = 1, blocks.shape[1]
        while half < width:
            pairs = blocks.reshape(len(blocks), -1, 2, half)
            total = pairs[:, :, 0] + pairs[:, :, 1]
            np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=pairs[:, :, 1])
            pairs[:, :, 0] = total
            half *= 2
        blocks *= x.dtype.type(1 / math.sqrt(width))


def rotated(x: NDArray[Real], turn: bytes) -> NDArray[Real]:
    """Two Walsh-Hadamard transforms behind random signs, of the first `width` values, then of the last.

    They reach every value, each in a transform of more than half of all, and nothing is filled in.
    """
    x = x.copy()
    for part, signs in _turns(x, turn):
        part *= signs
        hadamard(part, len(part))
    return x


def rotated_back(x: NDArray[Real], turn: bytes) -> NDArray[Real]:
    x = x.copy()
    for part, signs in reversed(_turns(x, turn)):
        hadamard(part, len(part))
        part *= signs
    return x


def _turns(x: NDArray[Real], turn: bytes) -> list[tuple[NDArray[Real], NDArray[np.int8]]]:
    if not len(x):
        return []
    span = width(len(x))
    signs = seed.signs(turn, 2 * span)
    return [(x[:span], signs[:span]), (x[-span:], signs[span:])]


def width(count: int) -> int:
    """The largest power of two within the count."""
    return 1 << count.bit_length() - 1


def _padded(count: int) -> int:
    """The next number of values that blocks of 4096 and a last power of two hold."""
    full, left = divmod(count, _BLOCK)
    return full * _BLOCK + (1 << (left - 1).bit_length() if left else 0)


def _blocks(padded: NDArray[Any], block: int = _BLOCK) -> list[NDArray[Any]]:
    """Views of the full blocks as rows, and of the last, shorter one."""
    full = len(padded) // block * block
    return [part.reshape(-1, min(block, len(part))) for part in (padded[:full], padded[full:]) if len(part)]
