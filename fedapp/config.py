"""Composes the YAML in conf/ and builds a `Job` of it; the only place that knows Hydra."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedapp import check
from fedapp.errors import ConfigError
from fedapp.job import Job

_HERE = Path(__file__).parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # wheel; checkout and bundle

_NAMES = {  # group: where its classes live, and which
    "task": (
        "fedapp.tasks",
        "images.FashionMnist images.Digits tables.Csv folders.ImageFolder anonymity.required stream.Stream",
    ),
    "partition": ("fedapp.tasks.partition", "Iid Dirichlet Shard Pathological Natural"),
    "model": ("fedapp.models", "Logistic Mlp SmallCnn Cnn Resnet18"),
    "trainer": ("fedapp", "training.Sgd training.DpSgd dp_step.DpStep"),
    "codec": (
        "fedapp.codec",
        "chain.Identity chain.Chain chain.ErrorFeedback chain.pipeline chain.staged "
        "prune.TopK prune.RandomMask quantize.DeadZone uniform.Uniform uniform.Stochastic uniform.Dither "
        "rate_distortion.default rate_distortion.RateDistortion "
        "ternary.Ternary sign.Sign rotate.Eden lowrank.LowRank entropy.Ans huffman.Huffman zstd.Zstd "
        "founding.rules founding.RandomPrune founding.FixedPoint per_layer.PerLayer public_step.PublicStep",
    ),
    "downlink": ("fedapp.downlink", "Plain Coded"),
    "strategy": (
        "flwr.serverapp.strategy",
        "FedAvg FedAvgM FedAdam FedYogi FedAdagrad FedProx QFedAvg "
        "FedMedian FedTrimmedAvg Krum MultiKrum Bulyan",
    ),
    "engine": ("fedapp.engine", "local.Local flower.Flower"),
    "speeds": ("fedapp.speeds", "Untimed Stragglers"),
    "selection": ("fedapp.selection", "Uniform Poisson BySize PowerOfChoice Tags"),
    "assignment": ("fedapp.assignment", "Whole Deadline"),
    "aggregation": ("fedapp.ckks", "Open Ckks"),
    "privacy": (
        "fedapp.privacy",
        "none.NoPrivacy example.ExamplePrivacy local.LocalGaussian central.CentralGaussian "
        "distributed.DistributedGaussian distributed_example.DistributedExample",
    ),
}
TARGETS = {group: [f"{home}.{n}" for n in names.split()] for group, (home, names) in _NAMES.items()}
"""Everything a `_target_` of a group may name, exactly: an override string comes over the network."""
TARGETS["strategy"] += ["fedapp.fedbuff.FedBuff", "fedapp.scaffold.Scaffold"]  # ours, beside Flower's
_POSITIVE, _SHARE = {"above": 0.0, "high": 1e6}, {"low": 0.0, "below": 1.0}
_STRATEGY_BOUNDS = {  # Flower checks few of these itself
    "eta": _POSITIVE, "tau": _POSITIVE, "server_learning_rate": _POSITIVE, "client_learning_rate": _POSITIVE,
    "beta_1": _SHARE, "beta_2": _SHARE, "server_momentum": _SHARE, "beta": {"low": 0.0, "below": 0.5},
    "proximal_mu": {"low": 0.0, "high": 1e3}, "q": {"low": 0.0, "high": 100.0},
}  # fmt: skip
_STRATEGY_COUNTS = {"num_malicious_nodes": 0, "num_nodes_to_select": 1}

_KEYS = (
    "clients", "begin_with", "cohort", "rounds", "seed", "sampling", "over_selection", "deadline",
    "norm_bound", "evaluate", "held_out", "device", "round_timeout", "checkpoint", "profile",
)  # fmt: skip
_SOURCE = "task@task.source"  # which task a stream reads
_WITHOUT_EFFECT = (
    "run_dir", "resume", "checkpoint", "profile",
    "engine.workers", "engine.state_mb", "engine.client_timeout",
    "engine.address", "engine.cpus", "engine.gpus",
)  # fmt: skip
_BUILT = (  # by themselves
    "trainer", "codec", "downlink", "aggregation", "engine", "speeds", "selection", "assignment", "privacy",
)  # fmt: skip
_GROUPS = ("task", "partition", "model", *_BUILT, "strategy", "experiment")


def compose(overrides: str) -> DictConfig:
    """The settings that a Hydra override string makes of the YAML; cached. Raises ConfigError.

    `overrides` comes from the network in a deployment: only plain `key=value` pairs of our own keys.
    """
    return _compose(tuple(split(overrides)))


@cache
def job_of(overrides: str) -> Job:
    """The job of an override string; cached, so that a process builds its model once."""
    return job(compose(overrides))


@cache
def job_in(settings: str) -> Job:
    """The job of a whole configuration as YAML; cached in the same way."""
    tree = OmegaConf.create(settings)
    assert isinstance(tree, DictConfig)
    return job(tree)


def split(overrides: str) -> list[str]:
    """Split as a shell would; refuse all but plain overrides of our own keys."""
    try:
        parts = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides {overrides!r} cannot be read: {error}") from error
    for part in parts:
        key, _, value = part.partition("=")
        # No _target_: a choice's name, by which clients accept a run, must go on to say what it is.
        plain = re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z0-9]\w*)*", key) and "${" not in value and "=" in part
        choice = re.fullmatch(r"\w+", value)
        if key == _SOURCE and choice:
            continue
        if not plain or key.startswith("hydra") or (key in _GROUPS and not choice):
            raise ConfigError(
                f"{part!r} is no plain override: write key=value or group=choice, without +, ~, paths, "
                f"interpolation, hydra keys or keys that begin with _"
            )
    return parts


@cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose("config", list(overrides), return_hydra_config=True)
            return with_choices(config, config.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    except ValueError as error:  # codec=null
        raise ConfigError(f"{' '.join(overrides)} cannot be composed: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What Hydra says, on one line, without its advice to append with +."""
    text = re.sub(r"\s*(To append to your config use.*|Set the environment variable.*)", "", str(error))
    text = re.sub(r"\s*Config search path:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*(full_key|object_type|reference_type)[:=].*", "", text)
    text = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return re.sub(r"(?<=:);|;(?=;)", "", text)


