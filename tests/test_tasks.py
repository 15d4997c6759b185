"""The tasks: what they read, how they split it, what they compute, and clear errors for what they cannot."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from fedapp.errors import ConfigError, DataError
from fedapp.models import Cnn, Logistic, Mlp
from fedapp.tasks import Data, Task, images
from fedapp.tasks import partition as splitting
from fedapp.tasks.classification import Classification, held_out
from fedapp.tasks.features import oriented
from fedapp.tasks.folders import ImageFolder
from fedapp.tasks.images import Digits, FashionMnist
from fedapp.tasks.partition import Dirichlet, Iid, Natural, Partition, Pathological, Shard
from fedapp.tasks.tables import Csv

CONF = Path(__file__).parents[1] / "conf"
RUN: dict[str, Any] = {"build": Logistic(), "partition": Iid(), "clients": 3, "seed": 0}
LABELS = np.random.default_rng(7).integers(0, 10, 3000)
PARTITIONS: list[Partition] = [Iid(), Dirichlet(), Shard(), Pathological()]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDAPP_DATA", raising=False)


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_fashion(folder: Path, train: int = 30, test: int = 12) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))


def write_table(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_images(tree: Path, counts: dict[str, int], side: int = 12) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (tree / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (side, side + 4), (40 * number, 10 * index, 255)).save(
                tree / name / f"{index}.png"
            )
    return tree


# The splits


@pytest.mark.parametrize("partition", PARTITIONS)
def test_parts_are_disjoint_and_cover_what_is_assigned(partition: Partition) -> None:
    parts = partition.split(LABELS, 12, 0)
    together = np.concatenate(parts)
    assert len(parts) == 12
    assert all(part.dtype == np.int64 for part in parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < len(LABELS)
    assert len(together) == len(LABELS)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_seed_fixes_the_split(
    partition: Partition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = partition.split(LABELS, 12, 0), partition.split(LABELS, 12, 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    again = partition.split(LABELS, 12, 0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_parts_have_equal_sizes_and_mixed_labels() -> None:
    parts = Iid().split(np.sort(LABELS), 7, 0)
    assert {len(part) for part in parts} <= {3000 // 7, 3000 // 7 + 1}
    assert all(len(np.unique(np.sort(LABELS)[part])) == 10 for part in parts)


def test_dirichlet_skews_more_for_a_smaller_alpha_and_keeps_its_minimum() -> None:
    def skew(alpha: float) -> float:
        parts = Dirichlet(alpha=alpha).split(LABELS, 10, 0)
        assert min(len(part) for part in parts) >= 10
        shares = [np.bincount(LABELS[part], minlength=10).max() / len(part) for part in parts]
        return float(np.mean(shares))

    assert skew(0.3) > skew(1.0) > skew(100.0)


def test_pathological_gives_each_client_exactly_its_classes() -> None:
    parts = Pathological(num_classes_per_partition=3).split(LABELS, 12, 0)
    assert all(len(np.unique(LABELS[part])) == 3 for part in parts)


def test_shards_hold_few_labels() -> None:
    parts = Shard(num_shards_per_partition=1).split(LABELS, 20, 0)
    assert all(len(np.unique(LABELS[part])) <= 2 for part in parts)
    assert {len(part) for part in parts} == {150}


def test_natural_gives_one_client_per_value_in_order() -> None:
    column = np.array(["b", "a", "c", "a", "b"])
    parts = Natural().split(np.zeros(5, np.int64), 3, 0, column)
    assert [sorted(part.tolist()) for part in parts] == [[1, 3], [0, 4], [2]]
    kept_as_objects = Natural().split(np.zeros(5, np.int64), 3, 0, column.astype(object))
    assert [sorted(part.tolist()) for part in kept_as_objects] == [[1, 3], [0, 4], [2]]


def test_clients_may_have_one_example_or_none() -> None:
    assert [len(part) for part in Iid().split(LABELS[:4], 4, 0)] == [1, 1, 1, 1]
    parts = Dirichlet(alpha=0.01, min_partition_size=0).split(LABELS[:40], 30, 0)
    assert min(len(part) for part in parts) == 0
    assert all(part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))


@pytest.mark.parametrize(
    ("partition", "labels", "clients", "message"),
    [
        (Iid(), LABELS[:5], 6, "5 training examples, got 6"),
        (Iid(), LABELS, 0, "got 0"),
        (Dirichlet(min_partition_size=400), LABELS, 10, r"min_partition_size=400.*3000 examples over 10"),
        (Shard(num_shards_per_partition=400), LABELS, 10, "num_shards_per_partition=400"),
        (Pathological(num_classes_per_partition=11), LABELS, 10, "num_classes_per_partition=11"),
        (Natural(), LABELS, 10, "task.client_column"),
    ],
)
def test_splits_that_cannot_be(
    partition: Partition, labels: NDArray[np.int64], clients: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partition.split(labels, clients, 0)


def test_natural_needs_as_many_clients_as_values() -> None:
    with pytest.raises(ConfigError, match="set clients=2"):
        Natural().split(LABELS[:4], 3, 0, np.array(["a", "b", "a", "b"]))
    with pytest.raises(DataError, match="4 examples have 3 client names"):
        Natural().split(LABELS[:4], 3, 0, np.array(["a", "b", "a"]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dirichlet(alpha=0),
        lambda: Dirichlet(alpha=float("nan")),
        lambda: Dirichlet(alpha="much"),  # type: ignore[arg-type]
        lambda: Dirichlet(min_partition_size=-1),
        lambda: Shard(num_shards_per_partition=0),
        lambda: Pathological(num_classes_per_partition=0),
    ],
)
def test_wrong_partition_settings(make: Callable[[], Partition]) -> None:
    with pytest.raises(ConfigError, match=r"partition\.\w+ must be .* got .*: set partition"):
        make()


def test_a_split_is_kept_on_disk_and_damage_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Iid().split(LABELS, 5, 0)
    (kept,) = (tmp_path / "cache" / "fedapp" / "partitions").iterdir()
    assert kept.suffix == ".npz"

    def nothing(*_: object) -> None:
        raise AssertionError("the split was made again")

    with monkeypatch.context() as patch:
        patch.setattr(splitting, "_run", nothing)
        again = Iid().split(LABELS, 5, 0)
    good = kept.read_bytes()
    for damaged in (b"", b"junk", good[: len(good) // 2]):
        kept.write_bytes(damaged)
        remade = Iid().split(LABELS, 5, 0)
        assert all(np.array_equal(a, b) for a, b in zip(first, remade, strict=True))
    np.savez(kept, indices=np.zeros(3000, np.int64), sizes=np.full(5, 600))  # readable, but no split
    remade = Iid().split(LABELS, 5, 0)
    assert all(
        np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(first, again, remade, strict=True)
    )


def test_a_cache_folder_that_cannot_be_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sum(len(part) for part in Iid().split(LABELS, 5, 0)) == 3000


def test_splitting_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Natural().split(LABELS, 10, 0, LABELS)
    Shard().split(LABELS, 10, 0)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_held_out_part_is_stratified_and_fixed() -> None:
    train, test = held_out(LABELS, 0.2)
    assert sorted([*train, *test]) == list(range(3000))
    assert len(test) == 600
    assert np.abs(np.bincount(LABELS[test]) - np.bincount(LABELS) / 5).max() <= 1
    assert np.array_equal(test, held_out(LABELS, 0.2)[1])
    assert len(held_out(LABELS, 0.0)[1]) == 0
    with pytest.raises(DataError, match="leaves none to train on"):
        held_out(LABELS[:1], 0.9)


# What all classification tasks share


@pytest.fixture(name="digits")
def _digits() -> Digits:
    return Digits(build=Mlp(), partition=Iid(), clients=4, seed=0)


def test_digits(digits: Digits) -> None:
    task: Task = digits
    test = task.test_data()
    assert test is not None
    parts = [task.client_data({"partition-id": i, "num-partitions": 4}) for i in range(4)]
    assert len(test) + sum(len(part) for part in parts) == 1797
    assert test.x.shape == (359, 1, 8, 8)
    assert (test.x.dtype, test.y.dtype) == (torch.float32, torch.int64)
    assert 0 <= float(test.x.min()) < float(test.x.max()) == 1
    assert task.private_preprocessing is False
    assert (task.label_counts() == [torch.bincount(p.y, minlength=10).tolist() for p in parts]).all()
    assert task.label_counts().shape == (4, 10)


def test_digits_are_those_of_scikit_learn(digits: Digits) -> None:
    bunch = load_digits()
    train, test = digits.train_data(), digits.test_data()
    assert test is not None
    seen = np.concatenate([train.x.numpy(), test.x.numpy()]).reshape(-1, 64)
    labels = np.concatenate([train.y.numpy(), test.y.numpy()])

    def sorted_rows(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        rows = np.column_stack([16 * x, y])
        return rows[np.lexsort(rows.T)]

    assert np.array_equal(sorted_rows(seen, labels), sorted_rows(bunch.data / 16, bunch.target))


def test_the_test_set_is_the_same_for_every_seed(digits: Digits) -> None:
    other = Digits(build=Mlp(), partition=Iid(), clients=4, seed=1)
    assert digits.test_data() is other.test_data()
    assert not np.array_equal(digits.partitions()[0], other.partitions()[0])


def test_models_depend_on_their_seed_alone(digits: Digits) -> None:
    before = torch.random.get_rng_state()
    first, again, other = digits.model(5), digits.model(5), digits.model(6)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert all(p.dtype == torch.float32 for p in first.parameters())


def test_evaluation_equals_one_large_batch_and_restores_the_mode(digits: Digits) -> None:
    data = Data(torch.rand(2345, 1, 8, 8), torch.randint(0, 10, (2345,)))
    model = Cnn()((1, 8, 8), 10).train()
    found = digits.evaluate(model, data)
    assert model.training
    model.eval()
    with torch.no_grad():
        output = model(data.x)
    assert found["accuracy"] == pytest.approx(float((output.argmax(1) == data.y).float().mean()), abs=1e-3)
    assert found["loss"] == pytest.approx(float(digits.loss(output, data.y)), rel=1e-5)
    digits.evaluate(model, data)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_needs_examples(digits: Digits) -> None:
    with pytest.raises(DataError, match="no examples"):
        digits.evaluate(nn.Flatten(), Data(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)))


def test_a_client_may_be_empty() -> None:
    partition = Dirichlet(alpha=0.001, min_partition_size=0)
    task = Digits(build=Mlp(), partition=partition, clients=60, seed=0)
    empty = int(np.argmin([len(part) for part in task.partitions()]))
    data = task.client_data({"partition-id": empty})
    assert len(data) == 0
    assert data.x.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no data"),
        ({"partition-id": 4}, "from 0 to 3, got 4"),
        ({"partition-id": -1}, "from 0 to 3, got -1"),
        ({"partition-id": True}, "got True"),
        ({"partition-id": "1"}, "got '1'"),
        ({"partition-id": 0, "num-partitions": 5}, "5 partitions and the run 4 clients: set clients=5"),
        ({"data": "somewhere"}, "task=digits reads no own data"),
    ],
)
def test_wrong_node_configs(digits: Digits, config: dict[str, bool | int | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits.client_data(config)


def test_a_task_needs_a_client() -> None:
    with pytest.raises(ConfigError, match="clients must be a whole number of at least 1, got 0"):
        Digits(build=Mlp(), partition=Iid(), clients=0, seed=0)


def test_examples_need_a_label_each() -> None:
    with pytest.raises(DataError, match="2 examples have 3 labels"):
        Data(torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64))


# Fashion-MNIST


@pytest.mark.parametrize("sub", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sub: str) -> None:
    write_fashion(tmp_path / "data" / sub)
    monkeypatch.setenv("FEDAPP_DATA", str(tmp_path / "data"))
    task = FashionMnist(**RUN, features="pixels")
    test = task.test_data()
    assert test is not None
    assert test.x.shape == (12, 1, 28, 28)
    assert sum(len(task.client_data({"partition-id": i})) for i in range(3)) == 30
    raw = test.x * 0.3530 + 0.2860
    assert float(raw.min()) == pytest.approx(0, abs=1e-6)
    assert float(raw.max()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(test.y, torch.arange(12) % 10)
    assert task.train_data() is FashionMnist(**RUN, features="pixels").train_data()
    seen = FashionMnist(**RUN).test_data()
    assert seen is not None
    assert torch.equal(seen.x, oriented(test.x))
    assert FashionMnist(**RUN).input_shape == seen.x.shape[1:] == (17, 7, 7)


def test_fashion_mnist_deployed_reads_the_nodes_folder_alone(tmp_path: Path) -> None:
    write_fashion(tmp_path / "own", train=5)
    own = FashionMnist(**RUN).client_data({"data": str(tmp_path / "own")})
    assert own.x.shape == (5, 17, 7, 7)


def test_fashion_mnist_names_three_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(images, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(DataError, match=r"no network.*FEDAPP_DATA.*dataset-fashion-mnist.*torchvision"):
        FashionMnist(**RUN).test_data()


def _truncate(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-2000])


def _shorten(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cannot be read"),
        (_shorten, r"has 23535 bytes where its header says 23536"),
        (lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"junk"), "cannot be read"),
        (lambda f: (f / "train-images-idx3-ubyte.gz").unlink(), "cannot be read"),
        (lambda f: (f / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0")), "no IDX file"),
        (
            lambda f: write_idx(f / "train-images-idx3-ubyte.gz", np.zeros((30, 28), np.uint8)),
            "no IDX file of bytes in 3 dimensions",
        ),
        (
            lambda f: write_idx(f / "train-images-idx3-ubyte.gz", np.zeros((30, 9, 9), np.uint8)),
            "give 28 x 28",
        ),
        (
            lambda f: write_idx(f / "train-labels-idx1-ubyte.gz", np.zeros(29, np.uint8)),
            "30 train images and 29 labels",
        ),
        (lambda f: write_idx(f / "train-labels-idx1-ubyte.gz", np.full(30, 10, np.uint8)), "label 10"),
    ],
)
def test_damaged_fashion_mnist(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write_fashion(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        FashionMnist(**RUN).read(tmp_path)


def test_wrong_features_of_fashion_mnist() -> None:
    with pytest.raises(ConfigError, match="pixels, oriented, scattering, got 'edges'"):
        FashionMnist(**RUN, features="edges")


@pytest.mark.skipif(not images.DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist_test_set() -> None:
    test = FashionMnist(**RUN).test_data()
    assert test is not None
    assert torch.bincount(test.y).tolist() == [1000] * 10
    assert abs(float(test.x.mean())) < 0.01
    assert abs(float(test.x.std()) - 1) < 0.01


# Tables

TABLE = "age,colour,site,label\n" + "".join(
    f"{20 + i},{'red' if i % 3 else 'blue'},{'north' if i % 2 else 'south'},{'yes' if i % 4 else 'no'}\n"
    for i in range(40)
)


def csv(tmp_path: Path, text: str = TABLE, **settings: Any) -> Csv:
    return Csv(**RUN | {"path": write_table(tmp_path / "table.csv", text), "test_fraction": 0.0} | settings)


def test_a_table_becomes_numbers(tmp_path: Path) -> None:
    task = csv(tmp_path)
    data = task.train_data()
    assert task.input_shape == (5,)  # age, blue, red, north, south
    assert task.classes == 2  # no, yes
    assert data.x[0].tolist() == [20, 1, 0, 0, 1]
    assert data.x[1].tolist() == [21, 0, 1, 1, 0]
    assert data.y[:5].tolist() == [0, 1, 1, 1, 0]
    assert (data.x.dtype, data.y.dtype) == (torch.float32, torch.int64)
    assert task.test_data() is None
    assert task.private_preprocessing is False
    assert task.model(0)(data.x).shape == (40, 2)


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    task = csv(tmp_path, "x,label\n1,10\n2,9\n3,9\n")
    assert task.train_data().y.tolist() == [1, 0, 0]


def test_held_out_rows_are_the_same_for_every_seed(tmp_path: Path) -> None:
    task = csv(tmp_path, test_fraction=0.25)
    test = task.test_data()
    assert test is not None
    assert (len(test), len(task.train_data())) == (10, 30)
    assert not {row[0] for row in test.x.tolist()} & {row[0] for row in task.train_data().x.tolist()}
    other = Csv(**RUN | {"path": task.path, "test_fraction": 0.25, "seed": 9})
    assert other.test_data() is test


def test_a_test_table_of_its_own(tmp_path: Path) -> None:
    path = write_table(tmp_path / "test.csv", "label,colour,site,age\nyes,red,north,30\n")
    test = csv(tmp_path, test_path=path).test_data()
    assert test is not None
    assert test.x.tolist() == [[30, 0, 1, 1, 0]]
    assert test.y.tolist() == [1]


def test_features_and_separator(tmp_path: Path) -> None:
    task = csv(tmp_path, TABLE.replace(",", ";"), separator=";", features=["age"])
    assert task.input_shape == (1,)


def test_natural_clients_of_a_table(tmp_path: Path) -> None:
    task = csv(tmp_path, client_column="site", partition=Natural(), clients=2, test_fraction=0.2)
    assert task.input_shape == (3,)  # the site is no feature
    ages = [task.client_data({"partition-id": i}).x[:, 0] for i in range(2)]
    assert (ages[0] % 2 == 1).all()  # north
    assert (ages[1] % 2 == 0).all()  # south
    assert sum(len(part) for part in ages) == 32


def test_public_constants_scale(tmp_path: Path) -> None:
    plain = csv(tmp_path, features=["age"]).train_data().x
    scaled = csv(tmp_path, features=["age"], mean=[40.0], std=2).train_data().x
    assert torch.allclose(scaled, (plain - 40) / 2)


def test_standardizing_is_private_and_for_simulation_only(tmp_path: Path) -> None:
    task = csv(tmp_path, TABLE.replace(",label", ",label,one").replace("\n", ",1\n").replace("one,1", "one"))
    task = Csv(**RUN | {"path": task.path, "standardize": True})
    x = task.train_data().x
    assert task.private_preprocessing is True
    assert torch.allclose(x.mean(dim=0), torch.zeros(x.shape[1]), atol=1e-5)
    assert torch.allclose(x[:, :-1].std(dim=0, correction=0), torch.ones(x.shape[1] - 1), atol=1e-5)
    assert (x[:, -1] == 0).all()  # a constant column is not divided by zero
    with pytest.raises(ConfigError, match="set public"):
        task.client_data({"data": str(task.path)})


def test_nodes_with_their_own_tables_agree(tmp_path: Path) -> None:
    own = write_table(tmp_path / "own.csv", "colour,label,age,site\nred,yes,50,south\n")
    data = csv(tmp_path).client_data({"data": own})
    assert data.x.tolist() == [[50, 0, 1, 0, 1]]
    assert data.y.tolist() == [1]
    alone = Csv(**RUN, class_names=["no", "yes"], features=["age"])
    assert (alone.input_shape, alone.classes, alone.test_data()) == ((1,), 2, None)
    assert alone.client_data({"data": own}).x.tolist() == [[50]]
    write_table(tmp_path / "own.csv", "label,age\nno,1\nno,2\n")
    assert len(alone.client_data({"data": own})) == 2  # read anew
    with pytest.raises(ConfigError, match="no training table"):
        alone.client_data({"partition-id": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "colour,site,label\nred,south,yes\n",
            r"lacks the columns \['age'\]: it has \['colour', 'site', 'label'\]",
        ),
        ("age,colour,site,label\n1,red,south,maybe\n", r"unknown values \['maybe'\] in column label"),
        ("age,colour,site,label\n1,green,south,yes\n", r"unknown values \['green'\] in column colour"),
        ("age,colour,site,label\nold,red,south,yes\n", "1 values in column age that are no finite"),
    ],
)
def test_own_tables_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    own = write_table(tmp_path / "own.csv", text)
    with pytest.raises(DataError, match=message):
        csv(tmp_path).client_data({"data": own})


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "cannot be read as a table"),
        ("a,b\n1,2,3,4\n5\n\0", {}, "table|lacks"),
        ("x,label\n", {}, "has no rows"),
        ("x,y\n1,2\n", {}, r"lacks the columns \['label'\]: it has \['x', 'y'\]"),
        ("x,label\n1,2\n", {"features": ["z"]}, r"lacks the columns \['z'\]"),
        ("x,label\n1,2\n", {"client_column": "site"}, r"lacks the columns \['site'\]"),
        ("label\n2\n", {}, "no columns to learn from"),
        ("x,label\n1,a\n,a\nnan,b\n", {}, "misses 2 values in column x"),
        ("x,label\n1,a\n2,\n", {}, "misses 1 values in column label"),
        ("x,label\n1,a\ninf,b\n-inf,b\n", {}, "2 values in column x that are no finite"),
        ("x,label\n1,a\n1e39,b\n", {}, "1 values in column x that are no finite"),
        ("x,label\n1,a\n?,b\n", {}, r"1 words such as '\?' among the numbers of column x"),
        ("x,label\n" + "".join(f"name{i},a\n" for i in range(101)), {}, "101 different words in column x"),
        ("x,label\n1,a\n2,b\n", {"class_names": ["a"]}, r"unknown values \['b'\]"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        csv(tmp_path, text, **settings).train_data()


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        Csv(**RUN, path=str(tmp_path / "none.csv")).train_data()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, r"set task\.path"),
        ({"path": None, "features": ["age"]}, r"task\.class_names and task\.features"),
        ({"test_fraction": 1.0}, r"task\.test_fraction .* got 1\.0"),
        ({"features": []}, r"task\.features must list"),
        ({"features": ["age", "age"]}, r"task\.features must list"),
        ({"class_names": "yes"}, r"task\.class_names must list"),
        ({"features": ["age", "label"]}, "must not list the label"),
        ({"std": 0.0}, r"task\.std must be finite numbers above 0"),
        ({"mean": float("nan")}, r"task\.mean must be finite"),
        ({"mean": "big"}, r"task\.mean must be finite"),
        ({"standardize": True, "mean": 1.0}, r"no task\.mean"),
    ],
)
def test_wrong_table_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        csv(tmp_path, **settings)


def test_constants_must_fit_the_features(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.mean has 2 numbers for 5 features"):
        csv(tmp_path, mean=[1.0, 2.0]).train_data()


# Folders of images


def test_an_image_tree(tmp_path: Path) -> None:
    write_images(tmp_path / "tree", {"cat": 6, "dog": 4, ".hidden": 1})
    (tmp_path / "tree" / "cat" / "notes.txt").write_text("no image")
    task = ImageFolder(**RUN, path=str(tmp_path / "tree"), size=8)
    train, test = task.train_data(), task.test_data()
    assert test is not None
    assert (task.input_shape, task.classes) == ((3, 8, 8), 2)
    assert (train.x.shape, test.x.shape) == ((8, 3, 8, 8), (2, 3, 8, 8))
    red, green, blue = train.x[0, :, 0, 0].tolist()  # cats are (0, 10 * index, 255)
    assert (red, blue) == (-1, 1)
    assert round((green + 1) * 127.5, 3) in range(0, 60, 10)
    assert torch.bincount(train.y).tolist() == [5, 3]
    assert ImageFolder(**RUN, path=str(tmp_path / "tree"), size=8).train_data() is train


def test_train_and_test_trees_in_grey(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 3, "b": 3})
    write_images(tmp_path / "test", {"b": 2})
    task = ImageFolder(**RUN, path=str(tmp_path), size=16, channels=1)
    test = task.test_data()
    assert test is not None
    assert test.x.shape == (2, 1, 16, 16)
    assert test.y.tolist() == [1, 1]
    assert sum(len(task.client_data({"partition-id": i})) for i in range(3)) == 6


def test_nodes_with_their_own_images(tmp_path: Path) -> None:
    own = write_images(tmp_path / "own", {"dog": 2})
    task = ImageFolder(**RUN, class_names=["cat", "dog"])
    assert task.client_data({"data": str(own)}).y.tolist() == [1, 1]
    assert (task.classes, task.test_data()) == (2, None)
    with pytest.raises(ConfigError, match="no training images"):
        task.client_data({"partition-id": 0})


def _empty(tree: Path) -> None:
    (tree / "cat").mkdir(parents=True)


def _broken(tree: Path) -> None:
    good = write_images(tree, {"cat": 1}, side=64) / "cat" / "0.png"
    good.write_bytes(good.read_bytes()[:60])


def _deep(tree: Path) -> None:
    (tree / "cat").mkdir(parents=True)
    Image.fromarray(np.array([[0, 300]], dtype=np.uint16)).save(tree / "cat" / "0.png")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda tree: None, "is not a folder"),
        (lambda tree: tree.mkdir(), "has no class folders"),
        (_empty, "has no images"),
        (_broken, r"0\.png cannot be read as an image"),
        (_deep, "more than 8 bits"),
        (lambda tree: write_images(tree, {"cat": 1, "bird": 1}), r"unknown classes \['bird'\]"),
    ],
)
def test_bad_image_trees(tmp_path: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(tmp_path / "tree")
    with pytest.raises(DataError, match=message):
        ImageFolder(**RUN, class_names=["cat", "dog"]).client_data({"data": str(tmp_path / "tree")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"set task\.path"),
        ({"path": "x", "size": 0}, r"task\.size must be a whole number from 1 to 4096, got 0"),
        ({"path": "x", "channels": 2}, r"task\.channels must be 1 \(grey\) or 3 \(colour\), got 2"),
        ({"path": "x", "test_fraction": -0.1}, r"task\.test_fraction"),
        ({"path": "x", "features": "edges"}, r"one of pixels, oriented, scattering, got 'edges'"),
        ({"path": "x", "features": "oriented", "size": 7}, r"task\.size must be a whole number from 8"),
    ],
)
def test_wrong_image_folder_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageFolder(**RUN, **settings)


# The YAML files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fashion_mnist", FashionMnist(**RUN)),
        ("digits", Digits(**RUN)),
        ("csv", Csv(**RUN, path="table.csv")),
        ("image_folder", ImageFolder(**RUN, path="tree")),
    ],
)
def test_task_yaml_holds_the_defaults(name: str, expected: Classification) -> None:
    config = OmegaConf.load(CONF / "task" / f"{name}.yaml")
    assert set(config) - {"_target_", "_convert_"} == set(vars(expected)) - set(RUN)
    if "path" in config:
        config.path = expected.path  # type: ignore[attr-defined]
    assert instantiate(config, **RUN) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("iid", Iid()),
        ("dirichlet", Dirichlet()),
        ("shard", Shard()),
        ("pathological", Pathological()),
        ("natural", Natural()),
    ],
)
def test_partition_yaml_holds_the_defaults(name: str, expected: Partition) -> None:
    config = OmegaConf.load(CONF / "partition" / f"{name}.yaml")
    assert instantiate(config) == expected
    assert set(config) - {"_target_"} == set(vars(expected))
