"""The settings: every YAML composes and builds, what is wrong is told in one line, nothing else gets in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from fedapp import config
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.privacy.example import ExamplePrivacy
from fedapp.training import DpSgd, Sgd

GROUPS = sorted(path.name for path in config.CONF.iterdir() if path.is_dir())
CHOICES = [(g, path.stem) for g in GROUPS for path in sorted((config.CONF / g).rglob("*.yaml"))]
COMPANIONS = {  # what a choice cannot be without
    "trainer=dp_sgd": "privacy=example",
    "trainer=dp_step": "privacy=distributed_example",
    "trainer=sgd": "privacy=none",
    "privacy=none": "",
    "model=cnn": "task.features=pixels",  # refuses maps of 7 x 7
    "strategy=qfedavg": "privacy=none",
    "strategy=fedprox": "privacy=none",
    "strategy=scaffold": "privacy=none",
    "selection=by_size": "privacy=none",
    "selection=power_of_choice": "privacy=none",
    "selection=tags": "privacy=none",
    "assignment=deadline": "privacy=none deadline=9",
}


def job_of(overrides: str) -> Job:
    return config.job(config.compose(overrides))


@pytest.mark.parametrize("privacy", ["none", "example", "local_gaussian", "distributed_gaussian"])
def test_absurdly_many_rounds_are_refused_at_once(privacy: str) -> None:
    """And those that are too many where it is counted how often each client is drawn, and only there."""
    with pytest.raises(ConfigError, match=r"rounds must be .* from 0 to 1000000, got 1000000000: set rounds"):
        job_of(f"task=digits privacy={privacy} clients=10 cohort=3 rounds=1000000000")
    many = f"task=digits privacy={privacy} clients=20000 cohort=3 rounds=1000000"
    if privacy == "none":
        assert job_of(many).terms is None
        return
    with pytest.raises(ConfigError, match=r"too many to count .*: set rounds=5000 or fewer, or leave cohort"):
        _ = job_of(many).cohorts.most


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Settings that point the tasks without data of their own at some."""
    table = tmp_path / "table.csv"
    table.write_text("a,b,label\n" + "".join(f"{i},{i % 3},{'yn'[i % 2]}\n" for i in range(60)))
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "images" / name / f"{index}.png")
    return {
        "task=csv": f"task.path={table} model=mlp partition=iid clients=2",
        "task=image_folder": f"task.path={tmp_path / 'images'} task.size=8 partition=iid clients=2",
        "task=stream": f"task.source.path={table} model=mlp partition=iid clients=2",
    }


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_composes_and_builds(group: str, choice: str, data: dict[str, str]) -> None:
    setting = f"{group}={choice}"
    job = job_of(f"{setting} {COMPANIONS.get(setting, '')} {data.get(setting, '')}")
    assert job.choices[group] == choice
    if setting in data:
        assert len(job.task.client_data({"partition-id": 0})) > 0
    if group == "model":
        assert sum(p.numel() for p in replace(job, device="cpu").model.parameters()) > 0


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "privacy"])
def test_every_privacy_choice_says_what_it_guarantees(choice: str) -> None:
    """In one paragraph, whose words are those that a reader asks for; or that it is nothing."""
    chosen = yaml.safe_load((config.CONF / "privacy" / f"{choice}.yaml").read_text())
    paragraphs = (config.resolve(chosen["_target_"], "privacy").__doc__ or "").lower().split("\n\n")
    (said,) = (" ".join(part.split()) for part in paragraphs if "*formal guarantees.*" in part)
    for word in ("adjacency", "sensitivity", "released:", "sampling", "against", "not covered:"):
        assert word in said
    assert ("nothing is guaranteed" in said) == (choice == "none") == ("(epsilon, delta)-dp" not in said)


def test_every_yaml_is_listed_by_its_target() -> None:
    """What a file builds is allowed, and what is allowed exists."""
    for group, names in config.TARGETS.items():
        for name in names:
            assert callable(config.resolve(name, group))
    for group, choice in CHOICES:
        node: Any = OmegaConf.load(config.CONF / group / f"{choice}.yaml")
        if group != "experiment":
            assert node["_target_"] in config.TARGETS[group]


