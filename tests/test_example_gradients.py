"""Each example's gradient by layer: what a pass of its own finds, of known layers and of no others."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedapp import example_gradients
from fedapp.errors import ConfigError
from fedapp.example_gradients import ExampleGradients, are_known
from fedapp.models import Cnn, Logistic, Mlp, Resnet18, SmallCnn


class Twice(nn.Module):
    """A layer that takes part twice, and one whose input has a row for each of several places."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.rows, self.out = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        made: Tensor = self.out(self.rows(x).flatten(1))
        return made


def convolution(before: int, after: int, size: Any, **how: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, size, **how), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6, eps=0.1), nn.Tanh(), nn.Conv2d(6, 4, 2), nn.Flatten()
    )


MODELS = [  # a layer joins with one row: a model of it, and the shape of an example
    (nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), (7,)),
    (Twice(), (4, 6)),
    (convolution(3, 5, 3), (3, 8, 7)),
    (convolution(1, 5, 4, stride=2, padding=3), (1, 9, 9)),
    (convolution(2, 6, (3, 1), stride=(1, 2), padding=(0, 1), bias=False), (2, 6, 8)),
    (normed(), (3, 4, 4)),
]  # fmt: skip


@pytest.fixture(params=[2**23, 100])
def _few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All examples at once, whose gradients are kept; and few, which are made again."""
    monkeypatch.setattr(example_gradients, "_AT_ONCE", request.param)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 4, reduction="none")


def one_by_one(model: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """Gradients of what is trained, by a pass for each example."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for loss in losses(model, x):
        yield list(torch.autograd.grad(loss, trained, retain_graph=True))


def norms_one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([torch.cat([g.flatten() for g in one]).norm() for one in one_by_one(model, x)])


def found(model: nn.Module, x: Tensor) -> ExampleGradients:
    return example_gradients.example_gradients(model, lambda: losses(model, x))


