"""The layers: torch's values and gradients to the last bit, and masks of the share that was asked for."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fedapp.layers import Dropout, MaxPool

POOLS = [  # cnn's, small_cnn's, resnet18's, and others
    {"kernel_size": 2}, {"kernel_size": 2, "stride": 1}, {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "dilation": (1, 2), "ceil_mode": True}, {"kernel_size": 3, "ceil_mode": True},
]  # fmt: skip
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def values(layout: torch.memory_format, dtype: torch.dtype) -> torch.Tensor:
    """Few distinct values, so that windows have ties; some of them infinite."""
    x = torch.randint(-3, 3, (3, 5, 13, 12), generator=torch.Generator().manual_seed(1)).float()
    x[x == -3] = -math.inf
    return x.to(dtype).contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pooling_is_torchs_to_the_bit_and_lies_as_it_came(
    pool: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    ours, theirs = values(layout, dtype), values(layout, dtype)
    pooled, expected = MaxPool(**pool)(ours), nn.MaxPool2d(**pool)(theirs)
    assert torch.equal(pooled, expected)
    assert pooled.is_contiguous(memory_format=layout)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (found,) = torch.autograd.grad(pooled, ours, towards)
    (known,) = torch.autograd.grad(expected, theirs, towards)
    assert torch.equal(found, known)


def test_no_examples_are_pooled_to_none() -> None:
    assert MaxPool(2)(torch.zeros(0, 5, 12, 12)).shape == (0, 5, 6, 6)


def test_other_inputs_and_outputs_are_torchs() -> None:
    x = torch.rand(3, 6, 6)
    assert torch.equal(MaxPool(2)(x), nn.MaxPool2d(2)(x))
    (pooled, places), (known, at) = (
        MaxPool(2, return_indices=True)(x[None]),
        nn.MaxPool2d(2, return_indices=True)(x[None]),
    )
    assert torch.equal(pooled, known)
    assert torch.equal(places, at)


def test_what_is_not_a_number_is_pooled_as_torch_does() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 2] = math.nan
    assert torch.equal(MaxPool(2)(x).isnan(), nn.MaxPool2d(2)(x).isnan())


def test_a_pooled_value_can_be_derived_twice() -> None:
    """As the attack on gradients does (`fedapp.audit.inversion`)."""
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: MaxPool(2)(x * x), x)


def mask(p: float, n: int = 200_000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(5)
    dropped: torch.Tensor = Dropout(p).train()(torch.ones(n, dtype=dtype))
    return dropped


def is_share(kept: torch.Tensor, share: float) -> bool:
    """Whether so many are kept, within five standard errors."""
    return abs(kept.float().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / len(kept))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_drops_the_share_that_was_asked_for(p: float) -> None:
    kept = mask(p) != 0
    assert is_share(kept, 1 - p)
    assert not is_share(kept, 1 - p * 2 / 3)
    assert not is_share(kept, 1 - p * 3 / 2)
    assert is_share(kept[1:] & kept[:-1], (1 - p) ** 2)  # neighbours have nothing to do with each other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scales_what_it_keeps_in_the_type_that_came(dtype: torch.dtype) -> None:
    dropped = mask(0.25, dtype=dtype)
    assert dropped.dtype == dtype
    assert set(dropped.tolist()) == {0.0, torch.tensor(1 / 0.75, dtype=dtype).item()}


def test_all_may_be_dropped_and_in_place() -> None:
    assert not Dropout(1.0).train()(torch.ones(5)).any()
    x = torch.ones(1000)
    Dropout(0.5, inplace=True).train()(x)
    assert set(x.tolist()) == {0.0, 2.0}


def test_gradients_pass_where_values_did() -> None:
    x = torch.ones(1000, requires_grad=True)
    dropped = Dropout(0.5).train()(x)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient, dropped.detach())


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0).train()])
def test_dropout_that_drops_nothing_gives_what_came(layer: nn.Module) -> None:
    x = torch.rand(10)
    assert torch.equal(layer(x), x)
