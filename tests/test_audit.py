"""Audits: the bound against its paper, ideal mechanisms, then the real trainer, right and broken."""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizerFastGradientClipping
from scipy.stats import binom, norm
from torch import nn

from fedapp import cli, config
from fedapp.audit import command
from fedapp.audit.bound import lower_bound, p_value
from fedapp.audit.client import Central, Distributed, Local
from fedapp.audit.example import Examples, SharedExamples, _plant, examples
from fedapp.audit.one_run import Claim, Finding, Guesses, audit, choose
from fedapp.dp_step import Step
from fedapp.errors import ConfigError
from fedapp.example_gradients import ExampleGradients, LayerGradients
from fedapp.job import Job
from fedapp.privacy import central, distributed_example, local
from fedapp.privacy import distributed as distributed_module
from fedapp.privacy.central import CentralGaussian
from fedapp.privacy.distributed import DistributedGaussian, Terms
from fedapp.privacy.example import ExamplePrivacy
from fedapp.privacy.local import LocalGaussian
from fedapp.public_rng import Use
from fedapp.tasks import Data

SMALL = (
    "task=digits clients=100 rounds=2 partition=iid model=mlp privacy=example privacy.epsilon=2 "
    "privacy.test_seed=5"
)


# --- the bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [
        (1000, 100, 75, 1e-4, 0.673),  # Steinke et al. 2023, Appendix D
        (100_000, 1510, 1439, 1e-5, 2.675),  # section 7, where the paper cuts 2.6759 off
    ],
)
def test_bound_is_the_papers(canaries: int, guesses: int, right: int, delta: float, published: float) -> None:
    assert lower_bound(canaries, guesses, right, delta) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("guesses", [10, 1000])
def test_all_right_in_closed_form(guesses: int) -> None:
    """With delta 0 the p-value is correct**guesses, which solves to a logit."""
    correct = 0.05 ** (1 / guesses)
    bound = lower_bound(guesses, guesses, guesses, 0.0)
    assert bound == pytest.approx(np.log(correct / (1 - correct)), abs=2e-4)


counts = st.integers(1, 60).flatmap(lambda r: st.tuples(st.just(r), st.integers(0, r), st.integers(r, 200)))


@given(counts, st.floats(0, 5), st.sampled_from([0.0, 1e-5, 1e-3, 0.1]))
def test_p_value_is_the_papers_loop(drawn: tuple[int, int, int], eps: float, delta: float) -> None:
    guesses, right, canaries = drawn
    law = binom(guesses, 1 / (1 + np.exp(-eps)))
    worst = max(((law.cdf(right - 1) - law.cdf(right - i - 1)) / i for i in range(1, right + 1)), default=0.0)
    value = min(1.0, law.sf(right - 1) + 2 * canaries * delta * worst)
    assert p_value(canaries, guesses, right, eps, delta) == pytest.approx(value, abs=1e-9)


@given(counts, st.sampled_from([0.0, 1e-5, 1e-3]))
def test_bound_follows_its_evidence(drawn: tuple[int, int, int], delta: float) -> None:
    guesses, right, canaries = drawn
    bound = lower_bound(canaries, guesses, right, delta)
    assert bound >= 0
    assert lower_bound(canaries, guesses, min(right + 1, guesses), delta) >= bound
    assert lower_bound(canaries, guesses, right, delta + 1e-3) <= bound
    assert lower_bound(canaries, guesses, right, delta, 0.99) <= bound


@pytest.mark.parametrize("eps", [0.5, 2.0, 4.0])
def test_confidence_is_kept_and_used(eps: float) -> None:
    """Against randomized response, exactly: the bound exceeds epsilon in 5 % of audits at most, and exceeds
    half of it in most."""
    law = binom(1000, 1 / (1 + np.exp(-eps)))
    right = np.arange(int(law.ppf(1e-6)), int(law.ppf(1 - 1e-6)) + 1)
    bounds = np.array([lower_bound(1000, 1000, int(v), 0.0) for v in right])
    assert 0.01 < law.pmf(right)[bounds > eps].sum() <= 0.05
    assert law.pmf(right)[bounds > eps / 2].sum() > 0.9


# --- ideal mechanisms ----------------------------------------------------------------------------------


def claim(noise: float, rate: float = 1.0, steps: int = 1) -> Claim:
    return Claim(ExamplePrivacy().spent(((noise, rate, steps),)), 1e-5, noise, rate, steps)


