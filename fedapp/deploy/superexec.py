"""Flower's SuperExec, a process beside the server, which starts the ServerApps of runs; how it ends, too."""

import asyncio
import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from fedapp.deploy.logs import to_file

PROGRAM = str(Path(sys.executable).with_name("flower-superexec"))
_READ_S = 60.0  # it has read its secret by then


async def start(folder: Path, secret: bytes, port: int) -> asyncio.subprocess.Process:
    """Start it, for the server in `folder` and the Runtime API on `port`.

    Its secret is in a file (mode 0600) for the time of that.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".superexec", delete=False) as file:
        file.write(secret)
    child = await asyncio.create_subprocess_exec(
        PROGRAM,
        *("--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
        *("--superexec-auth-secret-file", file.name, "--parent-pid", str(os.getpid())),
        env=os.environ
        | {
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.02",  # the listener holds what it asks
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(folder / "flwr"),
            "FEDAPP_RUNS": str(folder / "runs"),
            "PYTHONUNBUFFERED": "1",
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is the server's to pass on
    )
    asyncio.get_running_loop().call_later(_READ_S, forget, folder)
    return child


def forget(folder: Path) -> None:
    """Remove its secret."""
    for file in folder.glob(".superexec*"):
        file.unlink(missing_ok=True)


async def copy(child: asyncio.subprocess.Process, path: Path, as_json: bool) -> None:
    """Copy its output to a file that rotates, until it ends."""
    output = logging.getLogger("fedapp.superexec")
    output.propagate = False
    handler = to_file(path, as_json, "%(message)s")
    output.addHandler(handler)
    assert child.stdout is not None
    try:
        while piece := await child.stdout.read(1 << 16):
            output.info("%s", piece.decode(errors="replace").rstrip("\n"))
    finally:
        output.removeHandler(handler)
        handler.close()


async def end(child: asyncio.subprocess.Process) -> None:
    """End it and all that it started: they report their runs first, for some seconds."""
    with suppress(ProcessLookupError):  # the group is empty
        for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 1)):
            os.killpg(child.pid, number)
            for _ in range(10 * seconds):
                await asyncio.sleep(0.1)
                os.killpg(child.pid, 0)
