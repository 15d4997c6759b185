"""A federation by fedapp's own commands: a server, clients and a researcher, as the README sets them up."""

import json
import os
import re
import shutil
import signal
import sqlite3
import ssl
import subprocess
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from shell import Shell, free_port, wait

from fedapp.privacy.accounting import spent_by
from fedapp.privacy.ledger import Ledger
from fedapp.privacy.release import Gaussian

pytestmark = pytest.mark.slow

# Error feedback and a coded downlink: both keep state on the nodes, and in the server, from round to round.
SETTINGS = "task=digits model=logistic privacy=none clients=2 codec.rate=0.5 codec.feedback=true"


class Federation:
    """A server and its clients on loopback, with TLS and keys."""

    def __init__(self, shell: Shell, clients: int, more: str = "", data: str = "") -> None:
        """`more`: flags of each client, `data`: lines of its data.yaml; {number} stands for its number."""
        self.shell, self.home, self.port, self._more = shell, shell.home, free_port(), more
        self._data = data
        shell.run("fedapp keys init --host localhost")
        self.server = self.serve()
        self.clients = [self.join(number, clients) for number in range(clients)]

    def serve(self) -> subprocess.Popen[bytes]:
        log = self.shell._log()
        server = self.shell.start(f"fedapp server --host 127.0.0.1 --port {self.port}")
        wait(lambda: "register a node" in log.read_text(), server)
        return server

    def join(self, number: int, of: int) -> subprocess.Popen[bytes]:
        """Make a key, register it, start the client."""
        folder = self.home / f"client{number}"
        self.shell.run(f"fedapp keys node --out {folder}/node.key")
        self.shell.run(f"fedapp nodes register {folder}/node.key.pub")
        own = self.home / f"table{number}.csv"
        part = f"partition-id: {number}\nnum-partitions: {of}\n"
        text = (f"data: {own}\n" if own.exists() else part) + self._data.format(number=number)
        (folder / "data.yaml").write_text(text)
        return self.start(number)

    def start(self, number: int) -> subprocess.Popen[bytes]:
        folder = self.home / f"client{number}"
        return self.shell.start(
            f"fedapp client --server 127.0.0.1:{self.port} --ca {self.home}/.fedapp/server/ca.pem "
            f"--folder {folder} --data-config {folder}/data.yaml {self._more.format(number=number)}"
        )

    def said(self, number: int) -> str:
        """A client's own log."""
        path = self.home / f"client{number}" / "node.log"
        return path.read_text() if path.exists() else ""

    def kill_in_a_round(self, submitted: subprocess.Popen[bytes]) -> int:
        """Kill the server in a round that client 0 has answered and client 1 has not; returns which."""
        wait(lambda: "train took" in self.said(1), submitted)
        os.killpg(self.clients[1].pid, signal.SIGSTOP)
        at = int(re.findall(r"round (\d+): train took", self.said(1))[-1]) + 1  # later where this is slow
        wait(lambda: f"round {at}: train took" in self.said(0), submitted)
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        os.killpg(self.clients[1].pid, signal.SIGCONT)
        return at


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def same_as_simulated(shell: Shell, settings: str, run: Path) -> None:
    """The model, bit for bit, and what was sent."""
    shell.run(f"fedapp simulate {settings} run_dir={shell.home}/local", timeout=240)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (run, shell.home / "local")]
    for key in ("accuracy", "loss", "uplink_bytes", "downlink_bytes", "parameters", "seed", "rounds"):
        assert summaries[0][key] == summaries[1][key], key
    models = [(f / "model.safetensors").read_bytes() for f in (run, shell.home / "local")]
    assert models[0] == models[1]


