"""The same app in Flower's own runtimes, by Flower's own commands: simulation, deployment, bundle, wheel."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SETTINGS = "task=digits privacy=none rounds=2 clients=2"
FLOAT32 = 4 * 30498  # bytes of a small_cnn on digits
CONF = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
FEDAPP = {str(path.relative_to(ROOT)) for path in (ROOT / "fedapp").rglob("*.py")}


class Shell:
    """Runs commands, each in a process group of its own, in a folder that is also their FLWR_HOME."""

    def __init__(self, home: Path) -> None:
        self.home = home
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "RAY_"))}
        self._env = inherited | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, command: str, home: str = "") -> subprocess.Popen[bytes]:
        """Start a command; its output goes to a file. `home` names another folder inside this one."""
        flwr_home = self.home / home
        flwr_home.mkdir(exist_ok=True)
        log = self.home / f"{len(self._running):02d}.log"
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

    def run(self, command: str, timeout: float = 60) -> None:
        """Run a command to its end, which must come in time and be a success."""
        assert self.start(command).wait(timeout) == 0, command

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


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    running = Shell(tmp_path)
    try:
        yield running
    finally:
        running.close()


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


def app_in(home: Path, marked: bool = True) -> None:
    """A copy of the app; each program that imports it adds a line to $FLWR_HOME/imports: who, from where."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("fedapp", "conf"):
        shutil.copytree(ROOT / name, home / "app" / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home / "app")
    if not marked:
        return
    with (home / "app/fedapp/client_app.py").open("a") as file:
        file.write(
            "\nimport os, sys\n"
            "with open(os.path.join(os.environ['FLWR_HOME'], 'imports'), 'a') as _file:\n"
            "    _file.write(f'{os.path.basename(sys.argv[0])} {__file__}\\n')\n"
        )


def imports(home: Path) -> set[str]:
    """Which programs imported the app; all of them from the bundle that Flower installed."""
    lines = [line.split(maxsplit=1) for line in (home / "imports").read_text().splitlines()]
    assert all(Path(path).is_relative_to(home / "apps") for _, path in lines), lines
    return {program for program, _ in lines}


