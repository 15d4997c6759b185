"""What a curious server makes of one client's update, under each protection; reprints the README's table.

usage: .venv/bin/python scripts/attack.py [--plot F] [--steps N]

The attack is `fedapp.audit.inversion`, on digits; `fedapp audit attack=true` runs it for settings of your
own, and leaves a page. Prints a table and draws the images. Needs the extra dev for the plot.
"""

import argparse
from pathlib import Path

import torch

from fedapp.audit.inversion import STEPS, Attack, attack, protections


def draw(found: Attack, path: Path) -> None:
    """One row of images a protection, the PSNR under each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = {"the client's digit": found.truth, **{name: row.images for name, row in found.rows.items()}}
    size = len(found.truth) * 0.95 + 1.6, len(rows) * 1.12
    figure, axes = pyplot.subplots(len(rows), len(found.truth), figsize=size)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for i, (axis, image) in enumerate(zip(line, images, strict=True)):
            axis.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if name in found.rows:
                axis.set_xlabel(f"{found.rows[name].psnr[i]:.0f} dB", fontsize=9, labelpad=2)
        line[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=11)
    figure.tight_layout(h_pad=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "plots" / "attack.png")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = attack(protections({"task": "digits", "privacy.test_seed": "0"}, 8.0), arguments.steps)
    of = f"example picked out of {found.candidates:,}"
    print(f"| protection | PSNR of the reconstruction, dB | {of} | its label |")
    print("|---|---|---|---|")
    for name, row in found.rows.items():
        shares = (row.picked, row.labelled)
        told = " | ".join("-" if share is None else f"{share:.0%}" for share in shares)
        print(f"| {name} | {row.psnr.mean():.1f} | {told} |")
    draw(found, arguments.plot)


if __name__ == "__main__":
    main()
