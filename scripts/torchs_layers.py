"""The models of fedapp with the layers that torch has of that kind: what one would write without fedapp."""

from torch import nn


def with_torchs_layers(model: nn.Module) -> nn.Module:
    """The same model, its layers turned (in place) from those of `fedapp.layers` into their parents."""
    for module in model.modules():
        if type(module).__module__ == "fedapp.layers":
            module.__class__ = type(module).__mro__[1]
    return model
