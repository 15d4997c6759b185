"""The heart of the default codec: levels of one common step, and their code.

A layer of an update is close to an outer product: what a unit (row) is to learn times what an input (column)
was. So the magnitude to expect of a level is column mean x row factor, both learned from the levels coded so
far, and half octaves of that expectation are the contexts in which magnitudes are coded, a block of columns
at a time:

    a flag, whether any of its levels is not zero, in the context of what is expected of the block in all
    if so, magnitudes, one symbol each (large ones leave low bits as they are, far outliers escape)
    then the signs of those that are not zero, one symbol each, in the context of the signs before it

How often each symbol comes in its context is learned every so many symbols (`model.due`, `model.learn`). The
column means of a layer start from the row means of the layer before: its units are this one's inputs. The
encoder rounds each value where distance and bits cost least together, which prunes by itself (`rounding`).
Contexts are arithmetic on what both ends know, so they agree on any machine.

Sources: Martin 1979, "Range encoding"; Marpe, Schwarz and Wiegand 2003, "Context-based adaptive binary
arithmetic coding in H.264/AVC" (contexts, flags of blocks); Mahoney 2005, "Adaptive weighing of context
models" (counts, hence learning fast at first).
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import numpy as np

from fedapp.codec import range_coder
from fedapp.codec.decoder import layer_decoder
from fedapp.codec.encoder import ROOM, layer_encoder
from fedapp.codec.model import Floats, Integers, Levels, Model, Words, begin_columns
from fedapp.codec.rounding import Beyond
from fedapp.errors import DecodeError

Shapes = Sequence[tuple[int, ...]]
Before = Callable[[int, Levels], None]  # is told which layer comes next, and the levels of those before

_ENCODERS = [layer_encoder(dependent) for dependent in (False, True)]
_DECODERS = [layer_decoder(dependent) for dependent in (False, True)]


def _layers(shapes: Shapes, dependent: bool) -> Iterator[tuple[slice, int, Levels, Integers, Model]]:
    """Each layer's values, rows, column means, room for its units' means, and what was learned so far.

    A vector is one row; whatever holds nothing is passed over.
    """
    model, units, mean, start = Model(dependent), np.zeros(0, np.int64), 800 if dependent else 400, 0
    for shape in shapes:
        rows, size = shape[0] if len(shape) > 1 else 1, prod(shape)
        if size:
            column, now = np.empty(size // rows, np.int32), np.zeros(rows, np.int64)
            model.begin_layer()
            begin_columns(column, units, mean)
            yield slice(start, start + size), rows, column, now, model
            mean, start = max(int(now.sum()) // rows, 8), start + size
            units = now if rows > 1 else units


def encode(
    x: Floats, scale: float, edge: Floats, shapes: Shapes, dependent: bool = False, keep: bool = True,
    before: Before | None = None,
) -> tuple[bytes, Levels, Beyond]:  # fmt: skip
    """Code of float32 (n,) x * scale, its levels (int32 (n,)), and how far the values lie beyond them.

    The levels of a packet that nobody asks for are not kept (`keep`): they are as long as x.

    `edge`: how far above m - 1 level m begins, by ten bits of the probability that a magnitude goes on: 1024
    entries for m = 1, then for m > 1; and what a bit of a block's flag weighs, in squares of a level. With
    `dependent` quantizers levels are places in units of scale, `edge` holds one number, what a bit costs in
    squares of that unit, and nothing is said of what lies beyond. `before`, called before each layer, may
    change values that are yet to be coded.
    Raises ValueError where x is not finite or beyond 2^30 steps.
    """
    coder, words, level, beyond, _ = _written(x, scale, edge, shapes, dependent, keep, before)
    return range_coder.finish(coder, words), level, beyond


def lengths(x: Floats, scale: float, edge: Floats, shapes: Shapes) -> list[float]:
    """Bits of each layer in the code of x * scale, but for those that hold nothing."""
    *_, ends = _written(x, scale, edge, shapes, dependent=False, keep=False)
    return np.diff(ends, prepend=0.0).tolist()


def _written(
    x: Floats, scale: float, edge: Floats, shapes: Shapes, dependent: bool, keep: bool,
    before: Before | None = None,
) -> tuple[Integers, Words, Levels, Beyond, list[float]]:  # fmt: skip
    """The coder, what it has written, levels, what lies beyond; and bits up to the end of each layer."""
    level = np.empty(len(x) if keep or dependent else 0, np.int32)
    many, room = len(x) + 2048, np.empty(ROOM, np.int32)
    while True:  # once, unless the levels are huge
        coder, words = np.array([0, range_coder.FULL, 0]), np.empty(many, np.uint64)
        beyond, ends = np.zeros(4, np.int64), list[float]()
        for part, rows, column, units, model in _layers(shapes, dependent):
            if before is not None:
                before(len(ends), level)
            values = x[part].reshape(rows, -1)
            into = level[part].reshape(rows if len(level) else 0, len(column))
            if not _ENCODERS[dependent](
                values, np.float32(scale), edge, into, column, units, *model.arrays, coder, words, beyond,
                room, np.empty(len(column), np.int32),
            ):  # fmt: skip
                break
            ends.append(range_coder.bits(coder))
        else:
            return coder, words, level, beyond, ends
        if coder[2] < 0:
            raise ValueError("update holds values that are not finite or beyond 2^30 steps")
        many *= 4


def decode(code: bytes, shapes: Shapes, dependent: bool = False) -> Levels:
    """Undo `encode`: int32 levels. Raises DecodeError for bytes that it did not make, if they show it."""
    level = np.empty(sum(prod(shape) for shape in shapes), np.int32)
    coder, words = range_coder.begin(code)
    for part, rows, column, units, model in _layers(shapes, dependent):
        into = level[part].reshape(rows, -1)
        if not _DECODERS[dependent](into, column, units, *model.arrays, coder, words):
            raise DecodeError("packet holds code that no encoder makes")
    if not range_coder.ended(coder, code):
        raise DecodeError("packet does not end where its levels do")
    return level
