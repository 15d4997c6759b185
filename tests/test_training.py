"""Trainers: the laws that every one keeps, then what DP-SGD promises, checked by numbers."""

import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy.stats import binom, chi2
from test_mechanisms import WRONG, is_noise_of
from torch import nn

from fedapp import config
from fedapp.dp_step import Step
from fedapp.errors import ConfigError
from fedapp.example_gradients import are_known
from fedapp.models import Cnn, Logistic, Mlp, Resnet18, SmallCnn
from fedapp.privacy.example import ExamplePrivacy
from fedapp.tasks import Data
from fedapp.tasks.images import Digits
from fedapp.tasks.partition import Iid
from fedapp.training import DpSgd, Sgd, Trainer

TASK = Digits(build=Logistic(), partition=Iid(), clients=4, seed=0)
PRIVATE = DpSgd(
    lr=0.5, sampling_rate=0.2, examples_per_client=300, steps=3, rounds=2,
    privacy=ExamplePrivacy(test_seed=1),
)  # fmt: skip
TRAINERS = [  # a new trainer joins with one row
    Sgd(),
    Sgd(momentum=0.9, weight_decay=1e-3, epochs=2),
    Sgd(proximal_mu=0.1, schedule="cosine"),
    Sgd(channels_last=True),
    Sgd(bfloat16=True),
    PRIVATE,
    replace(PRIVATE, momentum=0.5, physical_batch_size=7),
]


def data(count: int) -> Data:
    whole = TASK.train_data()
    return Data(whole.x[:count], whole.y[:count])


def flat(model: nn.Module) -> NDArray[np.float32]:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])


def fit(
    trainer: Trainer, count: int, *, model: nn.Module | None = None, seed: int = 0,
    state: Mapping[str, NDArray[Any]] | None = None,
    progress: float = 0.0,
) -> tuple[NDArray[np.float32], dict[str, int | float], Mapping[str, NDArray[Any]]]:  # fmt: skip
    """The update, metrics and next state of one fit on the first `count` digits."""
    model = model or TASK.model(0)
    before = flat(model)
    metrics, after = trainer.fit(TASK, model, data(count), state or {}, np.random.default_rng(seed), progress)
    return flat(model) - before, metrics, after


@pytest.mark.usefixtures("clipping")
@pytest.mark.parametrize(
    "trainer", TRAINERS, ids=["sgd", "momentum", "prox", "last", "half", "dp_sgd", "chunked"]
)
class TestLaws:
    def test_same_seed_same_bits(self, trainer: Trainer) -> None:
        assert np.array_equal(fit(trainer, 100)[0], fit(trainer, 100)[0])
        assert not np.array_equal(fit(trainer, 100)[0], fit(trainer, 100, seed=1)[0])

    @pytest.mark.parametrize("count", [0, 1, 33])
    def test_any_number_of_examples(self, trainer: Trainer, count: int) -> None:
        update, metrics, _ = fit(trainer, count)
        assert np.isfinite(update).all()
        assert np.isfinite(list(metrics.values())).all()
        assert isinstance(metrics["num-examples"], int)

    def test_leaves_the_model_clean(self, trainer: Trainer) -> None:
        """A model that one trainer trained can be trained by another, as if it were fresh."""
        used, fresh = TASK.model(0), TASK.model(0)
        fit(trainer, 50, model=used)
        fresh.load_state_dict(used.state_dict())
        assert all(p.grad is None or not isinstance(trainer, DpSgd) for p in used.parameters())
        assert not any(m._forward_hooks or m._backward_hooks for m in used.modules())
        assert np.array_equal(fit(Sgd(), 50, model=used)[0], fit(Sgd(), 50, model=fresh)[0])

    def test_learns(self, trainer: Trainer) -> None:
        model, state = TASK.model(0), dict[str, NDArray[Any]]()
        start = TASK.evaluate(model, data(300))["loss"]
        for round_ in range(2):
            state = dict(fit(trainer, 300, model=model, seed=round_, state=state)[2])
        assert TASK.evaluate(model, data(300))["loss"] < start


