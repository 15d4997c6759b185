"""Updates to measure codecs on: of a short federation, of clients with few examples, a large one made up."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedapp import config
from fedapp.codec import Layout
from fedapp.tasks import Data, Task
from fedapp.training import Sgd

Vector = NDArray[np.float32]


def lenet() -> nn.Sequential:
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 6, 5), relu1=relu, pool1=pool, conv2=nn.Conv2d(6, 16, 5), relu2=relu, pool2=pool,
        flatten=nn.Flatten(), linear1=nn.Linear(256, 120), relu3=relu, linear2=nn.Linear(120, 84), relu4=relu,
        output=nn.Linear(84, 10),
    ))  # fmt: skip


def updates(folder: Path, rounds: list[int]) -> tuple[Layout, dict[int, list[Vector]]]:
    """The updates of all ten clients in these rounds of a plain federation."""
    torch.manual_seed(0)
    model = lenet()
    layout = Layout.of((name, tuple(p.shape)) for name, p in model.named_parameters())
    files = {r: folder / f"updates-{r}.npy" for r in rounds}
    if not all(file.exists() for file in files.values()):
        task = config.job_of("task.features=pixels privacy=none").task
        trainer = Sgd(lr=0.1, batch_size=32, epochs=1, schedule="constant")
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        clients = [task.client_data({"partition-id": i}) for i in range(10)]
        for r in range(1, max(rounds) + 1):
            cohort = []
            for i, data in enumerate(clients):
                cohort.append(trained(trainer, task, model, flat, data, [0, r, i]))
            if r in files:
                np.save(files[r], np.stack(cohort))
            sizes = np.array([len(data) for data in clients], np.float32)
            flat = flat + torch.from_numpy(np.average(cohort, axis=0, weights=sizes).astype(np.float32))
            print(f"\rround {r}/{max(rounds)}", end="", flush=True)
        print()
    return layout, {r: list(np.load(file)) for r, file in files.items()}


def trained(
    trainer: Sgd, task: Task, model: nn.Module, flat: torch.Tensor, data: Data, seed: list[int]
) -> Vector:
    """What one client's training adds to the weights."""
    nn.utils.vector_to_parameters(flat.clone(), model.parameters())
    trainer.fit(task, model, data, {}, np.random.default_rng(seed), 0.0)
    update: Vector = (nn.utils.parameters_to_vector(model.parameters()).detach() - flat).numpy()
    return update


def of_few_examples() -> tuple[Layout, list[Vector]]:
    """The first updates of ten of 1000 clients with 60 examples each: a CNN of 1.2 million parameters."""
    job = config.job_of(
        "privacy=none clients=1000 cohort=50 model=cnn task.features=pixels trainer.batch_size=10"
    )
    model, trainer = job.model, job.trainer
    assert isinstance(trainer, Sgd)
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    cohort = []
    for i in range(10):
        data = job.task.client_data({"partition-id": i})
        cohort.append(trained(trainer, job.task, model, flat, data, [0, i]))
    return Layout.of((name, tuple(p.shape)) for name, p in model.named_parameters()), cohort


def large() -> tuple[Layout, Vector]:
    """Ten million values with active rows and columns, for timing."""
    rng = np.random.default_rng(1)
    shapes = {
        "conv1.weight": (256, 128, 3, 3), "conv2.weight": (512, 256, 3, 3), "linear1.weight": (1024, 2048),
        "linear2.weight": (2048, 2048), "linear3.weight": (512, 2048), "output.weight": (1000, 1024),
        "output.bias": (1000,),
    }  # fmt: skip
    layout = Layout.of(shapes.items())
    parts = []
    for slot in layout.slots:
        rows, columns = slot.shape[0], int(np.prod(slot.shape[1:]))
        scale = np.exp(rng.normal(0, 1, (rows, 1)) + rng.normal(0, 0.8, (1, columns)))
        parts.append(
            (
                scale * np.exp(rng.normal(0, 0.5, (rows, columns))) * rng.standard_normal((rows, columns))
            ).ravel()
        )
    return layout, (1e-3 * np.concatenate(parts)).astype(np.float32)
