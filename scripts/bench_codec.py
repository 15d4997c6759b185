"""Measures every codec on real updates: bits on the wire, error, and speed; reprints the README's tables.

usage: .venv/bin/python scripts/bench_codec.py [--folder F] [--plots F] [--rounds 1 2 20]
       [--only rates|family|speed]

A short federation makes the updates first, and keeps them in the folder: Fashion-MNIST pixels, ten clients,
Dirichlet(0.5), a CNN of 44,426 parameters, one local epoch of plain SGD a round. rates also takes the first
updates of clients with 60 examples each, of a CNN of 1.2 million parameters. Bits are of the whole packet.
Needs the extra dev for the plot. Pin a thread: OMP_NUM_THREADS=1.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from results import save
from scipy.special import gammaln
from updates import Vector, large, of_few_examples, updates

from fedapp import config
from fedapp.codec import Codec, Layout, State
from fedapp.codec.packet import decode_update, pack
from fedapp.codec.rate_distortion import RateDistortion, default

RATES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
DRAWN = {  # beside the default
    "EDEN (1, 2, 4 bits)": [f"codec=eden codec.stage.bits={bits}" for bits in (1, 2, 4)],
    "QSGD": ["codec=qsgd"],
    "STC (1 %)": ["codec=stc"],
    "top-k (1 %, 10 %)": [f"codec=topk codec.keep={keep}" for keep in (0.01, 0.1)],
}


# --- the yardstick ----------------------------------------------------------------------------------------


def reference(x: Vector, layout: Layout, rate: float) -> float:
    """NMSE of a dead zone with one step at `rate`, at an ideal adaptive code length per layer; no bitstream.

    Rounding offset 0.38 up to 2 bits, 0.5 above; points of levels 1, 2 and more at their mean in each layer,
    for which nothing is charged. The length is that of Krichevsky and Trofimov's sequential estimate (1981).
    """
    low, high = np.log(1e-4 * np.std(x)), np.log(50 * np.std(x))
    offset = 0.38 if rate <= 2 else 0.5
    for _ in range(30):
        step = float(np.exp((low + high) / 2))
        level = np.copysign(np.floor(np.abs(x.astype(np.float64)) / step + offset), x).astype(np.int64)
        bits = sum(_kt_bits(part) for part in _layers(level, layout))
        low, high = (np.log(step), high) if bits > rate * len(x) else (low, np.log(step))
    error = 0.0
    for values, levels in zip(
        _layers(x.astype(np.float64) / step, layout), _layers(level, layout), strict=True
    ):
        magnitude, of = np.abs(values), np.abs(levels)
        error += float(np.sum(magnitude[of == 0] ** 2))
        for cell in (of == 1, of == 2, of > 2):
            if cell.any():
                error += float(
                    np.sum((magnitude[cell] - of[cell] - np.mean(magnitude[cell] - of[cell])) ** 2)
                )
    return error * step**2 / float(np.sum(x.astype(np.float64) ** 2))


def _layers(values: NDArray[Any], layout: Layout) -> list[NDArray[Any]]:
    return np.split(values, [slot.offset for slot in layout.slots][1:])


def _kt_bits(level: NDArray[np.int64]) -> float:
    """The better of one alphabet, and of decisions (zero, sign, > 1, > 2, ...) each with its own counts."""

    def length(counts: NDArray[Any]) -> float:
        n, k = counts.sum(), len(counts)
        flat = gammaln(n + k / 2) - gammaln(k / 2) - np.sum(gammaln(counts + 0.5) - gammaln(0.5))
        return float(flat / np.log(2))

    most = int(np.abs(level).max(initial=0))
    magnitudes = np.bincount(np.abs(level), minlength=most + 1)
    beyond = len(level) - np.cumsum(magnitudes)
    positive = int((level > 0).sum())
    decisions = sum(length(np.array(pair)) for pair in zip(magnitudes, beyond, strict=True))
    signs = length(np.array([positive, int(beyond[0]) - positive]))
    return min(length(np.bincount(level + most, minlength=2 * most + 1)), decisions + signs)


def gaussian_bound(x: Vector, layout: Layout, rate: float) -> float:
    """NMSE where R(D) of independent Gaussian layers of these variances is `rate` (reverse water-filling)."""
    parts = _layers(x.astype(np.float64), layout)
    power, sizes = np.array([np.mean(p**2) for p in parts]), np.array([len(p) for p in parts])
    low, high = 0.0, float(power.max())
    for _ in range(60):
        water = (low + high) / 2
        bits = np.sum(sizes * np.maximum(0.5 * np.log2(power / water), 0)) / len(x)
        low, high = (water, high) if bits > rate else (low, water)
    return float(np.sum(sizes * np.minimum(power, water)) / np.sum(sizes * power))


# --- measuring --------------------------------------------------------------------------------------------


def codec_of(overrides: str) -> Codec:
    """The codec that these choices make."""
    return config.job_of(f"task=digits privacy=none {overrides}").codec


def sent(codec: Codec, x: Vector, layout: Layout, client: int = 0) -> tuple[float, float, Vector]:
    """Bits per parameter, NMSE, and the decoded update; each client has randomness of its own."""
    data = pack(codec.encode(x, layout, {}, np.random.default_rng(client))[0], codec, layout)
    y = decode_update(data, codec, layout)
    return 8 * len(data) / len(x), nmse(x, y), y


def nmse(x: NDArray[Any], y: NDArray[Any]) -> float:
    wide = x.astype(np.float64)
    return float(np.sum((wide - y) ** 2) / np.sum(wide**2))


def spread(values: list[float], digits: int = 4) -> str:
    return f"{min(values):.{digits}f} .. {max(values):.{digits}f}"


def rates(layout: Layout, updates_of: dict[int, list[Vector]], picture: Path) -> None:
    """NMSE at equal rates, of the yardstick and with products; what these add, and a trellis to the default.

    The default, `codec.products=auto`, has products below 1 bit.
    """
    columns = "round | bits | yardstick (ideal length) | with products | bits at its error | products, dB"
    print(f"\n| {columns} | trellis, dB |\n{'|---' * 7}|")
    lines = "yardstick, ideal length", "with products", "without products", "Gaussian layers, R(D)"
    curves: dict[str, list[list[float]]] = {name: [] for name in (*lines, *DRAWN)}
    ratios: list[float] = []
    for r, cohort in updates_of.items():
        for rate in RATES:
            ideal = [reference(x, layout, rate) for x in cohort]
            ours = [sent(RateDistortion(rate=rate), x, layout) for x in cohort]
            plain = [sent(RateDistortion(rate=rate, products=False), x, layout) for x in cohort]
            usual = ours if rate < 1 else plain
            paths = [sent(default(rate=rate, trellis=True, products="auto"), x, layout) for x in cohort]
            equal = [sent(RateDistortion(nmse=e), x, layout) for x, e in zip(cohort, ideal, strict=True)]
            share = [bits / rate for bits, _, _ in equal]
            ratios += share if 0.5 <= rate <= 2 else []
            print(f"| {r} | {rate} | {spread(ideal)} | {spread([e for _, e, _ in ours])} "
                  f"| {statistics.mean(share):.3f} (worst {max(share):.3f}) "
                  f"| {spread(gains(plain, ours), 2)} "
                  f"| {spread(gains(usual, paths), 2)} |", flush=True)  # fmt: skip
            bound = [gaussian_bound(x, layout, rate) for x in cohort]
            errors = (ideal, *([e for _, e, _ in found] for found in (ours, plain)), bound)
            for name, found in zip(lines, errors, strict=True):
                curves[name].append([r, rate, statistics.mean(found)])
        for name, chosen in DRAWN.items():
            for overrides in chosen:
                codec = codec_of(overrides)
                points = [sent(codec, x, layout, client)[:2] for client, x in enumerate(cohort)]
                curves[name].append([r, *map(statistics.mean, zip(*points, strict=True))])
    print(f"\nbits against the yardstick at equal error, 0.5 to 2 bits: {statistics.mean(ratios):.3f}, "
          f"worst {max(ratios):.3f}")  # fmt: skip
    plot(curves, picture)


def few() -> None:
    """Where clients have few examples: NMSE at equal rates with and without products, and what these take."""
    layout, cohort = of_few_examples()
    columns = "bits", "without products", "with products", "products, dB", "encode, M/s", "decode, M/s"
    print(f"\n{layout.size:,} parameters; speed without and with products, in later rounds\n")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for rate in (0.05, 0.1, 0.25, 0.5, 1.0):
        codecs = [RateDistortion(rate=rate, products=products) for products in (False, True)]
        plain, ours = ([sent(codec, x, layout) for x in cohort] for codec in codecs)
        quick = [speed(codec, cohort[0], layout, runs=5, later=True) for codec in codecs]
        print(f"| {rate} | {spread([e for _, e, _ in plain])} | {spread([e for _, e, _ in ours])} "
              f"| {spread(gains(plain, ours), 2)} | {quick[0][0]:.0f}, {quick[1][0]:.0f} "
              f"| {quick[0][1]:.0f}, {quick[1][1]:.0f} |", flush=True)  # fmt: skip


Sent = list[tuple[float, float, Vector]]


def gains(before: Sent, after: Sent) -> list[float]:
    """Decibels less error; rates differ by less than a few percent, for which a bit is worth 6 dB here."""
    return [
        10 * float(np.log10(a[1] / b[1])) - 6.02 * (b[0] - a[0]) for a, b in zip(before, after, strict=True)
    ]


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rounds = sorted({int(point[0]) for points in curves.values() for point in points})
    figure, axes = pyplot.subplots(1, len(rounds), figsize=(4.2 * len(rounds), 4), sharey=True, squeeze=False)
    for axis, r in zip(axes[0], rounds, strict=True):
        for (name, points), mark in zip(curves.items(), ("s--", "o-", "^-", ":", *("vDPX")), strict=True):
            axis.loglog(
                *zip(*[p[1:] for p in points if p[0] == r], strict=True), mark, label=name, markersize=4
            )
        axis.set(title=f"round {r}", xlabel="bits per parameter")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("squared error / squared norm")
    axes[0][-1].legend(fontsize=7)
    save(figure, path)


def family(layout: Layout, found: dict[int, list[Vector]]) -> None:
    """Every codec with its YAML's settings: bits, error of one update and of the cohort's mean, speed."""
    wide, x = large()
    print("\n| codec | bits per parameter | NMSE | NMSE of the cohort's mean | encode, M/s | decode, M/s |")
    print("|---|---|---|---|---|---|")
    for name in sorted(path.stem for path in (config.CONF / "codec").glob("*.yaml")):
        codec = codec_of(f"codec={name}")
        bits, errors, means = [], [], []
        for cohort in found.values():
            coded = [sent(codec, update, layout, client) for client, update in enumerate(cohort)]
            bits += [b for b, _, _ in coded]
            errors += [e for _, e, _ in coded]
            means.append(nmse(np.mean(cohort, axis=0), np.mean([y for _, _, y in coded], axis=0)))
        encode, decode = speed(codec, x, wide, runs=3)
        print(f"| {name} | {statistics.mean(bits):.3f} | {statistics.mean(errors):.4f} "
              f"| {statistics.mean(means):.4f} | {encode:.1f} | {decode:.1f} |", flush=True)  # fmt: skip


def speed(codec: Codec, x: Vector, layout: Layout, runs: int, later: bool = False) -> tuple[float, float]:
    """Best of several, in million parameters per second; `later`: with what earlier rounds tell."""
    state: State = {}
    for _ in range(3 if later else 0):
        state = codec.encode(x, layout, state, np.random.default_rng(0))[1]
    packet = codec.encode(x, layout, state, np.random.default_rng(0))[0]
    codec.decode(packet, layout)
    encode = best(lambda: codec.encode(x, layout, state, np.random.default_rng(0)), runs)
    decode = best(lambda: codec.decode(packet, layout), runs)
    return len(x) / encode / 1e6, len(x) / decode / 1e6


def best(call: Callable[[], object], runs: int) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def speeds() -> None:
    """The default codec and its trellis at several steps, on ten million parameters and one core."""
    layout, x = large()
    print(f"\n{len(x):,} parameters\n\n| bits per parameter | trellis | encode, M/s | decode, M/s |")
    print("|---|---|---|---|")
    for trellis in (False, True):
        for step in (12.0, 4.0, 2.0, 1.0, 0.42, 0.19, 0.1)[:: 3 if trellis else 1]:
            codec = RateDistortion(step=step, trellis=trellis)
            bits = sent(codec, x, layout)[0]
            encode, decode = speed(codec, x, layout, runs=3 if trellis else 7)
            print(f"| {bits:.3f} | {trellis} | {encode:.1f} | {decode:.1f} |", flush=True)


def trellis_speeds(layout: Layout, updates_of: dict[int, list[Vector]]) -> None:
    """The trellis where there are products, at the step of a rate: the slowest to the fastest client."""
    print("\n| round | bits | trellis with products: encode, M/s | decode, M/s |\n|---|---|---|---|")
    for r, cohort in updates_of.items():
        for rate in (0.1, 0.5):
            quick = []
            for x in cohort:
                aimed = RateDistortion(rate=rate, trellis=True)
                step = float(aimed.encode(x, layout, {}, np.random.default_rng(0))[1]["step"][0])
                quick.append(speed(RateDistortion(step=step, trellis=True), x, layout, runs=5))
            encode, decode = (spread(list(one), 1) for one in zip(*quick, strict=True))
            print(f"| {r} | {rate} | {encode} | {decode} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"))
    parser.add_argument("--plots", type=Path, default=Path(__file__).parent / "plots")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 20])
    parser.add_argument("--only", choices=["rates", "family", "speed"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    layout, found = updates(options.folder, options.rounds)
    if options.only in (None, "rates"):
        rates(layout, found, options.plots / "rates.png")
        few()
    if options.only in (None, "family"):
        family(layout, found)
    if options.only in (None, "speed"):
        speeds()
        trellis_speeds(layout, found)


if __name__ == "__main__":
    main()