def test_a_submitted_run_ends_as_the_simulated_one(shell: Shell) -> None:
    """With what is kept on both sides from round to round; a second run on the same nodes starts clean."""
    federation = Federation(shell, 2)
    for place in ("first", "second"):
        shell.run(f"fedapp submit {SETTINGS} rounds=3 run_dir={place}", timeout=300)
    same_as_simulated(shell, f"{SETTINGS} rounds=3", shell.home / "first")
    assert (shell.home / "second/model.safetensors").read_bytes() == (
        shell.home / "first/model.safetensors"
    ).read_bytes()
    listed = shell.run("fedapp runs list")
    assert listed.count("completed") == 2
    federation.clients[0].send_signal(signal.SIGTERM)
    assert federation.clients[0].wait(30) == 0
    federation.server.send_signal(signal.SIGTERM)
    assert federation.server.wait(60) == 0


def test_a_client_killed_at_work_and_started_again_changes_nothing(shell: Shell) -> None:
    """It goes on with the message that it had not answered; nothing is lost, and nothing counts twice."""
    federation = Federation(shell, 2)
    settings = f"{SETTINGS} rounds=6 trainer.epochs=40"
    submitted = shell.start(f"fedapp submit {settings} run_dir=got")
    wait(lambda: "round 2: train took" in federation.said(0), submitted)
    time.sleep(0.3)  # in the midst of round 3, most likely; wherever it is, the end is the same
    os.killpg(federation.clients[0].pid, signal.SIGKILL)
    federation.clients[0].wait()
    federation.start(0)
    assert submitted.wait(400) == 0
    rounds = lines(shell.home / "got")
    assert [(r["replies"], r["failures"]) for r in rounds] == [(2, 0)] * 6
    same_as_simulated(shell, settings, shell.home / "got")


def test_a_client_that_stays_away_costs_its_replies_only(shell: Shell) -> None:
    federation = Federation(shell, 2)
    submitted = shell.start(f"fedapp submit {SETTINGS} rounds=2 round_timeout=45 run_dir=got")
    wait(lambda: "query took" in federation.said(1), submitted)  # the first work takes seconds
    os.killpg(federation.clients[1].pid, signal.SIGKILL)
    assert submitted.wait(400) == 0
    rounds = lines(shell.home / "got")
    assert (rounds[-1]["replies"], rounds[-1]["failures"]) == (1, 1)


def test_a_server_killed_in_a_round_goes_on_when_it_is_back(shell: Shell) -> None:
    """A new run takes up the old one; whoever watches is led on, and nothing counts twice, or is lost.

    One client has answered the round that is played again: what it kept back then is not taken twice. (A
    coded downlink begins anew with what it sends, so only a plain one leaves the bits of an unbroken run.)
    """
    federation = Federation(shell, 2)
    settings = f"{SETTINGS} downlink=plain rounds=8 trainer.epochs=40 checkpoint=0"
    log = shell._log()
    submitted = shell.start(f"fedapp submit {settings} run_dir=got")
    at = federation.kill_in_a_round(submitted)
    time.sleep(3)
    federation.serve()
    assert submitted.wait(400) == 0
    assert "goes on with it" in log.read_text()
    assert federation.said(0).count(f"round {at}: train took") == 2
    rounds = lines(shell.home / "got")
    assert [(r["round"], r["replies"], r["failures"]) for r in rounds] == [(n, 2, 0) for n in range(1, 9)]
    summary = json.loads((shell.home / "got/summary.json").read_text())
    assert summary["uplink_bytes"] == sum(r["uplink_bytes"] for r in rounds)
    assert summary["accuracy"] > 0.8
    same_as_simulated(shell, settings, shell.home / "got")


