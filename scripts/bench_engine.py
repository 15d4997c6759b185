"""Seconds a round: the local engine beside a bare loop on the same work; reprints the README's tables.

usage: .venv/bin/python scripts/bench_engine.py [--only lr cnn noop long wide start memory] [--repeats 3]
       [--peers FOLDER] [--device cpu|cuda]

lr: logistic regression (7,850 parameters), 10 of 1000 clients a round. cnn: 1.2 million parameters, 50 of
1000. noop: the same, and nobody trains. All on Fashion-MNIST, an equal random split, batches of 10, one local
epoch, nobody tests. The bare loop is FedAvg in one process on one thread, with torch's own layers and
optimizer: no messages, no codec, no engine. Two of them at once, each for half of the cohort, say what the
machine's cores give together.
Processes run in turns, so that a busy machine is busy for all; a figure is the least and the median over the
rounds of all turns, but for each process's first. In FOLDER, scripts `stock_flower.py` and `pfl_peer.py` that
take SETTING and ROUNDS and print "min X median Y" run in the same turns; one that fails is left out.

long: seconds a round of cnn as the run goes on, when most clients hold the weights of long ago.
wide: milliseconds a client of lr by the size of the cohort, up to 10,000, each of whom takes one step.
start: from the command to the first round. memory: what the server's process takes at most, by the size of
the cohort and by the number of rounds.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Setting:
    """One federation: what the bare loop does, and how fedapp is told to do it."""

    model: str
    clients: int
    cohort: int
    lr: float
    epochs: int
    rounds: int

    @property
    def overrides(self) -> list[str]:
        return [
            "privacy=none", "task.features=pixels", "partition=iid", "evaluate=none",
            f"model={self.model}", f"clients={self.clients}", f"cohort={self.cohort}",
            f"rounds={self.rounds + 1}", f"trainer.lr={self.lr}", f"trainer.epochs={self.epochs}",
            "trainer.batch_size=10", "trainer.schedule=constant",
        ]  # fmt: skip


SETTINGS = {
    "lr": Setting("logistic", 1000, 10, 0.03, 1, 40),
    "cnn": Setting("cnn", 1000, 50, 0.1, 1, 5),
    "noop": Setting("cnn", 1000, 50, 0.1, 0, 8),
}
PARTS = [*SETTINGS, "long", "wide", "start", "memory"]
UNCODED = ["codec=identity", "downlink=coded"]
PEERS = {"stock Flower, Ray, 2 cores": "stock_flower.py", "pfl, 1 thread": "pfl_peer.py"}
HALF = "fedapp, 2 workers, bfloat16"  # in cnn
RUNS: dict[str, list[str]] = {
    "bare loop": [],
    "two bare loops": [],
    "fedapp, 1 worker": [*UNCODED, "engine.workers=1"],
    "fedapp, 2 workers": [*UNCODED, "engine.workers=2"],
    HALF: [*UNCODED, "engine.workers=2", "trainer.bfloat16=true"],
    "fedapp, 2 workers, default codec": ["engine.workers=2"],
}


def bare(name: str, device: str) -> None:
    """The floor, in a process of its own; prints the seconds of each round."""
    import torch
    from torch.nn.functional import cross_entropy
    from torchs_layers import with_torchs_layers

    from fedapp import config
    from fedapp.tasks import Data

    torch.set_num_threads(1)
    setting = SETTINGS[name]
    job = config.job_of(" ".join(setting.overrides))
    ids = range(setting.clients)
    data = [job.task.client_data({"partition-id": i, "num-partitions": setting.clients}) for i in ids]
    data = [Data(one.x.to(device), one.y.to(device)) for one in data]
    model = with_torchs_layers(job.task.model(0)).to(device)
    weights = [p.detach().clone() for p in model.parameters()]
    for _ in range(setting.rounds + 1):
        start = time.perf_counter()
        total = [torch.zeros_like(w) for w in weights]
        for client in random.sample(ids, setting.cohort):
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    p.copy_(w)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
            for _ in range(setting.epochs):
                for batch in torch.randperm(len(data[client])).split(10):
                    optimizer.zero_grad()
                    cross_entropy(model(data[client].x[batch]), data[client].y[batch]).backward()
                    optimizer.step()
            with torch.no_grad():
                for t, p in zip(total, model.parameters(), strict=True):
                    t.add_(p)
        weights = [t / setting.cohort for t in total]
        weights[0].cpu()  # waits for a GPU
        print(time.perf_counter() - start, flush=True)


def seconds_of(name: str, run: str, device: str, peers: Path | None) -> list[float]:
    """Seconds of the rounds of one process; of a peer the least and the median, if it is there."""
    setting = SETTINGS[name]
    if run in PEERS:
        if peers is None:
            return []
        command = [sys.executable, str(peers / PEERS[run]), name, str(setting.rounds)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"min ([0-9.]+) median ([0-9.]+)", done.stdout)
        return [] if found is None else [float(found[1]), float(found[2])]
    if run in ("bare loop", "two bare loops"):
        command = [sys.executable, __file__, "--bare", name, "--device", device]
        loops = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for _ in range(2 if run == "two bare loops" else 1)
        ]
        printed = [loop.communicate()[0] for loop in loops]
        return [float(line) / len(loops) for one in printed for line in one.split()[1:]]
    _, rounds = simulated([*setting.overrides, *RUNS[run], f"device={device}"])
    return [float(line["seconds"]) for line in rounds[1:]]


def simulated(overrides: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary of a run, and what it says of each round."""
    with tempfile.TemporaryDirectory() as folder:
        summary = results.run(Path(folder, "run"), overrides)
        lines = Path(folder, "run", "rounds.jsonl").read_text().splitlines()
        return summary, [json.loads(line) for line in lines]


