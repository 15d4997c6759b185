"""`fedapp submit`: send fedapp and settings to a federation, follow the run, bring its folder."""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedapp import config
from fedapp.deploy import following
from fedapp.deploy.control import access, arguments
from fedapp.deploy.starting import start
from fedapp.errors import ConfigError


def main(given: Sequence[str]) -> None:
    """Submit a run, or one after the other of a sweep. Raises ConfigError before anything is sent."""
    parser = _parser()
    options, overrides = parser.parse_known_args(given)
    if unknown := [word for word in overrides if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    jobs = list(_sweep(overrides)) if options.multirun else [overrides]
    places = [_checked(job) for job in jobs]
    at = access(options)
    for number, (job, place) in enumerate(zip(jobs, places, strict=True)):
        if len(jobs) > 1:
            print(f"[{number + 1}/{len(jobs)}] {' '.join(job)}")
            place = place / str(number)
        sent = [word for word in job if not word.startswith("run_dir=")]  # which is a place on this machine
        with at.control() as client:
            run = start(client, sent)
        print(f"run {run} is submitted; it goes on when this window is closed", file=sys.stderr)
        if not options.detach:
            following.watch(at, run, place)


def _checked(overrides: Sequence[str]) -> Path:
    """See that the settings make a job; returns the run folder that they name."""
    tree = config.compose(shlex.join(overrides))
    if tree.resume is not None:
        raise ConfigError(f"resume={tree.resume}: a run on a server goes on by `fedapp runs resume RUN`")
    config.job(tree)
    place = Path(str(tree.run_dir))
    if place.exists() and any(place.iterdir()):
        raise ConfigError(f"run_dir={place} is not empty: set run_dir to another folder")
    return place


def _sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of the values given, as Hydra's multirun makes them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(config.one_line(error)) from error
    axes = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [str(one.input_line)]
        for one in parsed
    ]
    yield from (list(job) for job in itertools.product(*axes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedapp submit",
        description="Train on a federation: takes the settings that `fedapp simulate` takes.",
        usage="fedapp submit [options] [GROUP=CHOICE ...] [KEY=VALUE ...]",
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="KEY=A,B: one run for each value")
    parser.add_argument("--detach", action="store_true", help="do not wait for the run to end")
    arguments(parser)
    return parser
