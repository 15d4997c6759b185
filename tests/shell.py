"""Programs in tests: each in a group of its own, shown when a test fails, ended after it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


class Shell:
    """Runs commands, each in a process group of its own, in a folder that is also their FLWR_HOME."""

    def __init__(self, home: Path) -> None:
        self.home = home
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "RAY_"))}
        self._env = inherited | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, command: str, home: str = "") -> subprocess.Popen[bytes]:
        """Start a command; its output goes to a file. `home` names another folder inside this one."""
        flwr_home = self.home / home
        flwr_home.mkdir(exist_ok=True)
        log = self._log()
        log.write_text(f"$ {command}\n")
        with log.open("ab") as output:
            process = subprocess.Popen(
                f"exec {command}",
                shell=True,
                cwd=flwr_home,
                env=self._env | {"FLWR_HOME": str(flwr_home)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def run(self, command: str, timeout: float = 120) -> str:
        """Run a command to its end, which must come in time and be a success; returns what it said."""
        log = self._log()
        assert self.start(command).wait(timeout) == 0, command
        return log.read_text()

    def _log(self) -> Path:
        """Where the next command's output goes."""
        return self.home / f"{len(self._running):02d}.log"

    def close(self) -> None:
        """End what still runs, group by group, last first; show all output to a failing test."""
        for process in reversed(self._running):
            if process.poll() is None:
                process.terminate()  # SuperLinks and SuperNodes then end their own processes
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        for log in sorted(self.home.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers on its port."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"nothing listens on port {port}")


def wait(done: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Wait until something is so; fails where the process ends before."""
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
