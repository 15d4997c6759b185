"""Checkpoints: all that the next round depends on, so that a run which was killed goes on as if it had not.

A state is a tree of dicts and lists with numbers, text and arrays at its leaves. In a safetensors file arrays
keep their dtypes and shapes, and the rest is JSON beside them; there is no pickle. Each part of a run
gives its own (`state`) and takes it back (`restore`).
"""

import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedapp.engine.local import LocalGrid
from fedapp.errors import ConfigError, DecodeError
from fedapp.report.folder import make_folder, replacing

CLIENTS, BEGUN = "clients.sqlite", "begun.jsonl"  # what simulated clients keep; private rounds that began
_FORMAT = 4
State = dict[str, Any]


class Checkpoints:
    """The last two states of a run, in a folder: one file a state, and one for what simulated clients keep.

    every: seconds from one to the next, 0 for one after each round, None for none at all.

    Clients' states of a round are committed first, and the file of that round then counts them: whatever
    comes between, both states before stay whole.
    """

    def __init__(self, folder: Path, every: float | None) -> None:
        self._folder, self._every, self._last = folder, every, time.monotonic()
        self._finished = 0  # the round of the newest state that is whole

    @property
    def due(self) -> bool:
        """Whether it is time for one."""
        return self._every is not None and time.monotonic() >= self._last + self._every

    def save(self, finished: int, state: State, grid: Grid) -> None:
        """Write the state at the end of round `finished`. Raises ConfigError, and then nothing is lost."""
        make_folder(self._folder)
        kept = {number: path for number, path in self._kept().items() if number <= self._finished}
        if isinstance(grid, LocalGrid):
            state = {**state, "clients": grid.commit(finished, min(kept, default=0))}
        write(self._folder / f"round-{finished:06d}.safetensors", state)
        for number, path in self._kept().items():
            if number not in (finished, max(kept, default=0)):
                path.unlink()
        self._last, self._finished = time.monotonic(), finished

    def load(self) -> tuple[State | None, list[str]]:
        """The newest state that is whole, None where none is; and what there is to say of the others."""
        said: list[str] = []
        for number, path in sorted(self._kept().items(), reverse=True):
            try:
                state, self._finished = read(path), number
                return state, said
            except DecodeError as error:
                said.append(str(error))
        return None, said

    def _kept(self) -> dict[int, Path]:
        """The files by their rounds."""
        files = {path.stem.removeprefix("round-"): path for path in self._folder.glob("round-*.safetensors")}
        return {int(number): path for number, path in files.items() if number.isdigit()}


def write(path: Path, state: State) -> None:
    """Put a state in a file, whole or not at all. Raises ConfigError where the disk does not take it."""
    arrays: dict[str, NDArray[Any]] = {}
    text = json.dumps(_without(state, "", arrays))
    told = {"format": str(_FORMAT), "state": text, "crc": str(_crc(text, arrays))}
    with replacing(path) as partial:
        try:
            save_file(arrays, partial, told)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error


def read(path: Path) -> State:
    """The state in a file. Raises DecodeError where it is damaged, ConfigError if another fedapp wrote it."""
    try:
        with safe_open(path, "np") as file:
            told = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no Mapping)
        if told.get("format") != str(_FORMAT):
            raise ConfigError(f"the checkpoint {path} is none that this fedapp wrote: use the one that did")
        if told["crc"] != str(_crc(told["state"], arrays)):
            raise ValueError("its checksum is another one")
        state: State = _with(json.loads(told["state"]), arrays)
        return state
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DecodeError(f"the checkpoint {path} is damaged ({error})") from error


def _without(tree: Any, name: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """The tree with the names of its arrays in their place; they go to `arrays`."""
    if isinstance(tree, (np.ndarray, np.generic)):
        arrays[name] = np.array(tree, order="C")  # safetensors takes the memory as it lies
        return {"array": name}
    if isinstance(tree, Mapping):
        return {key: _without(value, f"{name}/{key}".lstrip("/"), arrays) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without(value, f"{name}/{index}", arrays) for index, value in enumerate(tree)]
    return tree


def _with(tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Undo `_without`."""
    if isinstance(tree, list):
        return [_with(value, arrays) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"array"} and isinstance(tree["array"], str):
        return arrays[tree["array"]]
    return {key: _with(value, arrays) for key, value in tree.items()}


def _crc(text: str, arrays: Mapping[str, NDArray[Any]]) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, crc)
    return crc
