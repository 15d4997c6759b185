"""What a user meets on the command line: real processes, real run folders, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fedapp import config
from fedapp.errors import ConfigError

FAST = ("task=digits", "model=logistic", "privacy=none", "clients=3", "rounds=2", "partition=iid")


def fedapp(*arguments: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedapp.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def summary(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return found


def test_a_run_leaves_its_folder(tmp_path: Path) -> None:
    done = fedapp("simulate", *FAST, "privacy=example", "trainer.steps=3", "run_dir=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "here"
    names = {"config.yaml", "summary.json", "rounds.jsonl", "model.safetensors", "report.html", "labels.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert "Run folder:" in done.stdout
    assert "round 2/2" in done.stdout
    found = summary(folder)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rounds] == [1, 2]
    assert found["uplink_bytes"] == sum(r["uplink_bytes"] for r in rounds)
    assert 0 < rounds[0]["epsilon"] < rounds[1]["epsilon"] == found["epsilon"]
    assert rounds[1]["epsilon"] <= 8
    assert found["privacy_unit"] == "example"
    assert (found["task"], found["codec"], found["engine"]) == ("digits", "default", "local")
    assert found["parameters"] == sum(a.size for a in load_file(folder / "model.safetensors").values()) == 650
    assert "trainer.steps" not in done.stderr


def test_a_sweep_leaves_one_folder_a_job(tmp_path: Path) -> None:
    done = fedapp(
        "simulate", "-m", *FAST, "codec=identity,default", "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    jobs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    found = [(summary(job)["codec"], summary(job)["seed"]) for job in jobs]
    assert found == [("identity", 0), ("identity", 1), ("default", 0), ("default", 1)]
    assert summary(jobs[0])["uplink_bytes"] > 4 * summary(jobs[2])["uplink_bytes"]  # type: ignore[operator]


def test_hydra_run_dir_is_the_run_folder_too(tmp_path: Path) -> None:
    assert fedapp("simulate", *FAST, "rounds=1", "hydra.run.dir=there", cwd=tmp_path).returncode == 0
    assert (tmp_path / "there" / "report.html").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["clients=0"], "clients must be"),
        (["colour=red"], "colour"),
        (["codec.step=0"], "codec.step must be a number at least 1e-06 and at most 1e+06, got 0"),
        (["+trainer.speed=1"], "speed"),
        (["task=csv", "task.path=nowhere.csv", "model=mlp"], "nowhere.csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_end_in_one_line(tmp_path: Path, overrides: list[str], said: str) -> None:
    """Nothing starts, nothing is left, and the line names the setting."""
    done = fedapp("simulate", *FAST, *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("fedapp: ")
    assert len(done.stderr.splitlines()) == 1
    assert "Run folder" not in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("clients=ten", "clients must be a whole number of at least 1, got 'ten'"),
        ("cohort=11", "cohort must be a whole number from 1 to 3, got 11"),
        ("sampling=systematic", "sampling must be one of auto, fixed, poisson"),
        ("device=cuda", "device=cuda, but torch sees no CUDA device"),
        ("trainer=dp_sgd", "trainer=dp_sgd does not go with privacy=none: choose privacy=example"),
        ("privacy=example trainer=sgd", "trainer=sgd does not go with privacy=example"),
        ("privacy=example strategy=qfedavg", "strategy=qfedavg needs the clients' losses"),
        ("privacy=example strategy=fedprox", "strategy=fedprox needs trainer=sgd"),
        ("privacy=example evaluate=clients", "evaluate=clients sends private accuracies"),
        ("privacy=example model=resnet18 model.norm=batch", "model.norm=group"),
        ("privacy=example task=csv task.path=x.csv task.standardize=true", "task.standardize=true takes"),
    ],
)
def test_bad_settings_are_refused(overrides: str, said: str) -> None:
    """The same, in process."""
    with pytest.raises(ConfigError) as caught:
        config.job(config.compose(" ".join([*FAST, overrides]))).prepare()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = fedapp("simulate", *FAST, "run_dir=file/run", cwd=tmp_path)
    assert done.returncode == 1
    assert "file/run" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text("{}")
    done = fedapp("simulate", *FAST, "run_dir=old", cwd=tmp_path)
    assert done.returncode == 1
    assert "old" in done.stderr
    assert (tmp_path / "old" / "summary.json").read_text() == "{}"


def test_usage_and_help(tmp_path: Path) -> None:
    assert "usage: fedapp" in fedapp("--help", cwd=tmp_path).stdout
    assert fedapp(cwd=tmp_path).returncode == 2
    assert fedapp("fly", cwd=tmp_path).returncode == 2
    told = fedapp("simulate", "--help", cwd=tmp_path)
    assert told.returncode == 0
    for word in ("fashion_mnist", "digits", "fedadam", "dp_sgd", "identity", "dirichlet", "clients: 10"):
        assert word in told.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_what_was_measured(tmp_path: Path, number: int) -> None:
    """Ctrl-C reaches the whole process group: the run ends cleanly and no process stays behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedapp.cli", "simulate", *FAST, "rounds=100000", "run_dir=here"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    lines = tmp_path / "here" / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "fedapp: interrupted"
    assert "Traceback" not in err
    found = summary(tmp_path / "here")
    assert found["interrupted"] is True
    assert found["rounds"] == lines.read_text().count("\n") >= 3
    assert (tmp_path / "here" / "report.html").exists()
    assert (tmp_path / "here" / "model.safetensors").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedapp.cli", "simulate", *FAST]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    models = [load_file(folder / "model.safetensors") for folder in folders]
    assert all((models[0][name] == models[1][name]).all() for name in models[0])


def test_own_table_is_one_override_away(tmp_path: Path) -> None:
    rows = [f"{i % 7},{(i * 3) % 5},{'yes' if i % 7 > 2 else 'no'}" for i in range(400)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,answer", *rows]))
    table = ("task=csv", "task.path=table.csv", "task.label=answer", "model=mlp", "task.standardize=true")
    done = fedapp("simulate", *FAST, *table, "rounds=6", "trainer.lr=0.5", "run_dir=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "here")["accuracy"] > 0.95  # type: ignore[operator]
    wrong = fedapp("simulate", *FAST, *table, "task.label=price", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "price" in wrong.stderr
    assert "answer" in wrong.stderr
    holes = (tmp_path / "table.csv").read_text().replace("\n3,", "\n,", 1)
    (tmp_path / "table.csv").write_text(holes)
    missing = fedapp("simulate", *FAST, *table, cwd=tmp_path)
    assert missing.returncode == 1
    assert "misses 1 values in column a" in missing.stderr


def test_report_is_made_anew(tmp_path: Path) -> None:
    assert fedapp("simulate", *FAST, "rounds=1", "run_dir=here", cwd=tmp_path).returncode == 0
    (tmp_path / "here" / "report.html").unlink()
    assert fedapp("report", "here", cwd=tmp_path).returncode == 0
    assert "<svg" in (tmp_path / "here" / "report.html").read_text()
    assert fedapp("report", "nowhere", cwd=tmp_path).returncode == 1
