"""The client's policy: a YAML file on its own machine that says what a run may ask of its data."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
import yaml
from cryptography.exceptions import UnsupportedAlgorithm

from fedapp import __version__, check
from fedapp.deploy.bundle import signer
from fedapp.dp_step import DpStep
from fedapp.errors import ConfigError, FedappError
from fedapp.privacy.central import BIT, CentralGaussian
from fedapp.privacy.release import Gaussian, Release
from fedapp.tasks import Data, Task
from fedapp.tasks.quality import COUNTS
from fedapp.tasks.stream import Stream, reader_of
from fedapp.tasks.tables import Csv
from fedapp.training import DpSgd, Sgd, Trainer

if TYPE_CHECKING:
    import pandas as pd

    from fedapp.job import Job

_LISTS = ("tasks", "privacy", "metrics", "facts", "counts", "versions", "signers", "columns", "classes")
_NEEDED = {"train": ("num-examples",), "evaluate": ("num-examples", "accuracy", "loss")}  # by the server


class PolicyRefusal(FedappError):  # noqa: N818
    """The client's policy does not let a run do what it asks. The text is public: it tells no data."""

    def __init__(self, rule: str, said: str) -> None:
        super().__init__(f"the client's policy refuses: {rule}: {said}")
        self.rule = rule


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a client lets runs do. A rule that is not given bounds nothing; the first three must be given.

    tasks, privacy: the choices accepted, as `task=` and `privacy=` name them; what protects nothing counts as
    none, whatever it is called. metrics: names of the metrics that may leave, and of what a mechanism sends
    beside its update; num-examples is the weight of a client, without which a run under privacy=none is
    refused. facts: what a run without privacy may be told of the data before it begins, examples (how many)
    and labels (how many of each class); not given, nothing. versions: of fedapp. signers: public keys; a
    run whose code is not the installed one is served where one of these has signed it (`deploy.bundle`).

    counts: what of a check of the data (`fedapp.tasks.quality.COUNTS`) runs without privacy may be told: of
    the columns and rows below, whatever classes and fraction take part. Nothing, where it is not given.

    epsilon, delta: the most that a whole planned run may cost, one update a round; what a server repeats only
    a ledger bounds. noise: the least noise multiplier. secure_aggregation: true refuses all runs without it.

    columns: of a table, the only ones that a run may name, its label included. rows: of a table, for each
    column the values that a row must have one of. classes: the only labels whose examples take part.
    fraction: the share of examples that takes part, always the same ones: by a hash of their place in the
    data under `salt`, any secret words. Examples added at the end change no earlier choice.

    examples, steps, seconds: the most local work of one round: epochs times examples (under DP-SGD
    their public expectation), optimizer steps, and time, after which the work is broken off.

    *Formal guarantees.* None of its own; `epsilon` is that of the run's accountant. It binds this client, as
    long as the code that runs is the one that the participant installed; see `fedapp.privacy.consent`. Not
    covered: a refusal by `examples` tells that there are more of them.
    """

    tasks: tuple[str, ...]
    privacy: tuple[str, ...]
    metrics: tuple[str, ...]
    facts: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    versions: tuple[str, ...] | None = None
    signers: tuple[str, ...] = ()
    epsilon: float | None = None
    delta: float | None = None
    noise: float | None = None
    secure_aggregation: bool = False
    columns: tuple[str, ...] | None = None
    rows: Mapping[str, tuple[str, ...]] | None = None
    classes: tuple[str, ...] | None = None
    fraction: float = 1.0
    salt: str | None = None
    examples: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _words(f"policy.{name}", getattr(self, name)))
        if self.rows is not None:
            if not isinstance(self.rows, Mapping):
                raise ConfigError(
                    f"policy.rows must map columns to lists of values, got {self.rows!r}: write column: [a]"
                )
            rows = {str(column): _words(f"policy.rows.{column}", of) for column, of in self.rows.items()}
            object.__setattr__(self, "rows", rows)
        for line in self.signers:
            try:
                signer(line)
            except (ValueError, UnsupportedAlgorithm) as error:
                raise ConfigError(
                    f"policy.signers has {line[:40]!r}, which is no key ({error}): "
                    "list lines as `fedapp keys sign` prints them"
                ) from error
        for name in self.facts:
            check.choice("each of policy.facts", name, ("examples", "labels"))
        if unknown := sorted({*self.counts} - {*COUNTS}):
            raise ConfigError(f"policy.counts names {', '.join(unknown)}: choose of {', '.join(COUNTS)}")
        check.flag("policy.secure_aggregation", self.secure_aggregation)
        check.real("policy.fraction", self.fraction, above=0.0, high=1.0)
        for name in ("epsilon", "noise", "seconds"):
            if getattr(self, name) is not None:
                check.real(f"policy.{name}", getattr(self, name), above=0.0)
        for name in ("examples", "steps"):
            if getattr(self, name) is not None:
                check.whole(f"policy.{name}", getattr(self, name), 0)
        if (self.epsilon is None) != (self.delta is None):
            raise ConfigError("policy.epsilon is a bound at a policy.delta: set both, or neither")
        if self.delta is not None:
            check.real("policy.delta", self.delta, above=0.0, below=1.0)
        if self.fraction < 1 and not isinstance(self.salt, str):
            raise ConfigError(
                f"policy.fraction={self.fraction} needs policy.salt, not a number: set any secret "
                "words and keep them, so that the same examples are chosen every time"
            )

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy. Raises ConfigError for what is unreadable, unknown, missing or out of range."""
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"the policy {path} cannot be read ({_place(error)}): give a YAML file"
            ) from None
        known = {field.name for field in fields(cls)}
        required = [field.name for field in fields(cls) if field.default is MISSING]
        if not isinstance(tree, dict):
            raise ConfigError(f"the policy {path} holds no rules: give at least {', '.join(required)}")
        unknown = [str(key) for key in tree if key not in known]
        if unknown:
            raise ConfigError(
                f"the policy {path} has unknown rules {', '.join(unknown)}: "
                f"there are {', '.join(sorted(known))}"
            )
        lacking = [name for name in required if name not in tree]
        if lacking:
            raise ConfigError(f"the policy {path} lacks {', '.join(lacking)}: list what you accept")
        return cls(**tree)

    def check(self, job: "Job", purpose: str, server_round: int, releases: Sequence[Release]) -> None:
        """Refuse what the settings of a run already tell: raises PolicyRefusal naming rule, value and bound.

        `releases` is what one reply releases; nothing stands for all of the data, unprotected.
        """
        _among("tasks", f"task={job.choices['task']}", job.choices["task"], self.tasks)
        if getattr(job.task, "path", None) is not None:
            raise PolicyRefusal("tasks", "task.path names a file of the client's machine: set task.path=null")
        if self.versions is not None:
            _among("versions", f"fedapp {__version__}", __version__, self.versions)
        choice = str(job.choices["privacy"]) if releases else "none"
        _among("privacy", f"privacy={choice}", choice, self.privacy)
        if self.secure_aggregation and job.terms is None:
            raise PolicyRefusal("secure_aggregation", "it is required, and this run has none")
        if not 1 <= server_round <= job.rounds:
            raise PolicyRefusal("epsilon", f"round {server_round} is outside the {job.rounds} planned rounds")
        self._check_noise(job, releases)
        self._check_columns(job.task)
        needed = _NEEDED.get(purpose, ())
        if releases:  # then a constant is what a client weighs
            adaptive = isinstance(job.privacy, CentralGaussian) and job.privacy.quantile is not None
            needed = (BIT,) if adaptive else ()
        for name in needed:
            if name not in self.metrics:
                raise PolicyRefusal("metrics", f"{purpose} needs {name}, and only {self.metrics} may leave")

    def check_work(self, trainer: Trainer | DpStep, examples: int) -> None:
        """Refuse a round of training on so many examples that is too much work, without saying how much."""
        for rule, asked in zip(("steps", "examples"), _work(trainer, examples), strict=True):
            bound = getattr(self, rule)
            if bound is not None and asked > bound:
                raise PolicyRefusal(
                    rule, f"a round asks for more than {bound}: lower trainer.epochs or steps"
                )

    def data(self, task: Task, node_config: Mapping[str, bool | int | float | str]) -> Data:
        """The part of the client's own data that takes part in runs."""
        if self.columns is None and self.rows is None:
            return self.share(task.client_data(node_config), task.labels)
        rule = "columns" if self.rows is None else "rows"
        if not isinstance(reader_of(task), Csv) or "data" not in node_config:
            raise PolicyRefusal(rule, "it is kept for task=csv on the client's own table only")
        assert isinstance(task, (Csv, Stream))
        whole = task.read(Path(str(node_config["data"])).expanduser(), self.table)
        return self.share(whole, task.labels)

    @property
    def narrowed(self) -> "tuple[Callable[[pd.DataFrame], pd.DataFrame], ...]":
        """What makes of a whole table the columns and rows that may be used."""
        return () if self.columns is None and self.rows is None else (self.table,)

    def table(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """The rows and columns of a table of text that may be used. Raises PolicyRefusal without a column."""
        for column, values in (self.rows or {}).items():
            if column not in table.columns:
                raise PolicyRefusal("rows", f"the client's table has no column {column}")
            table = table[table[column].isin(values)]
        return table if self.columns is None else table[[c for c in table.columns if c in self.columns]]

    def share(self, data: Data, class_names: Sequence[str]) -> Data:
        """The examples whose class and place in the data are chosen, in order; always the same ones."""
        kept = torch.ones(len(data), dtype=torch.bool)
        if self.classes is not None:
            chosen = torch.tensor([name in self.classes for name in class_names], dtype=torch.bool)
            kept &= chosen[data.y]
        if self.fraction < 1:
            kept &= torch.tensor([self._drawn(place) for place in range(len(data))], dtype=torch.bool)
        return Data(data.x[kept], data.y[kept])

    def may_leave(self, name: str) -> bool:
        """Whether a metric of this name may leave; num-examples is a constant where it is not refused."""
        return name in self.metrics or name == "num-examples"

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """Break off with a PolicyRefusal after `seconds`. Raises ValueError outside the main thread."""
        if self.seconds is None:
            yield
            return

        def expired(signum: int, frame: FrameType | None) -> None:
            raise PolicyRefusal("seconds", f"a round may take at most {self.seconds:g} s")

        before = signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _drawn(self, place: int) -> bool:
        digest = blake2b(f"{self.salt}\0{place}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.fraction * 2**64

    def _check_noise(self, job: "Job", releases: Sequence[Release]) -> None:
        noise = min((r.noise for r in releases if isinstance(r, Gaussian)), default=0.0)
        if job.terms is not None:
            noise = job.terms.multiplier  # of the whole sum
        if self.noise is not None and noise < self.noise:
            raise PolicyRefusal(
                "noise", f"the noise multiplier is {noise:.4g}, at least {self.noise:g} is due"
            )
        if self.epsilon is None or self.delta is None:
            return
        known = job.spent(job.rounds, job.answers_at_most) if releases else None
        spends = math.inf if known is None else known.epsilon
        if spends > self.epsilon:
            raise PolicyRefusal(
                "epsilon", f"the planned run spends {spends:.4g}, at most {self.epsilon:g} may be"
            )
        if job.privacy.delta is None or job.privacy.delta > self.delta:
            raise PolicyRefusal("delta", f"it is {job.privacy.delta}, at most {self.delta:g} may be")

    def _check_columns(self, task: Task) -> None:
        reads = reader_of(task)
        if self.columns is None or not isinstance(reads, Csv):
            return
        for column in (reads.label, *(reads.features or ())):
            _among("columns", f"the column {column}", column, self.columns)


def _work(trainer: Trainer | DpStep, examples: int) -> tuple[int, float]:
    """Steps, and examples counted once an epoch, of one round; public constants alone under DP-SGD."""
    if isinstance(trainer, DpSgd):
        return trainer.steps, trainer.steps * trainer.sampling_rate * trainer.examples_per_client
    if isinstance(trainer, DpStep):
        return 1, trainer.sampling_rate * trainer.examples_per_client
    if isinstance(trainer, Sgd):
        return trainer.epochs * math.ceil(examples / trainer.batch_size), float(trainer.epochs * examples)
    raise PolicyRefusal("steps", f"the work of a {type(trainer).__name__} is not known")


def _place(error: OSError | UnicodeDecodeError | yaml.YAMLError) -> str:
    """What is wrong and where, without the words that stand there: they may be the salt."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"no YAML at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__


def _among(rule: str, what: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise PolicyRefusal(rule, f"{what} is not among {', '.join(accepted) or 'nothing'}")


def _words(name: str, values: object) -> tuple[str, ...]:
    """A list of words or whole numbers as text; YAML takes no, on and 1.0 for neither, unless quoted."""
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f"{name} must be a list of words, got {values!r}: write [a, b]")
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, (str, int))]
    if wrong:
        raise ConfigError(f"{name} must list words, and YAML reads none in {wrong[0]!r}: write it in quotes")
    return tuple(str(value) for value in values)