def test_a_private_run_goes_on_and_ledgers_and_summary_count_what_left(shell: Shell) -> None:
    """The server dies in a round that one client has answered, and the other has not.

    Both are asked for it anew, by a run of another number, which can have no stored reply of the first: so
    both times are charged to whom they reached, the server counts them for all, and leaves the last round.
    """
    ledgers = [shell.home / f"ledger{client}.db" for client in (0, 1)]
    for path in ledgers:
        Ledger(path, new=True).set_limit("data", "example", 50, 1e-5)
    federation = Federation(shell, 2, "--ledger ledger{number}.db")
    settings = "task=digits model=logistic privacy=example clients=2 rounds=6"
    submitted = shell.start(f"fedapp submit {settings} run_dir=got")
    at = federation.kill_in_a_round(submitted)
    federation.serve()
    assert submitted.wait(400) == 0
    (folder,) = (run for run in (shell.home / ".fedapp/server/runs").iterdir() if not run.is_symlink())
    (link,) = (run for run in folder.parent.iterdir() if run.is_symlink())
    assert link.resolve() == folder  # one experiment
    charged = [charges(path, int(folder.name), int(link.name)) for path in ledgers]
    before, after = list(range(1, at + 1)), list(range(at, 6))
    assert charged[0] == (before, after)
    assert charged[1] in ((before, after), (before[:-1], after))  # where its work had begun, or not
    rounds = lines(shell.home / "got")
    assert [(r["round"], r["replies"], r["failures"]) for r in rounds] == [(n, 2, 0) for n in range(1, 6)]
    summary = json.loads((shell.home / "got/summary.json").read_text())
    assert summary["uplink_bytes"] == sum(r["uplink_bytes"] for r in rounds)
    assert "1 round was begun and not finished" in summary["note"]
    assert "the budget ends after round 5 of 6" in summary["note"]
    (release,) = released(ledgers[0])  # all that it holds are alike
    six = replace(release, count=6 * release.count)
    assert summary["releases"] == [asdict(six)]
    assert summary["epsilon"] == spent_by((six,), 1e-5).epsilon <= 8
    assert summary["epsilon"] < Ledger(ledgers[0]).spent("data")["example"]  # a filter, which is dearer


def charges(ledger: Path, *runs: int) -> tuple[list[int], ...]:
    """The rounds that a ledger holds of each of these runs, and none of others."""
    with closing(sqlite3.connect(ledger)) as db:
        held = db.execute("SELECT run, round FROM events ORDER BY number").fetchall()
    found = {run: [at for name, at in held if name.partition("/")[0] == str(run)] for run in runs}
    assert sum(map(len, found.values())) == len(held)
    return tuple(found.values())


def released(ledger: Path) -> set[Gaussian]:
    with closing(sqlite3.connect(ledger)) as db:
        texts = db.execute("SELECT DISTINCT release FROM events").fetchall()
    return {Gaussian(**json.loads(text)) for (text,) in texts}


def test_a_server_killed_before_a_run_had_written_anything_begins_it_again(shell: Shell) -> None:
    federation, log = Federation(shell, 2), shell._log()
    submitted = shell.start(f"fedapp submit {SETTINGS} rounds=2 run_dir=got")
    said, runs = shell.home / ".fedapp/server/log/server.log", shell.home / ".fedapp/server/runs"
    wait(lambda: "Started task" in said.read_text(), submitted)
    os.killpg(federation.server.pid, signal.SIGKILL)
    federation.server.wait()
    for folder in runs.iterdir():  # where this came late
        shutil.rmtree(folder)
    federation.serve()
    assert submitted.wait(300) == 0
    assert "goes on with it" in log.read_text()
    assert [(r["replies"], r["failures"]) for r in lines(shell.home / "got")] == [(2, 0)] * 2
    (first,) = (folder for folder in runs.iterdir() if not folder.is_symlink())
    assert f"run {first.name} is submitted" in log.read_text()


