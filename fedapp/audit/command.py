"""`fedapp audit`: from overrides to a printed finding, and with an attack to a page."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from fedapp import check, config
from fedapp.audit.client import Central, Distributed, Local
from fedapp.audit.example import Examples, SharedExamples, examples
from fedapp.audit.inversion import attack, protections
from fedapp.audit.one_run import LEAST, Finding, audit
from fedapp.audit.page import write_page
from fedapp.errors import ConfigError
from fedapp.job import Job
from fedapp.privacy.central import CentralGaussian
from fedapp.privacy.distributed import DistributedGaussian
from fedapp.privacy.example import ExamplePrivacy
from fedapp.privacy.local import LocalGaussian
from fedapp.report.folder import RunFolder

DEFAULTS = {"task": "digits", "privacy": "example", "privacy.epsilon": "2", "rounds": "5"}


def run(overrides: list[str]) -> Finding:
    """Audit the job of these overrides, print what was found, and return it. Raises ConfigError.

    Beside the job's own settings: confidence (0.95) of the lower bound, and canaries (5000, at least 1000).
    Of client-level privacy every client is a canary, so `clients` is as many; where some are tolerated to be
    gone, so many more that as many are left. With attack=true updates of clients that hold one image each are
    inverted too, with and without the claimed privacy, and a page with all of it is left in `run_dir`.
    """
    torch.set_num_threads(1)
    given = dict(part.partition("=")[::2] for part in overrides)
    canaries, confidence = _number(given.pop("canaries", "5000")), _number(given.pop("confidence", "0.95"))
    attacks = _number(given.pop("attack", "false"))
    check.whole("canaries", canaries, LEAST)
    check.real("confidence", confidence, low=0.5, high=0.9999)
    check.flag("attack", attacks)
    if given.get("privacy") in ("central_gaussian", "local_gaussian", "distributed_gaussian"):
        given["clients"] = str(canaries)
    if given.get("privacy") == "central_gaussian":
        given = {"cohort": str(canaries // 10)} | given
    job = _job(given)
    if isinstance(job.privacy, DistributedGaussian):
        job = _job(given | {"clients": str(math.ceil(canaries / (1 - job.privacy.tolerated)))})
    if attacks and not isinstance(job.privacy, ExamplePrivacy):
        raise ConfigError(
            f"attack=true inverts what one client sends under privacy=example, got "
            f"privacy={job.choices['privacy']}: leave it out, or set privacy=example"
        )
    job.prepare()
    rng = np.random.default_rng()
    release: Central | Local | Distributed | Examples | SharedExamples
    if isinstance(job.privacy, CentralGaussian):
        release = Central(job, job.privacy)
    elif isinstance(job.privacy, LocalGaussian):
        release = Local(job, job.privacy)
    elif isinstance(job.privacy, DistributedGaussian):
        release = Distributed(job, job.privacy)
        canaries = release.canaries
    else:
        release = examples(job, canaries, rng)
    claim = release.claim()
    attacked = protections(DEFAULTS | given, claim.epsilon) if attacks else {}
    folder = RunFolder(Path(_tree(given).run_dir)).path if attacks else None
    finding = audit(release, claim, canaries, confidence, rng)
    said = told(finding) if job.note is None else f"{told(finding)}\n{job.note}"
    print(said)
    if folder is not None:
        choices = " ".join(f"{k}={v}" for k, v in (DEFAULTS | given).items() if k != "run_dir")
        print(f"Report: {write_page(folder, choices, finding, said, attack(attacked))}")
    return finding


def told(finding: Finding) -> str:
    """What a reader needs to judge it, in five lines."""
    claim, guesses = finding.claim, finding.guesses
    low, median, high = finding.expected
    verdict = "passed: the bound does not exceed the claim"
    if not finding.passed:
        verdict = "FAILED: the bound exceeds the claim, so the claim does not hold"
    elif finding.most <= claim.epsilon:
        verdict = (
            "passed, as it must: so few guesses cannot refute this claim, even if all are right. "
            "Set more canaries, or a smaller privacy.epsilon, which takes the same path through the code"
        )
    return "\n".join((
        f"claimed      epsilon {claim.epsilon:.3f} at delta {claim.delta:g}: {claim.steps} steps, "
        f"noise multiplier {claim.noise_multiplier:.3f}, sampling rate {claim.sampling_rate:g}",
        f"lower bound  epsilon {finding.bound:.3f} at {100 * finding.confidence:g} % confidence: of "
        f"{finding.canaries} canaries {guesses.into} guessed in, {guesses.out} out, "
        f"{finding.right} of {guesses.total} right",
        f"expected     epsilon {median:.3f} ({low:.3f} to {high:.3f}) from an ideal audit of that mechanism",
        f"at most      epsilon {finding.most:.3f}, if every guess were right",
        verdict,
    ))  # fmt: skip


def _job(given: dict[str, str]) -> Job:
    return config.job(_tree(given))


def _tree(given: dict[str, str]) -> DictConfig:
    return config.compose(shlex.join(f"{k}={v}" for k, v in (DEFAULTS | given).items()))


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
