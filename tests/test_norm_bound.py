"""The norm bound: what one client can move, whatever it sends and however much it says to weigh."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, Message
from grids import bits, rounds_here

from fedapp import config
from fedapp.client_app import client_app, local_app, partition_of
from fedapp.codec.chain import Identity
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.records import METRICS, WEIGHT
from fedapp.running_sum import Reader
from fedapp.training import Sgd
from fedapp.vector import arrays_in

FAST = "task=digits privacy=none model=logistic clients=4 rounds=1 evaluate=none codec=identity"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


def moved(job: Job, app: object = None, fold: bool = True) -> np.ndarray:
    """How far a round took the model."""
    after, before = arrays_in(rounds_here(job, app, fold)[0].arrays), arrays_in(job.initial)
    return np.concatenate([(after[name] - before[name]).ravel() for name in before])


@pytest.mark.parametrize(("update", "expected"), [([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])])
def test_longer_updates_are_shortened_and_shorter_ones_are_not(
    update: list[float], expected: list[float]
) -> None:
    bounded = Reader(Identity(), bound=1.0)._bounded(np.array(update, np.float32))
    assert bounded.dtype == np.float32
    np.testing.assert_allclose(bounded, expected, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["fedavg", "fedmedian"])
def test_no_client_moves_the_model_further_than_its_share(strategy: str) -> None:
    """One of four sends a thousandfold: the mean moves by the bound at most, and half of it is honest."""
    job = job_of(f"norm_bound=0.1 strategy={strategy} trainer.lr=0.5")
    assert isinstance(job.trainer, Sgd)
    bad = replace(job, trainer=replace(job.trainer, lr=500.0))
    app = client_app(lambda context: bad if partition_of(context) == 0 else job)
    unbounded = job_of("trainer.lr=0.5")
    assert np.linalg.norm(moved(unbounded)) > 0.15
    assert np.linalg.norm(moved(job, app, fold=strategy == "fedavg")) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_whatever_a_client_says_to_weigh_it_counts_once(strategy: str) -> None:
    job = job_of(overrides := f"norm_bound=10 strategy={strategy}")
    honest = local_app(job)

    def heavy(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if partition_of(context) == 0:
            reply.content.metric_records[METRICS][WEIGHT] = 2**24 - 1
        return reply

    assert bits(rounds_here(job, heavy)[0].arrays) == bits(rounds_here(job_of(overrides))[0].arrays)


def test_a_bound_that_nobody_reaches_is_the_uniform_mean() -> None:
    """Two clients with as many examples each weigh the same anyway."""
    plain, bounded = (job_of(f"partition=iid clients=2 {more}") for more in ("", "norm_bound=1000"))
    assert bounded.wire_codec is not None
    assert plain.wire_codec is None
    np.testing.assert_allclose(moved(bounded), moved(plain), atol=2e-6)


def test_buffers_have_no_bound() -> None:
    with pytest.raises(ConfigError, match="norm_bound=1"):
        job_of("norm_bound=1 task=fashion_mnist model=resnet18 model.norm=batch").prepare()