def test_closing_the_terminal_does_not_stop_a_run_and_no_log_tells_a_secret(shell: Shell) -> None:
    """Two clients with tables of their own, one of them with a label that is none."""
    rows = "".join(f"271828.{i},{i % 7},{'no' if i % 2 else 'yes'}\n" for i in range(40))
    (shell.home / "table0.csv").write_text(f"age,dose,sick\n{rows}")
    (shell.home / "table1.csv").write_text(f"age,dose,sick\n{rows.replace('yes', 'Wilhelmina')}")
    for client in (0, 1):
        Ledger(shell.home / f"ledger{client}.db", new=True)
    federation = Federation(shell, 2, "--metrics-port 0 --ledger ledger{number}.db")
    log = shell._log()
    task = "task=csv task.features=[age,dose] task.label=sick task.class_names=[no,yes] model=logistic"
    submitted = shell.start(f"fedapp submit {task} privacy=none evaluate=none clients=2 rounds=4")
    wait(lambda: "query took" in federation.said(0), submitted)  # the first work takes seconds
    submitted.send_signal(signal.SIGINT)
    assert submitted.wait(30) == 130
    said = log.read_text()
    number = said.partition("run ")[2].split()[0]
    assert f"fedapp runs watch {number}" in said
    assert f"fedapp runs stop {number}" in said
    shell.run(f"fedapp runs watch {number} --into got", timeout=240)
    assert [(r["replies"], r["failures"]) for r in lines(shell.home / "got")] == [(1, 1)] * 4
    monitored(federation, number)
    assert "data check: column sick: 20 values are none of" in federation.said(1)
    assert "DataError, whose words may quote data" in federation.said(1)
    private(federation)


def monitored(federation: Federation, run: str) -> None:
    """The numbers of a run that is over, at both ends; and who does not serve any more."""
    folder = federation.home / ".fedapp/server"
    trust = ssl.create_default_context(cafile=folder / "ca.pem")
    bearer = {"Authorization": f"Bearer {(folder / 'operator.token').read_text().strip()}"}
    found = httpx.get(f"https://127.0.0.1:{federation.port}/metrics", headers=bearer, verify=trust).text
    assert f'fedapp_run_round{{run_id="{run}"}} 4\n' in found
    assert 'fedapp_nodes{status="online"} 2\n' in found
    uplink = sum(r["uplink_bytes"] for r in lines(federation.home / "got"))
    assert f'fedapp_run_uplink_bytes_total{{run_id="{run}"}} {uplink}\n' in found
    urls = [re.findall(r"http://127\.0\.0\.1:\d+/", federation.said(number))[-1] for number in (0, 1)]
    told = [httpx.get(f"{url}metrics").text for url in urls]
    for text, outcome in zip(told, ("answered", "failed"), strict=True):
        (count,) = re.findall(rf'fedapp_client_replies_total{{outcome="{outcome}"}} (\d+)', text)
        assert int(count) >= 4
        assert 'fedapp_client_messages_total{kind="train"} 4\n' in text
    assert 'fedapp_client_ledger_epsilon{data_id="data",unit="example",delta="1e-05"} +Inf\n' in told[0]
    assert httpx.get(f"{urls[0]}health").status_code == 200
    federation.server.send_signal(signal.SIGTERM)
    assert federation.server.wait(60) == 0
    wait(lambda: httpx.get(f"{urls[0]}health").text == "unreachable", federation.clients[0], 60)


def private(federation: Federation) -> None:
    """No log holds the operator's token, a line of a private key, or a value of the data."""
    home, server = federation.home, federation.home / ".fedapp/server"
    secrets = [(server / "operator.token").read_text().strip(), "271828", "Wilhelmina"]
    for key in (server / "ca.key", server / "server.key", home / "client0/node.key"):
        secrets += key.read_text().splitlines()[1:-1]
    logs = [*home.glob("*.log"), *home.glob("client*/node.log"), *server.glob("log/*.log")]
    assert len(logs) > 8
    for log in logs:
        said = log.read_text()
        assert not [secret for secret in secrets if secret in said], log