def prepared(model: nn.Module, shape: tuple[int, ...], n: int = 9) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(n, *shape, dtype=torch.float64)
    model = model.double()
    model(x)  # lazy layers take their sizes
    return model, x


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize(("model", "shape"), MODELS)
def test_norms_and_sums_are_those_of_a_pass_for_each(
    model: nn.Module, shape: tuple[int, ...], frozen: str | None
) -> None:
    model, x = prepared(model, shape)
    for name, p in model.named_parameters():
        p.requires_grad_(frozen is None or not (name.endswith(frozen) and "0" in name))
    assert are_known(model)
    each = list(one_by_one(model, x))
    gradients, weights = found(model, x), torch.rand(len(x), dtype=torch.float64)
    assert torch.allclose(gradients.norms(), norms_one_by_one(model, x), rtol=1e-12)
    total = dict(gradients.total(weights))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert total.keys() == set(trained)
    for p, *those in zip(trained, *each, strict=True):
        right = sum(weight * one for weight, one in zip(weights, those, strict=True))
        assert total[p].shape == p.shape
        assert total[p].is_contiguous()
        assert torch.allclose(total[p], torch.as_tensor(right), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_norm_is_right_where_its_parts_are_beyond_squares(scale: float) -> None:
    """A large input times a small gradient, or the other way: float32 holds neither square."""
    model, x = nn.Linear(3, 2, bias=False), torch.full((2, 3), scale)
    gradients = example_gradients.example_gradients(model, lambda: (model(x) / scale).sum(1))
    norms = gradients.norms()
    assert torch.allclose(norms, torch.full((2,), 6.0, dtype=torch.float64).sqrt())
    (total,) = gradients.total(0.1 / norms).values()
    assert total.double().norm() == pytest.approx(0.2)


@pytest.mark.parametrize("large", [1e31, 3e38])
def test_what_is_beyond_bounds_does_not_count_as_finite(large: float) -> None:
    """Its share would be so small that rounding doubles it; or products overflow that a sum is made of."""
    dense = nn.Linear(1, 1)
    x = torch.tensor([[1.0], [large]])
    assert example_gradients.example_gradients(
        dense, lambda: dense(x).sum(1)
    ).norms().isfinite().tolist() == [True, False]
    assert example_gradients.example_gradients(
        dense, lambda: dense(torch.ones(2, 1)).sum(1) * x[:, 0]
    ).norms().isfinite().tolist() == [True, False]
    seen = nn.Conv2d(1, 1, 1)
    pixels = torch.ones(2, 1, 4, 4) * x[:, :, None, None]
    assert example_gradients.example_gradients(
        seen, lambda: (seen(pixels) * pixels).sum((1, 2, 3))
    ).norms().isfinite().tolist() == [True, False]


class Apart(nn.Module):
    """Models that no rule can follow, by what is wrong with them."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong, self.first, self.second = wrong, nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.wrong == "more rows":
            made: Tensor = self.second(self.first(x.repeat(3, 1)).view(3, -1, 6).sum(0))
        elif self.wrong == "one row for all":
            made = self.second(torch.tanh(self.first(torch.ones(1, 6).to(x)) + x))
        elif self.wrong == "input overwritten":
            made = self.second(self.first(x) + x.mul_(2))
        else:
            made = self.second(self.first(x).relu_())
        return made


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("more rows", "27 rows of 27 where there are 9"),
        ("one row for all", "1 rows of 1 where there are 9"),
        ("input overwritten", "inplace=False"), ("output overwritten", "inplace=False"),
    ],
)  # fmt: skip
def test_models_that_do_not_keep_examples_apart_are_refused(wrong: str, said: str) -> None:
    model, x = prepared(Apart(wrong), (6,))
    with pytest.raises(ConfigError, match=said):
        found(model, x)
    assert not any(m._forward_hooks for m in model.modules())


class Idle(nn.Module):
    """A layer whose output is used, one whose output is not, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.idle = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        made: Tensor = self.used(x)
        return made


def test_layers_that_do_nothing_add_nothing() -> None:
    model, x = prepared(Idle(), (6,))
    assert isinstance(model, Idle)
    unused, idle = model.unused.weight, model.idle.weight
    gradients = found(model, x)
    assert torch.allclose(gradients.norms(), norms_one_by_one(model.used, x))
    total = gradients.total(torch.ones(len(x)))
    assert isinstance(unused, nn.Parameter)
    assert not total[unused].any()
    assert idle not in total


@pytest.mark.parametrize(("room", "times"), [(100_000, 1), (3000, 2)])
def test_what_is_made_at_a_time_is_bounded(room: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is too much to be kept is made a second time."""
    model, x = prepared(normed(), (3, 8, 7), n=40)
    made = list[tuple[int, int]]()
    for kind in (nn.Conv2d, nn.GroupNorm):
        rule = example_gradients._RULES[kind]

        def noting(layer: Any, x: Tensor, g: Tensor, rule: Any = rule) -> list[Tensor]:
            of: list[Tensor] = rule(layer, x, g)
            unfolded = g[0, 0].numel() * layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else 0
            made.append((len(x), len(x) * max(of[0][0].numel(), unfolded, x[0].numel(), g[0].numel())))
            return of

        monkeypatch.setitem(example_gradients._RULES, kind, noting)
    monkeypatch.setattr(example_gradients, "_AT_ONCE", room)
    gradients = found(model, x)
    gradients.norms()
    gradients.total(torch.ones(40))
    assert max(values for _, values in made) <= room
    assert 40 * 3 <= sum(examples for examples, _ in made) <= times * 40 * 3
    assert sum(examples for examples, _ in made) > (times - 1) * 40 * 3


@pytest.mark.parametrize("build", [Logistic(), Mlp(), SmallCnn(), Cnn(), Resnet18()], ids=str)
def test_the_models_of_fedapp_are_known(build: Any) -> None:
    assert are_known(build((1, 28, 28), 10))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Wider(nn.Linear):
    """What this layer does, nobody knows."""


def shared() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, second)


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv1d(4, 4, 3), nn.BatchNorm2d(4),
        nn.LayerNorm(4), Own(), Wider(3, 3), shared(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_are_left_to_opacus(model: nn.Module) -> None:
    assert not are_known(nn.Sequential(nn.Linear(2, 2), model))
    model.requires_grad_(False)
    assert are_known(nn.Sequential(nn.Linear(2, 2), model))
