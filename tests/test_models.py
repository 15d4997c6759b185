"""The models: exact sizes, shapes, what Opacus accepts, and clear errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torchvision.models import resnet18

from fedapp import config
from fedapp.errors import ConfigError
from fedapp.model_checks import check_model
from fedapp.models import Cnn, Logistic, Mlp, Resnet18, SmallCnn

CONF = Path(__file__).parents[1] / "conf" / "model"
FASHION, DIGITS, COLOUR = (1, 28, 28), (1, 8, 8), (3, 32, 32)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Logistic(), 7_850),
        (SmallCnn(), 26_010),
        (SmallCnn(activation="relu"), 26_010),
        (Cnn(), 1_199_882),
        (Mlp(hidden=(200, 200)), 199_210),
        (Mlp(hidden=[64]), 784 * 64 + 64 + 64 * 10 + 10),
    ],
)
def test_parameter_counts_on_fashion_mnist(build: Any, expected: int) -> None:
    assert size(build(FASHION, 10)) == expected


@pytest.mark.parametrize(("build", "expected"), [(SmallCnn(), 26_146), (Logistic(), 8_340)])
def test_parameter_counts_on_oriented_features(build: Any, expected: int) -> None:
    assert size(build((17, 7, 7), 10)) == expected


def test_resnet18_has_torchvisions_size() -> None:
    assert size(Resnet18()((3, 224, 224), 1000)) == 11_689_512
    assert size(Resnet18(norm="batch")((3, 224, 224), 1000)) == 11_689_512


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (build, shape)
        for shape in [FASHION, COLOUR, (3, 20, 24), DIGITS, (17, 7, 7), (1, 6, 6)]
        for build in [Logistic(), Mlp(), SmallCnn(), Cnn(), Resnet18(), Resnet18(norm="batch")]
        if not (isinstance(build, Cnn) and shape[1] < 8)
    ],
)
def test_forward_gives_one_logit_per_class(build: Any, shape: tuple[int, ...]) -> None:
    model = build(shape, 7).eval()
    with torch.no_grad():
        output = model(torch.rand(2, *shape))
    assert output.shape == (2, 7)
    assert output.dtype == torch.float32
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("build", [Logistic(), Mlp()])
def test_dense_models_take_tables(build: Any) -> None:
    assert build((5,), 3)(torch.rand(4, 5)).shape == (4, 3)


@pytest.mark.parametrize("build", [Logistic(), Mlp(), SmallCnn(), Cnn(), Resnet18()])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_accepts_and_gives_one_gradient_per_example(build: Any) -> None:
    model = build(FASHION, 10)
    assert ModuleValidator.validate(model, strict=False) == []
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    wrapped = GradSampleModule(model.train())
    wrapped(torch.rand(3, *FASHION)).sum().backward()
    for parameter in wrapped.parameters():
        assert parameter.grad_sample.shape == (3, *parameter.shape)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_resnet18_computes_what_torchvisions_does(shape: tuple[int, ...]) -> None:
    ours = Resnet18(norm="batch")(shape, 10).eval()
    theirs = resnet18(num_classes=10).eval()
    if shape[0] == 1:
        theirs.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, *shape)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_cnn_computes_what_pytorchs_example_does() -> None:
    """https://github.com/pytorch/examples/blob/main/mnist/main.py, but for dropout, to the last bit."""
    ours = Cnn()(FASHION, 10).eval()
    conv1, conv2, linear, output = (m for m in ours.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    theirs = nn.Sequential(
        conv1, nn.ReLU(), conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear, nn.ReLU(), output
    )
    x, classes = torch.rand(6, *FASHION), torch.arange(6)
    found, known = (nn.functional.cross_entropy(model(x), classes) for model in (ours, theirs))
    assert torch.equal(found, known)
    gradients = [torch.autograd.grad(loss, list(ours.parameters())) for loss in (found, known)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_opacus_refuses_batch_norm() -> None:
    assert ModuleValidator.validate(Resnet18(norm="batch")(COLOUR, 10), strict=False)


@pytest.mark.parametrize("frozen", [True, False])
def test_examples_that_are_mixed_are_refused_though_nothing_of_it_is_trained(frozen: bool) -> None:
    """Opacus' validator says nothing of such layers."""
    norm = nn.BatchNorm1d(8, affine=frozen, track_running_stats=False).requires_grad_(False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm, nn.Linear(8, 10))
    job = config.job(config.compose("task=digits privacy=example model=logistic"))
    assert ModuleValidator.validate(model, strict=False) == []
    with pytest.raises(
        ConfigError, match=r"BatchNorm1d.* mixes the examples of a batch.*group normalisation"
    ):
        check_model(job, model)


@pytest.mark.parametrize("build", [SmallCnn(), Cnn(), Resnet18()])
def test_convolutions_refuse_tables_with_the_repair(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"\(5,\).*model=mlp"):
        build((5,), 3)


@pytest.mark.parametrize(("build", "smallest"), [(SmallCnn(), 6), (Cnn(), 8)])
def test_too_small_images_are_refused(build: Any, smallest: int) -> None:
    with pytest.raises(ConfigError, match=f"at least {smallest} pixels, got {smallest - 1}: set "):
        build((1, smallest - 1, 30), 3)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (Mlp, {"hidden": []}, "model.hidden"),
        (Mlp, {"hidden": [64, 0]}, "model.hidden"),
        (Mlp, {"hidden": [1.5]}, "model.hidden"),
        (Mlp, {"activation": "gelu"}, "one of tanh, relu, got 'gelu'"),
        (SmallCnn, {"activation": "gelu"}, "one of tanh, relu, got 'gelu'"),
        (Cnn, {"dropout": [0.5]}, "model.dropout"),
        (Cnn, {"dropout": [0.5, 1.0]}, "model.dropout"),
        (Resnet18, {"norm": "layer"}, "one of group, batch, got 'layer'"),
    ],
)
def test_wrong_settings_are_refused(build: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logistic", Logistic()),
        ("mlp", Mlp()),
        ("small_cnn", SmallCnn()),
        ("cnn", Cnn()),
        ("resnet18", Resnet18()),
    ],
)
def test_yaml_holds_the_defaults(name: str, expected: object) -> None:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    assert instantiate(config) == expected
    assert set(config) - {"_target_"} == set(vars(expected))


def test_every_yaml_is_tested() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {"logistic", "mlp", "small_cnn", "cnn", "resnet18"}