def test_a_run_that_was_stopped_waits_for_who_resumes_it(shell: Shell) -> None:
    """Whatever becomes of the server meanwhile; it then ends as one that nobody stopped.

    So does one that was stopped while it waited for nodes, and has no summary.
    (A coded downlink begins anew with what it sends, so only a plain one leaves the same bits.)
    """
    federation = Federation(shell, 2)
    settings = f"{SETTINGS} downlink=plain rounds=12 trainer.epochs=40 checkpoint=0"
    log = shell._log()
    submitted = shell.start(f"fedapp submit {settings} run_dir=got")
    wait(lambda: "round 2: train took" in federation.said(0), submitted)
    number = log.read_text().partition("run ")[2].split()[0]
    assert f"run {number} is stopped" in shell.run(f"fedapp runs stop {number}")
    assert submitted.wait(60) == 1
    assert f"run {number} stopped" in log.read_text()
    folder = shell.home / ".fedapp/server/runs" / number
    wait(lambda: (folder / "summary.json").exists(), federation.server)
    shell.run(f"fedapp submit --detach {settings} clients=3", timeout=120)
    wait(lambda: len(list(folder.parent.glob("*/config.yaml"))) == 2, federation.server)
    (other,) = (run.name for run in folder.parent.iterdir() if run.name != number)
    shell.run(f"fedapp runs stop {other}")
    federation.server.send_signal(signal.SIGTERM)
    assert federation.server.wait(60) == 0
    federation.serve()
    resumed = shell.run(f"fedapp runs resume {number} --into again", timeout=300)
    assert "Going on after round" in resumed
    rounds = lines(shell.home / "again")
    assert [(r["round"], r["replies"], r["failures"]) for r in rounds] == [(n, 2, 0) for n in range(1, 13)]
    same_as_simulated(shell, settings, shell.home / "again")
    listed = shell.run("fedapp runs list")
    assert (listed.count("stopped"), listed.count("completed"), listed.count("running")) == (2, 1, 0)
    assert len(list(folder.parent.iterdir())) == 3


def test_a_researcher_elsewhere_needs_an_address_and_two_files(shell: Shell) -> None:
    """At a home of its own, with nothing of the server's but copies of ca.pem and operator.token."""
    federation, seat = Federation(shell, 2), shell.home / "seat"
    seat.mkdir()
    for name in ("ca.pem", "operator.token"):
        shutil.copy(shell.home / ".fedapp/server" / name, seat)
    at = f"env HOME={seat} "
    there = f"FEDAPP_SERVER=127.0.0.1:{federation.port} FEDAPP_CA=ca.pem FEDAPP_TOKEN_FILE=operator.token "
    log = shell._log()
    assert shell.start(f"{at} fedapp submit {SETTINGS}", home="seat").wait(120) == 1
    assert "operator.token" in log.read_text()
    submitted = shell.start(f"{at}{there} fedapp submit {SETTINGS} rounds=2 run_dir=got", home="seat")
    assert submitted.wait(300) == 0
    assert {path.name for path in (seat / "got").iterdir()} == {
        *("config.yaml", "model.safetensors", "report.html", "rounds.jsonl", "summary.json")
    }
    assert [(r["replies"], r["failures"]) for r in lines(seat / "got")] == [(2, 0)] * 2
    listed = shell._log()
    assert shell.start(f"{at}{there} fedapp runs list", home="seat").wait(120) == 0
    assert "completed" in listed.read_text()
    assert not (seat / ".fedapp").exists()


def test_settings_that_make_no_job_are_told_before_anything_is_sent(shell: Shell) -> None:
    log = shell._log()
    assert shell.start("fedapp submit codec.rate=-1").wait(120) == 1
    assert "codec.rate" in log.read_text()


