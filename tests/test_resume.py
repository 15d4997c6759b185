"""A run that was killed ends as one that was not; what it had begun is charged; nothing is left behind."""

import errno
import fcntl
import io
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from grids import Elsewhere, all_of
from rich.console import Console
from safetensors import SafetensorError

import fedapp
from fedapp import checkpoint, client_app, config, evaluation, server_app
from fedapp.checkpoint import Checkpoints, read, write
from fedapp.engine.states import States
from fedapp.errors import ConfigError, DecodeError, FedappError
from fedapp.evaluation import ServerTest
from fedapp.job import Job
from fedapp.privacy import consent
from fedapp.privacy.begun import Begun
from fedapp.privacy.ledger import Ledger
from fedapp.report import folder as report_folder
from fedapp.report.folder import RunFolder, alone
from fedapp.report.progress import Progress
from fedapp.report.summary import Summary, read_summary
from fedapp.resume import Start
from fedapp.rounds import Federation
from fedapp.synchronous import Synchronous
from fedapp.tasks import classification
from fedapp.training import DpSgd

FAST = "task=digits privacy=none model=logistic clients=5 rounds=6 cohort=3 engine.workers=1 checkpoint=0"
SETTINGS = {
    "feedback": "codec.rate=0.5 codec.feedback=true downlink=coded",
    "clients test": "codec.rate=0.5 codec.feedback=true downlink=coded evaluate=clients",
    "fedadam": "strategy=fedadam codec=identity",
    "scaffold": "strategy=scaffold codec.rate=0.5",
    "fedavgm": "strategy=fedavgm codec.step=0.5",
    "central": "privacy=central_gaussian privacy.test_seed=1 privacy.quantile=0.5",
    "example": "privacy=example privacy.test_seed=1 trainer.steps=2",
    "distributed": "privacy=distributed_gaussian privacy.test_seed=1 clients=6 cohort=6",
    "fedbuff": "strategy=fedbuff cohort=null strategy.buffer=2 strategy.concurrency=4 speeds=stragglers "
    "codec.rate=0.5 codec.feedback=true downlink=coded",
    "fedbuff, plain": "strategy=fedbuff cohort=null strategy.buffer=2 codec=identity downlink=plain",
    "over-selection": "speeds=stragglers over_selection=1.4 codec.rate=0.5 codec.feedback=true",
    "stream": "task=stream task@task.source=digits task.rounds=2 task.replay=20 codec=identity",
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def simulate(folder: Path, overrides: str, shown: Console | None = None) -> Summary:
    """As `fedapp simulate` does; with resume=, of what a user gave beside it."""
    composed = overrides if "resume=" in overrides else f"{FAST} {overrides} run_dir={folder}"
    tree = config.compose(composed)
    console = shown or Console(file=io.StringIO(), width=200)
    return server_app.simulate(tree, folder, console, time.perf_counter(), overrides.split())


def resume(folder: Path, more: str = "") -> Summary:
    return simulate(folder, f"resume={folder} {more}")


def said(folder: Path, more: str = "") -> str:
    console = Console(file=io.StringIO(), width=200)
    simulate(folder, f"resume={folder} {more}", console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def killed(run: Callable[[], object], when: Callable[[], object]) -> int:
    """Run in a process of its own, and kill that when `when` returns; its exit status, -9 if killed."""
    child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)

    def kill() -> None:
        when()
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def never() -> None:
    time.sleep(600)


def lines(folder: Path) -> int:
    path = folder / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def left(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Model and rounds, without the time that these took."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return (folder / "model.safetensors").read_bytes(), [{**r, "seconds": 0, "stages": None} for r in rounds]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[bytes, list[dict[str, Any]]]]:
    """What a run leaves that nobody disturbs, and that writes no checkpoint."""
    known: dict[str, Any] = {}

    def run(setting: str) -> tuple[bytes, list[dict[str, Any]]]:
        if setting not in known:
            path = tmp_path_factory.mktemp("whole")
            simulate(path, f"{SETTINGS[setting]} checkpoint=null")
            known[setting] = left(path)
        return known[setting]  # type: ignore[no-any-return]

    return run


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def at_call(number: int, function: Callable[..., Any], what: Callable[..., Any] = die) -> Callable[..., Any]:
    """The function, but at that call `what` comes first."""
    calls = iter(range(1, 10**9))

    def wrapped(*args: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            what()
        return function(*args, **keywords)

    return wrapped


# The law: killed and resumed is not killed


@every_setting
def test_killed_in_a_round_and_resumed_is_the_same_run(setting: str, tmp_path: Path, whole: Any) -> None:
    def run() -> None:
        Federation._evaluate = at_call(4, Federation._evaluate)  # type: ignore[method-assign]
        simulate(tmp_path, SETTINGS[setting])

    assert killed(run, never) == -9
    assert lines(tmp_path) == 3
    summary = resume(tmp_path, "engine.workers=2")
    assert left(tmp_path) == whole(setting)
    assert (summary.rounds, summary.interrupted) == (6, False)
    assert summary.uplink_bytes == sum(r["uplink_bytes"] for r in left(tmp_path)[1])
    assert not (tmp_path / "checkpoint").exists()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> str:
    """Settings of a run the test set of which has four batches: two workers test beside the rounds."""
    for module in (evaluation, client_app, classification):
        monkeypatch.setattr(module, "EVALUATION_BATCH", 100)
    return f"{SETTINGS['feedback']} engine.workers=2"


@pytest.mark.parametrize("step", ["begin", "end"])
def test_killed_while_a_test_goes_on(step: str, tmp_path: Path, shared: str) -> None:
    """The record of the round that was being tested is made anew, from the weights in the checkpoint."""

    def run() -> None:
        setattr(ServerTest, step, at_call(4, getattr(ServerTest, step)))
        simulate(tmp_path / "run", shared)

    simulate(tmp_path / "whole", f"{shared} checkpoint=null")
    assert killed(run, never) == -9
    assert lines(tmp_path / "run") == {"begin": 2, "end": 3}[step]
    resume(tmp_path / "run")
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_interrupted_while_a_test_goes_on(
    tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    simulate(tmp_path / "whole", f"{shared} checkpoint=null")
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_welcome", at_call(4, Federation._welcome, interrupt))
        with pytest.raises(KeyboardInterrupt):
            simulate(tmp_path / "run", shared)
    summary = read_summary(tmp_path / "run" / "summary.json")
    assert (summary.rounds, summary.accuracy) == (3, left(tmp_path / "whole")[1][2]["accuracy"])
    resume(tmp_path / "run")
    assert left(tmp_path / "run") == left(tmp_path / "whole")


@pytest.mark.parametrize("setting", ["codec.rate=2", SETTINGS["fedbuff"]])
def test_bytes_of_a_round_that_is_broken_off_count_with_their_replies(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Progress.reply

    def interrupted(self: Progress, number: int, done: int, total: int) -> None:
        shown(self, number, done, total)
        if number == 2 and done == total - 1:
            raise KeyboardInterrupt

    whole = simulate(tmp_path / "whole", setting)
    monkeypatch.setattr(Progress, "reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "run", setting)
    summary = read_summary(tmp_path / "run" / "summary.json")
    assert summary.rounds == 1
    assert summary.uplink_ratio == pytest.approx(whole.uplink_ratio, rel=0.2)


def test_private_asynchronous_rounds_go_on_within_their_budget(tmp_path: Path) -> None:
    """Who was at work is not asked again, but others are, and all that were asked are charged."""

    def run() -> None:
        Federation._evaluate = at_call(4, Federation._evaluate)  # type: ignore[method-assign]
        simulate(tmp_path, "strategy=fedbuff cohort=null strategy.buffer=2 privacy=example trainer.steps=2")

    assert killed(run, never) == -9
    begun = Begun(tmp_path / "checkpoint" / "begun.jsonl")
    assert begun.rounds == 4
    assert sum(begun.took_part.values()) > 5 + 3  # all, and at least one in each later round
    assert max(begun.took_part.values()) <= 4
    summary = resume(tmp_path)
    assert summary.epsilon is not None
    assert summary.epsilon <= 8
    assert summary.note is not None
    assert "1 round was begun and not finished" in summary.note


def test_rounds_in_which_all_failed_are_counted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after two of them, the run ends after the third, and after a fourth; mended, it goes on."""

    def fails(message: Message, context: Context) -> Message:
        raise ValueError("no")

    def run() -> None:
        Federation._welcome = at_call(3, Federation._welcome)  # type: ignore[method-assign]
        simulate(tmp_path, SETTINGS["feedback"])

    with monkeypatch.context() as patch:
        patch.setattr(server_app, "local_app", lambda job: fails)
        assert killed(run, never) == -9
        for number in (3, 4):
            with pytest.raises(FedappError, match=f"round {number}: .* after {number} such rounds in a row"):
                resume(tmp_path)
    summary = resume(tmp_path)
    assert (summary.rounds, summary.interrupted) == (6, False)
    assert summary.note == "no update came of round 1, 2, 3, 4, which changed nothing"
    assert [r["replies"] for r in left(tmp_path)[1]] == [0, 0, 0, 0, 3, 3]


MOMENTS: dict[str, tuple[Any, str, int]] = {  # who calls what, at which call the process dies
    "before the line of a round": (RunFolder, "append", 4),
    "before a checkpoint": (Checkpoints, "save", 4),
    "before clients' states": (States, "commit", 4),
    "after clients' states, before the server's": (checkpoint, "write", 4),
    "with a file half written": (os, "replace", 7),  # 3 before the rounds
    "before the older file is removed": (Path, "unlink", 2),
    "before a round is written down": (Begun, "add", 4),
    "before what a round begins is sent": (Synchronous, "_summed", 4),
}


WRITTEN_AHEAD = (
    "before a checkpoint",
    "before a round is written down",
    "before what a round begins is sent",
)


@pytest.mark.parametrize(
    ("setting", "moment"),
    [*(("feedback", moment) for moment in MOMENTS), *(("central", moment) for moment in WRITTEN_AHEAD)],
)
def test_any_moment_will_do(moment: str, setting: str, tmp_path: Path, whole: Any) -> None:
    place, name, number = MOMENTS[moment]

    def run() -> None:
        setattr(place, name, at_call(number, getattr(place, name)))
        simulate(tmp_path, SETTINGS[setting])

    assert killed(run, never) == -9
    resume(tmp_path)
    assert left(tmp_path) == whole(setting)
    assert not [path.name for path in tmp_path.rglob(".*")]


def test_killed_again_and_again_at_random(tmp_path: Path, whole: Any) -> None:
    """Between checkpoints that come every 30 ms, with one worker or two."""
    dice = random.Random(0)
    more, kills = f"{SETTINGS['feedback']} rounds=40 checkpoint=0.03", 0
    simulate(tmp_path / "whole", more)
    run: Callable[[], object] = lambda: simulate(tmp_path / "run", more)  # noqa: E731
    for _ in range(4):
        wait, begun = dice.uniform(0, 0.4), lines(tmp_path / "run")

        def when(wait: float = wait, begun: int = begun) -> None:
            while lines(tmp_path / "run") <= begun:
                time.sleep(0.005)
            time.sleep(wait)

        kills += killed(run, when) == -9
        if (tmp_path / "run" / "summary.json").exists():
            break
        run = lambda: resume(tmp_path / "run", f"engine.workers={dice.randint(1, 2)}")  # noqa: E731
    else:
        run()
    assert kills >= 2
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_interrupted_and_resumed_is_the_same_run(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What clients learned in the round that was abandoned is forgotten."""

    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_evaluate", at_call(4, Federation._evaluate, interrupt))
        with pytest.raises(KeyboardInterrupt):
            simulate(tmp_path, SETTINGS["feedback"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["interrupted"], summary["rounds"]) == (True, 3)
    assert sorted(os.listdir(tmp_path / "checkpoint")) == [
        "clients.sqlite", "round-000002.safetensors", "round-000003.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "checkpoint").stat().st_mode & 0o77 == 0  # who was drawn, what clients keep
    resumed = resume(tmp_path)
    assert left(tmp_path) == whole("feedback")
    assert resumed.startup_s > summary["startup_s"]
    assert resumed.wall_s > sum(r["seconds"] for r in left(tmp_path)[1])


def test_a_run_without_a_checkpoint_goes_on_from_its_beginning(tmp_path: Path, whole: Any) -> None:
    for setting in ("feedback", "example"):
        path = tmp_path / setting

        def run(path: Path = path, setting: str = setting) -> None:
            RunFolder.append = at_call(3, RunFolder.append)  # type: ignore[method-assign]
            simulate(path, f"{SETTINGS[setting]} checkpoint=null")

        assert killed(run, never) == -9
        assert "Going on from round 1: there is no checkpoint" in said(path)
        assert left(path) == whole(setting)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, whole: Any) -> None:
    """Real processes: killed, then terminated, then left in peace."""
    settings = f"{FAST} {SETTINGS['feedback']} rounds=60 run_dir=run".split()
    fedapp = [sys.executable, "-m", "fedapp.cli", "simulate"]
    simulate(tmp_path / "whole", f"{SETTINGS['feedback']} rounds=60")
    for arguments, number, status in (
        (settings, signal.SIGKILL, -9),
        (["resume=run", "engine.workers=2"], signal.SIGTERM, 130),
        ([*settings[:-1], "resume=run"], None, 0),
    ):
        before = lines(tmp_path / "run")
        with subprocess.Popen([*fedapp, *arguments], cwd=tmp_path, stderr=subprocess.PIPE) as process:
            while number and lines(tmp_path / "run") < before + 3:
                time.sleep(0.01)
                assert process.poll() is None
            if number:
                process.send_signal(number)
            _, error = process.communicate(timeout=120)
        assert process.returncode == status, error
    assert left(tmp_path / "run") == left(tmp_path / "whole")
    names = ["config.yaml", "labels.json", "model.safetensors", "report.html", "rounds.jsonl", "summary.json"]
    assert sorted(os.listdir(tmp_path / "run")) == names
    done = subprocess.run([*fedapp, "resume=run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "fedapp: the run in run is finished: there is nothing to resume\n"


# What is damaged, locked, finished, or other than before


def stopped(folder: Path, overrides: str, rounds: int = 3) -> None:
    """A run that was killed after so many rounds."""

    def run() -> None:
        Federation._welcome = at_call(rounds + 1, Federation._welcome)  # type: ignore[method-assign]
        simulate(folder, overrides)

    assert killed(run, never) == -9
    assert lines(folder) == rounds


def test_of_a_damaged_checkpoint_the_one_before_is_used(tmp_path: Path, whole: Any) -> None:
    stopped(tmp_path, SETTINGS["feedback"])
    newest = tmp_path / "checkpoint" / "round-000003.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    text = said(tmp_path)
    assert re.search(r"round-000003.safetensors is damaged .*\n.*Going on after round 2\n", text)
    assert left(tmp_path) == whole("feedback")


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_checkpoint_cut_short_is_damaged(cut: int, tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": np.arange(99.0)})
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:cut])
    with pytest.raises(DecodeError, match="damaged"):
        read(tmp_path / "b")


def test_what_clients_remember_is_checked(tmp_path: Path) -> None:
    stopped(tmp_path, SETTINGS["feedback"])
    file = tmp_path / "checkpoint" / "clients.sqlite"
    whole = file.read_bytes()
    with sqlite3.connect(file) as db:
        db.execute("UPDATE states SET crc = crc + 1 WHERE node = (SELECT MIN(node) FROM states)")
    db.close()
    with pytest.raises(ConfigError, match="remembers is damaged"):
        resume(tmp_path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"clients.sqlite \(.*malformed"):
        resume(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"clients.sqlite holds 0 states of 5: restore the file"):
        resume(tmp_path)
    assert lines(tmp_path) == 3


def test_other_settings_are_refused_and_shown(tmp_path: Path) -> None:
    stopped(tmp_path, "codec.rate=0.5")
    for more, shown in (
        ("rounds=9 codec.rate=1", r"codec.rate: 0.5 -> 1; rounds: 6 -> 9\. Set them back"),
        ("privacy=example", r"privacy: none -> example\."),
        ("strategy=fedadam seed=0", r"strategy: fedavg -> fedadam\."),
    ):
        with pytest.raises(ConfigError, match=shown):
            resume(tmp_path, more)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("rounds: 6", "rounds: 7"))
    with pytest.raises(ConfigError, match=r"config.yaml was changed .*: rounds: 6 -> 7\."):
        resume(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    assert resume(tmp_path, f"{FAST} codec.rate=0.5 checkpoint=1").rounds == 6
    with pytest.raises(ConfigError, match="is finished: there is nothing to resume"):
        resume(tmp_path)
    with pytest.raises(ConfigError, match="is no run folder"):
        resume(tmp_path / "nowhere")


def deployed(overrides: str, ids: list[int], run: int = 1, ledger: Path | None = None) -> None:
    """As Flower runs the ServerApp, on nodes with these ids that remember nothing yet, but for a ledger."""
    job = config.job(config.compose(overrides))
    grid = Elsewhere(client_app.client_app(lambda _: job), ids)
    for context in grid._contexts.values():
        context.run_id = run
        if ledger is not None:
            context.node_config |= {
                "ledger": str(ledger),
                "data-id": str(context.node_config["partition-id"]),
            }
    server_app.main(grid, Context(run, 1, {}, RecordDict(), {"overrides": overrides}))


def test_a_deployed_run_goes_on_with_nodes_that_remember_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"{FAST} codec.feedback=false codec.step=2"
    deployed(f"{settings} run_dir={tmp_path / 'whole'}", [5, 6, 7, 8, 9])

    def run() -> None:
        Federation._welcome = at_call(4, Federation._welcome)  # type: ignore[method-assign]
        deployed(f"{settings} run_dir={tmp_path / 'run'}", [5, 6, 7, 8, 9])

    assert killed(run, never) == -9
    with pytest.raises(ConfigError, match=r"goes on with its own settings, .*: codec.step: 2 -> null\."):
        deployed(f"{FAST} codec.feedback=false resume={tmp_path / 'run'}", [5])
    with pytest.raises(ConfigError, match="was started by `flwr run`: resume it in the same way"):
        resume(tmp_path / "run")
    capsys.readouterr()
    deployed(f"{settings} resume={tmp_path / 'run'}", [50, 60, 70, 80, 90])
    assert "Going on after round 3" in capsys.readouterr().out
    (model, rounds), (others, expected) = left(tmp_path / "run"), left(tmp_path / "whole")
    assert model == others
    for r, e in zip(rounds[3:], expected[3:], strict=True):  # newcomers are sent more
        assert r.pop("downlink_bytes") > e.pop("downlink_bytes") or r["round"] > 4
    assert rounds == expected


@pytest.mark.parametrize(
    ("served", "feedback", "told"), [(False, "true", True), (True, "true", False), (False, "false", False)]
)
def test_nodes_are_said_to_begin_anew_where_they_do(
    served: bool, feedback: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `fedapp server` go on with what they have on their disks."""
    if served:
        monkeypatch.setenv("FEDAPP_RUNS", str(tmp_path))
    else:
        monkeypatch.delenv("FEDAPP_RUNS", raising=False)
    tree = config.compose(f"{FAST} codec.rate=0.5 codec.feedback={feedback}")
    job = config.job(tree)
    federation = Federation(job, Elsewhere(client_app.client_app(lambda _: job), [5, 6, 7, 8, 9]))
    begin = Start(tree, tmp_path, again=True, state=federation.state())
    assert any("begin anew" in said for said in server_app._told(federation, begin)) == told
    assert not any("anew" in said for said in server_app._told(federation, Start(tree, tmp_path)))


def test_in_a_deployment_all_settings_are_compared() -> None:
    """Clients are sent them, and know no folder."""
    was, now = (
        config.compose(f"{FAST} {more}")
        for more in ("codec.rate=0.5", "engine.workers=2 engine.client_timeout=9 resume=x")
    )
    assert config.differences(was, now) == {"codec.rate": (0.5, 1)}
    assert config.follow(was, now).engine.client_timeout == 9
    assert config.follow(was, now).engine.workers == 2
    assert config.follow(was, now).resume is None


def test_a_folder_is_held_by_one_process_and_not_by_its_workers(tmp_path: Path) -> None:
    def free() -> bool:
        """As another process finds it."""
        with pytest.MonkeyPatch.context() as patch, suppress(ConfigError):
            patch.setattr(report_folder, "_held", {})
            with alone(tmp_path):
                return True
        return False

    with alone(tmp_path), alone(tmp_path):
        assert not free()
    assert free()
    reader, writer = os.pipe()

    def run() -> None:
        with alone(tmp_path):
            if not os.fork():  # a worker, which outlives its parent
                os.write(writer, b"x")
                time.sleep(2)
                os._exit(0)
            never()

    def when() -> None:
        os.read(reader, 1)
        assert not free()

    assert killed(run, when) == -9
    assert free()
    os.close(reader)
    os.close(writer)


def test_a_folder_in_use_is_not_resumed(tmp_path: Path) -> None:
    stopped(tmp_path, SETTINGS["feedback"])
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process runs in"):
        resume(tmp_path)
    os.close(held)


FULL = {  # what fails from round 4 on, and how
    "save_file": (checkpoint, SafetensorError("I/O error: No space left on device (os error 28)")),
    "fsync": (os, OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_error_and_loses_nothing(
    what: str, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, error = FULL[what]
    working, full = getattr(place, what), list[bool]()

    def failing(*args: Any, **keywords: Any) -> Any:
        if full:
            raise error
        return working(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(place, what, failing)
        patch.setattr(Federation, "_welcome", at_call(4, Federation._welcome, lambda: full.append(True)))
        with pytest.raises(ConfigError, match=r"cannot write .* \(.*No space left"):
            simulate(tmp_path, SETTINGS["feedback"])
    assert not [path.name for path in tmp_path.rglob(".*")]
    resume(tmp_path)
    assert left(tmp_path) == whole("feedback")


# What is charged


PRIVATE = "privacy=example trainer.steps=2 cohort=null privacy.noise_multiplier=1 privacy.epsilon=null"


def test_repeated_rounds_are_charged_and_the_run_says_so(tmp_path: Path) -> None:
    def run() -> None:
        Federation._evaluate = at_call(4, Federation._evaluate)  # type: ignore[method-assign]
        simulate(tmp_path, PRIVATE)

    assert killed(run, never) == -9
    summary = resume(tmp_path)
    tree = config.compose(f"{FAST} {PRIVATE}")
    spent = config.job(tree).spent(7, 7)
    assert spent is not None
    assert summary.rounds == 6
    assert summary.epsilon == spent.epsilon
    assert summary.note == "1 round was begun and not finished, and what had left by then is charged"
    epsilons = [r["epsilon"] for r in left(tmp_path)[1]]
    assert epsilons == [config.job(tree).spent(n, n).epsilon for n in (1, 2, 3, 5, 6, 7)]  # type: ignore[union-attr]


def test_a_budget_that_repeated_rounds_have_eaten_ends_the_run(tmp_path: Path) -> None:
    """It is a promise: a planned run takes all of it, so each round that is repeated costs the last one."""
    budget = PRIVATE.replace("privacy.noise_multiplier=1 privacy.epsilon=null", "privacy.epsilon=4")

    def run() -> None:
        Federation._evaluate = at_call(4, Federation._evaluate)  # type: ignore[method-assign]
        simulate(tmp_path, budget)

    assert killed(run, never) == -9
    summary = resume(tmp_path)
    assert (summary.rounds, summary.interrupted) == (5, False)
    assert summary.epsilon is not None
    assert 3.5 < summary.epsilon <= 4
    assert str(summary.note).endswith("is charged; the budget ends after round 5 of 6")


def test_a_repeated_round_of_a_cohort_does_not_pass_the_budget_either(tmp_path: Path) -> None:
    """Noise is set for who is drawn most often, and it is among those of the round that is repeated."""
    budget = "privacy=example trainer.steps=2 privacy.epsilon=4"
    job = config.job(config.compose(f"{FAST} {budget}"))
    times = [Counter(i for r in range(1, n + 1) for i in job.cohorts.draw(r, 5)) for n in (3, 6)]
    again = times[0] + Counter(job.cohorts.draw(4, 5)) + times[1] - times[0]
    assert max(times[1].values()) == job.cohorts.most < 6
    assert max(again.values()) > job.cohorts.most

    def run() -> None:
        Federation._evaluate = at_call(4, Federation._evaluate)  # type: ignore[method-assign]
        simulate(tmp_path, budget)

    assert killed(run, never) == -9
    summary = resume(tmp_path)
    assert summary.rounds < 6
    assert not summary.interrupted
    assert summary.epsilon is not None
    assert 0.99 * 4 < summary.epsilon <= 4
    assert f"the budget ends after round {summary.rounds} of 6" in str(summary.note)


@pytest.mark.parametrize("choice", ["local_gaussian", "example trainer.steps=2"])
def test_nodes_that_may_hold_other_data_than_before_do_not_pass_the_budget(
    choice: str, tmp_path: Path
) -> None:
    """A sampled cohort: whoever took part most often may be drawn most often again."""
    private = f"privacy={choice} privacy.epsilon=4 cohort=2 rounds=10"
    settings = f"{FAST} {private} run_dir={tmp_path / 'run'}"

    def run() -> None:
        Federation._welcome = at_call(6, Federation._welcome)  # type: ignore[method-assign]
        deployed(settings, [5, 6, 7, 8, 9])

    assert killed(run, never) == -9
    assert Begun(tmp_path / "run" / "checkpoint" / "begun.jsonl").rounds == 5
    deployed(f"{settings} resume={tmp_path / 'run'}", [50, 60, 70, 80, 90])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 8
    assert 3.9 < summary["epsilon"] <= 4
    assert summary["note"] == "the budget ends after round 8 of 10"


def test_ledgers_are_charged_for_repeated_rounds_and_epsilon_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the third of five clients trains in round 4: it has been charged, and two have not."""
    monkeypatch.setattr(
        consent, "installed", lambda: Path(fedapp.__file__).parent
    )  # wherever this checkout is
    settings, file = f"{FAST} {PRIVATE}", tmp_path / "ledger.db"
    ledger, job = Ledger(file, new=True), config.job(config.compose(settings))
    job.prepare()  # imports, once for both processes

    def counts() -> list[int]:
        return sorted(ledger.count(str(partition)) for partition in range(5))

    def run() -> None:
        DpSgd.fit = at_call(3 * 5 + 3, DpSgd.fit)  # type: ignore[method-assign]
        deployed(f"{settings} run_dir={tmp_path / 'run'}", [5, 6, 7, 8, 9], 1, file)

    assert killed(run, never) == -9
    assert counts() == [3, 3, 4, 4, 4]
    deployed(f"{settings} resume={tmp_path / 'run'}", [50, 60, 70, 80, 90], 2, file)
    assert counts() == [6, 6, 7, 7, 7]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    spent = job.spent(7, 7)
    assert spent is not None
    assert summary["rounds"] == 6
    assert summary["epsilon"] == spent.epsilon
    assert summary["note"] == "1 round was begun and not finished, and what had left by then is charged"
    assert max(ledger.spent(which)["example"] for which in "01234") >= spent.epsilon


def test_rounds_are_on_the_disk_before_they_begin(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint" / "begun.jsonl"
    begun = Begun(file)
    begun.add(1, [0, 2])
    begun.add(2, [2])
    begun.add(2, [2, 1])  # repeated
    assert (Begun(file).rounds, dict(Begun(file).took_part)) == (3, {0: 1, 1: 1, 2: 3})
    with file.open("a") as opened:
        opened.write('{"round": 3, "coh')  # a crash while it was written: nothing was sent
    again = Begun(file)
    assert (again.rounds, file.read_text().count("\n")) == (3, 3)
    again.anew(4)
    again.add(3, [0])
    assert dict(Begun(file).took_part) == {0: 4, 1: 3, 2: 3, 3: 3}
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ConfigError, match=r"begun.jsonl .* a private run does not go on without it"):
        Begun(file)


def test_a_private_run_does_not_go_on_without_its_account(tmp_path: Path) -> None:
    stopped(tmp_path, PRIVATE)
    (tmp_path / "checkpoint" / "begun.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"begun.jsonl lacks rounds that were finished"):
        resume(tmp_path)


# The parts


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Every leaf by its path; an array as dtype, shape and bytes."""
    if isinstance(tree, np.ndarray):
        return {name: (tree.dtype, tree.shape, tree.tobytes())}
    if not isinstance(tree, (dict, list)):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{name}/{key}").items()}


# The others never take weights as they are: they are among SETTINGS.
STRATEGIES = sorted(
    {path.stem for path in (config.CONF / "strategy").glob("*.yaml")} - {"fedbuff", "scaffold"}
)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_goes_on_with_what_it_kept(strategy: str, tmp_path: Path) -> None:
    """Weights of any shape and dtype: three rounds, or two, and one after a restart."""
    many = 7  # bulyan needs so many
    rng, clients = np.random.default_rng(0), list(range(5, 5 + many))
    shapes = {"w": ((3, 4), np.float32), "b": ((), np.float32), "h": ((5,), np.float16), "n": ((), np.int64)}

    def weights() -> ArrayRecord:
        drawn = {name: np.asarray(rng.normal(size=shape) * 3) for name, (shape, _) in shapes.items()}
        return ArrayRecord({name: Array(x.astype(shapes[name][1])) for name, x in drawn.items()})

    def federation() -> Federation:
        job = config.job(
            config.compose(f"{FAST} strategy={strategy} codec=identity clients={many} cohort=null")
        )
        made = Federation(job, Elsewhere(client_app.client_app(lambda _: job), clients))
        made.arrays = start
        return made

    def step(federation: Federation, number: int) -> None:
        list(federation._wire.configure_train(number, federation.arrays, ConfigRecord(), federation.grid))
        metrics = MetricRecord({"num-examples": 3, "train_loss": 0.5})
        contents = [
            RecordDict({"arrays": record.copy(), "metrics": metrics}) for record in trained[number - 1]
        ]
        replies = [Message(content, node, "train") for content, node in zip(contents, clients, strict=True)]
        made, _ = federation._wire.aggregate_train(number, replies)
        assert made is not None
        federation.arrays, federation.finished = made, number

    start, trained = weights(), [[weights() for _ in clients] for _ in range(3)]
    one, other = federation(), federation()
    step(one, 1)
    step(one, 2)
    write(tmp_path / "state", one.state())
    other.restore(read(tmp_path / "state"))
    for which, name in ((one, "one"), (other, "other")):
        step(which, 3)
        write(tmp_path / name, which.state())
    states = [flat(read(tmp_path / name)) for name in ("one", "other")]
    assert states[0] == states[1]
    assert one.arrays["n"].dtype == "int64"
    assert ("/wire/strategy/m_t/w" in states[0]) == (strategy in ("fedadam", "fedyogi", "fedadagrad"))
    assert ("/wire/strategy/momentum_vector/0" in states[0]) == (strategy == "fedavgm")


def test_arrays_keep_dtype_shape_and_order(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "a": {"array": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "z": np.float32(2.5)},
        "l": [np.zeros((0, 3), np.float16), [True, None, "x", 2**60], np.array(7)],
    }
    write(tmp_path / "f", state)
    found = read(tmp_path / "f")
    assert list(found["a"]) == ["array", "z"]
    for was, now in zip(
        (*state["a"].values(), state["l"][0], state["l"][2]),
        (*found["a"].values(), found["l"][0], found["l"][2]),
        strict=True,
    ):
        assert (np.shape(was), was.dtype) == (now.shape, now.dtype)
        assert np.array_equal(was, now)
    assert found["l"][1] == [True, None, "x", 2**60]
    assert len(safetensors.numpy.load_file(tmp_path / "f")) == 4


def fresh(node: int) -> Context:
    return Context(1, node, {"partition-id": node}, RecordDict(), {})


def holding(node: int, value: float, size: int = 1000) -> Context:
    context = fresh(node)
    context.state["x"] = ArrayRecord({"a": Array(np.full(size, value, np.float32))})
    return context


def held(states: States) -> list[float | None]:
    found = [states[node].state.array_records.get("x") for node in states]
    return [None if record is None else float(record["a"].numpy()[0]) for record in found]


@pytest.mark.parametrize("room", [0, 9_000, float("inf")])
@pytest.mark.parametrize("file", [None, "clients.sqlite"])
def test_states_beyond_the_limit_are_on_disk(room: float, file: str | None, tmp_path: Path) -> None:
    states = States(range(6), fresh, room, file and tmp_path / file)  # type: ignore[arg-type]
    dice, known = random.Random(1), dict[int, float | None](dict.fromkeys(range(6)))
    for number in range(300):
        node = dice.randrange(6)
        if dice.random() < 0.5:
            known[node] = number
            states[node] = holding(node, number)
        assert states[node].node_config == {"partition-id": node}
        if number % 50 == 0:
            states.commit(number, max(0, number - 50))
        assert states._pieces.bytes <= max(room, 5000)
    assert held(states) == list(known.values())
    states.close()
    assert [path.name for path in tmp_path.iterdir()] == ([file] if file else [])


def test_states_of_a_round_that_was_not_committed_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "c" / "clients.sqlite"
    states = States(range(3), fresh, 5000, file)
    for finished in range(1, 5):  # each round another client, and client 0
        for node in (0, finished % 3):
            states[node] = holding(node, finished)
        states.commit(finished, max(0, finished - 2))
    states[0] = holding(0, 99)
    states[1] = holding(1, 99)
    assert held(states) == [99.0, 99.0, 2.0]
    states.close()
    for finished, kept in ((4, [4.0, 4.0, 2.0]), (3, [3.0, 1.0, 2.0])):  # the last two
        again = States(range(3), fresh, 5000, file, finished)
        assert held(again) == kept
        again.close()


def test_a_full_disk_costs_no_state_that_was_committed(tmp_path: Path) -> None:
    states = States(range(9), fresh, 0, tmp_path / "clients.sqlite")
    states[0] = holding(0, 1)
    states.commit(1, 0)
    with states._disk() as db:
        db.execute("PRAGMA max_page_count = 5")
    states[0] = holding(0, 2, 100_000)
    with pytest.raises(ConfigError, match=r"cannot keep .*clients.sqlite \(database or disk is full\): free"):
        states[1] = holding(1, 2)
    states.close()
    assert held(States(range(1), fresh, 0, tmp_path / "clients.sqlite", 1)) == [1.0]


def test_memory_beyond_the_limit_leaves_nothing_behind_a_killed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))

    def run() -> None:
        states = States(range(500), fresh, 0)
        for node in range(500):
            states[node] = holding(node, node, 10_000)
        (tmp_path / "done").touch()
        never()

    def when() -> None:
        while not (tmp_path / "done").exists():
            time.sleep(0.01)
        assert [path.name for path in tmp_path.iterdir()] == ["done"]

    assert killed(run, when) == -9
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_a_run_with_hardly_any_memory_for_states_is_the_same(tmp_path: Path, whole: Any) -> None:
    for every in ("null", "0"):
        path = tmp_path / every
        simulate(path, f"{SETTINGS['feedback']} engine.state_mb=0.005 checkpoint={every}")
        assert left(path) == whole("feedback")


def test_a_server_that_resumes_elsewhere_assumes_nothing_of_its_nodes(tmp_path: Path) -> None:
    """A new Flower run: nodes have other ids and remember nothing."""

    def job() -> Job:
        return config.job(config.compose(f"{FAST} codec.feedback=false codec.step=2"))

    one = Federation(job(), Elsewhere(client_app.client_app(lambda _: job()), [5, 6, 7, 8, 9]))
    first = one.run(Progress(Console(file=io.StringIO()), 6))
    for _ in range(3):
        next(first)
    write(tmp_path / "state", one.state())
    list(first)
    other = Federation(job(), Elsewhere(client_app.client_app(lambda _: job()), [50, 60, 70, 80, 90]))
    other.restore(read(tmp_path / "state"))
    assert other._downlink is not None
    assert other._downlink._held == {}
    assert [(record.round, record.replies) for record in all_of(other)] == [(3, 3), (4, 3), (5, 3), (6, 3)]
    assert {n: a.data for n, a in one.arrays.items()} == {n: a.data for n, a in other.arrays.items()}


def test_arrays_that_many_nodes_keep_count_once(tmp_path: Path) -> None:
    file, shared = tmp_path / "clients.sqlite", ArrayRecord({"a": Array(np.arange(50_000, dtype=np.float32))})
    own = [ArrayRecord({"a": Array(np.full(2_000, node, np.float32))}) for node in range(20)]

    def keep(states: States, arrays: ArrayRecord) -> None:
        for node in range(20):
            context = fresh(node)
            context.state = RecordDict({"shared": arrays, "own": own[node]})
            states[node] = context

    states = States(range(20), fresh, 400_000, file)
    keep(states, shared)
    assert 200_000 + 20 * 8_000 < states._pieces.bytes < 400_000
    states.commit(1, 0)
    assert file.stat().st_size < 900_000  # and not 20 times 200,000
    keep(states, ArrayRecord({"a": Array(np.zeros(50_000, np.float32))}))
    states.commit(2, 2)
    with states._disk() as db:
        assert db.execute("SELECT COUNT(*) FROM pieces").fetchone() == (21,)  # the old one is gone
    states.close()
    again = States(range(20), fresh, 100_000, file, 2)
    for node in range(20):
        state = again[node].state.array_records
        assert state["shared"]["a"].numpy().tobytes() == bytes(200_000)
        assert state["own"]["a"].data == own[node]["a"].data
        assert state["shared"]["a"].stype == "numpy.ndarray"
    again.close()


def test_a_damaged_piece_is_noticed(tmp_path: Path) -> None:
    states = States(range(2), fresh, 0, tmp_path / "clients.sqlite")
    states[0] = holding(0, 1, 5_000)
    states.commit(1, 0)
    states.close()
    again = States(range(2), fresh, 0, tmp_path / "clients.sqlite", 1)
    with again._disk() as db:
        db.execute("UPDATE pieces SET data = zeroblob(20128)")
    with pytest.raises(ConfigError, match="node 0 remembers is damaged"):
        again[0]
    again.close()
