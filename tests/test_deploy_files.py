"""scripts/deploy starts what there is: its commands run, and make what its services look for."""

import argparse
import json
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import Any

import hatchling.build
import pytest
import yaml

from fedapp.cli import PROGRAMS
from fedapp.deploy import client, keys, preflight, server
from fedapp.errors import FedappError
from fedapp.privacy.ledger import Ledger

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "scripts/deploy"
HOME = "/var/lib/fedapp"  # of the user that all of it runs as
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "server": server._parser,
    "client": client._parser,
}


def unit(name: str) -> ConfigParser:
    read = ConfigParser(strict=False, interpolation=None, delimiters="=", comment_prefixes="#")
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(DEPLOY / f"fedapp-{name}.service")
    return read


def of_unit(name: str) -> list[str]:
    """The command of a unit, as its process sees it."""
    service = unit(name)["Service"]
    text = service["ExecStart"].replace("\\\n", " ")
    for variable, value in re.findall(r"(\w+)=(\S+)", service.get("Environment", "")):
        text = text.replace(f"${{{variable}}}", value)
    program, *words = shlex.split(text)
    assert program == "/opt/fedapp/bin/fedapp"
    return words


def of_compose(name: str) -> list[str]:
    """The command of a service, where no variable is set."""
    return shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE["services"][name]["command"]))


def options(words: list[str]) -> argparse.Namespace:
    """What the program itself makes of a command; exits 2 where it does not know an option."""
    return PARSERS[words[0]]().parse_args(words[1:])


def run(pattern: str, file: str, home: Path) -> int:
    """Run the commands in a file's comments, in a folder that stands for HOME; returns how many."""
    found = re.findall(rf"^#   {pattern}(.*)$", (DEPLOY / file).read_text(), re.MULTILINE)
    for command in found:
        program, *words = shlex.split(command.replace(HOME, str(home)))
        import_module(PROGRAMS[program]).main(words)
    return len(found)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, where all of it runs, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(keys, "FOLDER", tmp_path / ".fedapp/server")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ready(home: Path, given: argparse.Namespace) -> None:
    """A client finds its key and its ledger, which has a limit."""
    folder = Path(str(given.folder).replace(HOME, str(home))).expanduser()
    preflight.private_key(given.key or folder / "node.key")
    ledger = Path(str(given.ledger).replace(HOME, str(home)))
    (limit,) = Ledger(folder / ledger).limits("data")  # what a client calls them where nobody else does
    assert limit.epsilon == 8


# systemd


def test_units_start_programs_in_folders_that_they_may_write_to() -> None:
    for name in PARSERS:
        given, service = options(of_unit(name)), unit(name)["Service"]
        assert given.folder == Path(HOME, name)
        assert (service["User"], service["ReadWritePaths"]) == ("fedapp", HOME)
        assert not given.insecure
    given = options(of_unit("client"))
    assert given.folder == Path(unit("client")["Service"]["WorkingDirectory"])  # paths begin there
    assert given.server.rpartition(":")[2] == str(options(of_unit("server")).port)


def test_reload_is_what_makes_a_server_take_a_certificate() -> None:
    assert unit("server")["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert "ExecReload" not in unit("client")["Service"]  # SIGHUP would end it


def test_the_commands_for_units_make_what_these_look_for(home: Path) -> None:
    assert run("/opt/fedapp/bin/fedapp ", "fedapp-server.service", home) == 2
    keys.check(home / "server")
    assert run("/opt/fedapp/bin/fedapp ", "fedapp-client.service", home) == 2
    ready(home, options(of_unit("client")))


# Docker


def test_services_start_programs_with_volumes_and_ports_that_there_are() -> None:
    for name in PARSERS:
        given, service = options(of_compose(name)), COMPOSE["services"][name]
        mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
        assert {source for source in mounts if not source.startswith("./")} == {name} <= {*COMPOSE["volumes"]}
        assert mounts[name] == HOME
        build = service["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
    given = options(of_compose("client"))
    for file in (given.ca, given.data_config, given.policy):
        assert file.parent == Path(mounts["./data"])
    (port,) = COMPOSE["services"]["server"]["ports"]
    assert port == "{0}:{0}".format(options(of_compose("server")).port)
    assert "ports" not in COMPOSE["services"]["client"]


def test_the_commands_for_services_make_what_these_look_for(home: Path) -> None:
    assert run("docker compose run --rm server ", "compose.yaml", home) == 1
    assert run(r"docker compose exec server fedapp (?=keys )", "compose.yaml", home) == 1
    assert options(of_compose("server")).folder == keys.FOLDER
    keys.check(keys.FOLDER)
    with pytest.raises(FedappError, match="no public key"):  # in the place of one there are dots
        run(r"docker compose exec server fedapp (?=nodes )", "compose.yaml", home)
    (ca,) = re.findall(
        r"docker compose cp server:(\S+) \.$", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE
    )
    assert Path(ca.replace(HOME, str(home))).read_bytes() == (keys.FOLDER / keys.CA).read_bytes()
    assert run("docker compose run --rm client ", "compose.yaml", home) == 2
    ready(home, options(of_compose("client")))


def test_an_image_is_made_of_what_is_copied_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        place = tmp_path / target.strip("/")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, place)
    monkeypatch.chdir(tmp_path / "src")
    wheel = hatchling.build.build_wheel(os.fspath(tmp_path))
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    assert {"fedapp/cli.py", "fedapp/conf/config.yaml", "fedapp/pyproject.toml", "fedapp/LICENSE"} <= {*names}


def test_an_image_runs_fedapp_in_the_home_that_volumes_keep() -> None:
    said = dict(re.findall(r"^(\w+) (.*)$", DOCKERFILE, re.MULTILINE))
    assert json.loads(said["ENTRYPOINT"]) == ["fedapp"]
    assert said["WORKDIR"] == HOME
    assert f"useradd --create-home --home-dir {HOME} --uid 1000 {said['USER']}" in said["RUN"]
