"""How loops over values are compiled: once, kept on the disk, and the same everywhere.

Constants and loops of other files are compiled in with a loop. Numba alone compiles again when the loop's own
file has changed; here also when a file has that it imports from, directly or through others.
"""

import re
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from numba import config, njit
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])

_BEGAN = time.time()
_PACKAGE = Path(__file__).parent
_IMPORT = re.compile(rf"^\s*from ({_PACKAGE.name}[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)


@cache
def _imports(path: Path) -> list[Path]:
    """The files of this package that this one imports from."""
    found = []
    for module, names in _IMPORT.findall(path.read_text("utf-8", "replace")):
        within = _PACKAGE.joinpath(*module.split(".")[1:])
        for name in ("", *re.findall(r"\w+", names)):
            found += [
                file
                for file in ((within / name).with_suffix(".py"), within / name / "__init__.py")
                if file.is_file()
            ]
    return found


def sources(path: Path) -> set[Path]:
    """This file and all files of the package that it needs, directly or through others."""
    found, left = set[Path](), [path]
    while left:
        file = left.pop()
        if file not in found:
            found.add(file)
            left += _imports(file)
    return found


@cache
def _hash(files: frozenset[Path]) -> str:
    return sha256(b"".join(sha256(file.read_bytes()).digest() for file in sorted(files))).hexdigest()


class _Stamped:
    """A place of compiled code where it is good for as long as all its sources stay the same."""

    _py_file: str

    def get_source_stamp(self) -> str:
        path = Path(self._py_file)
        if not path.exists():  # as in an executable that has everything in it
            return str(super().get_source_stamp())  # type: ignore[misc]
        files = sources(path)
        if any(_BEGAN < file.stat().st_mtime <= time.time() for file in files):
            return uuid4().hex  # what this process took in may be what was there before: good for it alone
        return _hash(frozenset(files))


class Chosen(_Stamped, caching.UserProvidedCacheLocator):
    """In the folder that NUMBA_CACHE_DIR names."""


class Beside(_Stamped, caching.InTreeCacheLocator):
    """Beside the source."""


class AtHome(_Stamped, caching.UserWideCacheLocator):
    """In the user's cache folder, where the source's cannot be written."""


_PLACES = ",".join(f"{__name__}.{place.__name__}" for place in (Chosen, Beside, AtHome))


def _compiling(**options: bool | str) -> Callable[[F], F]:
    """A decorator like `numba.njit`. Numba asks for a function's place when it is decorated."""

    def decorate(function: F) -> F:
        others = config.CACHE_LOCATOR_CLASSES  # type: ignore[attr-defined]
        config.CACHE_LOCATOR_CLASSES = _PLACES  # type: ignore[attr-defined]
        try:
            compiled = njit(cache=True, error_model="numpy", nogil=True, **options)(function)  # type: ignore[call-overload]
        finally:
            config.CACHE_LOCATOR_CLASSES = others  # type: ignore[attr-defined]
        return cast(F, compiled)

    return decorate


jit = _compiling(_nrt=True)  # said, since what calls a function else decides it

borrowing = _compiling(_nrt=False)
"""For loops that make no arrays: nobody counts who holds those that they are given, and slice."""

inlined = _compiling(forceinline=True, _nrt=False)
"""For parts of loops. They make no arrays either."""

spliced = _compiling(inline="always")
"""For parts whose loops become vector instructions only together with what is around them.

What is `inlined` has been optimised by itself before. This is taken in first, as if it were written there.
"""