def with_choices(config: DictConfig, choices: Mapping[str, Any]) -> DictConfig:
    """Our own keys, and under `choices` which YAML of each group was chosen."""
    own = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])
    with open_dict(own):
        own.choices = {group: choices.get(group) for group in _GROUPS}
    return own


def job(config: DictConfig) -> Job:
    """Build everything a run is made of. Raises ConfigError naming the key, the value and the bound."""
    try:
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(tree, dict)
    for key in sorted(set(map(str, tree)) - {*_KEYS, *_GROUPS, "run_dir", "resume", "choices"}):
        raise ConfigError(f"{key} is no setting of fedapp: see `fedapp simulate --help` for those there are")
    for key in _KEYS:
        if key not in tree:  # a stored file
            raise ConfigError(f"{key} is not set: give it a value")
    _check_strategy(tree["strategy"])
    shared = {
        "build": build(tree["model"], "model"),
        "partition": build(tree["partition"], "partition"),
        "clients": tree["clients"],
        "seed": tree["seed"],
    }
    everyone = {  # our loop draws the cohort, and shows a strategy nobody else
        "fraction_train": 1.0, "fraction_evaluate": 1.0,
        "min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1,
    }  # fmt: skip
    return Job(
        **{key: tree[key] for key in _KEYS},
        task=_task(tree["task"], "task", shared),
        strategy=build(tree["strategy"], "strategy", **everyone),
        **{group: build(tree[group], group) for group in _BUILT},
        choices=tree["choices"],
    )


def _task(node: Mapping[str, Any], path: str, shared: Mapping[str, Any]) -> Any:
    """The task; one that reads another shares with it what is the run's."""
    if isinstance(node.get("source"), Mapping):
        node = {**node, "source": _task(node["source"], f"{path}.source", shared)}
    return build(node, path, **shared)


def _check_strategy(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key in _STRATEGY_BOUNDS:
            check.real(f"strategy.{key}", value, **_STRATEGY_BOUNDS[key])
        if key in _STRATEGY_COUNTS:
            check.whole(f"strategy.{key}", value, _STRATEGY_COUNTS[key])


def differences(
    stored: DictConfig, given: DictConfig, overrides: Iterable[str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, but for those that change no result: key, what it was, what it is now.

    With `overrides` only what they name is compared: of a group which choice, of a key its value.
    """
    was, now = _leaves(stored), _leaves(given)
    keys = {*was, *now}
    if overrides is not None:
        named = [f"choices.{name}" if name in _GROUPS else name for name in _named(overrides)]
        keys = {key for key in keys for name in named if key == name or key.startswith(f"{name}.")}
    found = {key: (was.get(key), now.get(key)) for key in sorted(keys) if key not in _WITHOUT_EFFECT}
    return {key.removeprefix("choices."): pair for key, pair in found.items() if pair[0] != pair[1]}


def follow(stored: DictConfig, given: DictConfig, overrides: Iterable[str] | None = None) -> DictConfig:
    """The stored settings, with those given that change no result."""
    tree, now = stored.copy(), _leaves(given)
    named = now if overrides is None else _named(overrides)
    for key in _WITHOUT_EFFECT:
        if key in now and key in named:
            OmegaConf.update(tree, key, now[key], force_add=True)
    tree.resume = None
    return tree


def _named(overrides: Iterable[str]) -> list[str]:
    """The keys that overrides set."""
    return [override.lstrip("+~").partition("=")[0] for override in overrides]


def _leaves(config: DictConfig) -> dict[str, Any]:
    """Each setting that is no group of settings, by its key with dots."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=True))]
    for name, node in waiting:
        if isinstance(node, dict) and (node or not name):
            waiting += [(f"{name}.{key}".lstrip("."), value) for key, value in node.items()]
        else:
            found[name] = node
    return found


def build(node: Any, path: str, **extra: Any) -> Any:
    """Make the object that a node's `_target_` names, its children first."""
    if isinstance(node, list):
        return [build(item, f"{path}[{i}]") for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    fields = {str(key): build(value, f"{path}.{key}") for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return fields
    target = resolve(node["_target_"], path)
    try:
        return target(**fields, **extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not fit {node['_target_']}: {error}") from error


def resolve(name: object, path: str) -> Callable[..., Any]:
    """The object that a target names, if its group may name it."""
    group = re.split(r"[.\[]", path)[0]
    if name not in TARGETS[group]:
        raise ConfigError(f"{path}._target_={name!r} is not allowed: choose one of conf/{group}/")
    module, _, attribute = str(name).rpartition(".")
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    if found.__qualname__ != attribute or not found.__module__.startswith(module):
        raise ConfigError(
            f"{name} is not what it seems: it resolves to {found.__module__}.{found.__qualname__}"
        )
    return found
