"""The heart of the default codec: levels of one common step, and their code, made in one pass.

A layer of an update is close to an outer product: what a unit (row) is to learn times what an input (column)
was. So the magnitude to expect of a level is column mean x row factor, both learned from the levels coded so
far, and half octaves of that expectation are the contexts in which a level's bits are coded:

    zero?  sign  > 1?  > 2?  ...  (each an adaptive bit)  then low bits as they are; far outliers escape

The column means of a layer start from the row means of the layer before: its units are this one's inputs.
The encoder rounds each value where distance and bits cost least together, which prunes by itself. Contexts
are integer arithmetic on what both ends know, so they agree on any machine.

Sources: Martin 1979, "Range encoding" (the coder; here 48 bits wide, 16 leave at a time); Marpe, Schwarz and
Wiegand 2003, "Context-based adaptive binary arithmetic coding in H.264/AVC" (binarization, contexts);
Mahoney 2005, "Adaptive weighing of context models" (states that count, hence learn fast at first);
Sullivan and Wiegand 1998, "Rate-distortion optimization for video compression" (rounding).
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.codec import model
from fedapp.codec.model import (
    BINS,
    CONTEXT,
    CONTEXTS,
    PATIENCE,
    UNARY,
    Levels,
    Whole,
    Words,
    end_row,
    learn,
)
from fedapp.codec.trellis import DECAY, HALF, NEXT, NUDGE, PACE, search
from fedapp.errors import DecodeError
from fedapp.jit import jit

MOST = 2**30  # the largest magnitude of a level

Shapes = Sequence[tuple[int, ...]]
Beyond = NDArray[np.float64]  # how far values lie beyond levels of 1, and above, in steps; how many each

_FULL, _WORD, _LOW = 1 << 48, 1 << 32, (1 << 32) - 1  # the interval at the start; below _WORD, 16 bits leave
_ONE = np.uint64(1)  # unsigned indices are used as they are; signed ones cost a test for negative


@jit
def _shift(encoding: bool, low: Whole, span: Whole, at: Whole, words: Words) -> tuple[Whole, Whole, Whole]:
    if encoding:
        words[at] = low >> 32
        return (low & _LOW) << 16, span << 16, at + 1
    return low << 16 | (np.int64(words[at]) if at < len(words) else 0), span << 16, at + 1


@jit
def _raw_bits(
    encoding: bool, v: Whole, n: Whole, low: Whole, span: Whole, at: Whole, words: Words
) -> tuple[Whole, Whole, Whole, Whole]:
    for b in range(n - 1, -1, -1):
        span >>= 1
        bit = (v >> b) & 1 if encoding else np.int64(low >= span)
        low += bit * span if encoding else -bit * span
        if not encoding:
            v = v << 1 | bit
        if span < _WORD:
            low, span, at = _shift(encoding, low, span, at, words)
    return v, low, span, at


def _layer_coder(encoding: bool, dependent: bool) -> Callable[..., bool]:
    """The coder of one layer: one text for both directions and kinds of quantizer, compiled four times.

    With `dependent` quantizers levels are places (`trellis`), and each quantizer has states of its own.

    `low` is the low end of the interval when encoding, and the code above it when decoding. `words` takes
    (with carries yet to settle) or gives 16 bits an entry. False: no room in `words`, or no valid level.
    """
    sense = 1 if encoding else -1
    rounding = encoding and not dependent
    pace, decay, nudge = (PACE, DECAY, NUDGE) if dependent else (4, 4, 4)
    raw_of = model.RAW_DEPENDENT if dependent else model.RAW
    most = MOST // 2 if dependent else MOST
    signs = 2 * CONTEXTS * BINS * (2 if dependent else 1)  # where the states of signs begin

    @jit
    def layer(
        updates: NDArray[np.float32], scale: Any, edge: NDArray[np.float32], levels: Levels, column: Levels,
        units: NDArray[np.int64], states: Words, coder: NDArray[np.int64], words: Words, beyond: Beyond,
    ) -> bool:  # fmt: skip
        low, span, at = coder[0], coder[1], coder[2]
        width = len(column)
        state: Whole = 0
        searched = 0
        # Where level 1 begins by context: known before it is asked for, and as bits, which compare sooner.
        begins, edges = np.empty(CONTEXTS, np.int32), edge.view(np.int32)
        if rounding:
            for c in range(CONTEXTS):
                begins[c] = edges[states[2 * BINS * c] >> np.uint32(22)]
        for row in range(len(units)):
            x, level = updates[row if encoding else 0], levels[row if row < len(levels) else 0]
            expected = column.sum() // width + 1  # what the column means promise of this row so far
            found = expected  # and what came; their quotient is the row factor
            begin: Whole = 0
            left: Whole = 0
            lean: Whole = 0
            while begin < width:
                if encoding and at + 600 > len(words):
                    return False
                factor: Whole = min(np.int64(np.uint64(found << 12) // np.uint64(expected)), 1 << 20)
                end = min(width, begin + min(pace, max(1, begin)))
                if dependent and encoding and row * width + begin == searched:
                    searched = search(
                        updates.reshape(-1), scale, edge[0], levels.reshape(-1), searched, state,
                        found, expected, left, lean, column, states,
                    )  # fmt: skip
                    if searched < 0:
                        coder[2] = -1
                        return False
                for c in range(begin, end):
                    u = np.uint64(c)
                    mean = np.int64(column[u])
                    e = (mean * factor) >> 16
                    e += ((left << 8) - e) >> nudge
                    context = np.int64(CONTEXT[np.uint64(e if e < 4096 else 4096 + min(e >> 10, 4095))])
                    odd = state // HALF if dependent else 0
                    base = (context + odd * CONTEXTS) * (2 * BINS)
                    i = np.uint64(base)
                    p, n = np.int64(states[i]), np.int64(states[i + _ONE])
                    part = (span >> 16) * ((p >> 16) | 1)
                    v = x[u] * scale if rounding else np.float32(0)
                    a = abs(v)
                    m: Whole = np.int64(a + np.float32(0.5))
                    far: Whole = 0
                    if rounding:
                        nothing = np.float32(a).view(np.int32) < begins[np.uint64(context)]
                    else:
                        nothing = level[u] == 0 if encoding else low >= part
                    if nothing:
                        low, span = low + sense * part, span - part
                        q = learn(p, n, 0)
                        states[i], states[i + _ONE] = q, n + (n < PATIENCE)
                        if span < _WORD:
                            low, span, at = _shift(encoding, low, span, at, words)
                        level[u] = 0
                    else:
                        span = part
                        q = learn(p, n, 1)
                        states[i], states[i + _ONE] = q, n + (n < PATIENCE)
                        if span < _WORD:
                            low, span, at = _shift(encoding, low, span, at, words)
                        raw = np.int64(raw_of[context])
                        if dependent and encoding:
                            m = (abs(np.int64(level[u])) + odd) >> 1
                        if rounding:
                            if not a <= np.float32(1 << 30):
                                coder[2] = -1
                                return False
                            m = max(m, 1)
                            if 1 < m < UNARY and raw == 0:
                                tenbits = states[base + 2 * m - 2] >> np.uint32(22)
                                if a - np.float32(m - 1) < edge[np.uint64(1024) + tenbits]:
                                    m -= 1
                            more_than_one = np.uint64(m > 1)
                            beyond[more_than_one] += a - np.float32(m)
                            beyond[more_than_one + np.uint64(2)] += 1

                        k = np.uint64(signs + ((lean + 4096) >> 9 << 1))
                        p, n = np.int64(states[k]), np.int64(states[k + _ONE])
                        part = (span >> 16) * ((p >> 16) | 1)
                        if rounding:
                            minus = np.int64(v < 0)
                        else:
                            minus = np.int64(level[u] < 0) if encoding else np.int64(low < part)
                        low += sense * part * (1 - minus)
                        span = part if minus else span - part
                        states[k], states[k + _ONE] = learn(p, n, minus), n + (n < PATIENCE)
                        lean += ((1 - 2 * minus) * 4096 - lean) >> 3
                        if span < _WORD:
                            low, span, at = _shift(encoding, low, span, at, words)

                        count, t = (m - 1) >> raw, 0
                        while t < UNARY:
                            k = np.uint64(base + 2 * t + 2)
                            p, n = np.int64(states[k]), np.int64(states[k + _ONE])
                            part = (span >> 16) * ((p >> 16) | 1)
                            more = t < count if encoding else low < part
                            if more:
                                span = part
                                p = learn(p, n, 1)
                            else:
                                low, span = low + sense * part, span - part
                                p = learn(p, n, 0)
                            states[k], states[k + _ONE] = p, n + (n < PATIENCE)
                            if span < _WORD:
                                low, span, at = _shift(encoding, low, span, at, words)
                            if not more:
                                break
                            t += 1
                        if t == UNARY:  # an escape: how many bits, then the bits
                            rest, size = count - UNARY + 1 if encoding else 0, 0
                            while rest >> size:
                                size += 1
                            size, low, span, at = _raw_bits(encoding, size, 5, low, span, at, words)
                            rest, low, span, at = _raw_bits(encoding, rest, size, low, span, at, words)
                            t = rest + UNARY - 1
                        if raw:
                            span >>= raw
                            bits = (
                                (m - 1) & ((1 << raw) - 1) if encoding else min(low // span, (1 << raw) - 1)
                            )
                            low += sense * bits * span
                            t = t << raw | bits
                            if span < _WORD:
                                low, span, at = _shift(encoding, low, span, at, words)
                        m = t + 1
                        if m > most or (not encoding and low >= span):
                            return False  # raw bits do not fill the interval: no encoder points at the rest
                        far = 2 * m - odd if dependent else m
                        level[u] = (far ^ -minus) + minus
                        found += far << 12
                    if dependent:
                        state = NEXT[np.uint64(state), np.uint64(m & 1)]
                    if rounding:
                        begins[np.uint64(context)] = edges[np.uint64(q >> 22)]
                    left = far
                    expected += mean
                begin = end
                found -= found >> decay
                expected -= expected >> decay
            units[row] = end_row(column, level, row)
        coder[0], coder[1], coder[2] = low, span, at
        return True

    return layer


_CODERS = {(encoding, dependent): _layer_coder(encoding, dependent)
           for encoding in (False, True) for dependent in (False, True)}  # fmt: skip


def _walk(
    encoding: bool, dependent: bool, x: NDArray[np.float32], scale: Any, edge: NDArray[np.float32],
    level: Levels, shapes: Shapes, coder: NDArray[np.int64], words: Words, beyond: Beyond,
) -> bool:  # fmt: skip
    """All layers in turn; a vector is one row, whatever holds nothing is passed over.

    Where `level` has no room for a layer, each of its rows takes the place of the one before.
    """
    layer = _CODERS[encoding, dependent]
    states = (model.INITIAL_DEPENDENT if dependent else model.INITIAL).copy()
    units, mean, start = np.zeros(0, np.int64), 800 if dependent else 400, 0
    for shape in shapes:
        rows, size = shape[0] if len(shape) > 1 else 1, prod(shape)
        if size:
            column, now = np.empty(size // rows, np.int32), np.zeros(rows, np.int64)
            model.begin_layer(states, column, units, mean)
            part = slice(start, start + size)
            values = x[part].reshape(rows, -1) if len(x) else x.reshape(1, 0)
            into = (level[part] if part.stop <= len(level) else level[: size // rows]).reshape(
                -1, size // rows
            )
            if not layer(values, scale, edge, into, column, now, states, coder, words, beyond):
                return False
            mean, start = max(int(now.sum()) // rows, 8), start + size
            units = now if rows > 1 else units
    return True


def encode(
    x: NDArray[np.float32], scale: float, edge: NDArray[np.float32], shapes: Shapes, dependent: bool = False,
    keep: bool = True,
) -> tuple[bytes, Levels, Beyond]:  # fmt: skip
    """Code of float32 (n,) x * scale, its levels (int32 (n,)), and how far the values lie beyond them.

    The levels of a packet that nobody asks for are not kept (`keep`), which is quicker by a tenth: they are
    as long as x.

    `edge`: how far above m - 1 level m begins, by ten bits of the state's probability: 1024 entries for
    m = 1, then for m > 1. With `dependent` quantizers levels are places in units of scale, `edge` holds one
    number, what a bit costs in squares of that unit, and nothing is said of what lies beyond.
    Raises ValueError where x is not finite or beyond 2^30 steps.
    """
    room, widest = 2 * len(x) + 4096, max((prod(s[1:] if len(s) > 1 else s) for s in shapes), default=0)
    level = np.empty(len(x) if keep or dependent else widest, np.int32)
    while True:  # once, unless the levels are huge
        words, coder, beyond = np.empty(room, np.uint32), np.array([0, _FULL, 0]), np.zeros(4)
        if _walk(True, dependent, x, np.float32(scale), edge, level, shapes, coder, words, beyond):
            return _finish(coder, words), level, beyond
        if coder[2] < 0:
            raise ValueError("update holds values that are not finite or beyond 2^30 steps")
        room *= 4


def _finish(coder: NDArray[np.int64], words: Words) -> bytes:
    """The fewest bytes that name a number in the interval if zeros follow."""
    low, span, at = (int(v) for v in coder)
    value, spare = 0, 0
    for spare in range(4):
        unit = 1 << (48 - 8 * spare)
        value = -(-low // unit) * unit
        if value < low + span:
            break
    settled = np.empty(at + 2, np.uint16)
    _settle(words[:at], value, settled)
    return settled.astype(">u2").tobytes()[: 2 * at + spare]


@jit
def _settle(words: Words, low: Whole, out: NDArray[np.uint16]) -> None:
    n, carry = len(words), low >> 48
    out[n], out[n + 1] = (low >> 32) & 0xFFFF, (low >> 16) & 0xFFFF
    for i in range(n - 1, -1, -1):
        carry += np.int64(words[i])
        out[i] = carry & 0xFFFF
        carry >>= 16


def decode(code: bytes, shapes: Shapes, dependent: bool = False) -> Levels:
    """Undo `encode`: int32 levels. Raises DecodeError for bytes that it did not make, if they show it."""
    level = np.empty(sum(prod(shape) for shape in shapes), np.int32)
    words = np.frombuffer(code + bytes(6 + len(code) % 2), ">u2").astype(np.uint32)
    coder = np.array([int(words[0]) << 32 | int(words[1]) << 16 | int(words[2]), _FULL, 3])
    none = np.zeros(0, np.float32)
    if not _walk(False, dependent, none, np.float32(0), none, level, shapes, coder, words, np.zeros(4)):
        raise DecodeError("packet holds a level that no encoder makes")
    if not 0 <= len(code) - 2 * (int(coder[2]) - 3) <= 3:
        raise DecodeError("packet does not end where its levels do")
    return level
