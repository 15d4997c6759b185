"""The private rounds that a run has begun, each written down before anything of it is sent."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedapp.errors import ConfigError
from fedapp.report.folder import append_line, make_folder, write_text


class Begun:
    """How many rounds a run has begun, and in how many each partition's data took part.

    Lines of JSON in a file, on the disk before `add` returns, and only then may messages be sent; without a
    file, in memory. A run that goes on after a crash adds up all of them: a round that it repeats was begun
    twice, and what had left of it the first time is charged. No checkpoint takes a line back.

    *Formal guarantees.* None of its own: `rounds` and `took_part` are upper bounds of what was released, as
    accountants need them. Where nodes start anew (`anew`), a partition may be other data than before, so
    each is charged what the one was that took part most often; and so is one that a node joins with (`join`)
    which does not tell whose place its data had before.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Go on with what the file holds. Raises ConfigError where that is damaged."""
        self.rounds, self.took_part = 0, Counter[int]()
        self.moved = False  # partitions may be other data than before
        self._file = file
        if file is None or not file.exists():
            return
        *lines, torn = file.read_text(encoding="utf-8").split("\n")
        try:
            for line in lines:
                self._count(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"cannot read {file} ({error}), and a private run does not go on without it: "
                "restore the file, or begin a new run"
            ) from error
        if torn:  # nothing of that round was sent
            write_text(file, "".join(f"{line}\n" for line in lines))

    def add(self, number: int, cohort: Iterable[int]) -> None:
        """One more round, and the partitions that train in it. Raises ConfigError where the disk is full."""
        self._write({"round": number, "cohort": list(cohort)})

    def more(self, cohort: Iterable[int]) -> None:
        """More partitions that train in the round that began last."""
        self._write({"more": list(cohort)})

    def anew(self, clients: int) -> None:
        """From here on each of so many partitions may be any of the data."""
        self._write({"anew": clients})

    def join(self, partition: int) -> None:
        """From here on this partition may be any of the data."""
        self._write({"join": partition})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            make_folder(self._file.parent)
            append_line(self._file, json.dumps(event))
        self._count(event)

    def _count(self, event: dict[str, Any]) -> None:
        if "anew" in event:
            self.moved = True
            most = max(self.took_part.values(), default=0)
            self.took_part = Counter(dict.fromkeys(range(event["anew"]), most))
        elif "join" in event:
            self.moved = True
            self.took_part[event["join"]] = max(self.took_part.values(), default=0)
        elif "more" in event:
            self.took_part.update(event["more"])
        else:
            self.took_part.update(event["cohort"])
            self.rounds += 1