def test_sgd_is_the_plain_loop() -> None:
    model, rng = TASK.model(0), np.random.default_rng(0)
    shuffle = torch.Generator().manual_seed(int(rng.integers(2**63)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        for batch in torch.randperm(100, generator=shuffle).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data(100).x[batch]), data(100).y[batch]).backward()
            optimizer.step()
    update, metrics, _ = fit(Sgd(epochs=2), 100)
    assert np.array_equal(update, flat(model) - flat(TASK.model(0)))
    assert metrics["num-examples"] == 100
    assert 0 < metrics["train_loss"] < 3


def test_channels_last_changes_how_it_is_computed_and_not_what() -> None:
    trained = []
    for last in (False, True):
        overrides = f"task=digits privacy=none model=small_cnn clients=4 trainer.channels_last={last}"
        job = config.job(config.compose(overrides))
        convolution = next(m for m in job.model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1)
        assert convolution.weight.is_contiguous() == (not last)
        assert isinstance(job.trainer, Sgd)
        job.trainer.fit(job.task, job.model, data(200), {}, np.random.default_rng(0), 0.0)
        trained.append(flat(job.model))
    moved = np.abs(trained[0] - flat(job.task.model(job.seed))).max()
    assert 0 < np.abs(trained[1] - trained[0]).max() < 1e-4 * moved


def test_mixed_precision_goes_about_the_same_way_in_float32() -> None:
    trained = []
    for half in (False, True):
        job = config.job_of(f"task=digits privacy=none model=small_cnn clients=4 trainer.bfloat16={half}")
        seen = set[torch.dtype]()
        last = list(job.model.modules())[-1]
        last.register_forward_hook(lambda *those, seen=seen: seen.add(those[-1].dtype))
        assert isinstance(job.trainer, Sgd)
        job.trainer.fit(job.task, job.model, data(200), {}, np.random.default_rng(0), 0.0)
        assert seen == {torch.bfloat16 if half else torch.float32}
        assert {p.dtype for p in job.model.parameters()} == {torch.float32}
        trained.append(flat(job.model) - flat(job.task.model(job.seed)))
    assert 1e-4 < np.linalg.norm(trained[1] - trained[0]) / np.linalg.norm(trained[0]) < 0.1


