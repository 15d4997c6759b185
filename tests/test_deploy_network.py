"""A federation on machines of its own, with TLS and keys, and what its wires carry.

Each machine is a network namespace, and interfaces count what passes, all headers with it; that needs root
and iproute2. On loopback all are this machine, and each client's wire is a relay: it counts what passes but
for the headers of TCP and IP, which are a hundredth of a model, and more of a short request.
"""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
from shell import Shell, free_port, wait

from fedapp.deploy.bundle import bundle

pytestmark = pytest.mark.slow

CLIENTS = 3


class Machines(Protocol):
    """m0 (the server), m1, ...: their homes, where the server is, and the wire of each client."""

    homes: list[Path]

    def on(self, number: int, command: str) -> str:
        """A command as it runs on that machine, whose home is its own too."""
        ...

    def server(self, number: int) -> str:
        """The server's host and port, as that machine reaches it; of 0, as it is to listen."""
        ...

    def cut(self, number: int, seconds: float) -> None:
        """Pull the plug for so long."""
        ...

    def sent(self, number: int) -> int:
        """Bytes that the machine has sent so far."""
        ...

    def received(self, number: int) -> int: ...

    def close(self) -> None: ...


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


class Namespaces:
    """A switch, and machines on it, each with an address of its own."""

    def __init__(self, shell: Shell, count: int) -> None:
        self._net = f"f{os.getpid()}"
        self._names = [f"{self._net}m{number}" for number in range(count)]
        self.homes = [shell.home / f"m{number}" for number in range(count)]
        ip(f"netns add {self._net}")
        ip(f"-n {self._net} link add switch type bridge")
        ip(f"-n {self._net} link set switch up")
        for number, name in enumerate(self._names):
            ip(f"netns add {name}")
            ip(f"-n {self._net} link add port{number} type veth peer name eth0 netns {name}")
            ip(f"-n {self._net} link set port{number} master switch up")
            ip(f"-n {name} addr add 10.77.0.{number + 1}/24 dev eth0")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set eth0 up")

    @staticmethod
    def there() -> bool:
        """Whether this machine makes namespaces with a bridge."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            return False
        try:
            ip(f"netns add {os.getpid()}x")
            ip(f"-n {os.getpid()}x link add switch type bridge")
        except subprocess.CalledProcessError:
            return False
        finally:
            subprocess.run(["ip", "netns", "del", f"{os.getpid()}x"], check=False)
        return True

    def close(self) -> None:
        for name in (*self._names, self._net):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def on(self, number: int, command: str) -> str:
        return f"env HOME={self.homes[number]} ip netns exec {self._names[number]} {command}"

    def server(self, number: int) -> str:
        return "10.77.0.1:8443"

    def cut(self, number: int, seconds: float) -> None:
        ip(f"-n {self._net} link set port{number} down")
        time.sleep(seconds)
        ip(f"-n {self._net} link set port{number} up")

    def sent(self, number: int) -> int:
        return self._counter(number, "tx")

    def received(self, number: int) -> int:
        return self._counter(number, "rx")

    def _counter(self, number: int, way: str) -> int:
        path = f"/sys/class/net/eth0/statistics/{way}_bytes"
        command = ["ip", "netns", "exec", self._names[number], "cat", path]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Relay:
    """One client's wire to the server: passes bytes on, both ways, and counts them."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._server, self._whole, self._ends = port, True, set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                near, _ = self._listener.accept()
                try:
                    if not self._whole:
                        raise ConnectionRefusedError
                    far = socket.create_connection(("127.0.0.1", self._server))
                except OSError:
                    near.close()
                    continue
                self._ends |= {near, far}
                for ends in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
                if up:  # each way has one thread a connection, and one count
                    self.up += len(piece)
                else:
                    self.down += len(piece)
        self._hang_up(source, target)

    def _hang_up(self, *ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._ends.discard(end)

    def cut(self, seconds: float) -> None:
        self._whole = False
        self._hang_up(*list(self._ends))
        time.sleep(seconds)
        self._whole = True

    def close(self) -> None:
        self._listener.close()
        self._hang_up(*list(self._ends))


class Loopback:
    """This machine as all of them: each has a home of its own, and each client a wire."""

    def __init__(self, shell: Shell, count: int) -> None:
        self.homes = [shell.home / f"m{number}" for number in range(count)]
        self._port = free_port()
        self._wires = [Relay(self._port) for _ in range(count)]

    def close(self) -> None:
        for wire in self._wires:
            wire.close()

    def on(self, number: int, command: str) -> str:
        return f"env HOME={self.homes[number]} {command}"

    def server(self, number: int) -> str:
        return f"127.0.0.1:{self._wires[number].port if number else self._port}"

    def cut(self, number: int, seconds: float) -> None:
        self._wires[number].cut(seconds)

    def sent(self, number: int) -> int:
        return self._wires[number].up

    def received(self, number: int) -> int:
        return self._wires[number].down


@pytest.fixture(params=[Namespaces, Loopback])
def machines(request: pytest.FixtureRequest, shell: Shell) -> Iterator[Machines]:
    """The server and its clients, all connected."""
    if request.param is Namespaces and not Namespaces.there():
        pytest.skip("no network namespaces with a bridge here: it is measured on loopback")
    net: Machines = request.param(shell, CLIENTS + 1)
    try:
        for home in net.homes:
            home.mkdir()
        host, _, port = net.server(0).partition(":")
        shell.run(net.on(0, f"fedapp keys init --host {host}"))
        log = shell._log()
        server = shell.start(net.on(0, f"fedapp server --host {host} --port {port}"))
        wait(lambda: "register a node" in log.read_text(), server)
        for number in range(1, CLIENTS + 1):
            folder = net.homes[number] / ".fedapp/client"
            shell.run(net.on(number, f"fedapp keys node --out {folder}/node.key"))
            shutil.copy(net.homes[0] / ".fedapp/server/ca.pem", folder)
            (folder / "data.yaml").write_text(f"partition-id: {number - 1}\nnum-partitions: {CLIENTS}\n")
            shell.run(net.on(0, f"fedapp nodes register {folder}/node.key.pub"))
            join = f"fedapp client --server {net.server(number)} --data-config {folder}/data.yaml"
            shell.start(net.on(number, join))
            wait(partial(connected, folder / "node.log"), server)
        yield net
    finally:
        shell.close()
        net.close()


def connected(log: Path) -> bool:
    return log.exists() and "waiting for work" in log.read_text()


def test_the_wire_carries_what_the_run_says_and_a_cut_costs_nothing(machines: Machines, shell: Shell) -> None:
    clients = range(1, CLIENTS + 1)
    time.sleep(3)
    before, begun = {n: machines.sent(n) + machines.received(n) for n in clients}, time.monotonic()
    time.sleep(15)
    for n in clients:
        idle = (machines.sent(n) + machines.received(n) - before[n]) / (time.monotonic() - begun)
        print(f"node {n}, idle: {idle:.0f} B/s")
        assert idle <= 5000, f"an idle node moves {idle:.0f} B/s"
    up, down = ({n: way(n) for n in clients} for way in (machines.sent, machines.received))
    settings = f"task=digits model=mlp model.hidden=[1024,512] privacy=none clients={CLIENTS} rounds=2"
    settings += " codec=identity downlink=plain"
    shell.run(machines.on(0, f"fedapp submit {settings} run_dir={shell.home}/got"), timeout=400)
    summary = json.loads((shell.home / "got/summary.json").read_text())
    wired_up = sum(machines.sent(n) - up[n] for n in clients)
    wired_down = sum(machines.received(n) - down[n] for n in clients)
    # The bundle, which each node compares with its own fedapp once a run, comes on top.
    code = CLIENTS * len(bundle())
    for way, wired, said in (
        ("uplink", wired_up, summary["uplink_bytes"]),
        ("downlink", wired_down, summary["downlink_bytes"] + code),
    ):
        print(f"{way}: {wired} bytes on the wire, {wired / said - 1:+.2%} of what the run says")
        assert said > 1e7
        assert said <= wired <= 1.1 * said

    settings = f"task=digits model=logistic privacy=none clients={CLIENTS} rounds=4 trainer.epochs=30"
    submitted = shell.start(machines.on(0, f"fedapp submit {settings} run_dir={shell.home}/cut"))
    log = machines.homes[1] / ".fedapp/client/node.log"
    wait(lambda: log.read_text().count("round 1: train took") == 2, submitted)
    machines.cut(1, 30)
    assert submitted.wait(300) == 0
    rounds = [json.loads(line) for line in (shell.home / "cut/rounds.jsonl").read_text().splitlines()]
    assert [(r["replies"], r["failures"]) for r in rounds] == [(CLIENTS, 0)] * 4
    assert "the server is there again after" in log.read_text()