def long() -> None:
    """Seconds a round, and its downlink, early and late in a run with the default codec."""
    _, rounds = simulated([*SETTINGS["cnn"].overrides, "engine.workers=2", "rounds=42"])
    print("\n| rounds of cnn | s a round, median | downlink, MB a round |\n|---|---|---|")
    for first in (2, 12, 22, 32):
        those = rounds[first - 1 : first + 9]
        seconds, sent = ([line[key] for line in those] for key in ("seconds", "downlink_bytes"))
        print(f"| {first} to {first + 9} | {statistics.median(seconds):.2f} "
              f"| {statistics.mean(sent) / 1e6:.1f} |", flush=True)  # fmt: skip


def wide() -> None:
    """Milliseconds a client, by the size of the cohort."""
    print("\n| a cohort of | uncoded, ms a client | default codec, ms a client |\n|---|---|---|")
    for size in (100, 1000, 10_000):
        least = []
        for chosen in ("fedapp, 2 workers", "fedapp, 2 workers, default codec"):
            many = ["clients=10000", f"cohort={size}", f"rounds={4 if size > 1000 else 9}"]
            _, rounds = simulated([*SETTINGS["lr"].overrides, *RUNS[chosen], *many])
            least.append(1e3 * min(line["seconds"] for line in rounds[1:]) / size)
        print(f"| {size} | {least[0]:.2f} | {least[1]:.2f} |", flush=True)


def start(repeats: int) -> None:
    """Seconds from the command to the first round."""
    print("\n| run | s to the first round, least | median |\n|---|---|---|")
    for name, chosen in {
        "digits, privacy=none": ["task=digits", "privacy=none"],
        "the default run": [],
    }.items():
        took = [simulated([*chosen, "rounds=1"])[0]["startup_s"] for _ in range(repeats)]
        print(f"| {name} | {min(took):.1f} | {statistics.median(took):.1f} |", flush=True)


def memory() -> None:
    """Peak of the server's process, MB."""
    print("\n| run | peak of the server, MB |\n|---|---|")
    cnn = [*SETTINGS["cnn"].overrides, "trainer.batch_size=60", "engine.workers=2", "rounds=2"]
    lr = [*SETTINGS["lr"].overrides, "engine.workers=2"]
    alone = [*cnn, "codec.feedback=false"]
    runs = {f"cnn, a cohort of {size}": [*alone, f"cohort={size}"] for size in (50, 200, 1000)}
    runs["cnn, a cohort of 1000, error feedback"] = [*cnn, "cohort=1000", "codec.feedback=true"]
    runs |= {f"lr, {rounds} rounds": [*lr, f"rounds={rounds}"] for rounds in (50, 300)}
    for name, overrides in runs.items():
        print(f"| {name} | {simulated(overrides)[0]['peak_rss_mb']:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bare", choices=list(SETTINGS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or start-up would compile fedapp anew each time
    if options.bare:
        bare(options.bare, options.device)
        return
    chosen = [name for name in SETTINGS if name in options.only]
    if chosen:
        print("| setting | run | s a round, least | median | least, of the bare loop's |")
        print("|---|---|---|---|---|")
    told: list[str] = []
    for name in chosen:
        runs = [run for run in (*RUNS, *PEERS) if run != HALF or name == "cnn"]
        found: dict[str, list[float]] = {run: [] for run in runs}
        for _ in range(options.repeats):
            for run, seconds in found.items():
                seconds += seconds_of(name, run, options.device, options.peers)
        floor = min(found["bare loop"])
        for run, seconds in found.items():
            if seconds:
                rounds = seconds[1::2] if run in PEERS else seconds  # of each run its least, its median
                least, median = min(seconds), statistics.median(rounds)
                print(f"| {name} | {run} | {least:.4f} | {median:.4f} | {least / floor:.2f} |", flush=True)
        one, two, coded = (
            found[f"fedapp, {which}"] for which in ("1 worker", "2 workers", "2 workers, default codec")
        )
        ratios = [[of(a) / of(b) for a, b in ((one, two), (coded, two))] for of in (min, statistics.median)]
        (quick, dear), (usual, slow) = ratios
        told.append(
            f"{name}: two workers are {quick:.2f} times as quick as one by least, {usual:.2f} by median; "
            f"the default codec takes {dear - 1:.0%} more by least, {slow - 1:.0%} by median"
        )
    if told:
        print("", *told, sep="\n")
    if "long" in options.only:
        long()
    if "wide" in options.only:
        wide()
    if "start" in options.only:
        start(options.repeats)
    if "memory" in options.only:
        memory()


if __name__ == "__main__":
    main()
