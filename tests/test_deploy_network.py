"""A federation on machines of its own: server and clients each in a network namespace, with TLS and keys.

Needs root and iproute2; what a wire carries is read off the interfaces.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from shell import Shell, wait

from fedapp.deploy.bundle import bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"),
]

CLIENTS = 3


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


class Machines:
    """A switch, and machines m0 (the server), m1, ... on it, each with an address of its own."""

    def __init__(self, shell: Shell, count: int) -> None:
        self.shell, self.net = shell, f"f{os.getpid()}"
        self.names = [f"{self.net}m{number}" for number in range(count)]
        self.homes = [shell.home / f"m{number}" for number in range(count)]
        ip(f"netns add {self.net}")
        ip(f"-n {self.net} link add switch type bridge")
        ip(f"-n {self.net} link set switch up")
        for number, name in enumerate(self.names):
            ip(f"netns add {name}")
            ip(f"-n {self.net} link add port{number} type veth peer name eth0 netns {name}")
            ip(f"-n {self.net} link set port{number} master switch up")
            ip(f"-n {name} addr add {self.address(number)}/24 dev eth0")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set eth0 up")

    def close(self) -> None:
        for name in (*self.names, self.net):
            subprocess.run(["ip", "netns", "del", name], check=False)

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.0.{number + 1}"

    def on(self, number: int, command: str) -> str:
        """A command as it runs on that machine, whose home is its own too."""
        return f"env HOME={self.homes[number]} ip netns exec {self.names[number]} {command}"

    def cut(self, number: int, seconds: float) -> None:
        """Pull the plug for so long."""
        ip(f"-n {self.net} link set port{number} down")
        time.sleep(seconds)
        ip(f"-n {self.net} link set port{number} up")

    def sent(self, number: int) -> int:
        """Bytes that the machine has sent so far, all headers counted."""
        return self._counter(number, "tx")

    def received(self, number: int) -> int:
        return self._counter(number, "rx")

    def _counter(self, number: int, way: str) -> int:
        path = f"/sys/class/net/eth0/statistics/{way}_bytes"
        command = ["ip", "netns", "exec", self.names[number], "cat", path]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture
def machines(shell: Shell) -> Iterator[Machines]:
    """The server and its clients, all connected. Skips where this machine makes no namespaces."""
    try:
        ip(f"netns add {os.getpid()}x")
        ip(f"-n {os.getpid()}x link add switch type bridge")
    except subprocess.CalledProcessError:
        pytest.skip("network namespaces with a bridge cannot be made here")
    finally:
        subprocess.run(["ip", "netns", "del", f"{os.getpid()}x"], check=False)
    net = Machines(shell, CLIENTS + 1)
    try:
        for home in net.homes:
            home.mkdir()
        shell.run(net.on(0, f"fedapp keys init --host {net.address(0)}"))
        log = shell._log()
        server = shell.start(net.on(0, "fedapp server"))
        wait(lambda: "register a node" in log.read_text(), server)
        for number in range(1, CLIENTS + 1):
            folder = net.homes[number] / ".fedapp/client"
            shell.run(net.on(number, f"fedapp keys node --out {folder}/node.key"))
            shutil.copy(net.homes[0] / ".fedapp/server/ca.pem", folder)
            (folder / "data.yaml").write_text(f"partition-id: {number - 1}\nnum-partitions: {CLIENTS}\n")
            shell.run(net.on(0, f"fedapp nodes register {folder}/node.key.pub"))
            shell.start(
                net.on(
                    number, f"fedapp client --server {net.address(0)}:8443 --data-config {folder}/data.yaml"
                )
            )
            wait(partial(connected, folder / "node.log"), server)
        yield net
    finally:
        shell.close()
        net.close()


def connected(log: Path) -> bool:
    return log.exists() and "waiting for work" in log.read_text()


def test_the_wire_carries_what_the_run_says_and_a_cut_costs_nothing(machines: Machines) -> None:
    shell, clients = machines.shell, range(1, CLIENTS + 1)
    time.sleep(3)
    before, begun = {n: machines.sent(n) + machines.received(n) for n in clients}, time.monotonic()
    time.sleep(15)
    for n in clients:
        idle = (machines.sent(n) + machines.received(n) - before[n]) / (time.monotonic() - begun)
        assert idle <= 5000, f"an idle node moves {idle:.0f} B/s"
    up, down = ({n: way(n) for n in clients} for way in (machines.sent, machines.received))
    settings = f"task=digits model=mlp model.hidden=[1024,512] privacy=none clients={CLIENTS} rounds=2"
    settings += " codec=identity downlink=plain"
    shell.run(machines.on(0, f"fedapp submit {settings} run_dir={shell.home}/got"), timeout=400)
    summary = json.loads((shell.home / "got/summary.json").read_text())
    wired_up = sum(machines.sent(n) - up[n] for n in clients)
    wired_down = sum(machines.received(n) - down[n] for n in clients)
    assert summary["uplink_bytes"] > 1e7
    assert summary["uplink_bytes"] <= wired_up <= 1.1 * summary["uplink_bytes"]
    # The bundle, which each node compares with its own fedapp once a run, comes on top.
    code = CLIENTS * len(bundle())
    assert summary["downlink_bytes"] <= wired_down <= 1.1 * (summary["downlink_bytes"] + code)

    settings = f"task=digits model=logistic privacy=none clients={CLIENTS} rounds=4 trainer.epochs=30"
    submitted = shell.start(machines.on(0, f"fedapp submit {settings} run_dir={shell.home}/cut"))
    log = machines.homes[1] / ".fedapp/client/node.log"
    wait(lambda: log.read_text().count("round 1: train took") == 2, submitted)
    machines.cut(1, 30)
    assert submitted.wait(300) == 0
    rounds = [json.loads(line) for line in (shell.home / "cut/rounds.jsonl").read_text().splitlines()]
    assert [(r["replies"], r["failures"]) for r in rounds] == [(CLIENTS, 0)] * 4
    assert "the server is there again after" in log.read_text()
