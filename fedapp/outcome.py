"""What a run came to: its time and memory, what a reader of its results must know, and the summary."""

import resource
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version

from fedapp import __version__
from fedapp.job import Job
from fedapp.privacy.central import CentralGaussian
from fedapp.report.folder import Round
from fedapp.report.summary import Summary
from fedapp.rounds import Federation
from fedapp.stages import total


@dataclass(frozen=True)
class Took:
    """Time and memory of a run, over the processes that it went on in, each up to its last checkpoint."""

    startup_s: float = 0.0
    wall_s: float = 0.0
    peak_rss_mb: float = 0.0

    def plus(self, startup: float, started: float) -> "Took":
        """With what this process has taken so far."""
        who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        peak = max(resource.getrusage(one).ru_maxrss for one in who) / 1e3
        wall = time.perf_counter() - started
        return Took(self.startup_s + startup, self.wall_s + wall, max(self.peak_rss_mb, peak))


def charged(repeated: int) -> str:
    """What is said of rounds that a crash made a run repeat."""
    many = "1 round was" if repeated == 1 else f"{repeated} rounds were"
    return f"{many} begun and not finished, and what had left by then is charged"


def _lost(job: Job, records: list[Round]) -> str:
    """Which rounds left no update."""
    lost = [str(record.round) for record in records if record.failures and not record.replies]
    did = "added noise alone" if isinstance(job.privacy, CentralGaussian) else "changed nothing"
    return f"no update came of round {', '.join(lost)}, which {did}" if lost else ""


def _note(federation: Federation, records: list[Round]) -> str | None:
    """What a reader of the results must know."""
    job, repeated = federation.job, federation.budget.repeated(federation.finished)
    ended = f"the budget ends after round {federation.finished} of {job.rounds}"
    said = [
        job.note,
        _lost(job, records) or None,
        charged(repeated) if repeated else None,
        ended if federation.budget.ends(federation.finished) else None,
    ]
    return "; ".join(text for text in said if text) or None


def summary_of(federation: Federation, records: list[Round], took: Took, interrupted: bool) -> Summary:
    """All that `summary.json` holds, of the rounds so far."""
    job = federation.job
    traffic, parameters, spent = federation.traffic, federation.parameters, federation.budget.spent
    float32_up = 4 * parameters * federation.accepted
    last = records[-1] if records else None
    uncompressed = float32_up + 4 * parameters * federation.messages
    sent = traffic.uplink + traffic.downlink
    return Summary(
        task=str(job.choices["task"]),
        codec=job.coded_by,
        privacy=str(job.choices["privacy"]),
        engine=str(job.choices["engine"]),
        clients=job.clients,
        cohort=job.in_round,
        rounds=len(records),
        accuracy=last.accuracy if last else None,
        loss=last.loss if last else None,
        clients_mean=last.clients_mean if last else None,
        clients_worst=last.clients_worst if last else None,
        clients_tested=last.clients_tested if last else None,
        uplink_bytes=traffic.uplink,
        downlink_bytes=traffic.downlink,
        uplink_bits_per_parameter=8 * traffic.uplink / (parameters * federation.accepted)
        if federation.accepted
        else None,
        uncompressed_bytes=uncompressed,
        compression_ratio=uncompressed / sent if sent else None,
        uplink_ratio=float32_up / traffic.uplink if traffic.uplink else None,
        parameters=parameters,
        epsilon=None if spent is None else spent.epsilon,
        delta=job.privacy.delta,
        accountant=None if spent is None else spent.accountant,
        privacy_unit=job.privacy.unit,
        releases=[asdict(release) for release in federation.budget.releases] or None,
        privacy_against=job.privacy.against,
        startup_s=took.startup_s,
        seconds_per_round=sum(r.seconds for r in records) / len(records) if records else None,
        wall_s=took.wall_s,
        peak_rss_mb=took.peak_rss_mb,
        seed=job.seed,
        versions={
            "fedapp": __version__,
            **{name: version(name) for name in ("flwr", "torch", "opacus", "numpy")},
        },
        interrupted=interrupted,
        coding=job.said,
        stages=total([record.stages for record in records]),
        note=_note(federation, records),
    )
