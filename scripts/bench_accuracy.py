"""Accuracy against bytes, up and down together, of codecs on Fashion-MNIST; reprints the README's tables.

usage: .venv/bin/python scripts/bench_accuracy.py [--seeds 0 1 2] [--only full long partial] [--rows NAME ...]
                                                  [--folder F] [--plots F] [KEY=VALUE ...]

full: all of 10 clients in each of 15 rounds. long: in each of 60. partial: 10 of 100 clients in each of 100
rounds. The last two have some of the rows only. Labels are Dirichlet(0.5), nothing is private. All but `none`
share one coded downlink, so that they differ in the uplink alone. Each run is a `fedapp simulate` of its own,
kept under `--folder`; a run whose summary is there already is not repeated, so that an interrupted series
goes on where it stopped. Needs the extra dev for the plot.
"""

import statistics
from pathlib import Path
from typing import Any

from results import arguments, run, save, spread

SETTINGS = {
    "full": ["clients=10", "rounds=15"],
    "long": ["clients=10", "rounds=60"],
    "partial": ["clients=100", "cohort=10", "rounds=100", "trainer.batch_size=8"],
}
CODECS = {
    "none": ["codec=identity"],
    "default, 1 bit": ["codec.rate=1"],
    "default, 0.28 bit": ["codec.rate=0.28"],
    "default, 0.1 bit": ["codec.rate=0.1"],
    "EDEN, 1 bit": ["codec=eden"],
    "QSGD": ["codec=qsgd"],
    "STC, 1 %": ["codec=stc"],
    "top-k, 1 %": ["codec=topk", "codec.keep=0.01"],
    "scaffold, none": ["strategy=scaffold", "codec=identity", "downlink=coded"],
    "scaffold, 1 bit": ["strategy=scaffold", "codec.rate=1"],
    "scaffold, 0.28 bit": ["strategy=scaffold", "codec.rate=0.28"],
    "scaffold, 0.28 bit, finer downlink": ["strategy=scaffold", "codec.rate=0.28", "downlink.rate=1.85"],
    "scaffold, 0.28 bit, coarser downlink": ["strategy=scaffold", "codec.rate=0.28", "downlink.rate=0.5"],
    "scaffold, 0.28 bit, products": ["strategy=scaffold", "codec.rate=0.28", "codec.products=true"],
    "scaffold, 0.1 bit": ["strategy=scaffold", "codec.rate=0.1"],
}
IN = {
    "full": tuple(name for name in CODECS if "coarser" not in name),
    "long": ("none", "default, 0.28 bit", "scaffold, none", "scaffold, 0.28 bit"),
    "partial": (
        *(name for name in CODECS if not name.startswith("scaffold")),
        "scaffold, 0.28 bit",
        "scaffold, 0.28 bit, coarser downlink",
    ),
}


def table(setting: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """One row a codec; differences are paired by seed."""
    print(f"\n{setting}: {' '.join(SETTINGS[setting])}\n")
    print("| codec | accuracy, % | against none | uplink | downlink, MB | total, MB | total |")
    print("|---|---|---|---|---|---|---|")
    uncoded = [100 * r["accuracy"] for r in runs["none"]]
    for name, found in runs.items():
        accuracy = [100 * r["accuracy"] for r in found]
        paired = spread([a - b for a, b in zip(accuracy, uncoded, strict=True)])
        down, total = (statistics.mean(mb(r, *keys) for r in found) for keys in (("downlink",), WAYS))
        print(
            f"| {name} | {spread(accuracy)} | {'-' if name == 'none' else paired} "
            f"| {statistics.mean(r['uplink_ratio'] for r in found):.0f}x smaller | {down:.2f} | {total:.2f} "
            f"| {statistics.mean(r['compression_ratio'] for r in found):.1f}x smaller |"
        )


WAYS = ("uplink", "downlink")


def mb(summary: dict[str, Any], *ways: str) -> float:
    """Megabytes that a run sent these ways."""
    return float(sum(summary[f"{way}_bytes"] for way in ways)) / 1e6


def plot(settings: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(settings), figsize=(5.6 * len(settings), 4.4), squeeze=False)
    named = set[str]()
    for axis, (setting, runs) in zip(axes[0], settings.items(), strict=True):
        for index, (name, mark) in enumerate(zip(CODECS, "sooo^vDPs******", strict=True)):
            color = pyplot.get_cmap("tab20")(index)
            if name not in runs:
                continue
            accuracy = [100 * r["accuracy"] for r in runs[name]]
            total = statistics.mean(mb(r, *WAYS) for r in runs[name])
            error = statistics.stdev(accuracy) / len(accuracy) ** 0.5 if len(accuracy) > 1 else 0
            look = {"fmt": mark, "color": color, "label": f"_{name}" if name in named else name, "capsize": 3}
            axis.errorbar(total, statistics.mean(accuracy), error, **look)
        axis.set(title=" ".join(SETTINGS[setting][:2]), xlabel="MB sent, both ways", xscale="log")
        axis.grid(alpha=0.3, which="both")
        if runs.keys() - named:
            axis.legend(fontsize=8)  # of what the axes before do not name
        named |= runs.keys()
    axes[0][0].set_ylabel("test accuracy, %")
    save(figure, path)


def main() -> None:
    parser = arguments(__doc__, Path("bench/accuracy"))
    parser.add_argument("--only", choices=list(SETTINGS), nargs="+", default=list(SETTINGS))
    parser.add_argument("--rows", choices=list(CODECS), nargs="+", default=list(CODECS), metavar="NAME")
    options, overrides = parser.parse_known_args()

    settings = {}
    for setting in options.only:
        settings[setting] = {
            name: [
                run(
                    options.folder
                    / setting
                    / name.replace(" ", "").replace(",", "-").replace("%", "")
                    / str(seed),
                    ["privacy=none", f"seed={seed}", *SETTINGS[setting], *chosen, *overrides],
                )
                for seed in options.seeds
            ]
            for name, chosen in CODECS.items()
            if name in options.rows and name in IN[setting]
        }
        table(setting, settings[setting])
    plot(settings, options.plots / "accuracy.png")


if __name__ == "__main__":
    main()
