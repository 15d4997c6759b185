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

from fedapp.errors import ConfigError

_AT_ONCE = 2**23  # values that are made at a time; of a layer with no more in all, what was made is kept
LARGEST = 1e30  # norms; see `ExampleGradients.norms`
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
    owners = Counter(id(p) for layer in _trained(model) for p in _parameters(layer).values())
    return all(map(_is_known, _trained(model))) and all(count == 1 for count in owners.values())


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
            return False
        if isinstance(layer.padding, str):
            return False
    return type(layer) in _RULES and _parameters(layer).keys() <= set(_SLOTS)


def _trained(model: nn.Module) -> list[nn.Module]:
    """The layers that hold what is trained."""
    return [layer for layer in model.modules() if _parameters(layer)]


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a layer itself, by name, weight first."""
    return {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def example_gradients(model: nn.Module, losses: Callable[[], Tensor]) -> "ExampleGradients":
    """The gradients of the losses (n,), one an example, that a forward pass comes to; layers must be known.

    Raises ConfigError where layers do not keep examples apart as rows, or overwrite what others need.
    """
    uses = list[tuple[nn.Module, _Use]]()

    def see(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        uses.append((layer, _Use(given[0].detach(), made)))

    hooks = [layer.register_forward_hook(see) for layer in _trained(model)]
    try:
        found = losses()
    finally:
        for hook in hooks:
            hook.remove()
    for layer, use in uses:
        use.check(layer, len(found))
    outputs = torch.autograd.grad(found.sum(), [use.out for _, use in uses], materialize_grads=True)
    by_layer = dict[nn.Module, list[tuple[Tensor, Tensor]]]()
    for (layer, use), g in zip(uses, outputs, strict=True):
        by_layer.setdefault(layer, []).append((use.x, g))
    return ExampleGradients([LayerGradients(layer, pairs) for layer, pairs in by_layer.items()])


class _Use:
    """What went into a layer, and what came out."""

    def __init__(self, x: Tensor, out: Tensor) -> None:
        self.x, self.out = x, out
        self._versions = x._version, out._version

    def check(self, layer: nn.Module, n: int) -> None:
        if not len(self.x) == len(self.out) == n:
            raise ConfigError(
                f"{layer} makes {len(self.out)} rows of {len(self.x)} where there are {n} examples, whose "
                "gradients cannot be told apart: give each layer one row an example"
            )
        if (self.x._version, self.out._version) != self._versions:
            raise ConfigError(f"what {layer} takes or makes is overwritten later: set inplace=False")


@dataclass(frozen=True)
class ExampleGradients:
    """The gradients of n examples, few of which are in memory at a time."""

    layers: "list[LayerGradients]"

    def norms(self) -> Tensor:
        """Float64 (n,): of each example's gradient, over all layers; inf or NaN where it is not finite.

        Nor does it count as finite where it, or a factor of it, is longer than `LARGEST`: its share would be
        among the smallest numbers of float32, whose rounding may double them.
        """
        return torch.stack([layer.squares() for layer in self.layers]).sum(0).sqrt()

    def total(self, weights: Tensor) -> dict[nn.Parameter, Tensor]:
        """By parameter the sum of gradients, the examples' times their weights (n,)."""
        return {p: total for layer in self.layers for p, total in layer.total(weights).items()}


class LayerGradients:
    """Gradients of one layer: its uses in the pass are what went in, and the gradient of what came out."""

    def __init__(self, layer: nn.Module, uses: list[tuple[Tensor, Tensor]]) -> None:
        self.layer: Any = layer
        self.uses = uses
        self._trained = _parameters(layer)
        self._outer = isinstance(layer, nn.Linear) and len(uses) == 1 and uses[0][0].ndim == 2
        self._kept: list[list[Tensor]] = []

    def squares(self) -> Tensor:
        """Float64 (n,): squared norms."""
        if self._outer:
            x, g = (torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).square() for v in self.uses[0])
            found = torch.zeros_like(g)
            found += g * x if "weight" in self._trained else 0.0
            found += g if "bias" in self._trained else 0.0
            return torch.where(torch.maximum(x, g) < LARGEST**2, found, torch.inf)
        squares = []
        for made in self._made():
            norms = [torch.linalg.vector_norm(v, dim=1) for v in made]
            squares.append(torch.stack(norms).double().square().sum(0))
        found = torch.cat(squares)
        return torch.where(found < LARGEST**2, found, torch.inf)

    def total(self, weights: Tensor) -> dict[nn.Parameter, Tensor]:
        """The weighted sum over the examples."""
        if self._outer:
            x, g = self.uses[0]
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
        if isinstance(self.layer, nn.Conv2d) and name == "weight":
            return total.view(len(p), *p.shape[2:], -1).permute(0, 3, 1, 2).contiguous()
        return total.view_as(p)

    def _made(self) -> Iterator[list[Tensor]]:
        """Gradients of what is trained, (k, values), of some examples after others; the same each time."""
        if self._kept:
            yield from self._kept
            return
        rule, n = _RULES[type(self.layer)], len(self.uses[0][0])
        size = sum(p.numel() for p in self._trained.values())
        step = max(1, _AT_ONCE // max(size, *(self._unfolded(x, g) for x, g in self.uses)))
        for begin in range(0, n, step):
            these = slice(begin, begin + step)
            uses = [rule(self.layer, x[these], g[these]) for x, g in self.uses]
            both = dict(zip(_SLOTS, (reduce(torch.add, of) for of in zip(*uses, strict=True)), strict=True))
            made = [both[name].flatten(1) for name in self._trained]
            if n * size <= _AT_ONCE:
                self._kept.append(made)
            yield made

    def _unfolded(self, x: Tensor, g: Tensor) -> int:
        """Values of the largest array on the way to one example's gradient."""
        taps = self.layer.weight[0].numel() if isinstance(self.layer, nn.Conv2d) else 1
        return max(x[0].numel(), g[0].numel(), g[0, 0].numel() * taps)
