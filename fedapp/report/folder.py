"""The run folder: what a run leaves behind, written so that a crash never leaves half a file."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedapp.errors import ConfigError
from fedapp.report.summary import Summary, to_json

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("fedapp")
PROBE_BYTES = 1 << 20  # enough that a full disk shows before training, little enough to cost nothing


@dataclass(frozen=True)
class Round:
    """One round, one line of rounds.jsonl. Bytes are those of this round, epsilon is what is spent so far."""

    round: int  # from 1
    accuracy: float | None  # 0 to 1
    loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    epsilon: float | None
    seconds: float
    replies: int
    failures: int
    stages: Mapping[str, float | None] | None = None  # seconds by stage, see fedapp/stages.py
    clock: float | None = None  # simulated seconds until its end, see fedapp/speeds.py
    drift: int | None = None  # clients whose data have drifted, see fedapp/tasks/drift.py
    clients_mean: float | None = None  # where clients test: accuracy, where each of them counts the same
    clients_worst: float | None = None  # and that of the worst tenth of them
    clients_tested: int | None = None  # how many did


class RunFolder:
    """One run's folder. Opening it proves that it can be written and holds no run yet (else ConfigError).

    `again` opens that of a run which stopped.
    """

    def __init__(self, path: Path, again: bool = False) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint"
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            for partial in [*path.glob(".*.partial"), *self.checkpoint.glob(".*.partial")] if again else []:
                partial.unlink()  # of a process that was killed while it wrote
            for name in () if again else ("rounds.jsonl", "summary.json"):
                if (path / name).exists():
                    raise ConfigError(f"run_dir {path} already holds a run ({name}): choose another run_dir")
            _probe(path / ".probe")

    def write_config(self, text: str) -> None:
        """config.yaml: the whole configuration of the run."""
        write_text(self.path / "config.yaml", text)

    def write_split(self, counts: list[list[int]]) -> None:
        """labels.json: `counts[client][label]`, how many examples of each label each client holds."""
        rows = [[int(count) for count in row] for row in counts]
        write_text(self.path / "labels.json", json.dumps({"counts": rows}))

    def write_checks(self, counts: list[dict[str, int]]) -> None:
        """data.json: what clients told of the quality of their data, one object each, nobody's name in it.

        No file where nobody told anything.
        """
        if counts:
            write_text(self.path / "data.json", json.dumps({"counts": counts}))

    def append(self, r: Round, lasting: bool = True) -> None:
        """One more line of rounds.jsonl; a failed write leaves nothing.

        On the disk when this returns, with all before it, where it is `lasting`: what a checkpoint follows.
        Waiting for that in each round would take as long as a small one.
        """
        append_line(self.path / "rounds.jsonl", to_json(r), lasting)

    def cut(self, last: int) -> None:
        """Take back what was written after round `last`: lines of rounds.jsonl, and the summary."""
        (self.path / "summary.json").unlink(missing_ok=True)
        if (self.path / "rounds.jsonl").exists():
            lines = [f"{to_json(r)}\n" for r in self.rounds() if r.round <= last]
            write_text(self.path / "rounds.jsonl", "".join(lines))

    def clear(self) -> None:
        """Remove the checkpoints: a run that has finished needs none."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def write_summary(self, summary: Summary) -> None:
        """summary.json, which also says that the run has ended."""
        rounds = self.path / "rounds.jsonl"
        with _explained(rounds):
            if rounds.exists():
                _sync(rounds)
        write_text(self.path / "summary.json", to_json(summary, indent=2) + "\n")

    def write_trace(self, text: str) -> None:
        """trace.json: what `report.trace` made of the stages."""
        write_text(self.path / "trace.json", text)

    def write_model(self, state: Mapping[str, torch.Tensor]) -> None:
        """model.safetensors: tensors of any shape and dtype, by name; tied tensors are written out each."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        with replacing(self.path / "model.safetensors") as partial:
            try:
                save_file(own, partial)
            except SafetensorError as error:  # how it reports a full disk
                raise OSError(str(error)) from error

    def rounds(self) -> list[Round]:
        """The rounds finished so far."""
        return read_rounds(self.path)


def read_rounds(folder: Path) -> list[Round]:
    """The rounds in a run folder, without a last line that a crash cut off; ConfigError if it is damaged."""
    path = folder / "rounds.jsonl"
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        return [Round(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {path} ({error}): restore the file or name another run") from error


def append_line(path: Path, line: str, lasting: bool = True) -> None:
    """Add a line, on the disk when this returns if it is `lasting`; a failed write leaves nothing."""
    with _explained(path), path.open("ab", buffering=0) as file:
        end, data = file.tell(), f"{line}\n".encode()
        try:
            if file.write(data) != len(data):  # a disk about to be full takes part of a write
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if lasting:
                os.fsync(file.fileno())
            if not end:
                _sync(path.parent)  # it is new
        except OSError:  # and no other: a line that is whole stays when Ctrl-C cuts the waiting short
            file.truncate(end)
            raise


def make_folder(path: Path) -> None:
    """A folder inside another one, for good; what is in it is for its owner alone."""
    with _explained(path):
        if not path.exists():
            path.mkdir(mode=0o700)
            _sync(path.parent)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a run folder against other processes; raises ConfigError while another one holds it.

    The hold ends with this process, however it ends.
    """
    place = path.resolve()
    if place in _held:
        yield
        return
    with _explained(path):
        held = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process runs in {path}: wait for it, or end it") from None
        except OSError:  # a network file system may hold files only
            _log.warning("%s cannot be locked: see that no other process resumes it", path)
        _held[place] = held
        yield
    finally:
        _held.pop(place, None)
        os.close(held)


_held = dict[Path, int]()


def _let_go() -> None:
    """A worker outlives its killed parent by moments, and must not keep the folder for so long."""
    for held in _held.values():
        os.close(held)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def write_text(path: Path, text: str) -> None:
    """Put `text` (UTF-8) in a file whole; ConfigError if the disk does not take it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write the yielded file, and it becomes `path` at once; on any error it goes and `path` stays."""
    partial = path.with_name(f".{path.name}.partial")
    with _explained(path):
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync(path.parent)  # or the new name itself may be lost with the power
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _probe(path: Path) -> None:
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path} ({error.strerror or error}): "
            "free space there or set run_dir to a folder you can write"
        ) from error
