"""What a round costs on real machines beyond the slowest client's work; reprints the README's table.

usage: .venv/bin/python scripts/bench_deploy.py [--clients 3] [--rounds 20] [KEY=VALUE ...]

Sets up a server and its clients on this machine, over TLS with keys, in a folder that is deleted
afterwards, and submits one run. A client's work is what its log calls `took`: the message goes to the
process that trains, and the reply comes back. All else of a round is overhead: messages out, replies in,
the sum, the test.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = ["task=digits", "privacy=none"]
_TOOK = re.compile(r"round (\d+): train took ([\d.]+) s")


def fedapp(home: Path, *words: str) -> list[str]:
    """A command, whose home is a folder of its own."""
    return ["env", f"HOME={home}", sys.executable, "-m", "fedapp.cli", *words]


def measure(home: Path, clients: int, rounds: int, overrides: list[str]) -> list[tuple[float, float]]:
    """Seconds of each round but the first, and of the slowest client's work in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running: list[subprocess.Popen[bytes]] = []

    def start(log: Path, *words: str) -> None:
        with log.open("wb") as output:
            running.append(subprocess.Popen(fedapp(home, *words), stdout=output, stderr=output))

    def run(*words: str) -> None:
        subprocess.run(fedapp(home, *words), check=True, stdout=subprocess.DEVNULL)

    try:
        run("keys", "init", "--host", "localhost")
        start(home / "server.log", "server", "--host", "127.0.0.1", "--port", port)
        while "register a node" not in (home / "server.log").read_text():
            if running[0].poll() is not None:
                sys.exit((home / "server.log").read_text())
            time.sleep(0.1)
        for number in range(clients):
            folder = home / f"client{number}"
            run("keys", "node", "--out", str(folder / "node.key"))
            run("nodes", "register", str(folder / "node.key.pub"))
            (folder / "data.yaml").write_text(f"partition-id: {number}\nnum-partitions: {clients}\n")
            ca, data = home / ".fedapp/server/ca.pem", folder / "data.yaml"
            words = "--folder", str(folder), "--ca", str(ca), "--data-config", str(data)
            start(folder / "out", "client", "--server", f"127.0.0.1:{port}", *words)
        settings = [*SETTINGS, f"clients={clients}", f"rounds={rounds}", *overrides, f"run_dir={home}/run"]
        subprocess.run(fedapp(home, "submit", *settings), check=True, stdout=sys.stderr)
        worked = dict[int, float]()
        for number in range(clients):
            for found in _TOOK.finditer((home / f"client{number}/node.log").read_text()):
                worked[int(found[1])] = max(worked.get(int(found[1]), 0.0), float(found[2]))
        lines = map(json.loads, (home / "run/rounds.jsonl").read_text().splitlines())
        return [(line["seconds"], worked[line["round"]]) for line in lines if line["round"] > 1]
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    options, overrides = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.clients, options.rounds, overrides)
    print("| of a round, s | least | median |")
    print("|---|---|---|")
    for name, values in {
        "all": [seconds for seconds, _ in found],
        "the slowest client's work": [work for _, work in found],
        "overhead": [seconds - work for seconds, work in found],
    }.items():
        print(f"| {name} | {min(values):.3f} | {statistics.median(values):.3f} |")


if __name__ == "__main__":
    main()
