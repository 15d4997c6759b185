"""Each example's gradient, layer by layer, from what one forward and one backward pass leave.

The gradient of a layer's weights follows from what went into the layer and from the gradient of what came out
of it. Of a dense layer it is an outer product, whose norm is a product of norms; other layers' are made, some
examples at a time. So the norms that clipping needs, and the sum of what is clipped, take no pass of their
own. Sources: Goodfellow 2015, "Efficient per-example gradient computations"; Rochette, Manoel and Tramel
2019, "Efficient per-example gradient computations in convolutional neural networks"; Bu, Wang, Zha and
Karypis 2023, "Differentially private optimization on large model at small cost" (book-keeping).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, pad

_AT_ONCE = 2**23  # values that are made at a time; of a layer with no more in all, what was made is kept
_SLOTS = ("weight", "bias")  # what a known layer may hold


def _of_linear(layer: nn.Linear, x: Tensor, g: Tensor) -> list[Tensor]:
    x, g = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, g))
    return [g.mT @ x, g.sum(1)]


def _of_convolution(layer: nn.Conv2d, x: Tensor, g: Tensor) -> list[Tensor]:
    (high, wide), (down, right) = layer.kernel_size, layer.stride
    if any(layer.padding):
        x = pad(x, (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]))  # type: ignore[arg-type]
    # With the channels of a pixel together patches are copied seven times as fast as by torch's `unfold`.
    patches = x.permute(0, 2, 3, 1).contiguous().unfold(1, high, down).unfold(2, wide, right)
    patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(len(x), g.shape[2:].numel(), -1)
    return [g.flatten(2) @ patches, g.sum((2, 3))]


def _of_group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor) -> list[Tensor]:
    along = group_norm(x, layer.num_groups, eps=layer.eps) * g
    return [along.flatten(2).sum(2), g.flatten(2).sum(2)]


_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], list[Tensor]]] = {
    nn.Linear: _of_linear,
    nn.Conv2d: _of_convolution,
    nn.GroupNorm: _of_group_norm,
}
"""By layer: gradients (n, ...) of weight and bias, from input (n, ...) and gradient of output (n, ...).

Those of a convolution's weight come with the channels last.
"""


def are_known(model: nn.Module) -> bool:
    """Whether all that is trained belongs to layers whose gradients are known here, each to one layer."""
    owners = Counter(id(p) for layer in _trained(model) for p in _parameters(layer))
    return all(map(_is_known, _trained(model))) and all(count == 1 for count in owners.values())


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return type(layer) in _RULES and plain and not isinstance(layer.padding, str)
    return type(layer) in _RULES


def _trained(model: nn.Module) -> list[nn.Module]:
    """The layers that hold what is trained."""
    return [layer for layer in model.modules() if _parameters(layer)]


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    """What is trained of a layer itself."""
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


class Layers:
    """The layers of a model, watched from here on. All must be known (`are_known`)."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._hooks = [layer.register_forward_hook(self._see) for layer in _trained(model)]

    def _see(self, layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        self._seen.setdefault(layer, []).append((given[0].detach(), made))

    def gradients(self, losses: Tensor) -> "ExampleGradients":
        """Those of the losses (n,), one an example, that the forward pass before came to."""
        seen, self._seen = self._seen, {}
        made = [out for uses in seen.values() for _, out in uses]
        found = iter(torch.autograd.grad(losses.sum(), made, materialize_grads=True))
        return ExampleGradients(
            [_Layer(layer, [(x, next(found)) for x, _ in uses]) for layer, uses in seen.items()]
        )

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class ExampleGradients:
    """The gradients of n examples, none of which need be in memory."""

    layers: "list[_Layer]"

    def norms(self) -> Tensor:
        """Float64 (n,): of each example's gradient, over all layers."""
        return torch.stack([layer.squares() for layer in self.layers]).sum(0).sqrt()

    def total(self, weights: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with the sum of its gradients, the examples' times their weights (n,)."""
        for layer in self.layers:
            yield from layer.total(weights).items()


class _Layer:
    """Gradients of one layer: its uses in the pass are what went in, and the gradient of what came out."""

    def __init__(self, layer: nn.Module, uses: list[tuple[Tensor, Tensor]]) -> None:
        self._layer: Any = layer
        self._uses = uses
        slots = {name: getattr(layer, name) for name in _SLOTS}
        self._trained = {name: p for name, p in slots.items() if p is not None and p.requires_grad}
        self._outer = isinstance(layer, nn.Linear) and len(uses) == 1 and uses[0][0].ndim == 2
        self._kept: list[list[Tensor]] = []

    def squares(self) -> Tensor:
        """Float64 (n,): squared norms."""
        if self._outer:  # in float64, where no product of two float32 is too large, or too small
            x, g = (torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).square() for v in self._uses[0])
            both: Tensor = g * (x * ("weight" in self._trained) + float("bias" in self._trained))
            return both
        found = []
        for made in self._made():
            norms = [torch.linalg.vector_norm(v, dim=1) for v in made]
            found.append(torch.stack(norms).double().square().sum(0))
        return torch.cat(found)

    def total(self, weights: Tensor) -> dict[nn.Parameter, Tensor]:
        """The weighted sum over the examples."""
        if self._outer:
            x, g = self._uses[0]
            g = g * weights[:, None].to(g.dtype)
            return {p: g.mT @ x if name == "weight" else g.sum(0) for name, p in self._trained.items()}
        sums, begin = [torch.zeros_like(p).view(-1) for p in self._trained.values()], 0
        for made in self._made():
            some = weights[begin : begin + len(made[0])]
            sums = [total + some.to(v.dtype) @ v for total, v in zip(sums, made, strict=True)]
            begin += len(some)
        return {
            p: self._shaped(name, total) for (name, p), total in zip(self._trained.items(), sums, strict=True)
        }

    def _shaped(self, name: str, total: Tensor) -> Tensor:
        """The sum in the shape of what it is of."""
        p = self._trained[name]
        if isinstance(self._layer, nn.Conv2d) and name == "weight":
            return total.view(len(p), *p.shape[2:], -1).permute(0, 3, 1, 2).contiguous()
        return total.view_as(p)

    def _made(self) -> Iterator[list[Tensor]]:
        """Gradients of what is trained, (k, values), of some examples after others; the same each time."""
        if self._kept:
            yield from self._kept
            return
        rule, n = _RULES[type(self._layer)], len(self._uses[0][0])
        size, places = sum(p.numel() for p in self._trained.values()), self._uses[0][1][0, :1].numel()
        step = max(1, _AT_ONCE // max(size, places * self._layer.weight[0].numel()))
        for begin in range(0, n, step):
            these = slice(begin, begin + step)
            uses = [rule(self._layer, x[these], g[these]) for x, g in self._uses]
            both = dict(zip(_SLOTS, (reduce(torch.add, of) for of in zip(*uses, strict=True)), strict=True))
            made = [both[name].flatten(1) for name in self._trained]
            if n * size <= _AT_ONCE:
                self._kept.append(made)
            yield made
