"""Reprints the README's results: accuracy at 1 and 2 bits against uncoded, with and without privacy.

usage: .venv/bin/python scripts/results.py [--seeds 0 1 2] [--only example|none] [--folder F] [KEY=VALUE ...]

Each run is a `fedapp simulate` of its own, with a run folder under `--folder`; a run whose summary is there
already is not repeated, so that an interrupted series goes on where it stopped.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CODECS = {"uncoded": ["codec=identity"], "2 bits": ["codec.rate=2"], "1 bit": []}


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary of one run; made now unless it is there. One that was interrupted begins anew."""
    path = folder / "summary.json"
    if path.exists() and json.loads(path.read_text())["interrupted"]:
        shutil.rmtree(folder)
    if not path.exists():
        command = [sys.executable, "-m", "fedapp.cli", "simulate", *overrides, f"run_dir={folder}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def spread(values: list[float]) -> str:
    """Mean and its standard error; of one value itself."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def arguments(usage: str | None, folder: Path) -> argparse.ArgumentParser:
    """What benchmarks that draw have in common: seeds, where runs are kept, and where pictures go."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=folder)
    parser.add_argument("--plots", type=Path, default=Path(__file__).parent / "plots")
    return parser


def save(figure: Any, path: Path) -> None:
    """Write a picture, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["example", "none"])
    parser.add_argument("--folder", type=Path, default=Path("results"))
    options, overrides = parser.parse_known_args()

    print("| privacy | codec | accuracy, % | against uncoded | bits a parameter | uplink | epsilon |")
    print("|---|---|---|---|---|---|---|")
    for privacy in [options.only] if options.only else ["example", "none"]:
        uncoded: list[float] = []
        for codec, chosen in CODECS.items():
            runs = [
                run(
                    options.folder / privacy / codec.replace(" ", "-") / str(seed),
                    [f"privacy={privacy}", f"seed={seed}", *chosen, *overrides],
                )
                for seed in options.seeds
            ]
            accuracy = [100 * r["accuracy"] for r in runs]
            uncoded = uncoded or accuracy
            paired = spread([a - b for a, b in zip(accuracy, uncoded, strict=True)])
            epsilon = runs[0]["epsilon"]
            print(
                f"| {privacy} | {codec} | {spread(accuracy)} | {paired if codec != 'uncoded' else '-'} "
                f"| {statistics.mean(r['uplink_bits_per_parameter'] for r in runs):.3f} "
                f"| {statistics.mean(r['uplink_ratio'] for r in runs):.1f}x smaller "
                f"| {'-' if epsilon is None else f'{epsilon:.2f}'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
