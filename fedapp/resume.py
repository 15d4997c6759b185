"""Where a run begins: anew, or where the one in a run folder stopped."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedapp import config
from fedapp.checkpoint import Checkpoints, State
from fedapp.errors import ConfigError
from fedapp.report.folder import alone
from fedapp.report.summary import read_summary


@dataclass(frozen=True)
class Start:
    """Settings and folder of a run; of one that stopped also its last checkpoint, and what to say of it."""

    tree: DictConfig
    path: Path
    again: bool = False
    state: State | None = None
    said: tuple[str, ...] = ()

    @property
    def finished(self) -> int:
        """The last round that the checkpoint counts."""
        return int(self.state["federation"]["finished"]) if self.state else 0


@contextmanager
def start(tree: DictConfig, path: Path, overrides: Iterable[str] | None = None) -> Iterator[Start]:
    """Where the run that these settings describe begins: in `path`, or in the folder that `resume` names.

    A run that goes on does so with the settings stored in its folder, and no other process may be at it
    meanwhile. What is given beside `resume` must agree: all of `tree`, or, given `overrides`, what they name.
    Raises ConfigError, which shows what differs, or why there is nothing to go on with.
    """
    if tree.resume is None:
        yield Start(tree, path)
        return
    path = Path(str(tree.resume))
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"resume={path} is no run folder (no config.yaml): name one that a run has left")
    with alone(path):
        yield _stopped(tree, path, overrides)


def _stopped(tree: DictConfig, path: Path, overrides: Iterable[str] | None) -> Start:
    if (path / "summary.json").exists() and not read_summary(path / "summary.json").interrupted:
        raise ConfigError(f"the run in {path} is finished: there is nothing to resume")
    try:
        stored = OmegaConf.load(path / "config.yaml")
        assert isinstance(stored, DictConfig)
        state, said = Checkpoints(path / "checkpoint", None).load()
        if state is not None:
            began = OmegaConf.create(state["config"])
            assert isinstance(began, DictConfig)
            _refuse(
                config.differences(began, stored), f"{path / 'config.yaml'} was changed after the run began"
            )
        _refuse(config.differences(stored, tree, overrides), f"resume={path} goes on with its own settings")
        settings = config.follow(stored, tree, overrides)
    except (OSError, YAMLError, OmegaConfBaseException, AssertionError) as error:
        raise ConfigError(f"cannot read {path / 'config.yaml'} ({error}): restore it") from error
    settings.run_dir = str(path)
    begin = Start(settings, path, True, state)
    at = f"after round {begin.finished}" if state else "from round 1: there is no checkpoint"
    return replace(begin, said=(*said, f"Going on {at}"))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _refuse(differences: dict[str, tuple[object, object]], why: str) -> None:
    if differences:
        shown = "; ".join(f"{key}: {_text(was)} -> {_text(now)}" for key, (was, now) in differences.items())
        raise ConfigError(f"{why}, and these differ: {shown}. Set them back, or begin a new run")
