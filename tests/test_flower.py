"""The same app in Flower's own runtimes, by Flower's own commands: simulation, deployment, bundle, wheel."""

import json
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from shell import Shell, free_port, listens

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SETTINGS = "task=digits privacy=none rounds=2 clients=2"
FLOAT32 = 4 * 30498  # bytes of a small_cnn on digits
CONF = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
FEDAPP = {str(path.relative_to(ROOT)) for path in (ROOT / "fedapp").rglob("*.py")}


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
    shell.run(f"fedapp simulate {SETTINGS} run_dir={shell.home}/local", timeout=240)
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


def test_engine_flower_gives_the_bits_of_the_local_engine(shell: Shell) -> None:
    """The same command on Ray, in one process with the rounds; nothing of Ray is left when it ends."""
    pytest.importorskip("ray")
    shell.run(
        f"fedapp simulate {SETTINGS} engine=flower engine.workers=2 run_dir={shell.home}/run", timeout=480
    )
    check(shell, shell.home / "run")
    assert not left_by_ray(shell.home)
    assert (shell.home / "run/labels.json").read_bytes() == (shell.home / "local/labels.json").read_bytes()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_on_ray_that_is_stopped_ends_ray(sent: signal.Signals, status: int, shell: Shell) -> None:
    """By Ctrl-C it also keeps its rounds and tells of them."""
    pytest.importorskip("ray")
    run = shell.start(
        f"fedapp simulate task=digits model=logistic privacy=none rounds=100000 clients=2 checkpoint=0 "
        f"engine=flower run_dir={shell.home}/run"
    )
    deadline = time.monotonic() + 480
    while not (shell.home / "run/rounds.jsonl").exists() and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.2)
    assert ray_processes(shell.home)
    run.send_signal(sent)
    assert run.wait(120) == status
    if sent == signal.SIGINT:
        summary, rounds = records(shell.home / "run")
        assert summary["interrupted"]
        assert summary["rounds"] == len(rounds) >= 1
    assert not left_by_ray(shell.home)


def ray_processes(home: Path) -> list[str]:
    """What Ray has running for a program that was started in this folder; they inherit its FLWR_HOME."""
    mark, found = f"FLWR_HOME={home}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if mark in (process / "environ").read_bytes().split(b"\0") and "ray" in command:
                found.append(command)
        except OSError:  # it has ended
            continue
    return [command for command in found if "fedapp simulate" not in command]


def left_by_ray(home: Path) -> list[str]:
    """The same, once those that were told to end have had the time for it."""
    deadline = time.monotonic() + 120  # its agents look for their parent at intervals
    while (left := ray_processes(home)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def deploy(shell: Shell, node_configs: list[str]) -> None:
    """One SuperLink and its SuperNodes on loopback, with TLS and node keys, by Flower's own commands."""
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
    shell.run("flwr run app own --run-config run.toml --stream", timeout=600)
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
    shell.run("flwr run app own --run-config run.toml --stream", timeout=600)
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
    shell.run("flwr run app own --run-config run.toml --stream", timeout=600)
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
    assert shell.start("flwr run app own --run-config run.toml --stream").wait(600) == 0
    rounds = [json.loads(line) for line in (home / "run/rounds.jsonl").read_text().splitlines()]
    assert [(r["replies"], r["failures"]) for r in rounds][:1] == [(1, 1)]
    assert rounds[-1]["replies"] == 0  # a filter over adaptive choices is above the run's own figure
    shown = shell.run("fedapp ledger show ledger.db")
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
    shell.run("flwr run app own --run-config run.toml --stream", timeout=600)
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
    beside = {f"fedapp/{name}" for name in (*CONF, "py.typed", "pyproject.toml", "LICENSE")}
    assert names == beside | FEDAPP
    (home / "compose.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(home / 'site')!r})\n"
        "from fedapp import config\n"
        f"assert str(config.CONF) == {str(home / 'site/fedapp/conf')!r}, config.CONF\n"
        f"assert config.job_of({SETTINGS!r}).rounds == 2\n"
        "from pathlib import Path\n"
        "from fedapp.deploy.bundle import bundle\n"
        "Path('sent.fab').write_bytes(bundle())\n"
    )
    shell.run("python compose.py")
    shell.run(f"flwr build --app {ROOT}")
    (built,) = home.glob("fedapp*.fab")
    bundles = [zipfile.ZipFile(file) for file in (home / "sent.fab", built)]
    sent, found = ({name: bundle.read(name) for name in bundle.namelist()} for bundle in bundles)
    assert sent == found
