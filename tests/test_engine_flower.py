"""Flower's simulation runtime as an engine: what needs no Ray; whole runs are in test_flower.py."""

import time
from importlib import util
from threading import Thread
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from grids import Elsewhere, bits, model_of, rounds_on
from omegaconf import OmegaConf

from fedapp import config
from fedapp.client_app import remote_app
from fedapp.engine import flower
from fedapp.engine.flower import Flower
from fedapp.errors import ConfigError, FedappError


def test_without_ray_one_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "find_spec", lambda name: None if name == "ray" else util.find_spec(name))
    with (
        pytest.raises(ConfigError, match=r"engine=flower needs Ray: pip install 'flwr\[simulation\]>=1\.41"),
        Flower().grid(ClientApp(), 2),
    ):
        pass


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, {}),
        ({"workers": 3}, {"num_cpus": 3}),
        ({"workers": 3, "cpus": 0.5}, {"num_cpus": 2}),
        ({"workers": 1, "cpus": 0.1}, {"num_cpus": 1}),
        ({"address": "auto"}, {"address": "auto"}),
    ],
)
def test_what_ray_is_asked_for(given: dict[str, Any], asked: dict[str, Any]) -> None:
    engine = Flower(**given)
    backend = engine._backend()
    assert {**asked, "logging_level": "ERROR", "log_to_driver": True} == backend["init_args"]
    assert backend["client_resources"] == {"num_cpus": engine.cpus, "num_gpus": 0.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 0}, r"engine\.workers must be"),
        ({"cpus": 0}, r"engine\.cpus must be"),
        ({"gpus": -1}, r"engine\.gpus must be"),
        ({"address": "auto", "workers": 2}, r"leave engine\.workers out, and set engine\.cpus"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Flower(**given)


@pytest.mark.parametrize("late", [False, True])
def test_a_runtime_that_does_not_start_says_why(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it hands its grid over, or after, when nobody answers."""

    def failing(server: ServerApp, app: ClientApp, nodes: int, **_: Any) -> None:
        if late:
            context = Context(1, 1, {}, RecordDict(), {})
            Thread(target=lambda: server(Elsewhere(app, [2, 3]), context), daemon=True).start()
            time.sleep(0.3)
        try:
            raise ValueError("no room for an actor")
        except ValueError as error:
            raise RuntimeError("crashed") from error

    monkeypatch.setattr(flower, "find_spec", lambda name: True)
    monkeypatch.setattr("flwr.simulation.run_simulation", failing)
    monkeypatch.setattr(Elsewhere, "pull_messages", lambda self, ids: [])
    with (
        pytest.raises(FedappError, match=r"runtime did not start \(no room for an actor\): see that Ray has"),
        Flower().grid(ClientApp(), 2),
    ):
        pass


def test_rounds_run_on_the_grid_that_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's runtime is on another thread, gets app and number of nodes, and ends with the block."""
    ended = list[int]()

    def runtime(server: ServerApp, app: ClientApp, nodes: int, **_: Any) -> None:
        server(Elsewhere(app, list(range(2, 2 + nodes))), Context(1, 1, {}, RecordDict(), {}))
        ended.append(nodes)

    monkeypatch.setattr(flower, "find_spec", lambda name: True)
    monkeypatch.setattr("flwr.simulation.run_simulation", runtime)
    settings = "task=digits model=logistic privacy=none clients=3 rounds=2 cohort=2"
    job = config.job_of(settings)
    with Flower().grid(remote_app(OmegaConf.to_yaml(config.compose(settings), resolve=True)), 3) as grid:
        federation, records = rounds_on(job, grid)
        assert not ended
    assert ended == [3]
    assert [(r.replies, r.failures) for r in records] == [(2, 0)] * 2
    assert bits(federation.arrays) == model_of(settings)