def test_the_defaults_are_a_private_run() -> None:
    job = job_of("")
    assert isinstance(job.privacy, ExamplePrivacy)
    assert isinstance(job.trainer, DpSgd)
    assert job.trainer.privacy == job.privacy
    assert job.choices["codec"] == "default"
    assert isinstance(job_of("privacy=none").trainer, Sgd)


@pytest.mark.parametrize("overrides", ["", "task=digits privacy=none", "codec=topk codec.keep=0.2 clients=3"])
def test_composing_twice_gives_the_same(overrides: str) -> None:
    first, again = (OmegaConf.to_container(config.compose(overrides), resolve=False) for _ in range(2))
    assert first == again
    config._compose.cache_clear()
    afresh: Any = OmegaConf.to_container(config.compose(overrides), resolve=False)
    assert afresh == first
    assert "hydra" not in afresh
    assert set(afresh["choices"]) == {*GROUPS}


def test_building_twice_gives_equal_parts() -> None:
    first, again = (job_of("task=digits codec=topk") for _ in range(2))
    assert first.codec == again.codec
    assert first.trainer == again.trainer
    assert first.task == again.task
    assert first.strategy is not again.strategy  # it has a state


def test_values_keep_quotes_and_lists() -> None:
    assert config.split("a=1 'b=[x,y]' c='d e'") == ["a=1", "b=[x,y]", "c=d e"]
    assert job_of("model=mlp model.hidden=[7,5] task=digits").choices["model"] == "mlp"
    assert job_of("rounds=3 rounds=4").rounds == 4


# One line that names the key, the value and the bound