@pytest.mark.parametrize(
    ("there", "warned"), [({"avx2": True, "avx512_bf16": False}, True), ({"bf16": 1}, False)]
)
def test_a_processor_without_bfloat16_is_told_of(
    there: dict[str, Any], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    with caplog.at_level("WARNING", "flwr"):
        config.job_of("task=digits privacy=none trainer.bfloat16=true").prepare()
        config.job_of("task=digits privacy=none").prepare()
    assert len([line for line in caplog.messages if "trainer.bfloat16=true" in line]) == warned


def test_proximal_term_pulls_back() -> None:
    """FedProx: the larger mu, the closer the trained weights stay to the received ones."""
    norms = [np.linalg.norm(fit(Sgd(epochs=5, proximal_mu=mu), 100)[0]) for mu in (0.0, 1.0, 10.0)]
    assert norms[0] > norms[1] > 2 * norms[2]


def test_batch_norm_skips_a_remainder_of_one() -> None:
    model = Resnet18(norm="batch")((1, 8, 8), 10)
    metrics, _ = Sgd(batch_size=4).fit(TASK, model, data(5), {}, np.random.default_rng(0), 0.0)
    assert metrics["num-examples"] == 5
    assert model.state_dict()["bn1.num_batches_tracked"] == 1


# --- DP-SGD ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clipping")
def test_noise_has_the_stated_deviation() -> None:
    """On no data an update is noise alone: sigma * C * lr / B a step."""
    dp = replace(PRIVATE, max_grad_norm=0.7)
    update, _, _ = fit(dp, 0, model=Mlp(hidden=(512, 430))((1, 8, 8), 10))
    deviation = dp.noise_multiplier * 0.7 * 0.5 / (0.2 * 300) * np.sqrt(3)
    assert is_noise_of(update, deviation)
    assert not any(is_noise_of(update, wrong * deviation) for wrong in WRONG)


def test_noise_and_draws_come_from_the_operating_system() -> None:
    """The same public randomness gives other noise and other draws each time; `test_seed` fixes both."""
    dp = replace(PRIVATE, privacy=ExamplePrivacy())
    assert not np.array_equal(fit(dp, 0)[0], fit(dp, 0)[0])
    assert np.array_equal(fit(PRIVATE, 0)[0], fit(PRIVATE, 0)[0])


@pytest.mark.parametrize("claimed", [2 / 3, 1.0, 3 / 2])
def test_each_example_joins_each_step_with_the_stated_probability(
    monkeypatch: pytest.MonkeyPatch, claimed: float
) -> None:
    """Draws differ between steps and fits, and their sizes fit a binomial law, judged at 1e-6."""
    drawn: list[list[int]] = []
    monkeypatch.setattr(Step, "__call__", lambda self, data, batch: drawn.append(batch.tolist()))
    dp = replace(PRIVATE, privacy=ExamplePrivacy(), steps=20)
    fit(dp, 1000)
    fit(dp, 1000)
    assert len({tuple(batch) for batch in drawn}) == 40
    assert all(len(set(batch)) == len(batch) for batch in drawn)
    low, high = binom.ppf([5e-7, 1 - 5e-7], 40 * 1000, claimed * 0.2)
    assert (low <= sum(map(len, drawn)) <= high) == (claimed == 1.0)
    times = np.bincount(np.concatenate(drawn), minlength=1000)  # no example is preferred
    assert chi2.ppf(5e-7, 999) < np.sum((times - 8) ** 2) / (40 * 0.2 * 0.8) < chi2.ppf(1 - 5e-7, 999)


@pytest.mark.usefixtures("clipping")
def test_one_example_moves_an_update_by_the_clip_norm_at_most() -> None:
    """Same noise, same draws, one example more, with a huge gradient: lr * C / B, reached within 1 %."""
    dp = replace(PRIVATE, steps=1, sampling_rate=1.0, max_grad_norm=0.5)
    model, outlier = TASK.model(0), Data(1e3 * torch.ones(1, 1, 8, 8), torch.tensor([3]))

    def update(examples: Data) -> NDArray[np.float32]:
        trained = TASK.model(0)
        dp.fit(TASK, trained, examples, {}, np.random.default_rng(0), 0.0)
        return flat(trained) - flat(model)

    few = data(20)
    more = Data(torch.cat([few.x, outlier.x]), torch.cat([few.y, outlier.y]))
    moved = float(np.linalg.norm(update(more) - update(few)))
    assert 0.99 * 0.5 * 0.5 / 300 < moved < 1.001 * 0.5 * 0.5 / 300


SIZES = (0, 1, 2, 3, 15, 25, 29, 31, 37, 38)  # powers of ten


def clipped(dp: DpSgd, model: nn.Module, x: torch.Tensor) -> float:
    """How long one example's gradient is once it is clipped, measured in float64; its label is 0."""
    with closing(Step(TASK, model, dp, None, 0.0)) as step:
        return float(step.total(Data(x[None], torch.tensor([0])), torch.tensor([0])).double().norm())


@pytest.mark.usefixtures("clipping")
@pytest.mark.parametrize("build", [Logistic(), Mlp(), SmallCnn()], ids=lambda build: type(build).__name__)
def test_no_gradient_is_longer_than_the_clip_norm(build: Any) -> None:
    """Not by a bit, for sensitivity is a bound; and long ones are little shorter."""
    task = replace(TASK, build=build)
    for norm in (0.1, 0.3, 0.5):
        dp = replace(PRIVATE, max_grad_norm=norm)
        for number, x in enumerate(data(12).x):
            assert clipped(dp, task.model(0), x * 10.0 ** SIZES[number % len(SIZES)]) <= norm
        assert clipped(dp, task.model(0), 1e3 * torch.ones(1, 8, 8)) > 0.999 * norm


@pytest.mark.parametrize("large", [1e25, 1e29, 1e31, 1e38])
def test_weights_that_aim_at_it_make_no_gradient_longer(large: float) -> None:
    """Whoever sends weights may have shares come to the smallest float32, of which the next is the double."""
    task = replace(TASK, build=Mlp(hidden=(1, 1)))
    dp, found = replace(PRIVATE, max_grad_norm=0.1), []
    for w in np.logspace(5, 7.5, 100):
        model = task.model(0)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            first, second, last = (m.weight for m in model.modules() if isinstance(m, nn.Linear))
            first[0, 0], second[0, 0], last[0, 0], last[1:, 0] = large, 1 / large / w, -w, w
        x = torch.zeros(1, 8, 8)
        x[0, 0, 0] = 1.0
        found.append(clipped(dp, model, x))
    assert max(found) <= 0.1
    assert large > 1e28 or max(found) > 0.099


@pytest.mark.usefixtures("clipping")
def test_no_gradient_of_many_equal_values_is_longer_either() -> None:
    """Its squares are rounded the same way each time they are added: float32 norms of 100,000 lack 1e-4."""
    dp = replace(PRIVATE, max_grad_norm=0.5)
    found = []
    for square in (1.1, 1.2, 1.6):
        model = Logistic()((1, 100, 100), 10)
        for p in model.parameters():
            nn.init.zeros_(p)
        found.append(clipped(dp, model, torch.full((1, 100, 100), square**0.5)))
    assert 0.499 < max(found) <= 0.5


def test_what_clipping_leaves_out_is_no_less_noise() -> None:
    """Gradients are clipped a little short of the clip norm; the noise is that of the whole."""
    for build in (Logistic(), Mlp(hidden=(512, 512))):
        with closing(Step(TASK, build((1, 8, 8), 10), PRIVATE, None, 0.0)) as step:
            clip, multiplier = step._optimizer.max_grad_norm, step._optimizer.noise_multiplier
        assert clip < PRIVATE.max_grad_norm
        assert multiplier * clip == pytest.approx(PRIVATE.noise_multiplier * PRIVATE.max_grad_norm, rel=1e-12)


@pytest.mark.parametrize(
    "build",
    [Mlp(), SmallCnn(), Cnn(dropout=(0.0, 0.0)), pytest.param(Resnet18(), marks=pytest.mark.slow)],
    ids=lambda build: type(build).__name__,
)
def test_steps_are_those_of_opacus_hooks(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever clips, with the same noise and draws, the step is Opacus' own, which stores every gradient."""
    task, examples = Digits(build=build, partition=Iid(), clients=4, seed=0), data(24)
    drawn = torch.arange(0, 24, 2)
    dp = replace(PRIVATE, max_grad_norm=0.7)
    right = task.model(0)
    hooked = GradSampleModule(right)
    optimizer = DPOptimizer(
        torch.optim.SGD(right.parameters(), lr=0.5), noise_multiplier=dp.noise_multiplier, max_grad_norm=0.7,
        expected_batch_size=0.2 * 300, generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        nn.functional.cross_entropy(hooked(examples.x[drawn]), examples.y[drawn]).backward()
    optimizer.step()
    moved = np.linalg.norm(flat(right) - flat(task.model(0)))
    for known in (are_known, lambda model: False):
        for size in (512, 5):
            monkeypatch.setattr("fedapp.dp_step.are_known", known)
            model, noise = task.model(0), torch.Generator().manual_seed(4)
            with closing(Step(task, model, replace(dp, physical_batch_size=size), noise, 0.5)) as step:
                step(examples, drawn)
            assert np.linalg.norm(flat(model) - flat(right)) < 1e-4 * moved


def test_physical_batches_change_no_result() -> None:
    whole, parts = fit(PRIVATE, 200)[0], fit(replace(PRIVATE, physical_batch_size=9), 200)[0]
    assert np.linalg.norm(whole - parts) < 1e-5 * np.linalg.norm(whole)


def test_private_size_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client's N changes none of q, T, B, sigma, nor anything it sends but the noised weights.

    Opacus issues 571 and 819: `make_private` takes rate and expected batch size from the private N."""
    from opacus.optimizers import DPOptimizer

    seen: list[tuple[object, ...]] = []
    step = DPOptimizer.step

    def spy(self: Any, closure: Any = None) -> Any:
        seen.append(
            (self.noise_multiplier, self.max_grad_norm, self.expected_batch_size, self.loss_reduction)
        )
        return step(self, closure)

    monkeypatch.setattr(DPOptimizer, "step", spy)
    sent = []
    for count in (0, 1, 100, 1400):
        seen.clear()
        _, metrics, state = fit(replace(PRIVATE, physical_batch_size=10**6), count)
        sent.append((metrics, state["history"].tolist(), list(seen)))
    assert all(each == sent[0] for each in sent)
    assert sent[0][0] == {"num-examples": 1}
    assert len(sent[0][2]) == PRIVATE.steps
    assert sent[0][2][0][2] == 0.2 * 300


def test_history_composes_and_the_budget_ends() -> None:
    state: Mapping[str, NDArray[Any]] = {}
    for rounds in (1, 2):
        _, _, state = fit(PRIVATE, 10, state=state)
        assert state["history"].tolist() == [[PRIVATE.noise_multiplier, 0.2, 3 * rounds]]
    with pytest.raises(
        ConfigError, match=r"would spend epsilon .* of a budget of 8.0: raise privacy.epsilon"
    ):
        fit(PRIVATE, 10, state=state)
    other = {"history": np.array([[1.0, 0.2, 50]])}
    with pytest.raises(ConfigError, match="budget"):
        fit(PRIVATE, 10, state=other)


def test_dp_sgd_without_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose privacy=example"):
        fit(DpSgd(), 10)


@pytest.mark.parametrize(
    ("build", "bad", "said"),
    [
        (Sgd, {"lr": 0.0}, "trainer.lr"),
        (Sgd, {"lr": float("nan")}, "trainer.lr"),
        (Sgd, {"momentum": 1.0}, "trainer.momentum must be a number at least 0 and below 1, got 1.0"),
        (Sgd, {"batch_size": 0}, "trainer.batch_size"),
        (Sgd, {"epochs": -1}, "trainer.epochs"),
        (Sgd, {"proximal_mu": -0.1}, "trainer.proximal_mu"),
        (DpSgd, {"sampling_rate": 1.5}, "trainer.sampling_rate"),
        (DpSgd, {"max_grad_norm": 0}, "trainer.max_grad_norm"),
        (DpSgd, {"steps": 2.5}, "trainer.steps must be a whole number of at least 1, got 2.5"),
        (DpSgd, {"examples_per_client": 0}, "trainer.examples_per_client"),
        (DpSgd, {"physical_batch_size": 0}, "trainer.physical_batch_size"),
    ],
)
def test_bad_settings_are_named(build: Any, bad: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(**bad)


@pytest.mark.parametrize("trainer", [Sgd(lr=0.1), replace(PRIVATE, momentum=0.5)], ids=["sgd", "dp_sgd"])
def test_cosine_schedule_falls_to_a_twentieth(trainer: Sgd | DpSgd) -> None:
    """With one step a fit, or linear noise, an update is proportional to the learning rate."""
    one_step: Sgd | DpSgd = replace(trainer, schedule="cosine")
    if isinstance(one_step, Sgd):
        one_step = replace(one_step, batch_size=100)
    count = 100 if isinstance(trainer, Sgd) else 0
    norms = [np.linalg.norm(fit(one_step, count, progress=p)[0]) for p in (0.0, 0.5, 1.0)]
    assert norms[1] / norms[0] == pytest.approx(0.525, rel=1e-3)
    assert norms[2] / norms[0] == pytest.approx(0.05, rel=1e-3)
    constant = np.linalg.norm(fit(replace(one_step, schedule="constant"), count, progress=0.7)[0])
    assert constant == pytest.approx(norms[0])


@pytest.mark.parametrize("trainer", [Sgd(batch_size=10), PRIVATE], ids=["sgd", "dp_sgd"])
def test_dropout_draws_from_a_stream_of_the_fit(trainer: Trainer) -> None:
    """Whatever the process drew before. Under privacy it is fixed by a test seed alone."""
    task = Digits(build=Cnn(), partition=Iid(), clients=4, seed=0)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = task.model(0)
        trainer.fit(task, model, data(20), {}, np.random.default_rng(0), 0.0)
        results.append(flat(model))
    assert np.array_equal(results[0], results[1])


def test_dropout_under_privacy_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known masks would tell the batch's other examples that one more stands before them."""
    task, masks = Digits(build=Cnn(), partition=Iid(), clients=4, seed=0), []
    monkeypatch.setattr(Step, "__call__", lambda *_: masks.append(torch.rand(4).tolist()))
    for _ in range(2):
        dp = replace(PRIVATE, privacy=ExamplePrivacy(), steps=1)
        dp.fit(task, task.model(0), data(20), {}, np.random.default_rng(0), 0.0)
    assert masks[0] != masks[1]


@pytest.mark.usefixtures("clipping")
@pytest.mark.parametrize("value", [3e38, torch.nan])
def test_an_example_whose_gradient_is_not_finite_counts_as_zero(value: float) -> None:
    """It would make every weight NaN, which no noise hides; alone in its batch, or beside others."""
    task = Digits(build=Mlp(), partition=Iid(), clients=4, seed=0)
    dp = replace(PRIVATE, sampling_rate=1.0, steps=1)
    outlier = Data(torch.full((1, 1, 8, 8), value), torch.tensor([3]))
    for few in (data(20), data(0)):
        more = Data(torch.cat([few.x, outlier.x]), torch.cat([few.y, outlier.y]))
        results = []
        for examples in (few, more):
            model = task.model(0)
            dp.fit(task, model, examples, {}, np.random.default_rng(0), 0.0)
            results.append(flat(model))
        assert np.isfinite(results[1]).all()
        assert np.abs(results[1] - results[0]).max() < 1e-6


@pytest.mark.usefixtures("clipping")
def test_a_fit_that_fails_leaves_the_model_clean() -> None:
    """The model is resident: what one client's failure left on it, the next client would meet."""
    dp, model = replace(PRIVATE, sampling_rate=1.0), TASK.model(0)
    wrong = Data(torch.zeros(5, 1, 9, 9), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        dp.fit(TASK, model, wrong, {}, np.random.default_rng(0), 0.0)
    model.load_state_dict(TASK.model(0).state_dict())
    assert np.array_equal(fit(dp, 50, model=model)[0], fit(dp, 50)[0])


def test_steps_do_not_bring_the_compiler_in() -> None:
    """It takes over a second to import, which start-up, or the first step of each worker, would wait for."""
    script = (
        "import sys, torch; from fedapp import config; from fedapp.dp_step import Step\n"
        "job = config.job_of('task=digits model=logistic'); job.prepare()\n"
        "from fedapp import dp_step\n"
        "for known in (dp_step.are_known, lambda model: False):\n"
        "    dp_step.are_known = known\n"
        "    step = Step(job.task, job.task.model(0), job.trainer, None, 0.1)\n"
        "    data = job.task.client_data({'partition-id': 0})\n"
        "    step(data, torch.arange(3)); step.close()\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
