"""`fedapp check`: a table of counts, and one line for each problem of a client's own data."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedapp import config
from fedapp.errors import ConfigError
from fedapp.tasks.classification import Classification
from fedapp.tasks.quality import Findings


def run(overrides: list[str], console: Console | None = None) -> Findings:
    """Check what data=<file or folder> names by the task of the other overrides; print and return it.

    Raises ConfigError for settings that do not fit.
    """
    given = dict(part.partition("=")[::2] for part in overrides)
    if not (own := given.pop("data", "")):
        raise ConfigError("no data to check: add data=<the file or folder that the node is to train on>")
    task = config.job(config.compose(shlex.join(f"{key}={value}" for key, value in given.items()))).task
    if not isinstance(task, Classification):
        raise ConfigError(f"{type(task).__name__} cannot check data: choose task=csv or image_folder")
    found, shown = task.examined(Path(own).expanduser()), console or Console()
    table = Table("count", "of this data", title=own, title_justify="left")
    for name, count in found.counts.items():
        table.add_row(name, str(count))
    shown.print(table)
    for problem in found.problems:
        said = f"{'stops training' if problem.fatal else 'look at'}: {problem.said}"
        shown.print(said, soft_wrap=True, markup=False, highlight=False)
    if not found.problems:
        shown.print("nothing is wrong with it")
    return found
