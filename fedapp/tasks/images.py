"""Images that come as one known data set: Fashion-MNIST and scikit-learn's digits."""

import gzip
import os
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedapp import check
from fedapp.errors import ConfigError, DataError
from fedapp.tasks import Data
from fedapp.tasks.classification import Classification, held_out
from fedapp.tasks.features import CHOICES, features, features_shape

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# Public constants, so that scaling tells nothing about anyone's data.
MEAN, STD = 0.2860, 0.3530


@dataclass(frozen=True, kw_only=True)
class FashionMnist(Classification):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, (1, 28, 28), ten classes.

    Read from $FEDAPP_DATA, from Debian's package, or downloaded by torchvision. A client's own data is a
    folder with train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz.

    features: oriented, scattering (`fedapp.tasks.features`) or pixels. Raises ConfigError for anything else.
    """

    features: str = "oriented"

    def __post_init__(self) -> None:
        super().__post_init__()
        check.choice("task.features", self.features, CHOICES)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(17, 7, 7) oriented or (81, 7, 7) scattering features, or (1, 28, 28): one grey channel."""
        return features_shape(self.features, 1, 28, 28)

    @property
    def classes(self) -> int:
        """Ten kinds of clothes."""
        return 10

    def train_data(self) -> Data:
        """60,000 images. Raises DataError when they are nowhere to be found or damaged."""
        return _kept(_folder(), "train", self.features)

    def test_data(self) -> Data | None:
        """10,000 images. Raises DataError when they are nowhere to be found or damaged."""
        return _kept(_folder(), "t10k", self.features)

    def read(self, path: Path) -> Data:
        """The images of a folder's train pair. Raises DataError when a file is missing or damaged."""
        return _pair(path, "train", self.features)


@dataclass(frozen=True, kw_only=True)
class Digits(Classification):
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8), ten classes; a fifth is held out."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(1, 8, 8): one grey channel."""
        return (1, 8, 8)

    @property
    def classes(self) -> int:
        """Ten digits."""
        return 10

    def train_data(self) -> Data:
        """1,438 images."""
        return _digits()[0]

    def test_data(self) -> Data | None:
        """359 images."""
        return _digits()[1]

    def read(self, path: Path) -> Data:
        """Raises ConfigError: the digits come with scikit-learn and from no file."""
        raise ConfigError(
            f"task=digits reads no own data, got data={path}: use task=image_folder or task=csv"
        )


@cache
def _digits() -> tuple[Data, Data]:
    # What sklearn.datasets.load_digits reads, without the seconds that importing scikit-learn takes.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    x = torch.tensor(table[:, :-1] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(table[:, -1], dtype=torch.int64)
    train, test = (torch.from_numpy(part) for part in held_out(y.numpy(), 0.2))
    return Data(x[train], y[train]), Data(x[test], y[test])


def _files(split: str) -> tuple[str, str]:
    return f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"


def _folder() -> Path:
    return _find(os.environ.get("FEDAPP_DATA"), os.environ.get("XDG_CACHE_HOME"))


@cache  # each message asks
def _find(chosen: str | None, caches: str | None) -> Path:
    """The first folder that holds the four files, downloading them where none does."""
    cached = Path(caches or Path.home() / ".cache") / "fedapp"
    roots = [Path(chosen).expanduser(), DEBIAN, cached] if chosen else [DEBIAN, cached]
    for folder in (root / sub for root in roots for sub in ("", "fashion-mnist", "FashionMNIST/raw")):
        if all((folder / name).is_file() for split in ("train", "t10k") for name in _files(split)):
            return folder
    return _download(roots[0] if chosen else cached)


def _download(root: Path) -> Path:
    try:
        from torchvision.datasets import FashionMNIST

        for train in (True, False):
            FashionMNIST(str(root), train=train, download=True)
    except (OSError, RuntimeError, ImportError) as error:
        raise DataError(
            f"Fashion-MNIST is not here and could not be downloaded ({error}): set FEDAPP_DATA to a folder "
            "with its four .gz files, or apt install dataset-fashion-mnist, or allow network for torchvision"
        ) from error
    return root / "FashionMNIST" / "raw"


def _pair(folder: Path, split: str, choice: str) -> Data:
    """The images and labels of one split of a folder."""
    names = _files(split)
    images, labels = _read_idx(folder / names[0], 3), _read_idx(folder / names[1], 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{folder / names[0]} has images of {images.shape[1:]} pixels: give 28 x 28")
    if len(images) != len(labels):
        raise DataError(
            f"{folder} has {len(images)} {split} images and {len(labels)} labels: fetch the files again"
        )
    if len(labels) and labels.max() > 9:
        raise DataError(f"{folder / names[1]} has a label {labels.max()}: labels are 0 to 9")
    x = torch.from_numpy(images.astype(np.float32)).unsqueeze(1).div_(255).sub_(MEAN).div_(STD)
    return Data(features(choice, x), torch.from_numpy(labels.astype(np.int64)))


_kept = cache(_pair)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of a gzipped IDX file, shaped as its header says."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): fetch the file again") from error
    start = 4 + 4 * dimensions
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < start:
        raise DataError(f"{path} is no IDX file of bytes in {dimensions} dimensions: fetch the file again")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dimensions, offset=4))
    expected = start + int(np.prod(shape, dtype=object))
    if len(raw) != expected:
        raise DataError(f"{path} has {len(raw)} bytes where its header says {expected}: fetch the file again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
