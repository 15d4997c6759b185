"""The models: builders that are given (input_shape, classes) and return a fresh network."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import nn

from fedapp import check
from fedapp.errors import ConfigError
from fedapp.layers import Dropout, MaxPool
from fedapp.vector import values

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression on any input: 7,850 parameters on 28 x 28 pixels and ten classes."""

    def __call__(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Logits (n, classes) from (n, *input_shape)."""
        return _stack(flatten=nn.Flatten(), linear=nn.Linear(math.prod(input_shape), classes))


@dataclass(frozen=True)
class Mlp:
    """Fully connected layers on any input.

    hidden: the widths of the hidden layers. activation: tanh or relu.
    """

    hidden: Sequence[int] = (64, 64)
    activation: str = "relu"

    def __post_init__(self) -> None:
        widths = self.hidden if isinstance(self.hidden, Sequence) else ()
        if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
            raise ConfigError(
                f"model.hidden must list widths of at least 1, got {self.hidden}: set model.hidden=[64]"
            )
        object.__setattr__(self, "hidden", tuple(widths))
        check.choice("model.activation", self.activation, ("tanh", "relu"))

    def __call__(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Logits (n, classes) from (n, *input_shape)."""
        widths = [math.prod(input_shape), *self.hidden]
        layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
        for number, (width, following) in enumerate(zip(widths, self.hidden, strict=False), start=1):
            layers[f"linear{number}"] = nn.Linear(width, following)
            layers[f"activation{number}"] = ACTIVATIONS[self.activation]()
        return _stack(**layers, output=nn.Linear(widths[-1], classes))


@dataclass(frozen=True)
class SmallCnn:
    """Two convolutions and two dense layers, small enough for DP-SGD.

    26,146 parameters on Fashion-MNIST's oriented features. Images of 20 pixels and more get the large
    kernels and the pooling of the DP-SGD literature: 26,010 parameters on 28 x 28 grey pixels.
    activation: tanh (better under clipping; Papernot et al., 2021) or relu.
    """

    activation: str = "tanh"

    def __post_init__(self) -> None:
        check.choice("model.activation", self.activation, ("tanh", "relu"))

    def __call__(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Logits (n, classes) from (n, channels, height, width). Raises ConfigError under 6 pixels."""
        channels, side = _image(input_shape, "small_cnn", smallest=6)
        activation = ACTIVATIONS[self.activation]
        if side >= 20:
            hidden = 32
            features = _stack(
                conv1=nn.Conv2d(channels, 16, kernel_size=8, stride=2, padding=3),
                activation1=activation(),
                pool1=MaxPool(2, 1),
                conv2=nn.Conv2d(16, 32, kernel_size=4, stride=2),
                activation2=activation(),
                pool2=MaxPool(2, 1),
                flatten=nn.Flatten(),
            )
        else:
            hidden = 40
            features = _stack(
                conv1=nn.Conv2d(channels, 32, kernel_size=3),
                activation1=activation(),
                conv2=nn.Conv2d(32, 32, kernel_size=3),
                activation2=activation(),
                flatten=nn.Flatten(),
            )
        head = _stack(
            linear=nn.Linear(_width(features, input_shape), hidden),
            activation3=activation(),
            output=nn.Linear(hidden, classes),
        )
        return _joined(features, head)


@dataclass(frozen=True)
class Cnn:
    """The network of PyTorch's MNIST example: 1,199,882 parameters on 28 x 28 grey pixels.

    dropout: the shares of values dropped after the convolutions and after the dense layer.
    """

    dropout: Sequence[float] = (0.25, 0.5)

    def __post_init__(self) -> None:
        shares = self.dropout if isinstance(self.dropout, Sequence) else ()
        if len(shares) != 2 or not all(isinstance(s, int | float) and 0 <= s < 1 for s in shares):
            raise ConfigError(
                f"model.dropout must be two shares from 0 to below 1, got {self.dropout}: "
                "set model.dropout=[0.25,0.5]"
            )
        object.__setattr__(self, "dropout", tuple(shares))

    def __call__(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Logits (n, classes) from (n, channels, height, width). Raises ConfigError under 8 pixels."""
        channels, _ = _image(input_shape, "cnn", smallest=8)
        features = _stack(
            conv1=nn.Conv2d(channels, 32, kernel_size=3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, kernel_size=3),
            pool=MaxPool(2),
            relu2=nn.ReLU(),  # of the maxima, which is the same, and they are fewer
            flatten=nn.Flatten(),
        )
        head = _stack(
            dropout1=Dropout(self.dropout[0]),
            linear=nn.Linear(_width(features, input_shape), 128),
            relu3=nn.ReLU(),
            dropout2=Dropout(self.dropout[1]),
            output=nn.Linear(128, classes),
        )
        return _joined(features, head)


@dataclass(frozen=True)
class Resnet18:
    """torchvision's ResNet-18, not pretrained: 11.2 million parameters with ten classes.

    norm: group (statistics of one example, as DP-SGD needs) or batch (statistics of the batch).
    """

    norm: str = "group"

    def __post_init__(self) -> None:
        check.choice("model.norm", self.norm, ("group", "batch"))

    def __call__(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Logits (n, classes) from (n, channels, height, width). Raises ConfigError for no image."""
        from torchvision.models.resnet import ResNet

        channels, _ = _image(input_shape, "resnet18", smallest=1)
        norm = nn.BatchNorm2d if self.norm == "batch" else _group_norm
        model: nn.Module = ResNet(_residual_block(), [2, 2, 2, 2], num_classes=classes, norm_layer=norm)
        if channels != 3:
            model.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        model.maxpool = MaxPool(3, 2, 1)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # clipping needs the values that would be overwritten
        return model


def _residual_block() -> type[nn.Module]:
    """torchvision's basic block with a sum that overwrites nothing, which clipping forbids."""
    from torchvision.models.resnet import BasicBlock

    class ResidualBlock(BasicBlock):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            identity = x if self.downsample is None else self.downsample(x)
            out = self.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(out)) + identity)

    return ResidualBlock


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _stack(**layers: nn.Module) -> nn.Sequential:
    """A sequence with named layers: the names are the first half of each parameter's name."""
    return nn.Sequential(OrderedDict(layers))


def _joined(*stacks: nn.Sequential) -> nn.Sequential:
    return _stack(**{name: layer for stack in stacks for name, layer in stack.named_children()})


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers that mix the examples of a batch, whether anything of them is trained or not."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _width(features: nn.Module, input_shape: tuple[int, ...]) -> int:
    """How many values `features` makes of one example."""
    with torch.no_grad():
        return int(features(torch.zeros(1, *input_shape)).shape[1])


def _image(input_shape: tuple[int, ...], model: str, smallest: int) -> tuple[int, int]:
    """Channels and shorter side of an image. ConfigError for other or smaller inputs."""
    if len(input_shape) != 3:
        raise ConfigError(f"model={model} needs images, got examples of shape {input_shape}: set model=mlp")
    side = min(input_shape[1:])
    if side < smallest:
        raise ConfigError(
            f"model={model} needs images of at least {smallest} pixels, got {side}: "
            "set task.features=pixels, a larger task.size, or model=small_cnn or mlp"
        )
    return input_shape[0], side


def load(model: nn.Module, arrays: ArrayRecord) -> None:
    """Copy received weights into a resident model, in place. Raises ValueError for those of another model."""
    own = model.state_dict()
    if arrays.keys() != own.keys():
        raise ValueError("received weights are not of this model")
    for name, tensor in own.items():
        if tensor.device.type == "cpu":
            # Read once; torch would copy what is read-only first.
            np.copyto(tensor.numpy(), values(arrays[name]))
        else:
            tensor.copy_(torch.tensor(values(arrays[name])))