SAID = [
    ("clients=0", r"clients .* at least 1, got 0"),
    ("clients=abc", r"clients .* at least 1, got 'abc'"),
    ("clients=true", r"clients .* got True"),
    ("clients=[1]", r"clients .* got \[1\]"),
    ("clients=null", r"clients .* got None"),
    ("cohort=11", r"cohort .* from 1 to 10, got 11"),
    ("cohort=0", r"cohort .* from 1 to 10, got 0"),
    ("rounds=-1", r"rounds .* from 0 to 1000000, got -1"),
    ("rounds=2.5", r"rounds .* got 2.5"),
    ("rounds=1e3", r"rounds .* got 1000.0"),
    ("rounds=", r"rounds .* got ''"),
    ("rounds=1,2", r"rounds"),
    ("'rounds=choice(1,2)'", r"rounds"),
    ("seed=-1", r"seed .* from 0 to 4294967295, got -1"),
    ("seed=4294967296", r"seed .* from 0 to 4294967295, got 4294967296"),
    ("sampling=always", r"sampling must be one of .*fixed.*, got 'always'"),
    ("norm_bound=0", r"norm_bound .* above 0 .*, got 0"),
    ("norm_bound=1 strategy=scaffold privacy=none", r"norm_bound=1 .* strategy=scaffold"),
    ("norm_bound=1 privacy=local_gaussian", r"norm_bound=1 .* privacy.clip"),
    ("norm_bound=1 privacy=distributed_gaussian", r"norm_bound=1 .* sums alone"),
    ("evaluate=nobody", r"evaluate must be one of server, clients, none, got 'nobody'"),
    ("device=tpu", r"device must be one of auto, cpu, cuda, got 'tpu'"),
    ("round_timeout=0", r"round_timeout .* above 0, got 0"),
    ("round_timeout=soon", r"round_timeout .* got 'soon'"),
    ("codec.step=0", r"codec.step .* at least 1e-06 .*, got 0"),
    ("codec=topk codec.offset=0.7", r"codec.offset .* at most 0.5, got 0.7"),
    ("codec=topk codec.keep=0", r"codec.keep .* above 0 and at most 1, got 0"),
    ("codec=topk codec.keep=half", r"codec.keep .* got 'half'"),
    ("codec.feedback=maybe", r"codec.feedback must be true or false, .*auto.*, got 'maybe'"),
    ("codec=topk codec.feedback=auto", r"codec.feedback must be true or false, .*, got 'auto'"),
    ("engine.workers=0", r"engine.workers .* from 1 to 1024, got 0"),
    ("engine.client_timeout=0", r"engine.client_timeout must be a number above 0, got 0: set"),
    ("engine.client_timeout=-1", r"engine.client_timeout must be a number above 0, got -1"),
    ("engine.workers=many", r"engine.workers .* got 'many'"),
    ("model.activation=gelu", r"model.activation must be .*tanh.*relu.*, got '?gelu"),
    ("model=mlp model.hidden=[]", r"model.hidden .* got"),
    ("model=cnn model.dropout=[2,0]", r"model.dropout .* got"),
    ("model=resnet18 model.norm=layer", r"model.norm must be .*group.*batch.*, got '?layer"),
    ("partition.alpha=-1", r"partition.alpha .* above 0, got -1"),
    ("partition.alpha=x", r"partition.alpha .* got 'x'"),
    ("partition.min_partition_size=-1", r"partition.min_partition_size .* got -1"),
    ("partition=shard partition.num_shards_per_partition=0", r"partition.num_shards_per_partition .* got 0"),
    ("partition=pathological partition.num_classes_per_partition=0", r"num_classes_per_partition .* got 0"),
    ("privacy.epsilon=0", r"privacy.epsilon .* at least 0.01 .*, got 0"),
    ("privacy.epsilon=inf", r"privacy.epsilon .* got inf"),
    ("privacy.delta=1", r"privacy.delta .* below 0.1, got 1"),
    ("privacy.noise_multiplier=1", r"exactly one of privacy.epsilon and privacy.noise_multiplier"),
    ("privacy.test_seed=-1", r"privacy.test_seed .* got -1"),
    ("trainer.lr=0", r"trainer.lr .* above 0 .*, got 0"),
    ("trainer.sampling_rate=2", r"trainer.sampling_rate .* at most 1, got 2"),
    ("trainer.steps=0", r"trainer.steps .* at least 1, got 0"),
    ("privacy=none trainer.batch_size=true", r"trainer.batch_size .* got True"),
    ("privacy=none trainer.momentum=1", r"trainer.momentum .* below 1, got 1"),
    ("task=csv task.test_fraction=1", r"task.test_fraction .* below 1, got 1"),
    ("task=image_folder task.class_names=[a,b] task.size=0", r"task.size .* got 0"),
    ("task=image_folder task.class_names=[a,b] task.channels=2", r"task.channels .* got 2"),
    ("trainer=sgd privacy=example", r"trainer=sgd does not go with privacy=example"),
    ("trainer=dp_sgd privacy=none", r"trainer=dp_sgd does not go with privacy=none"),
    ("evaluate=clients", r"evaluate=clients"),
    ("strategy=qfedavg", r"strategy=qfedavg"),
    ("nope=1", r"nope"),
    ("codec.nope=1", r"codec.nope"),
    ("codec=identity codec.step=1", r"codec.step"),
    ("task=nope", r"task/nope"),
    ("choices=1", r"choices"),
    ("strategy.fraction_train=0.5", r"strategy.fraction_train"),
    ("selection=by_size", r"selection=by_size .* privacy=example"),
    ("privacy=none selection=power_of_choice selection.candidates=0", r"selection.candidates .* got 0"),
    ("privacy=none selection=tags selection.tags=eu", r"selection.tags must be a list of words, got 'eu'"),
    ("privacy=none selection=tags selection.nope=1", r"selection.nope"),
    ("privacy=none assignment=deadline", r"assignment=deadline needs a deadline: set deadline"),
    (
        "privacy=none assignment=deadline deadline=9 assignment.first=0",
        r"assignment.first .* above 0 .*, got 0",
    ),
]


