"""The default codec: the lowest error that a number of bytes buys, by scalar quantization."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedapp import check
from fedapp.codec import Codec, Layout, Packet, State
from fedapp.codec.chain import with_feedback
from fedapp.codec.estimate import Like
from fedapp.codec.factors import Factors
from fedapp.codec.feedback import AutoFeedback
from fedapp.codec.layers import energy, largest, require_finite, require_whole, shapes
from fedapp.codec.model import Floats, Levels
from fedapp.codec.pilot import pilot
from fedapp.codec.products import Products
from fedapp.codec.quantizer import LAMBDA, Quantizer
from fedapp.codec.target import Target, Thin, meet, nearest, within
from fedapp.codec.varint import Reader, varint
from fedapp.errors import DecodeError

_ENCODES = {False: 3, True: 6}  # by trellis: under it noise falls from 0.8 to 0 bits within 20 % of a step
_LIKE = {False: Like(finer=1.0, weight=LAMBDA, rounds=3), True: Like(finer=1.6, weight=0.17, rounds=8)}
# Searches for products at most, again where the step came to less than so much of the one before, or to more.
_TURNS, _MUCH = 3, 0.8
_PASSES = {False: 1, True: 2}  # over vectors of products, by trellis: which takes its time anyway
# What the state says and may say: log of what the estimate missed; with products the step, in root mean
# squares; log of what a part of the update missed.
_MEMORY = ("miss", -0.8, 0.8), ("step", 1e-9, 1e9), ("part", -0.8, 0.8)
_REST = 7  # what a packet holds beside header and code: the header's length, version, dtype, CRC
_DENSE = 2.0  # bits per parameter from which on most values are sent, and sizes do not jump
_EXPONENTS = np.finfo(np.float32).maxexp  # 2^128 is no float32: points of values from 2^127 on may be none
_TOO_LARGE = "update holds values too near the largest float32; training diverged"
_LONG = 2**19  # updates from this length on are coded in part first


def default(
    step: float | None = None, rate: float = 1.0, nmse: float | None = None,
    feedback: bool | Literal["auto"] = False, trellis: bool = False, products: bool | Literal["auto"] = True,
) -> Codec:  # fmt: skip
    """What `codec=default` is made of.

    products=auto: below 1 bit; from there on they take more time than less error is worth. What is left to a
    run, `AutoFeedback` decides.
    """
    low = step is not None or nmse is not None or rate < 1
    codec = RateDistortion(step, rate, nmse, trellis, low if products == "auto" else products)
    if feedback == "auto":
        return AutoFeedback(codec, replace(codec, products=False) if products == "auto" else codec)
    return with_feedback(codec, feedback)


@dataclass(frozen=True)
class RateDistortion:
    """One step for all: products that say most of a layer, then what they leave, in context-adaptive code.

    Layers are matrices of (out, rest). Where leading singular triplets pay (`factors`), their vectors come
    first, and the rest is what their quantized products leave. All are rounded where bits and distance weigh
    least together, to levels of one step, and coded as layers of their own (`context`).

    Aims at one of: step, in root mean squares of the vector; else nmse, squared error over squared norm; else
    rate, bits per parameter of the whole packet. Targets are met within 3 % or 32 bytes by a search on an
    estimate with at most three full encodes. From the second round on one is usual, since the state says what
    the estimate missed in the last one (`miss`, float64 (1,)), and with products the step (`step`); should
    that mislead, four are the most, and what is no such state is passed over. To a rate up to about 2, of a
    long update whose layers are wide, one is usual in any round, after one or two of an eighth of it; the
    state says what such a part missed too (`part`). Under error feedback a rate below 2 may lie between two
    steps: up to nine more find it. The coarsest step is 0.9 of the largest magnitude, since error feedback
    would owe a vector that is never sent for ever; the finest is 2^-24 of it. A target beyond these gets the
    nearer one, and the log names it.

    products: False spends no time on them. trellis: dependent quantization (`trellis`); its quantizers have
    this step each, and their points together lie half a step apart. Vectors of products are fitted to what
    those of the other side came to, in turns. On updates of a small CNN 0.4 to 1.2 dB better from 0.5 to 4
    bits; hardly better at 0.1. It takes 10 to 40 times as long, up to six times for a target (or seven), and
    under noise misses some between 0.3 and 0.8 bits: zeros beget zeros there.

    float32 (n,) <-> uint8 (bytes,), where n is the layout's. Header: the step, and how far points of levels
    move (`quantizer`). With products it says so of their vectors too, and the body is their counts and sizes
    (`products`), the length of the vectors' code, that code, and the code of what is left.
    Sources: Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian random variables";
    Sullivan and Wiegand 1998, "Rate-distortion optimization for video compression"; Vogels et al. 2019,
    "PowerSGD: practical low-rank gradient compression for distributed optimization".
    """

    step: float | None = None
    rate: float = 1.0
    nmse: float | None = None
    trellis: bool = False
    products: bool = True

    def __post_init__(self) -> None:
        if self.step is not None:
            check.real("codec.step", self.step, low=1e-6, high=1e6)
        if self.nmse is not None:
            check.real("codec.nmse", self.nmse, low=1e-9, below=1.0)
        check.real("codec.rate", self.rate, above=0.0, high=12.0)
        check.flag("codec.trellis", self.trellis)
        check.flag("codec.products", self.products)

    def __repr__(self) -> str:
        """It seeds the CRC; a packet says itself whether it has products."""
        trellis = ", trellis=True" if self.trellis else ""
        return f"RateDistortion(step={self.step!r}, rate={self.rate!r}, nmse={self.nmse!r}{trellis})"

    def encode(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        return self._encode(x, layout, state, knowing=False)

    def encode_known(
        self, x: NDArray[Any], layout: Layout, state: State, rng: np.random.Generator
    ) -> tuple[Packet, State]:
        return self._encode(x, layout, state, knowing=True)

    def _encode(self, x: NDArray[Any], layout: Layout, state: State, knowing: bool) -> tuple[Packet, State]:
        require_whole(x, layout)
        most = largest(x)
        if not np.isfinite(most):
            require_finite(x, layout)
        if not most:
            known = np.zeros(len(x), np.float32) if knowing else None
            return Packet(np.zeros(0, np.uint8), bytes(self._header(1).size), known), {}
        # float32 holds no squares of the smallest values or the largest; a power of two changes no other bit.
        exponent = int(np.frexp(most)[1])
        exponent = exponent if abs(exponent) > 16 else 0
        unit, most = (np.ldexp(x, -exponent) if exponent else x), float(np.ldexp(most, -exponent))
        told = self.products or self.step is not None  # else nobody asks, and it takes a pass over all values
        rms = float(np.ldexp(np.sqrt(energy(x) / len(x)), -exponent)) if told else 0.0
        fresh = partial(Factors, unit, most, layout if self.products else Layout((), 0))
        code = partial(self._code, unit, exponent, layout, knowing or self.nmse is not None)
        if self.step is not None:
            factors, step = fresh(), within(self.step * rms, most)
            factors.extend(step / self._like.finer)
            return code(factors, step), {}
        usual, last, beyond = (_remembered(state, *what) for what in _MEMORY)
        target = partial(self._target, x, layout)
        about = None if last is None else last * rms

        def step_with(those: Factors) -> float:
            return nearest(target(those), usual or 0.0)

        factors = self._search(fresh, step_with, about) if self.products else fresh()
        to_rate = self.nmse is None and not self.trellis
        beyond = beyond or 0.0
        of_part = None
        if to_rate and len(x) >= _LONG:
            of_part = pilot(factors, layout, self._quantizer, self._like, beyond)
        jumps = to_rate and self.rate < _DENSE
        thin = Thin(partial(code, factors), factors.magnitudes[0].above) if jumps else None
        met = meet(target(factors), partial(code, factors), usual, thin, of_part)
        after = {"miss": met.miss}
        if self.products:
            after["step"] = met.step / rms
        if of_part:
            after["part"] = beyond + met.miss - met.foreseen
        return met.packet, {name: np.array([value]) for name, value in after.items()}

    def _search(
        self, fresh: Callable[[], Factors], step_with: Callable[[Factors], float], about: float | None
    ) -> Factors:
        """Products that pay at the step that is needed with them; `about` that step, where it is known."""
        factors = fresh()
        step = step_with(factors) if about is None else about
        for turn in range(_TURNS):
            if not factors.extend(step / self._like.finer):
                break
            came = step_with(factors)
            if turn + 1 < _TURNS and came > step / _MUCH:
                factors = fresh()  # less pays at coarser steps
            elif came > _MUCH * step:
                break
            step = came
        return factors

    def _target(self, x: Floats, layout: Layout, factors: Factors) -> Target:
        """What the packet shall have, and an estimate with the products found so far."""
        like, encodes = self._like, _ENCODES[self.trellis]
        left, vectors, largest = factors.magnitudes
        if self.nmse is not None:
            rest, those = factors.shares
            # What vectors lose is small, and a part of what is left: lost again where nothing is sent.
            return Target(
                "codec.nmse", self.nmse,
                lambda step: rest * left.error(step, like)
                + those * vectors.error(step, like) * left.unsent(step, like),
                lambda packet: self._nmse(x, packet, layout), largest, falls=False, encodes=encodes,
            )  # fmt: skip
        goal, frame = self.rate * len(x) / 8, self._header(1).size + _REST
        return Target(
            "bytes for codec.rate", goal,
            lambda step: (left.bits(step, like) + vectors.bits(step, like)) / 8 + frame,
            lambda packet: len(packet.header) + len(packet.body) + _REST, largest, falls=True,
            tolerance=max(0.01, 10 / goal), encodes=encodes,
        )  # fmt: skip

    def decode(self, packet: Packet, layout: Layout) -> NDArray[Any]:
        header, body = packet.header, packet.body
        if body.dtype != np.uint8 or len(header) not in (self._header(1).size, self._header(2).size):
            raise DecodeError("packet does not hold a header and context-coded levels")
        with_products = len(header) == self._header(2).size
        step, *moves = self._header(1 + with_products).unpack(header)
        if not 0 <= step < np.inf:
            raise DecodeError(f"packet names a quantizer step of {step}")
        if not step:
            if len(body) or with_products:
                raise DecodeError("packet has levels without a step")
            return np.zeros(layout.size, np.float32)
        reader, coder = Reader(body.data), self._quantizer
        products = vectors = None
        if with_products:
            products = Products.read(reader, layout)
            levels = coder.decode(reader.take(reader.varint(len(body))), products.shapes)
            vectors = coder.points(levels, moves[coder.moves :])
        levels = coder.decode(reader.rest(), shapes(layout))
        points = _known(coder, levels, moves[: coder.moves], step, products, vectors)
        if not np.isfinite(largest(points)):
            raise DecodeError("packet decodes to values beyond float32")
        return points

    @property
    def _like(self) -> Like:
        return _LIKE[self.trellis]

    @property
    def _quantizer(self) -> Quantizer:
        return Quantizer(self.trellis)

    def _header(self, codes: int) -> struct.Struct:
        """Step, then how far points move: of levels, and where there are products, of their vectors'."""
        return struct.Struct(f"<f{codes * self._quantizer.moves}b")

    def _code(
        self, unit: Floats, exponent: int, layout: Layout, knowing: bool, factors: Factors,
        step: float, least: float = 0.0,
    ) -> Packet:  # fmt: skip
        """One full encode of unit * 2^exponent; with `least`, magnitudes are sent from so many steps on."""
        coder, wide = self._quantizer, np.ldexp(step, exponent)
        if wide > np.finfo(np.float32).max:  # vectors of products may be longer than what they are of
            raise ValueError(_TOO_LARGE)
        knowing = knowing or exponent >= _EXPONENTS
        step32 = max(np.float32(wide), np.finfo(np.float32).smallest_subnormal)
        scale = float(np.ldexp(1 / np.float64(step32), exponent))
        products = vectors = None
        if not factors.count:
            code, levels, moves = coder.encode(unit, scale, shapes(layout), least, knowing)
            header, body = self._header(1).pack(step32, *moves), code
        else:
            products, values = factors.at(1 / scale)
            left = unit * np.float32(scale)
            first, vectors, turns = self._vectors(products, values, left, least)
            products.add(left, vectors, -1)
            code, levels, moves = coder.encode(left, 1.0, shapes(layout), least, knowing)
            header = self._header(2).pack(step32, *moves, *turns)
            body = b"".join((products.to_bytes(), varint(len(first)), first, code))
        known = _known(coder, levels, moves, float(step32), products, vectors) if knowing else None
        if known is not None and exponent >= _EXPONENTS and not np.isfinite(largest(known)):
            raise ValueError(_TOO_LARGE)
        return Packet(np.frombuffer(body, np.uint8), header, known)

    def _vectors(
        self, products: Products, values: Floats, left: Floats, least: float
    ) -> tuple[bytes, Floats, list[int]]:
        """Code of vectors, their points, how far these move.

        With a trellis each side but the first is fitted, just before it is coded, to what the other side came
        to, so that products come nearest to `left`.
        """
        coder, moves = self._quantizer, [0] * self._quantizer.moves
        points = np.zeros(0, np.float32)

        def fit(side: int, levels: Levels) -> None:
            if side % 2:
                left_ones = products.apart(levels)[side - 1]
                other = coder.points(left_ones.flatten(), moves).reshape(left_ones.shape)
            elif len(points):
                other = products.apart(points)[side + 1]
            else:
                return
            products.fit(side, left, values, other)

        before = fit if self.trellis else None
        for _ in range(_PASSES[self.trellis]):
            code, levels, moves = coder.encode(values, 1.0, products.shapes, least, before=before)
            points = coder.points(levels, moves)
        return code, points, moves

    def _nmse(self, x: NDArray[np.float32], packet: Packet, layout: Layout) -> float:
        error = x - (self.decode(packet, layout) if packet.known is None else packet.known)
        scale = 1 / largest(x)  # the smallest float32 have no squares in float64
        return energy(error, scale) / energy(x, scale)


def _remembered(state: State, name: str, low: float, high: float) -> float | None:
    """What the last update had; None where the state says nothing of the kind, or what cannot be."""
    value = np.asarray(state.get(name))
    known = value.shape == (1,) and value.dtype == np.float64 and low < value[0] < high
    return float(value[0]) if known else None


def _known(
    coder: Quantizer, levels: Levels, moves: Sequence[int], step: float, products: Products | None,
    vectors: Floats | None,
) -> Floats:  # fmt: skip
    """What a packet of these levels decodes to, in their place; beyond float32 there are infinities."""
    if products is None or vectors is None:
        return coder.points(levels, moves, step)
    points = coder.points(levels, moves)
    products.add(points, vectors, 1)
    with np.errstate(over="ignore"):
        return np.multiply(points, np.float32(step), out=points)
