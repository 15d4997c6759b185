"""Images in folders named after their class, laid out as torchvision's ImageFolder reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, DataError
from fedapp.tasks import Data
from fedapp.tasks.classification import Classification, check_names, held_out, once
from fedapp.tasks.features import CHOICES, LEAST, features, features_shape
from fedapp.tasks.quality import Findings, Problem, of_data

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Classification):
    """<path>/<class>/<image>, or <path>/train/<class>/<image> beside <path>/test/<class>/<image>.

    path: the tree; null where every node brings its own data. class_names: the classes in order; null takes
    the sorted folder names of the training tree. size: images are cropped to a square and scaled to
    size x size pixels. channels: 1 (grey) or 3 (red, green, blue). Without a test folder, test_fraction of
    the training images is held out, the same ones for every seed. Pixels become -1 to 1 by public constants.
    features: pixels, oriented or scattering (`fedapp.tasks.features`). All images stay in memory.

    Raises ConfigError for a value out of range, or when neither path nor class_names says the classes.
    """

    path: str | None = None
    class_names: Sequence[str] | None = None
    size: int = 32
    channels: int = 3
    features: str = "pixels"
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_names is not None:
            object.__setattr__(self, "class_names", check_names("class_names", self.class_names))
        if self.path is None and self.class_names is None:
            raise ConfigError(
                "task=image_folder does not know its classes: set task.path, or task.class_names=[a,b]"
            )
        check.choice("task.features", self.features, CHOICES)
        check.whole("task.size", self.size, LEAST[self.features], 4096)
        if self.channels not in (1, 3):
            raise ConfigError(
                f"task.channels must be 1 (grey) or 3 (colour), got {self.channels}: set task.channels=3"
            )
        check.real("task.test_fraction", self.test_fraction, low=0.0, below=1.0)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, size, size) pixels, or (17 or 81 * channels, size // 4, size // 4) features."""
        return features_shape(self.features, self.channels, self.size, self.size)

    @property
    def classes(self) -> int:
        """How many class folders the training tree has, or names were given."""
        return len(self._names())

    def train_data(self) -> Data:
        """The training images. Raises ConfigError without a path, DataError for an unreadable tree."""
        return self._data()[0]

    def test_data(self) -> Data | None:
        """The test images; None without a path, or with nothing held out."""
        return self._data()[1] if self.path is not None else None

    def read(self, path: Path) -> Data:
        """A client's own tree: it may lack classes, but must have no unknown one. Raises DataError."""
        files = _images(path)
        if not files:
            raise DataError(
                f"{path} has no images: put {', '.join(sorted(EXTENSIONS))} files into its class folders"
            )
        return self._own(files, path)

    def arrived(self, path: Path, *narrowed: Callable[[Any], Any]) -> Data:
        """The same by when each file became what it is (its inode's change time), the first ones first.

        An image is to be written elsewhere, or under a name with another ending, and moved to its place.
        """
        files = sorted(_images(path), key=lambda image: (image[0].stat().st_ctime_ns, image[0]))
        if not files:
            return _nothing(self.input_shape)
        return self._own(files, path)

    def examined(self, path: Path, *narrowed: Callable[[Any], Any], growing: bool = False) -> Findings:
        """A check of all images, rather than up to the first that cannot be read."""
        try:
            files = _images(path)
        except DataError as error:
            return Findings({}, (Problem(str(error), fatal=True),))
        names, problems, good = self._names(), list[Problem](), list[tuple[Path, str]]()
        for file, name in files:
            try:
                self._pixels(file)
                good += [(file, name)] * (name in names)
            except DataError as error:
                logged = "an image cannot be read: `fedapp check` names it"
                problems.append(Problem(str(error), True, logged))
        strange = [name for _, name in files if name not in names]
        if strange:
            many, some = f"{len(strange)} images in folders", sorted(set(strange))[:5]
            none = f"that are none of {list(names)}: rename the folders"
            problems.append(Problem(f"{many} {some} {none}", True, f"{many} {none}"))
        if not files and not growing:
            problems.append(Problem("there are no images: put some into the class folders", fatal=True))
        data = self._own(good, path) if good else _nothing(self.input_shape)
        found = of_data(data, names)
        unread = len(problems) - bool(strange) - (not files and not growing)
        counts = {"examples": len(files), "values-malformed": unread, "labels-unknown": len(strange)}
        return Findings({**found.counts, **counts}, (*problems, *found.problems))

    @property
    def labels(self) -> Sequence[str]:
        """The names of the class folders."""
        return self._names()

    def _own(self, files: Sequence[tuple[Path, str]], path: Path) -> Data:
        names = self._names()
        unknown = sorted({name for _, name in files} - set(names))
        if unknown:
            raise DataError(
                f"{path} has unknown classes {unknown}: rename the folders to some of {list(names)}"
            )
        pixels = np.empty((len(files), self.channels, self.size, self.size), dtype=np.float32)
        for index, (file, _) in enumerate(files):
            pixels[index] = self._pixels(file)
        labels = [names.index(name) for _, name in files]
        images = torch.from_numpy(pixels).div_(127.5).sub_(1)
        return Data(features(self.features, images), torch.tensor(labels, dtype=torch.int64))

    def _names(self) -> tuple[str, ...]:
        return tuple(self.class_names) if self.class_names is not None else tuple(_classes(self._trees()[0]))

    def _trees(self) -> tuple[Path, Path | None]:
        """The training tree, and the test tree where there is one."""
        if self.path is None:
            raise ConfigError(
                "task=image_folder has no training images: set task.path, or give every node its own data"
            )
        root = Path(self.path).expanduser()
        if not (root / "train").is_dir():
            return root, None
        return root / "train", root / "test" if (root / "test").is_dir() else None

    @once
    def _data(self) -> tuple[Data, Data | None]:
        train_tree, test_tree = self._trees()
        data = self.read(train_tree)
        if test_tree is not None:
            return data, self.read(test_tree)
        train, test = (torch.from_numpy(part) for part in held_out(data.y.numpy(), self.test_fraction))
        return Data(data.x[train], data.y[train]), Data(data.x[test], data.y[test]) if len(test) else None

    def _pixels(self, file: Path) -> NDArray[np.uint8]:
        """One image as bytes, (channels, size, size)."""
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"{file} has more than 8 bits a channel: convert it to 8 bits")
                plain = image.convert("L" if self.channels == 1 else "RGB")
                square = ImageOps.fit(plain, (self.size, self.size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{file} cannot be read as an image ({error}): mend or remove it") from error
        return np.asarray(square).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)


def _nothing(shape: tuple[int, ...]) -> Data:
    return Data(torch.empty((0, *shape)), torch.empty(0, dtype=torch.int64))


def _classes(tree: Path) -> list[str]:
    """The class folders of a tree, sorted. Raises DataError when there are none."""
    if not tree.is_dir():
        raise DataError(
            f"{tree} is not a folder: set the path to a folder with one folder of images per class"
        )
    names = sorted(
        child.name for child in tree.iterdir() if child.is_dir() and not child.name.startswith(".")
    )
    if not names:
        raise DataError(f"{tree} has no class folders: put the images into one folder per class")
    return names


def _images(tree: Path) -> list[tuple[Path, str]]:
    """Every image of a tree with its class, sorted. Raises DataError where there are no class folders."""
    return [
        (file, name)
        for name in _classes(tree)
        for file in sorted((tree / name).rglob("*"))
        if file.suffix.lower() in EXTENSIONS and file.is_file()
    ]
