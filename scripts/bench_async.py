"""Time to accuracy with stragglers: synchronous, over-selected and asynchronous rounds; reprints a table.

usage: .venv/bin/python scripts/bench_async.py [--seeds 0 1 2] [--folder F] [--plots F] [KEY=VALUE ...]

Logistic regression on Fashion-MNIST over 50 clients, labels Dirichlet(0.5), nothing private or coded; a fifth
of the clients takes ten times as long. A step takes 10 updates everywhere: of 10 clients, of the first 10 of
13, or of a buffer while 13 train at any time. Time is simulated: it counts training only, a millisecond an
example. Each run is a `fedapp simulate` of its own, kept under `--folder`; one whose summary is there is not
repeated. Needs the extra dev for the plot.
"""

import json
import statistics
from pathlib import Path

from results import arguments, run, save, spread

COMMON = [
    "privacy=none", "codec=identity", "downlink=plain", "model=logistic", "trainer.epochs=1",
    "trainer.batch_size=32", "trainer.lr=0.05", "clients=50", "speeds=stragglers", "speeds.slowdown=10",
]  # fmt: skip
SETTINGS = {
    "synchronous": ["cohort=10", "rounds=30"],
    "over-selected": ["cohort=10", "over_selection=1.3", "rounds=50"],
    "FedBuff": ["strategy=fedbuff", "strategy.buffer=10", "strategy.concurrency=13", "rounds=50"],
}
TARGETS = 0.80, 0.85, 0.87
Curve = list[tuple[float, float]]


def curve(folder: Path) -> Curve:
    """Simulated seconds and accuracy after each round."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [(r["clock"], r["accuracy"]) for r in rounds]


def reached(points: Curve, target: float) -> float | None:
    """When the accuracy is there for the first time."""
    return next((clock for clock, accuracy in points if accuracy >= target), None)


def mean_of(curves: list[Curve], target: float) -> str:
    found = [reached(points, target) for points in curves]
    known = [clock for clock in found if clock is not None]
    return spread(known) if len(known) == len(found) else "-"


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for index, (name, found) in enumerate(curves.items()):
        for points in found:
            clocks, accuracies = zip(*points, strict=True)
            label = name if points is found[0] else None
            axis.plot(
                clocks, [100 * a for a in accuracies], color=f"C{index}", label=label, alpha=0.8, lw=1.3
            )
    axis.set(xlabel="simulated seconds (log)", ylabel="test accuracy, %", xscale="log", ylim=(65, 90))
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower right")
    save(figure, path)


def main() -> None:
    options, overrides = arguments(__doc__, Path("bench/async")).parse_known_args()

    heads = [f"{100 * target:g} % after, s" for target in TARGETS]
    print(f"| rounds | {' | '.join(heads)} | s a round | last round | its accuracy, % |")
    print("|---" * (len(heads) + 4) + "|")
    curves: dict[str, list[Curve]] = {}
    for name, chosen in SETTINGS.items():
        folders = [options.folder / name / str(seed) for seed in options.seeds]
        summaries = [
            run(folder, [*COMMON, f"seed={seed}", *chosen, *overrides])
            for folder, seed in zip(folders, options.seeds, strict=True)
        ]
        curves[name] = [curve(folder) for folder in folders]
        times = " | ".join(mean_of(curves[name], target) for target in TARGETS)
        print(
            f"| {name} | {times} | {statistics.mean(c[-1][0] / len(c) for c in curves[name]):.2f} "
            f"| {summaries[0]['rounds']} | {spread([100 * s['accuracy'] for s in summaries])} |",
            flush=True,
        )
    plot(curves, options.plots / "async.png")


if __name__ == "__main__":
    main()
