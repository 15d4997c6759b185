"""The discrete Gaussian, drawn from secret bytes by integer arithmetic alone."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedapp.errors import ConfigError
from fedapp.jit import jit
from fedapp.privacy.secret import Secret

Whole = Any  # an int, or a NumPy integer: one and the same once compiled
Bytes = NDArray[np.uint8]
Place = NDArray[np.int64]  # (1,): how many bytes are used up

LEAST, MOST = Fraction(1, 64), 2**52  # variances
_FAR = 20  # scales from zero where draws end; two draws in 2^280 would go on
_ONE, _USUAL, _AT_ONCE = 4096, 24, 2**16  # bytes that no draw exceeds, that draws take on average; draws


def discrete_gaussian(size: int, variance: Fraction, secret: Secret) -> NDArray[np.int64]:
    """Int64 (size,), independent, k with probability proportional to exp(-k^2 / (2 variance)).

    No probability is rounded: all decisions compare whole numbers with secret bytes, as many as it takes.
    Only the far tail is cut, for 64-bit numbers: the total variation distance is below 2^-250 a draw.
    `variance` is the parameter sigma^2; from 1 on, the variance of the draws is the same within 1e-6, below
    it is smaller. How long it takes varies with what is drawn. Raises ConfigError on variances that
    `sampled_variance` does not give. Source: Canonne, Kamath and Steinke 2020, "The discrete Gaussian for
    differential privacy", Algorithms 1 to 3; coins of rational odds compare digits in base 256 with bytes.
    """
    if sampled_variance(variance) != variance:
        raise ConfigError(f"no draws have variance {variance}: take {sampled_variance(variance)}")
    scale = _root(variance)  # of the proposals; any is right, this one is seldom refused
    common = math.gcd(variance.denominator * scale, variance.numerator)
    slope, offset = variance.denominator * scale // common, variance.numerator // common
    out, done = np.empty(size, np.int64), 0
    while done < size:
        source = np.frombuffer(secret(_ONE + _USUAL * min(size - done, _AT_ONCE)), np.uint8)
        done = _fill(out, done, source, scale, slope, offset)
    return out


def sampled_variance(at_least: float | Fraction) -> Fraction:
    """The least variance at or above that `discrete_gaussian` draws at: its arithmetic then fits 64 bits.

    Multiples of 1/64 up to 2^20; above, squares of whole numbers, which are within 0.2 %. Raises ConfigError
    above 2^52.
    """
    if not at_least <= MOST:
        raise ConfigError(f"the variance of discrete noise is at most 2^52, got {at_least}: use fewer bits")
    if at_least <= 2**20:
        return max(LEAST, Fraction(math.ceil(64 * at_least), 64))
    return Fraction(_root(at_least) ** 2)


def _root(square: float | Fraction) -> int:
    """The least whole number whose square is at least that, and at least 1."""
    return math.isqrt(max(math.ceil(square) - 1, 0)) + 1


@jit
def _fill(
    out: NDArray[np.int64], done: Whole, source: Bytes, scale: Whole, slope: Whole, offset: Whole
) -> Whole:
    """Draws from `done` on while bytes last; how many are done then. Algorithm 3.

    A proposal k is taken with probability exp(-(|k| - variance / scale)^2 / (2 variance)).
    """
    at, under = np.zeros(1, np.int64), 2 * slope * offset * scale
    while done < len(out) and at[0] + _ONE <= len(source):
        while True:
            k = _laplace(scale, source, at)
            if _exponential((slope * abs(k) - offset) ** 2, under, source, at):
                break
        out[done] = k
        done += 1
    return done


@jit
def _laplace(scale: Whole, source: Bytes, at: Place) -> Whole:
    """k with probability proportional to exp(-|k| / scale), below `_FAR` scales. Algorithm 2."""
    while True:
        rest = _below(scale, source, at)
        if not _exponential(rest, scale, source, at):
            continue
        times = 0
        while times < _FAR and _exponential(1, 1, source, at):
            times += 1
        size, negative = rest + scale * times, _byte(source, at) & 1
        if times < _FAR and not (negative and size == 0):
            return -size if negative else size


@jit
def _exponential(above: Whole, under: Whole, source: Bytes, at: Place) -> Whole:
    """True with probability exp(-above / under). Algorithm 1."""
    while above > under:
        if not _exponential_of_share(1, 1, source, at):
            return False
        above -= under
    return _exponential_of_share(above, under, source, at)


@jit
def _exponential_of_share(above: Whole, under: Whole, source: Bytes, at: Place) -> Whole:
    """True with probability exp(-above / under), for above <= under."""
    count = 1
    while _coin(above, under, source, at) and _coin(1, count, source, at):
        count += 1
    return count % 2 == 1


@jit
def _coin(above: Whole, under: Whole, source: Bytes, at: Place) -> Whole:
    """True with probability above / under: a uniform number is below it. Under stays below 2^55."""
    if above >= under:
        return True
    while True:
        digit, byte = (above << 8) // under, _byte(source, at)
        if byte != digit:
            return byte < digit
        above = (above << 8) - digit * under


@jit
def _below(bound: Whole, source: Bytes, at: Place) -> Whole:
    """Uniform on 0 .. bound - 1."""
    while True:
        span, value = 1, 0
        while span < bound:
            span, value = span << 8, value << 8 | _byte(source, at)
        if value < span // bound * bound:
            return value % bound


@jit
def _byte(source: Bytes, at: Place) -> Whole:
    if at[0] == len(source):  # nothing secret would be read twice, or beyond
        raise IndexError("a draw took more than 4096 bytes")
    at[0] += 1
    return np.int64(source[at[0] - 1])