@pytest.mark.parametrize("sampling", [(1.0, 1), (0.1, 30)])
def test_ideal_audits_stay_below_epsilon_and_grow_with_it(sampling: tuple[float, int]) -> None:
    medians = []
    for noise in (4.0, 2.0, 1.0):
        claimed, rng = claim(noise, *sampling), np.random.default_rng(3)
        release = partial(claimed.simulate, rng=rng)
        found = [audit(release, claimed, 2000, 0.95, rng) for _ in range(5)]
        assert all(f.passed and f.bound <= claimed.epsilon <= f.most for f in found)
        low, median, high = found[0].expected
        assert low <= np.median([f.bound for f in found]) <= high
        medians.append(median)
    assert medians[0] < medians[1] < medians[2]


def test_scores_are_likelihood_ratios() -> None:
    claimed, x = claim(1.5, 0.2, 2), np.array([[0.3, -1.0], [2.0, 0.0]])
    out, drawn = norm.pdf(x, 0, 1.5), norm.pdf(x, 1, 1.5)
    assert np.allclose(claimed.scores(x), np.log((0.8 * out + 0.2 * drawn) / out).sum(0))
    opposite = norm.pdf(x, -1, 1.5)
    ratio = np.log((0.8 * out + 0.2 * drawn) / (0.8 * out + 0.2 * opposite)).sum(0)
    assert np.allclose(replace(claimed, out=-1.0).scores(x), ratio)


def test_guesses_take_both_ends() -> None:
    included = np.array([True, False, True, False, True, True])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert Guesses(3, 0).right(scores, included) == 2
    assert Guesses(0, 3).right(scores, included) == 1
    assert Guesses(1, 2).right(scores, included) == 1


def test_choice_sees_no_result() -> None:
    """The same guesses whatever was released, and such that could refute the claim."""
    claimed = claim(0.9)
    assert claimed.epsilon > 4
    guesses = choose(claimed, 2000, 0.95)
    assert guesses == choose(claimed, 2000, 0.95)
    assert lower_bound(2000, guesses.total, guesses.total, 1e-5) > claimed.epsilon


# --- client-level mechanisms ---------------------------------------------------------------------------


CLIENTS = "task=digits clients=2000 rounds=5 privacy.epsilon=2 privacy.test_seed=1 privacy=central_gaussian"
MECHANISMS = {
    "central": f"{CLIENTS} cohort=600",
    "central, adaptive clip": f"{CLIENTS} cohort=600 privacy.quantile=0.5",
    "central, fixed": f"{CLIENTS} cohort=600 sampling=fixed",
    "central, watched": f"{CLIENTS} cohort=1200 privacy.network=untrusted codec=public_step",
    "local": CLIENTS.replace("central", "local"),
    "local, cohorts": CLIENTS.replace("central", "local") + " cohort=1200",
}


def audited_clients(settings: str) -> Finding:
    job = config.job(config.compose(settings))
    release: Central | Local
    if isinstance(job.privacy, CentralGaussian):
        release = Central(job, job.privacy)
    else:
        assert isinstance(job.privacy, LocalGaussian)
        release = Local(job, job.privacy)
    return audit(release, release.claim(), job.clients, 0.95, np.random.default_rng(2))


@pytest.mark.parametrize("settings", MECHANISMS.values(), ids=MECHANISMS)
@pytest.mark.parametrize("removed", [None, "clipped", "normal"])
def test_clients_are_canaries(monkeypatch: pytest.MonkeyPatch, settings: str, removed: str | None) -> None:
    broken = {"clipped": lambda x, norm: x, "normal": lambda size, secret: np.zeros(size)}
    if removed:
        monkeypatch.setattr(central, removed, broken[removed])
        monkeypatch.setattr(local, removed, broken[removed])
    found = audited_clients(settings)
    assert found.claim.epsilon == pytest.approx(2, rel=0.01)
    assert found.most > 2
    assert found.passed == (removed is None)
    assert found.bound > 0.1


def test_a_watched_client_is_audited_in_the_rounds_it_is_seen_in() -> None:
    job = config.job(config.compose(MECHANISMS["central, watched"].replace("rounds=5", "rounds=9")))
    assert isinstance(job.privacy, CentralGaussian)
    release = Central(job, job.privacy)
    claim = release.claim()
    assert (claim.sampling_rate, claim.out, claim.steps) == (1.0, -1.0, job.cohorts.most)
    times = np.bincount(
        [j for number in range(1, 10) for j in job.cohorts.draw(number, 2000)], minlength=2000
    )
    released = release(np.ones(2000, np.bool_))
    assert (np.count_nonzero(released, axis=0) == times).all()


