"""Which choices go together: what cannot be private, summed or coded is refused before anything starts."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedapp import check
from fedapp.ckks import Ckks
from fedapp.codec.chain import ErrorFeedback, Identity
from fedapp.codec.public_step import PublicStep
from fedapp.dp_step import DpStep
from fedapp.errors import ConfigError
from fedapp.fedbuff import FedBuff
from fedapp.privacy.central import CentralGaussian
from fedapp.privacy.distributed_example import DistributedExample
from fedapp.privacy.example import ExamplePrivacy
from fedapp.privacy.local import LocalGaussian
from fedapp.secagg.wire import Summed
from fedapp.selection import Poisson, PowerOfChoice, Uniform
from fedapp.strategies import ROBUST, STREAMED
from fedapp.tasks.stream import Stream
from fedapp.training import DpSgd, Sgd

if TYPE_CHECKING:
    from fedapp.job import Job

LEAST = 3  # clients in a sum that hides them


def check_whole_cohorts(job: "Job") -> None:
    """Refuse what needs whole cohorts where late replies are dropped, or there are none (fedbuff)."""
    buffered, robust = isinstance(job.strategy, FedBuff), type(job.strategy).__name__ in ROBUST
    if not buffered and job.over_selection == 1 and job.deadline is None:
        return
    given = "strategy=fedbuff" if buffered else f"over_selection={job.over_selection:g}"
    if not buffered and job.over_selection == 1:
        given = f"deadline={job.deadline:g}"
    privacy, strategy = f"privacy={job.choices['privacy']}", job.choices["strategy"]
    refused = (
        (
            isinstance(job.privacy, (CentralGaussian, Summed)),
            f"{privacy} is not accounted for where answers decide who takes part: "
            f"choose privacy=none or example",
        ),
        (isinstance(job.aggregation, Ckks), "aggregation=ckks adds whole cohorts: choose aggregation=open"),
        (job.sampling == "poisson", "sampling=poisson draws a cohort of no set size: set sampling=fixed"),
        (robust, f"strategy={strategy} would weigh who is fast, attackers too: choose strategy=fedavg"),
    )
    refused_buffered = (
        (job.cohort is not None, "there is no cohort: leave cohort out, and set strategy.concurrency"),
        (job.over_selection > 1, "there is no cohort: leave over_selection out"),
        (job.deadline is not None, "nothing waits for the slow: leave deadline out"),
        (job.evaluate == "clients", "clients that test would not train: set evaluate=server or none"),
        (
            job.evaluate == "server" and job.torch_device.type == "cuda",
            "on a GPU a worker tests the model, and all of them train: set device=cpu, or evaluate=none",
        ),
    )
    _refuse(f"with {given},", (*refused, *(refused_buffered if buffered else ())))
    if isinstance(job.strategy, FedBuff):
        check.whole("strategy.buffer", job.strategy.buffer, 1, job.clients)
        check.whole("strategy.concurrency", job.at_once, 1, job.clients)


def check_sampling(job: "Job") -> None:
    """One word on how a cohort is drawn, or two that say the same."""
    if job.sampling == "fixed" and isinstance(job.selection, Poisson):
        raise ConfigError("selection=poisson draws a cohort of no set size: leave sampling out")
    if job.sampling == "poisson" and not isinstance(job.selection, (Uniform, Poisson)):
        raise ConfigError(
            f"selection={job.choices['selection']} draws cohorts of a set size: leave sampling out"
        )


def check_selection(job: "Job") -> None:
    """Who is drawn by what it has is no random cohort of all, on which privacy and steering count."""
    selection = job.selection
    if isinstance(selection, (Uniform, Poisson)):
        return
    refused = (
        (
            job.privacy.unit is not None,
            f"privacy={job.choices['privacy']}, which does not cover what they tell: set selection=uniform",
        ),
        (isinstance(job.strategy, FedBuff), "strategy=fedbuff, which asks whoever is free"),
        (job.steers, "strategy=scaffold, which counts on all clients coming back: choose strategy=fedavg"),
        (isinstance(job.aggregation, Ckks), "aggregation=ckks: set aggregation=open"),
    )
    given = f"selection={job.choices['selection']} draws clients by what they tell, and does not go with"
    _refuse(given, refused)
    if isinstance(selection, PowerOfChoice) and selection.candidates is not None:
        check.whole("selection.candidates", selection.candidates, job.at_once, job.clients)


def check_assignment(job: "Job") -> None:
    """Parts of the work are made up for in a weighted mean of updates that plain SGD made."""
    if not job.assigns:
        return
    strategy = job.choices["strategy"]
    linear = type(job.strategy).__name__ in STREAMED and not job.steers
    refused = (
        (job.deadline is None, "needs a deadline: set deadline to seconds"),
        (
            job.privacy.unit is not None,
            f"asks for other work than the noise of privacy={job.choices['privacy']} is set for: "
            f"set privacy=none",
        ),
        (not isinstance(job.trainer, Sgd), f"asks for steps of trainer=sgd, not {job.choices['trainer']}"),
        (isinstance(job.trainer, Sgd) and not job.trainer.epochs, "divides epochs: set trainer.epochs=1"),
        (not linear, f"scales the mean update, which strategy={strategy} does not take: set strategy=fedavg"),
        (isinstance(job.aggregation, Ckks), "does not go with aggregation=ckks: set aggregation=open"),
    )
    _refuse("assignment=deadline", refused)


def check_clock(job: "Job", simulated: bool) -> None:
    """Speeds are simulated or real: refuse those that are not there, and rounds that would need them."""
    if job.timed and not simulated:
        raise ConfigError(
            f"speeds={job.choices['speeds']} simulates time, and here it is real: set speeds=none"
        )
    if simulated and not job.timed and (job.over_selection > 1 or job.deadline is not None):
        raise ConfigError(
            f"over_selection={job.over_selection:g} deadline={job.deadline} ask who is late, and in a "
            f"simulation without speeds nobody is: set speeds=stragglers"
        )


def check_roster(job: "Job", simulated: bool) -> None:
    """A simulation makes long-term keys, real participants have their own."""
    secure = job.secure
    if secure is not None and secure.signed and simulated != bool(secure.identities):
        repair = "made" if simulated else "the file of the participants' public keys"
        raise ConfigError(
            f"privacy.roster={getattr(job.privacy, 'roster', None)} is not for "
            f"{'a simulation' if simulated else 'nodes of their own'}: set privacy.roster={repair}"
        )


def check_privacy(job: "Job") -> None:
    """What would leak beside a private update, and trainers without their privacy, are refused."""
    given, strategy = f"privacy={job.choices['privacy']}", type(job.strategy).__name__
    _check_trainer(job, given)
    if job.privacy.unit is None:
        return
    example, central = job.privacy.unit == "example", isinstance(job.privacy, CentralGaussian)
    watched = central and not job.hides_cohorts
    adaptive = isinstance(job.privacy, CentralGaussian) and job.privacy.quantile is not None
    summed = isinstance(job.privacy, Summed)
    refused = (
        (strategy == "QFedAvg", "strategy=qfedavg needs the clients' losses: choose strategy=fedavg"),
        (
            strategy == "FedProx" and example,
            "strategy=fedprox needs trainer=sgd: choose strategy=fedavg",
        ),
        (
            strategy not in (*STREAMED, "FedBuff") and (summed or not example),
            f"strategy={job.choices['strategy']} needs each update by itself, and what is private is "
            f"their mean: choose strategy=fedavg",
        ),
        (
            watched and job.sampling == "poisson",
            "who watches privacy.network=untrusted sees who is drawn, and Poisson cohorts are to be secret: "
            "set sampling=fixed",
        ),
        (
            watched and not isinstance(job.codec, (PublicStep, Identity)),
            f"under privacy.network=untrusted the step of codec={job.choices['codec']} or the size of its "
            f"packets would tell of an update: set codec=public_step",
        ),
        (
            isinstance(job.codec, PublicStep) and isinstance(job.privacy, LocalGaussian),
            "noise makes updates far longer than codec=public_step is for, and tells by no size: "
            "choose another codec",
        ),
        (
            isinstance(job.codec, PublicStep) and adaptive,
            "privacy.quantile moves the clip norm, and the step of codec=public_step follows the first one: "
            "set privacy.quantile=null, or codec=identity",
        ),
        (
            central and isinstance(job.codec, ErrorFeedback),
            "error feedback would bring back what the clip has cut: set codec.feedback=false",
        ),
        (
            summed and job.choices["codec"] not in ("default", "identity"),
            f"secure aggregation takes the place of codec={job.choices['codec']}: leave codec out",
        ),
        (
            summed and job.sampling == "poisson",
            "its noise is divided among a cohort of a set size: set sampling=fixed",
        ),
        (
            summed and job.in_round < LEAST,
            f"fewer than {LEAST} clients hide nobody in their sum: set cohort={LEAST} or more",
        ),
        (
            example and isinstance(job.task, Stream) and job.task.shifts,
            "task.rows and task.replay take an example in because another one is there or not, which is "
            "not accounted for: set task.rounds, or none of them",
        ),
        (job.evaluate == "clients", "evaluate=clients sends private accuracies: set evaluate=server"),
        (
            job.task.private_preprocessing,
            "task.standardize=true takes statistics of private data: give public task.mean and task.std; "
            "and task.anonymity mixes rows, which needs privacy=none",
        ),
    )
    _refuse(f"{given} keeps what is private on the client, but", refused)


def _check_trainer(job: "Job", given: str) -> None:
    """Each trainer under privacy has its own choice of privacy, and the other way round."""
    pairs: tuple[tuple[type, str, type, str], ...] = (
        (DpSgd, "dp_sgd", ExamplePrivacy, "example"),
        (DpStep, "dp_step", DistributedExample, "distributed_example"),
    )
    for trainer, trained_by, privacy, private_by in pairs:
        if isinstance(job.trainer, trainer) != isinstance(job.privacy, privacy):
            fitting = f"privacy={private_by}" if isinstance(job.trainer, trainer) else f"trainer={trained_by}"
            raise ConfigError(
                f"trainer={job.choices['trainer']} does not go with {given}: "
                f"choose {fitting}, or leave trainer to the privacy choice"
            )


def check_aggregation(job: "Job") -> None:
    """What has to see single updates, or replaces them, does not go with homomorphic sums."""
    if not isinstance(job.aggregation, Ckks):
        return
    codec, given = job.choices["codec"], f"privacy={job.choices['privacy']}"
    refused = (
        (codec not in ("default", "identity"), f"it takes the place of codec={codec}: leave codec out"),
        (
            job.privacy.unit == "client" or isinstance(job.privacy, Summed),
            f"{given} bounds each update at the server, or in its own sum: choose privacy=none or example",
        ),
        (
            type(job.strategy).__name__ not in STREAMED,
            f"strategy={job.choices['strategy']} needs each update by itself: choose strategy=fedavg",
        ),
        (job.begin_with is not None, "its key holder must be there at once: leave begin_with out"),
        (
            job.aggregation.key_holder >= job.clients,
            f"aggregation.key_holder={job.aggregation.key_holder} is no partition of clients="
            f"{job.clients}: set 0 to {job.clients - 1}",
        ),
    )
    _refuse("under aggregation=ckks the server reads sums alone;", refused)


def check_steering(job: "Job") -> None:
    """Control variates are updates that both ends remember, of clients that train by plain SGD."""
    if not job.steers:
        return
    refused = (
        (job.privacy.unit is not None, f"privacy={job.choices['privacy']}: set privacy=none"),
        (isinstance(job.aggregation, Ckks), "aggregation=ckks: set aggregation=open"),
        (not isinstance(job.trainer, Sgd), f"trainer={job.choices['trainer']}: set trainer=sgd"),
        (isinstance(job.trainer, Sgd) and not job.trainer.epochs, "trainer.epochs=0: set 1 or more"),
        (
            isinstance(job.codec, ErrorFeedback),
            "error feedback, since what was lost is in the next news anyway: set codec.feedback=false",
        ),
    )
    _refuse("strategy=scaffold steers training by what clients sent, and does not go with", refused)


def check_bound(job: "Job") -> None:
    """The server cuts updates that it sees, and of which nothing else makes more or less."""
    if job.norm_bound is None:
        return
    sums, private = isinstance(job.aggregation, Ckks), f"privacy={job.choices['privacy']}"
    refused = (
        (isinstance(job.privacy, Summed), f"{private} shows the server sums alone: leave norm_bound out"),
        (job.mechanism is not None, f"{private} bounds updates by privacy.clip: leave norm_bound out"),
        (sums, "aggregation=ckks shows the server sums alone: set aggregation=open"),
        (job.steers, "strategy=scaffold sends news of updates, not updates: choose strategy=fedavg"),
    )
    _refuse(f"norm_bound={job.norm_bound:g} is for updates that the server reads, and", refused)


def _refuse(given: str, rules: Iterable[tuple[bool, str]]) -> None:
    """Raise ConfigError with the reason of the first rule that holds."""
    for holds, reason in rules:
        if holds:
            raise ConfigError(f"{given} {reason}")
