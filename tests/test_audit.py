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
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _mark_as_processed
from scipy.stats import binom, norm

from fedapp import cli, config
from fedapp.audit import command
from fedapp.audit.bound import lower_bound, p_value
from fedapp.audit.example import examples
from fedapp.audit.one_run import Claim, Finding, Guesses, Release, audit, choose
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.privacy.example import epsilon
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
    return Claim(epsilon(((noise, rate, steps),), 1e-5, "prv"), 1e-5, noise, rate, steps)


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


# --- client-level mechanisms, as functions of who is in -------------------------------------------------


def central(clip: bool = True, noise: float = 6.0) -> Release:
    """Updates of norm 10, clipped to 1, summed over Poisson cohorts, noised by the server."""

    def release(included: NDArray[np.bool_]) -> NDArray[np.float64]:
        rng = np.random.default_rng(8)
        size = 1.0 if clip else 10.0
        drawn = [included & (rng.random(len(included)) < 0.3) for _ in range(40)]
        return np.stack([size * d + noise * rng.standard_normal(len(included)) for d in drawn])

    return release


def local(noise: float = 3.0) -> Release:
    """Each client alone: one of two opposite updates of norm 1, noised at home; replacing it moves 2."""

    def release(included: NDArray[np.bool_]) -> NDArray[np.float64]:
        update = np.where(included, 1.0, -1.0)
        reply = update + noise * np.random.default_rng(9).standard_normal(len(included))
        return (reply[None] + 1) / 2

    return release


def test_client_level_mechanisms_are_audited_alike() -> None:
    of_central, of_local = claim(6.0, 0.3, 40), claim(3.0 / 2)
    found = {
        name: audit(release, claimed, 3000, 0.95, np.random.default_rng(1))
        for name, release, claimed in (
            ("central", central(), of_central),
            ("no clip", central(clip=False), of_central),
            ("no noise", central(noise=0.0), of_central),
            ("local", local(), of_local),
            ("local, little noise", local(noise=0.3), of_local),
        )
    }
    assert {name for name, f in found.items() if f.passed} == {"central", "local"}
    assert found["central"].bound > 0.5
    assert found["local"].bound > 0.5


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


def no_clip(self: Any) -> None:
    for p in self.params:
        total = self._get_flat_grad_sample(p).sum(0)
        p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
        _mark_as_processed(p.grad_sample)


def test_dp_sgd_passes() -> None:
    found = audited()
    assert found.claim.epsilon == pytest.approx(2, rel=0.01)
    assert found.claim.steps == 40
    assert 0.1 < found.bound < 2 < found.most
    assert found.passed


@pytest.mark.parametrize(("part", "broken"), [("add_noise", no_noise), ("clip_and_accumulate", no_clip)])
def test_what_is_removed_is_caught(monkeypatch: pytest.MonkeyPatch, part: str, broken: Any) -> None:
    monkeypatch.setattr(DPOptimizer, part, broken)
    found = audited()
    assert found.bound > 2
    assert not found.passed


@pytest.mark.parametrize("trainer", ["", "trainer.momentum=0.5", "trainer.physical_batch_size=7"])
def test_a_canary_adds_the_sensitivity(monkeypatch: pytest.MonkeyPatch, trainer: str) -> None:
    """Without noise and data, and everybody drawn: 1 a step for who is in, 0 for who is not."""
    monkeypatch.setattr(DPOptimizer, "add_noise", no_noise)
    release = examples(
        job(f"trainer.sampling_rate=1.0 trainer.steps=2 {trainer}"), 50, np.random.default_rng(0)
    )
    whole = release.job.task.client_data({"partition-id": 0})
    nobody = Data(whole.x[:0], whole.y[:0])
    monkeypatch.setattr(type(release.job.task), "client_data", lambda self, node: nobody)
    included = np.arange(50) % 3 == 0
    assert np.abs(release(included) - included).max() < 1e-4


def test_nothing_else_changes() -> None:
    """Without a canary the trainer does what it does without an audit: the same weights, bit by bit."""
    release = examples(job("rounds=1"), 500, np.random.default_rng(0))
    trained = release(np.zeros(500, bool))
    model, task, dp = release.job.task.model(0), release.job.task, release.trainer
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])[release.coordinates]
    dp.fit(task, model, task.client_data({"partition-id": 0}), {}, release.job.public_rng(1, 0, use=0), 0.0)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])[release.coordinates]
    unit = dp.lr * dp.max_grad_norm / (dp.sampling_rate * dp.examples_per_client)
    moved = (before.double() - after.double()).numpy() / unit
    assert np.allclose(trained.sum(0), moved, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "canaries", "said"),
    [
        (SMALL, 10**6, "each canary needs a weight of its own: set canaries=8970"),
        (
            f"{SMALL} trainer.ghost_above=100",
            1000,
            "ghost clipping stores no gradients .* trainer.ghost_above=8970",
        ),
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


@pytest.mark.parametrize("bad", ["canaries=many", "canaries=10", "confidence=1", "nothing=1"])
def test_bad_settings_are_named(bad: str) -> None:
    with pytest.raises(ConfigError, match=bad.split("=")[0]):
        command.run([bad])