# --- mechanisms whose noise clients share ---------------------------------------------------------------

SHARED = (
    "task=digits clients=1112 rounds=2 privacy=distributed_gaussian privacy.epsilon=2 privacy.test_seed=1"
)
SHARED_EXAMPLES = (
    "task=digits clients=5 rounds=4 partition=iid model=mlp privacy=distributed_example privacy.epsilon=2 "
    "privacy.tolerated=0.2 privacy.test_seed=1"
)


def distributed(settings: str) -> Distributed:
    job = config.job(config.compose(settings))
    assert isinstance(job.privacy, DistributedGaussian)
    return Distributed(job, job.privacy)


def no_shares(size: int, variance: Any, secret: Any) -> Any:
    return np.zeros(size, np.int64)


def longer(encode: Any) -> Any:
    """A client that clips to ten times the norm, on the same grid."""
    return lambda self, *given, **named: encode(
        replace(self, clip=10 * self.clip, most=100 * self.most), *given, **named
    )


@pytest.mark.parametrize("removed", [None, "clip", "noise"])
def test_shared_noise_of_clients_is_audited(monkeypatch: pytest.MonkeyPatch, removed: str | None) -> None:
    if removed == "noise":
        monkeypatch.setattr(distributed_module, "discrete_gaussian", no_shares)
    if removed == "clip":
        monkeypatch.setattr(Terms, "encode", longer(Terms.encode))
    release = distributed(SHARED)
    found = audit(release, release.claim(), release.canaries, 0.95, np.random.default_rng(3))
    assert found.canaries == 1000  # a tenth is tolerated to be gone
    assert 1.9 < found.claim.epsilon <= 2 < found.most
    assert found.passed == (removed is None)
    assert removed is not None or found.bound < 1


def test_a_canary_client_adds_the_clip_norm_and_the_sum_has_the_least_noise() -> None:
    release = distributed(f"{SHARED} rounds=1")
    included = np.arange(release.canaries) % 2 == 0
    signed = release(included)[0] * np.where(included, 1, -1)
    noise = release.claim().noise_multiplier
    assert signed.mean() == pytest.approx(1, abs=4 * noise / np.sqrt(1000))
    assert signed.std() == pytest.approx(noise, rel=0.09)  # four deviations


def shared_examples(more: str = "", canaries: int = 1500) -> tuple[SharedExamples, np.random.Generator]:
    rng = np.random.default_rng(4)
    job = config.job(config.compose(f"{SHARED_EXAMPLES} {more}"))
    release = examples(job, canaries, rng)
    assert isinstance(release, SharedExamples)
    return release, rng


@pytest.mark.parametrize("removed", [None, "clip", "noise"])
def test_shared_noise_of_examples_is_audited(monkeypatch: pytest.MonkeyPatch, removed: str | None) -> None:
    if removed == "noise":
        monkeypatch.setattr(distributed_example, "discrete_gaussian", no_shares)
    if removed == "clip":
        monkeypatch.setattr(Step, "_shares", no_clip)
    release, rng = shared_examples()
    whole = release.job.task.client_data({"partition-id": 0})
    few = Data(whole.x[:20], whole.y[:20])  # unclipped, a client's own examples blur all that is released
    monkeypatch.setattr(type(release.job.task), "client_data", lambda self, node: few)
    found = audit(release, release.claim(), 1500, 0.95, rng)
    assert 1.9 < found.claim.epsilon <= 2 < found.most
    assert found.passed == (removed is None)
    assert removed is not None or found.bound < 1


def test_the_shared_claim_is_the_runs_where_cohorts_are_drawn() -> None:
    release, _ = shared_examples("clients=10 cohort=5 rounds=12")
    job = release.job
    assert 0 < job.cohorts.most < 12
    assert release.claim().steps == job.cohorts.most
    assert 1.9 < release.claim().epsilon <= 2
    assert release(np.zeros(1500, np.bool_)).shape == (job.cohorts.most, 1500)