@pytest.mark.parametrize(("overrides", "said"), SAID)
def test_what_is_wrong_is_told_in_one_line(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        job_of(overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("codec=null", r"codec"),
        ("model=mlp model.hidden=64", r"model.hidden .* got"),
        ("model=cnn model.dropout=0.5", r"model.dropout .* got"),
        ("task=null", r"task"),
        ("=3", r"="),
        ("codec._target_=[1]", r"codec._target_"),
        ("strategy=fedtrimmedavg strategy.beta=0.9", r"strategy.*beta"),
        ("strategy=fedadam strategy.eta=-1", r"strategy.eta .* got -1"),
        ("strategy=fedadam strategy.eta=abc", r"strategy.eta .* got 'abc'"),
        ("strategy=fedadam strategy.beta_1=7", r"strategy.beta_1 .* got 7"),
        ("strategy=krum strategy.num_malicious_nodes=-3", r"strategy.num_malicious_nodes .* got -3"),
        ("privacy=none strategy=qfedavg strategy.client_learning_rate=0", r"strategy.client_learning_rate"),
    ],
)
def test_what_else_is_wrong_is_told_in_one_line(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job_of(overrides)


# Overrides come over the network


@pytest.mark.parametrize(
    "overrides",
    [
        "+foo=1",
        "++foo=1",
        "~codec",
        "~codec.step=1",
        "' +foo=1'",
        "hydra.run.dir=/tmp/x",
        "hydra/launcher=basic",
        "' hydra.run.dir=/tmp/x'",
        "run_dir=${oc.env:HOME}",
        "'run_dir=${oc.env:HOME}'",
        "'run_dir=\\${oc.env:HOME}'",
        "seed='\"${oc.env:HOME}\"'",
        "'rounds=${clients}'",
        "--multirun",
        "-m",
        "--config-dir=/tmp",
        "codec",
        "privacy=local_gaussian privacy._target_=fedapp.privacy.central.CentralGaussian",
        "'unclosed",
    ],
)
def test_overrides_that_are_not_plain_are_refused(overrides: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.compose(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "group",
    [
        "task",
        "model",
        "trainer",
        "codec",
        "strategy",
        "engine",
        "privacy",
        "selection",
        "assignment",
    ],
)
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "fedapp.cli.os.system",
        "fedapp.codec.chain.np.save",
        "builtins.eval",
        "subprocess.Popen",
        "fedapp.codec.chain.pipeline.__globals__",
        "fedapp.codec.chain.Identity.encode",
        "fedapp.codec.chain. Identity",
        "flwr.serverapp.strategy.FedAvgEvil",
        "flwr.serverapp.strategy",
        "hydra.utils.instantiate",
        "",
        "null",
        "1",
    ],
)
def test_targets_that_are_not_listed_are_refused(group: str, target: str) -> None:
    with pytest.raises(ConfigError):
        job_of(f"'{group}._target_={target}'")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "fedapp.codec.chain.Chain", "stages": [{"_target_": "os.system", "command": "true"}]},
        {"_target_": "fedapp.codec.chain.ErrorFeedback", "codec": {"_target_": "builtins.eval"}},
        {"_target_": "fedapp.codec.chain.Identity", "_args_": [1]},
        {"_target_": "fedapp.codec.chain.Identity", "_partial_": True},
    ],
)
def test_nested_targets_are_checked_too(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config.build(node, "codec")


def test_an_allowed_name_that_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from fedapp.codec import chain

    monkeypatch.setattr(chain, "pipeline", os.system)
    with pytest.raises(ConfigError, match="not what it seems"):
        job_of("codec=topk codec.step=1.5")


def test_a_codec_can_be_put_together_from_its_stages() -> None:
    stages = [
        {"_target_": "fedapp.codec.quantize.DeadZone", "step": 0.5},
        {"_target_": "fedapp.codec.entropy.Ans"},
    ]
    codec = config.build({"_target_": "fedapp.codec.chain.Chain", "stages": stages}, "codec")
    assert repr(codec) == "Chain(stages=(DeadZone(step=0.5, offset=0.38), Ans()))"


def test_a_choice_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("_target_: os.system\ncommand: touch /tmp/never\n")
    up = "/".join([".."] * 12)
    with pytest.raises(ConfigError):
        job_of(f"codec={up}{tmp_path}/evil")


WORDS = [
    "codec",
    "task",
    "rounds",
    "seed",
    "true",
    "null",
    "???",
    ".inf",
    "${",
    "$",
    "\\",
    "\t",
    "é",
    *"=.,[]{}():'@/1-a%!*&#\n",
]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(WORDS), max_size=8).map("".join))
def test_any_text_is_an_override_string_or_an_error_of_ours(text: str) -> None:
    try:
        config.compose(text)
    except ConfigError:
        return
