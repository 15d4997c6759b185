"""The command line: `fedapp <command> [hydra overrides]`."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType

USAGE = """\
usage: fedapp <command> [GROUP=CHOICE ...] [KEY=VALUE ...]

commands:
  simulate   train one model over simulated clients on this machine
             (fedapp simulate --help lists all settings; -m KEY=A,B sweeps)
             resume=RUN_DIR goes on with a run that was stopped or killed, to the same end
  check      is a client's own data fit to train on? counts, and one line for each problem; exits 1 where
             training is impossible: fedapp check data=FILE_OR_FOLDER task=csv [KEY=VALUE ...]
  report     make report.html of a run folder anew: fedapp report RUN_DIR
  audit      train with canaries and print a lower bound on epsilon beside the claimed one; exits 1 where
             it exceeds the claim: fedapp audit [canaries=5000] [confidence=0.95] [KEY=VALUE ...];
             attack=true inverts single updates too, and leaves a page with the pictures in run_dir
  ledger     what a client's data has spent, and may spend: fedapp ledger show|set-limit|overlap

on real machines (each tells more with --help):
  keys       make keys: fedapp keys init|renew|sign (the operator's), fedapp keys node (a participant's)
  server     what nodes join and runs are sent to: fedapp server [--folder DIR] [--port 8443];
             fedapp server backup|restore FILE keeps, and brings back, its keys, nodes and runs
  nodes      which nodes may join: fedapp nodes list|register|unregister
  client     take part with the data of this machine: fedapp client --server HOST:PORT;
             fedapp client backup|restore FILE, and forget, which leaves key and ledger
  submit     train on a federation, with the settings of simulate: fedapp submit [-m] [KEY=VALUE ...]
  runs       what runs on a server: fedapp runs list|watch|fetch|stop

Settings are Hydra overrides of the YAML in conf/.
"""
PROGRAMS = {
    "ledger": "fedapp.privacy.ledger_cli",
    "keys": "fedapp.deploy.keys_cli",
    "server": "fedapp.deploy.server",
    "nodes": "fedapp.deploy.registry",
    "client": "fedapp.deploy.client",
    "submit": "fedapp.deploy.submit",
    "runs": "fedapp.deploy.following",
}


def main() -> None:
    """Entry of the console script; exits 0, 1 (an error, told in one line), 2 (usage) or 130 (Ctrl-C)."""
    commands = {"simulate": simulate, "check": check, "report": report, "audit": audit}
    commands |= {name: partial(_program, module) for name, module in PROGRAMS.items()}
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        said = f"fedapp: no command {sys.argv[1]!r}\n" if len(sys.argv) > 1 else ""
        sys.exit(_usage(said))
    command = commands[sys.argv.pop(1)]  # Hydra reads what is left
    signal.signal(signal.SIGTERM, _interrupt)
    with _told():
        command()


@contextmanager
def _told() -> Iterator[None]:
    """End the program with one line for an error that the user can mend."""
    from fedapp.errors import FedappError

    try:
        yield
    except FedappError as error:
        print(f"fedapp: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fedapp: interrupted", file=sys.stderr)
        sys.exit(130)


def simulate() -> None:
    """Run the job that the settings describe, or a sweep of them, on the local engine."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's printer
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from fedapp import config
    from fedapp.errors import ConfigError

    inside = False

    @hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")
    def job(tree: DictConfig) -> None:
        import torch
        from rich.console import Console

        from fedapp import server_app

        nonlocal inside
        inside = True
        torch.set_num_threads(1)
        told, runtime = HydraConfig.get().overrides.task, HydraConfig.get().runtime
        path = Path(runtime.output_dir)
        try:
            with _told():  # here already, or Hydra adds a line of its own
                settings = config.with_choices(tree, runtime.choices)
                server_app.simulate(settings, path, Console(), _started(), told)
        finally:
            if path.is_dir() and not any(path.iterdir()):  # Hydra made it, but nothing ran
                path.rmdir()

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(config.one_line(error)) from error
    except OSError as error:
        if inside:
            raise
        raise ConfigError(f"the run folder cannot be made ({error}): set run_dir to another place") from error


def check() -> None:
    """Check a client's own data by the settings of a run; exit 1 where it would decline to train."""
    from fedapp.tasks.quality_cli import run

    sys.exit(1 if run(sys.argv[1:]).fatal else 0)


def report() -> None:
    """Write report.html of a run folder again, from the files in it."""
    from fedapp.report.page import write_page

    if len(sys.argv) != 2:
        sys.exit(_usage("fedapp: report takes one run folder\n"))
    print(write_page(Path(sys.argv[1])))


def audit() -> None:
    """Bound epsilon from below by canaries; exit 1 where the bound exceeds the claim."""
    from fedapp.audit.command import run

    sys.exit(0 if run(sys.argv[1:]).passed else 1)


def _program(module: str) -> None:
    """Run a command that reads its own arguments."""
    import_module(module).main(sys.argv[1:])


def _started() -> float:
    """When this process began, by `time.perf_counter`: imports are part of what a user waits for."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError):  # no Linux
        age = 0.0
    return time.perf_counter() - age


def _usage(said: str) -> int:
    sys.stderr.write(said + USAGE)
    return 2


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