def test_a_canary_example_adds_the_clip_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise and data, everybody drawn: 1 for who is in, within rounding to the grid, else 0."""
    monkeypatch.setattr(distributed_example, "discrete_gaussian", no_shares)
    release, _ = shared_examples("trainer.sampling_rate=1.0 rounds=1", canaries=60)
    whole = release.job.task.client_data({"partition-id": 0})
    nobody = Data(whole.x[:0], whole.y[:0])
    monkeypatch.setattr(type(release.job.task), "client_data", lambda self, node: nobody)
    included = np.arange(60) % 3 == 0
    assert np.abs(release(included) - included).max() < 0.1


# --- the real trainer ----------------------------------------------------------------------------------


def job(more: str = "") -> Job:
    return config.job(config.compose(f"{SMALL} {more}"))


def audited(more: str = "", canaries: int = 2000, seed: int = 0) -> Finding:
    rng = np.random.default_rng(seed)
    release = examples(job(more), canaries, rng)
    return audit(release, release.claim(), canaries, 0.95, rng)


def no_noise(self: Any) -> None:
    for p in self.params:
        p.grad = p.summed_grad.view_as(p).clone()


def no_clip(self: Any, norms: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(norms)


def test_dp_sgd_passes() -> None:
    found = audited()
    assert found.claim.epsilon == pytest.approx(2, rel=0.01)
    assert found.claim.steps == 40
    assert 0.1 < found.bound < 2 < found.most
    assert found.passed


@pytest.mark.parametrize(
    ("where", "part", "broken"),
    [(DPOptimizerFastGradientClipping, "add_noise", no_noise), (Step, "_shares", no_clip)],
)
def test_what_is_removed_is_caught(
    monkeypatch: pytest.MonkeyPatch, where: type, part: str, broken: Any
) -> None:
    monkeypatch.setattr(where, part, broken)
    found = audited()
    assert found.bound > 2
    assert not found.passed


@pytest.mark.parametrize("trainer", ["", "trainer.momentum=0.5", "trainer.physical_batch_size=7"])
def test_a_canary_adds_the_sensitivity(monkeypatch: pytest.MonkeyPatch, trainer: str) -> None:
    """Without noise and data, and everybody drawn: 1 a step for who is in, 0 for who is not."""
    monkeypatch.setattr(DPOptimizerFastGradientClipping, "add_noise", no_noise)
    release = examples(
        job(f"trainer.sampling_rate=1.0 trainer.steps=2 {trainer}"), 50, np.random.default_rng(0)
    )
    whole = release.job.task.client_data({"partition-id": 0})
    nobody = Data(whole.x[:0], whole.y[:0])
    monkeypatch.setattr(type(release.job.task), "client_data", lambda self, node: nobody)
    included = np.arange(50) % 3 == 0
    assert np.abs(release(included) - included).max() < 1e-4


LAYERS = [
    (nn.Linear(4, 3), (4,), (3,)),
    (nn.Conv2d(1, 2, 4, stride=2, padding=3), (1, 9, 9), (2, 6, 6)),
    (nn.Conv2d(2, 3, (3, 1), stride=(1, 2), padding=(0, 1)), (2, 6, 8), (3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "given", "made"), LAYERS)
def test_canaries_point_at_one_weight(
    layer: nn.Module, given: tuple[int, ...], made: tuple[int, ...]
) -> None:
    for place, (name, p) in enumerate(layer.named_parameters()):
        n = p.numel()
        x, g, at = torch.zeros(n, *given), torch.zeros(n, *made), torch.arange(n)
        _plant(layer, name, x, g, at, at, 3.0)
        found = LayerGradients(layer, [(x, g)])
        for example in range(n):
            one = torch.zeros(n)
            one[example] = 1
            total = found.total(one)[p].flatten()
            assert torch.equal(total, 3 * one), place
        assert torch.allclose(found.squares(), torch.full((n,), 9.0, dtype=torch.float64))


@pytest.mark.parametrize("model", ["mlp", "small_cnn"])
def test_canaries_beside_what_is_not_finite_count_once(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(DPOptimizerFastGradientClipping, "add_noise", no_noise)
    release = examples(
        job(f"model={model} trainer.sampling_rate=1.0 trainer.steps=2"), 50, np.random.default_rng(0)
    )
    whole = release.job.task.client_data({"partition-id": 0})
    nobody = Data(torch.full_like(whole.x[:3], torch.nan), whole.y[:3])
    monkeypatch.setattr(type(release.job.task), "client_data", lambda self, node: nobody)
    included = np.arange(50) % 3 == 0
    assert np.abs(release(included) - included).max() < 1e-4


def test_models_that_opacus_clips_are_not_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedapp.audit.example.are_known", lambda model: False)
    with pytest.raises(ConfigError, match="audit another model"):
        examples(job(), 1000, np.random.default_rng(0))


@pytest.mark.parametrize("broken", [1e-9, 0.1])
def test_norms_that_are_measured_too_short_are_caught(monkeypatch: pytest.MonkeyPatch, broken: float) -> None:
    measured = ExampleGradients.norms
    monkeypatch.setattr(ExampleGradients, "norms", lambda self: measured(self) * broken)
    found = audited()
    assert found.bound > 2
    assert not found.passed


def test_nothing_else_changes() -> None:
    """Without a canary the trainer does what it does without an audit: the same weights, bit by bit."""
    release = examples(job("rounds=1"), 500, np.random.default_rng(0))
    assert isinstance(release, Examples)
    trained = release(np.zeros(500, bool))
    model, task, dp = release.job.task.model(0), release.job.task, release.trainer
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])[release.coordinates]
    dp.fit(
        task,
        model,
        task.client_data({"partition-id": 0}),
        {},
        release.job.public_rng(1, 0, Use.TRAINING),
        0.0,
    )
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])[release.coordinates]
    unit = dp.lr * dp.max_grad_norm / (dp.sampling_rate * dp.examples_per_client)
    moved = (before.double() - after.double()).numpy() / unit
    assert np.allclose(trained.sum(0), moved, atol=1e-9)


def test_a_client_of_a_cohort_is_audited_in_as_many_rounds_as_it_takes_part_in() -> None:
    job = config.job(config.compose(f"{SMALL} rounds=6 cohort=30 trainer.steps=2"))
    release = examples(job, 1000, np.random.default_rng(0))
    assert isinstance(release, Examples)
    assert job.cohorts.most < 6
    assert release.claim().steps == 2 * job.cohorts.most
    assert 1.9 < release.claim().epsilon <= 2
    assert release(np.ones(1000, bool)).shape == (2 * job.cohorts.most, 1000)


@pytest.mark.parametrize(
    ("settings", "canaries", "said"),
    [
        (SMALL, 10**6, "needs a weight of its own, the model has 8970: set canaries=8970 or choose a larger"),
        (f"{SMALL} model=logistic", 1000, "each of 1000 canaries .* the model has 650: choose a larger"),
        ("task=digits privacy=none", 1000, "set privacy=example"),
    ],
)
def test_what_cannot_be_audited_is_refused(settings: str, canaries: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        examples(config.job(config.compose(settings)), canaries, np.random.default_rng(0))


# --- the command ---------------------------------------------------------------------------------------


def test_command_prints_and_exits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command.run([*SMALL.split(), "canaries=1000", "trainer.steps=5"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("claimed", "lower bound", "expected", "at most", "passed: "))
    assert "test_seed" in said
    for bound, code in ((found.claim.epsilon - 0.1, 0), (found.claim.epsilon + 0.1, 1)):
        monkeypatch.setattr(command, "run", lambda _, b=bound: replace(found, bound=b))
        monkeypatch.setattr(sys, "argv", ["fedapp"])
        with pytest.raises(SystemExit) as left:
            cli.audit()
        assert left.value.code == code
    assert "FAILED" in command.told(replace(found, bound=9.0))
    assert "passed, as it must" in command.told(replace(found, most=1.0))


@pytest.mark.parametrize("bad", ["canaries=many", "canaries=999", "confidence=1", "nothing=1"])
def test_bad_settings_are_named(bad: str) -> None:
    with pytest.raises(ConfigError, match=bad.split("=")[0]):
        command.run([bad])


def test_an_audit_takes_a_thousand_canaries_at_least() -> None:
    with pytest.raises(ConfigError, match=r"canaries must be .* at least 1000, got 100: set canaries=1000"):
        command.run(["canaries=100"])


@pytest.mark.parametrize("tolerated", [0.0, 0.1, 0.3])
def test_as_many_are_left_of_a_shared_noise_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tolerated: float
) -> None:
    """Where some are tolerated to be gone, who is left is a canary."""
    audited: list[int] = []
    monkeypatch.setattr(command, "told", lambda _: "")
    monkeypatch.setattr(command, "audit", lambda release, claim, canaries, *_: audited.append(canaries))
    command.run(["privacy=distributed_gaussian", "canaries=1000", f"privacy.tolerated={tolerated}"])
    assert audited == [1000]