def test_nodes_with_a_roster_sign_what_they_do_in_secure_aggregation(shell: Shell) -> None:
    """All five stages. A node that is on no roster but its own takes no part; the others go on.

    One of them, killed between two stages, is where it was when it is back: it has masked what it sent.
    """
    home, stranger = shell.home, 4
    for number in range(5):
        shell.run(f"ssh-keygen -q -t ed25519 -N '' -C '' -f {home}/sign{number}.key")
    public = [(home / f"sign{number}.key.pub").read_text() for number in range(5)]
    for number in range(5):
        (home / f"roster{number}").write_text("".join(public[: 5 if number == stranger else 4]))
    data = f"roster: {home}/roster{{number}}\nsigning-key: {home}/sign{{number}}.key\n"
    federation = Federation(shell, 5, data=data)
    privacy = f"privacy=distributed_gaussian privacy.roster={home}/roster0 privacy.tolerated=0.25"
    settings = f"task=digits model=logistic clients=5 {privacy} rounds=2"
    submitted = shell.start(f"fedapp submit {settings} run_dir=run")
    wait(lambda: "share took" in federation.said(1), submitted)
    os.killpg(federation.clients[1].pid, signal.SIGSTOP)  # so that nobody is asked to go on meanwhile
    wait(lambda: "round 1: train took" in federation.said(0), submitted)
    os.killpg(federation.clients[0].pid, signal.SIGKILL)
    federation.clients[0].wait()
    federation.start(0)
    os.killpg(federation.clients[1].pid, signal.SIGCONT)
    assert submitted.wait(300) == 0
    assert "declined" not in federation.said(0)
    assert [line["replies"] for line in lines(home / "run")] == [4, 4]
    for stage in ("advertise", "share", "train", "confirm", "unmask"):
        assert stage in federation.said(0), stage
    assert "unmask" not in federation.said(stranger)


def test_the_readmes_page_from_nothing_to_a_finished_run(shell: Shell) -> None:
    """Its blocks as they are, each person at a home of his own; names and paths are put in."""
    page = (Path(__file__).parents[1] / "README.md").read_text().split("## On real machines")[1]
    operator, participant, lets_in, client, researcher = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[:5]
    port, there = free_port(), shell.home / "operator/.fedapp/server"

    def at(person: str, block: str, old: str = "", new: str = "") -> str:
        """The command that runs a block at somebody's, who has a home."""
        home = shell.home / person
        home.mkdir(exist_ok=True)
        assert old in block
        text = block.replace(old, new).replace("fed.example.org:8443", f"127.0.0.1:{port}")
        (home / "block.sh").write_text(text.replace("fed.example.org", "localhost"))
        return f"env HOME={home} bash -e {home}/block.sh"

    serves = f"exec fedapp server --host 127.0.0.1 --port {port}"
    server = shell.start(at("operator", operator, "fedapp server ", f"{serves} "))
    wait(lambda: (there / "address").exists() or server.poll() is not None, server)
    clients = []
    for name in ("ada", "ben"):
        folder = shell.home / name / ".fedapp/client"
        folder.mkdir(parents=True)
        (folder / "ca.pem").write_bytes((there / "ca.pem").read_bytes())
        table = shell.home / f"{name}.csv"
        rows = [(20 + i * 7 % 70, i * 13 % 301 / 60) for i in range(300)]
        table.write_text(
            "age,dose,outcome\n" + "".join(f"{a},{d},{'yes' if a / 20 + d > 5 else 'no'}\n" for a, d in rows)
        )
        shell.run(at(name, participant, "/path/table.csv", str(table)))
        public = (folder / "node.key.pub").read_text().strip()
        shell.run(at("operator", lets_in, "ecdsa-sha2-nistp384 AAAA...", public))
        block = client.replace("fedapp client ", "exec fedapp client ")  # so that it is what we end
        clients.append(shell.start(at(name, block)))
    shell.run(at("operator", researcher), timeout=240)
    summary = json.loads((shell.home / "result/summary.json").read_text())
    assert summary["epsilon"] == pytest.approx(4, abs=0.01)
    assert [(line["replies"], line["failures"]) for line in lines(shell.home / "result")] == 5 * [(2, 0)]
    for name, started in zip(("ada", "ben"), clients, strict=True):
        spent = Ledger(shell.home / name / ".fedapp/client/ledger.db").spent("ward 3")["example"]
        assert 4 < spent < 8  # composed as a filter, which is dearer than the run's own figure
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0