def records(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = json.loads((run_dir / "summary.json").read_text())
    return summary, [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def check(shell: Shell, run_dir: Path) -> None:
    """A whole run came back, compressed, and is bit for bit what the local engine gives."""
    summary, rounds = records(run_dir)
    assert [(r["replies"], r["failures"]) for r in rounds] == [(2, 0), (2, 0)]
    assert all(0 < r["uplink_bytes"] < 2 * FLOAT32 / 8 for r in rounds)
    assert summary["uplink_bytes"] == sum(r["uplink_bytes"] for r in rounds)
    assert summary["engine"] == "flower"
    shell.run(f"fedapp simulate {SETTINGS} run_dir={shell.home}/local")
    local, local_rounds = records(shell.home / "local")
    same = ("accuracy", "loss", "uplink_bytes", "downlink_bytes", "parameters", "seed")
    assert {key: summary[key] for key in same} == {key: local[key] for key in same}
    assert [r["accuracy"] for r in rounds] == [r["accuracy"] for r in local_rounds]
    models = [(path / "model.safetensors").read_bytes() for path in (run_dir, shell.home / "local")]
    assert models[0] == models[1]


def test_flowers_simulation_runtime_gives_the_bits_of_the_local_engine(shell: Shell) -> None:
    pytest.importorskip("ray")
    home, port = shell.home, free_port()
    app_in(home)
    superlink = shell.start(
        f"flower-superlink --simulation --insecure --port {port} --disable-runtime-dependency-installation"
    )
    (home / "config.toml").write_text(f'[superlink.ray]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    (home / "run.toml").write_text(f'overrides = "{SETTINGS} run_dir={home}/run"\n')
    listens(port, superlink)
    shell.run(
        "flwr run app ray --run-config run.toml --stream "
        "--federation-config 'num-supernodes=2 client-resources-num-cpus=1'",
        timeout=240,
    )
    check(shell, home / "run")
    assert imports(home) == {"flwr-simulation", "default_worker.py"}


def deploy(shell: Shell, node_configs: list[str]) -> None:
    """One SuperLink and its SuperNodes on loopback, with TLS and node keys: the recipe of the README."""
    home, port = shell.home, free_port()
    shell.run(
        'openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj "/CN=fedapp CA" '
        "-addext keyUsage=critical,keyCertSign -keyout ca.key -out ca.pem"
    )
    shell.run(
        "openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj /CN=superlink "
        "-addext subjectAltName=IP:127.0.0.1,DNS:localhost -addext basicConstraints=critical,CA:FALSE "
        "-CA ca.pem -CAkey ca.key -keyout server.key -out server.pem"
    )
    superlink = shell.start(
        f"flower-superlink --host 127.0.0.1 --port {port} --enable-supernode-auth "
        "--ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key "
        "--disable-runtime-dependency-installation"
    )
    (home / "config.toml").write_text(
        f'[superlink.own]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{home}/ca.pem"\n'
    )
    listens(port, superlink)
    for node, config in enumerate(node_configs):
        shell.run(f'ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f node{node}.key')
        shell.run(f"flwr supernode register node{node}.key.pub own")
        shell.start(
            f"flower-supernode --superlink 127.0.0.1:{port} --root-certificates {home}/ca.pem "
            f"--auth-supernode-private-key {home}/node{node}.key --port {free_port()} "
            f"--node-config '{config}'",
            home=f"node{node}",
        )


def test_a_deployment_with_tls_and_node_keys_gives_the_bits_of_the_local_engine(shell: Shell) -> None:
    home = shell.home
    app_in(home)
    deploy(shell, ["partition-id=0 num-partitions=2", "partition-id=1 num-partitions=2"])
    (home / "run.toml").write_text(f'overrides = "{SETTINGS} run_dir={home}/run"\n')
    shell.run("flwr run app own --run-config run.toml --stream", timeout=300)
    check(shell, home / "run")
    assert imports(home) == {"flwr-serverapp"}
    assert imports(home / "node0") == imports(home / "node1") == {"flwr-clientapp"}


def test_secure_aggregation_in_a_deployment_gives_the_bits_of_the_local_engine(shell: Shell) -> None:
    """There with the nodes' own signing keys and roster, here with those that the simulation makes."""
    home = shell.home
    app_in(home, marked=False)
    for node in range(3):
        shell.run(f"ssh-keygen -q -t ed25519 -N '' -C '' -f {home}/sign{node}.key")
    shell.run(f"cat {home}/sign*.key.pub > {home}/roster")
    known = f'num-partitions=3 roster="{home}/roster" signing-key="{home}/sign%d.key"'
    deploy(shell, [f"partition-id={n} {known % n}" for n in range(3)])
    chosen = "task=digits privacy=distributed_gaussian privacy.test_seed=1 rounds=1 clients=3"
    run = f"{chosen} privacy.roster={home}/roster run_dir={home}/run"
    (home / "run.toml").write_text(f'overrides = "{run}"\n')
    shell.run("flwr run app own --run-config run.toml --stream", timeout=300)
    summary, rounds = records(home / "run")
    assert [(r["replies"], r["failures"]) for r in rounds] == [(3, 0)]
    assert (summary["epsilon"], summary["codec"]) == (None, "secure aggregation")
    shell.run(f"fedapp simulate {chosen} privacy.roster=made run_dir={home}/local")
    models = [(home / run / "model.safetensors").read_bytes() for run in ("run", "local")]
    assert models[0] == models[1]


def test_asynchronous_rounds_in_a_deployment(shell: Shell) -> None:
    """A step for each update: who answers is sent the next weights while the other one still trains."""
    home = shell.home
    app_in(home, marked=False)
    deploy(shell, ["partition-id=0 num-partitions=2", "partition-id=1 num-partitions=2"])
    chosen = "task=digits model=logistic privacy=none clients=2 rounds=4 strategy=fedbuff strategy.buffer=1"
    (home / "run.toml").write_text(f'overrides = "{chosen} run_dir={home}/run"\n')
    shell.run("flwr run app own --run-config run.toml --stream", timeout=240)
    summary, rounds = records(home / "run")
    assert [(r["replies"], r["failures"], r["clock"]) for r in rounds] == [(1, 0, None)] * 4
    assert (summary["cohort"], summary["interrupted"]) == (1, False)
    assert summary["accuracy"] > 0.3


def test_a_node_declines_what_its_policy_or_its_ledger_does_not_allow(shell: Shell) -> None:
    """One pays for one round and declines the second; the other's policy takes no such run."""
    home = shell.home
    app_in(home, marked=False)
    for node, privacy in enumerate(("example", "none")):
        (home / f"policy{node}.yaml").write_text(f"tasks: [digits]\nprivacy: [{privacy}]\nmetrics: []\n")
    shell.run("fedapp ledger set-limit ledger.db ward example 3 1e-5")
    own = [f'policy="{home}/policy{n}.yaml" ledger="{home}/ledger.db" data-id="ward"' for n in (0, 1)]
    deploy(shell, [f"partition-id={n} num-partitions=2 {own[n]}" for n in (0, 1)])
    (home / "run.toml").write_text(
        f'overrides = "task=digits model=logistic privacy=example privacy.epsilon=3 rounds=3 clients=2 '
        f'run_dir={home}/run"\n'
    )
    assert shell.start("flwr run app own --run-config run.toml --stream").wait(300) == 0
    rounds = [json.loads(line) for line in (home / "run/rounds.jsonl").read_text().splitlines()]
    assert [(r["replies"], r["failures"]) for r in rounds][:1] == [(1, 1)]
    assert rounds[-1]["replies"] == 0  # a filter over adaptive choices is above the run's own figure
    shell.run("fedapp ledger show ledger.db")
    shown = (home / f"{len(shell._running) - 1:02d}.log").read_text()
    assert f"ward: {sum(r['replies'] for r in rounds)} release" in shown


def test_nodes_bring_their_own_tables_and_have_no_test_table(shell: Shell) -> None:
    home = shell.home
    app_in(home)
    for node in ("node0", "node1", "server"):
        rows = [f"{x},{1 - x},{'yes' if x else 'no'}" for x in (0, 1) * 40]
        (home / f"{node}.csv").write_text("\n".join(["left,right,label", *rows]) + "\n")
    deploy(shell, [f'partition-id={n} data="{home}/node{n}.csv"' for n in (0, 1)])
    (home / "run.toml").write_text(
        f'overrides = "task=csv task.features=[left,right] task.class_names=[no,yes] model=logistic rounds=1 '
        f'clients=2 privacy=none trainer.lr=1.0 task.test_path=server.csv run_dir={home}/run"\n'
    )
    shell.run("flwr run app own --run-config run.toml --stream", timeout=300)
    summary, rounds = records(home / "run")
    assert (summary["accuracy"], rounds[0]["replies"], rounds[0]["failures"]) == (1.0, 2, 0)


def test_the_bundle_carries_the_app_and_its_settings_and_nothing_else(shell: Shell) -> None:
    home = shell.home
    shell.run(f"flwr build --app {ROOT}")
    (bundle,) = home.glob("*.fab")
    assert set(zipfile.ZipFile(bundle).namelist()) == CONF | FEDAPP | {
        "pyproject.toml",
        "LICENSE",
        ".info/CONTENT",
    }
    shell.run(f"flwr install {bundle}")
    (installed,) = (home / "apps").iterdir()
    (home / "compose.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        "from fedapp import config\n"
        f"assert str(config.CONF) == {str(installed / 'conf')!r}, config.CONF\n"
        f"assert config.job_of({SETTINGS!r}).rounds == 2\n"
    )
    shell.run("python compose.py")


def test_the_wheel_carries_the_settings_inside_the_package(shell: Shell) -> None:
    home = shell.home
    shell.run(f"python -m pip wheel {ROOT} --no-deps --no-build-isolation --wheel-dir .")
    (wheel,) = home.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(home / "site")
    assert names == {f"fedapp/{name}" for name in CONF} | FEDAPP | {"fedapp/py.typed"}
    (home / "compose.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(home / 'site')!r})\n"
        "from fedapp import config\n"
        f"assert str(config.CONF) == {str(home / 'site/fedapp/conf')!r}, config.CONF\n"
        f"assert config.job_of({SETTINGS!r}).rounds == 2\n"
    )
    shell.run("python compose.py")
