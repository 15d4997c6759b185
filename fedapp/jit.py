"""How loops over values are compiled: once, kept on the disk, and the same everywhere.

Constants and loops of other files are compiled in with a loop. Numba alone compiles again when the loop's own
file has changed; here also when a file has that it imports from, directly or through others.
"""

import re
from functools import cache
from hashlib import sha256
from pathlib import Path

from numba import config, njit
from numba.core import caching

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
def _stamp(path: Path) -> str:
    return sha256(b"".join(sha256(file.read_bytes()).digest() for file in sorted(sources(path)))).hexdigest()


class _Stamped:
    """A place of compiled code where it is good for as long as all its sources stay the same."""

    _py_file: str

    def get_source_stamp(self) -> str:
        return _stamp(Path(self._py_file))


class Chosen(_Stamped, caching.UserProvidedCacheLocator):
    """In the folder that NUMBA_CACHE_DIR names."""


class Beside(_Stamped, caching.InTreeCacheLocator):
    """Beside the source."""


class AtHome(_Stamped, caching.UserWideCacheLocator):
    """In the user's cache folder, where the source's cannot be written."""


# Numba's NUMBA_CACHE_LOCATOR_CLASSES; its own last two are for notebooks and archives.
_PLACES = (
    *(f"{__name__}.{place.__name__}" for place in (Chosen, Beside, AtHome)),
    "IPythonCacheLocator",
    "ZipCacheLocator",
)
config.CACHE_LOCATOR_CLASSES = ",".join(_PLACES)  # type: ignore[attr-defined]

jit = njit(cache=True, error_model="numpy", nogil=True)

inlined = njit(cache=True, error_model="numpy", nogil=True, forceinline=True)
"""For parts of loops: where none is called, arrays are not counted at calls, a tenth of a coder's time."""
