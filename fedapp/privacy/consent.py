"""A client's consent: its policy and its ledger around each train and evaluate message.

The participant names both when starting the SuperNode, in its node config: policy="<file>", ledger="<file>"
with data-id="<any name of the data>". Where none is named, as in a simulation, nothing is asked.

In this order: the policy checks what the run asks; a reply of this round that was charged before is sent
again as the same bytes; the data are read and narrowed to what is shared; what the reply will release is
written to the ledger; the client works; metrics that may not leave are taken out; the reply is kept, then
leaves.

What this can enforce. A node that `fedapp client` starts runs the installed fedapp and never the bundle,
which it compares with it. A stock SuperNode runs the code of the bundle that arrives, and a bundle named
fedapp shadows the installed package, so there it is that code which reads the policy. With a policy or a
ledger, a run whose fedapp differs from the installed one in any file is then declined, which catches other
versions and changes made without malice. It does not stop a bundle written to ignore all this: on a
SuperNode, whoever may start runs can run any code as its user. Give runs to those you trust, and the
SuperNode a user that can read no more than it needs.
"""

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord
from flwr.clientapp.typing import Mod
from flwr.common.constant import ErrorCode

import fedapp
from fedapp.deploy.bundle import digests
from fedapp.errors import ConfigError, DataError, FedappError
from fedapp.facts import OF_DATA, SPEED, Told, of_data, of_machine, speed_of
from fedapp.job import Job
from fedapp.privacy.ledger import BudgetSpent, Ledger, TwiceInRun, fingerprint
from fedapp.privacy.policy import Policy, PolicyRefusal
from fedapp.privacy.release import Release
from fedapp.records import (
    DRIFT,
    METRICS,
    STREAM,
    as_bytes,
    from_bytes,
    load_state,
    record_in,
    round_of,
    store_state,
)
from fedapp.tasks import Data
from fedapp.tasks.classification import Classification
from fedapp.tasks.quality import Findings
from fedapp.tasks.stream import Stream

SPENT = "the client's privacy budget does not allow this release"
TWICE = "another node brings the same data into this run"
_log = logging.getLogger("fedapp.client")


def consent(job_of: Callable[[Context], Job]) -> Mod:
    """The client mod: asks policy and ledger; a declined message costs the run this reply, and is told why.

    The reason is public: it names the rule, and holds no data and no figure of the ledger.
    """

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        policy, books = _policy(context), _books(context)
        if policy is None and books is None:
            return call_next(message, context)
        try:
            if not _as_installed():
                raise PolicyRefusal("versions", "the run brings a fedapp that differs from the installed one")
            job, purpose, server_round = job_of(context), message.metadata.message_type, round_of(message)
            if policy is not None:
                policy.check(job, purpose, server_round, releases(job))
            if books and (kept := _kept(books, context, server_round, purpose)) is not None:
                return Message(from_bytes(kept), reply_to=message)
            with policy.in_time() if policy else nullcontext():
                reply = call_next(message, context)
            metrics = None if reply.has_error() else record_in(reply.content, METRICS, MetricRecord)
            if metrics is None:
                return reply  # nothing was trained or tested, or it is masked, which is never done twice
            if policy is not None:
                left = {name: value for name, value in metrics.items() if policy.may_leave(name)}
                reply.content[METRICS] = MetricRecord(left)
            if books:
                data = as_bytes(reply.content)
                at = context.run_id, server_round, purpose
                books[0].store(books[1], *at, data, node=context.node_id)
            return reply
        except (PolicyRefusal, BudgetSpent, TwiceInRun) as refusal:
            _log.warning("node %s declined: %s", context.node_id, refusal)
            known = {BudgetSpent: SPENT, TwiceInRun: TWICE}
            reason = known.get(type(refusal), str(refusal))
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)

    return mod


def data_of(job: Job, message: Message, context: Context) -> Data:
    """The client's data for this message: no more than it shares, and charged to its ledger already.

    Raises PolicyRefusal, BudgetSpent, TwiceInRun.
    """
    policy, books = _policy(context), _books(context)
    if message.metadata.message_type == "train":
        _require_fit(job, context, policy)
    if policy is None:
        data = job.task.client_data(context.node_config)
    else:
        data = policy.data(job.task, context.node_config)
    if isinstance(job.task, Stream):
        data = _of_round(job.task, data, round_of(message), context)
    if policy is not None and message.metadata.message_type == "train":
        policy.check_work(job.trainer, len(data))
    if books is not None:
        ledger, data_id = books
        own = context.node_config.get("data")
        content = None if own is None else fingerprint(Path(str(own)).expanduser())
        released, asked = releases(job), round_of(message)
        if job.hides_cohorts and not 1 <= asked <= job.rounds:
            raise PolicyRefusal("epsilon", f"round {asked} is outside the {job.rounds} planned rounds")
        ledger.charge(
            data_id,
            job.privacy.unit if released else None,
            released,
            context.run_id,
            asked,
            message.metadata.message_type,
            mechanism=job.choices["privacy"] if released else None,
            adversary=job.privacy.against if released else None,
            fingerprint=content,
            once=job.hides_cohorts and bool(released),
            node=context.node_id,
        )
    return data


def facts_of(job: Job, context: Context, asked: Collection[object]) -> Told:
    """What a node tells of itself before the rounds, of what it is asked.

    Of its data only what its policy lists under `facts`, and of a run that this accepts. Nothing under any
    privacy, or where a ledger keeps books: no mechanism covers it. Reads the data, and charges nothing.
    Its speed it tries only for a run that its policy accepts.
    """
    wanted, policy = {str(name) for name in asked}, _policy(context)
    told, private = of_machine(wanted, context.node_config), job.privacy.unit is not None or _books(context)
    listed = wanted & OF_DATA if policy is None else wanted & OF_DATA & set(policy.facts)
    names = set() if private else listed
    if (not names and SPEED not in wanted) or (policy is not None and not _as_installed()):
        return told
    try:
        if policy is not None:
            policy.check(job, "query", 1, ())
        if SPEED in wanted:
            told[SPEED] = speed_of(job.task, job.model)
        if names:
            read = job.task.client_data if policy is None else partial(policy.data, job.task)
            told |= of_data(names, read(context.node_config), job.task.classes)
    except FedappError as refusal:
        said = "`fedapp check` says why" if isinstance(refusal, DataError) else refusal  # it may quote them
        _log.warning("node %s tells nothing of its data: %s", context.node_id, said)
    return told


def counts_of(job: Job, context: Context) -> dict[str, int]:
    """What a check of a node's own data counts, as far as its policy lets that out; nothing under privacy.

    A count is as unprotected as data are, and charged so. Raises PolicyRefusal, BudgetSpent, TwiceInRun.
    """
    policy, books = _policy(context), _books(context)
    if job.privacy.unit is not None or policy is None or not policy.counts:
        return {}
    found = _findings(job, context, policy)
    if found is None:
        return {}
    if books is not None:
        books[0].charge(books[1], None, (), context.run_id, 1, "check", node=context.node_id)
    return {name: count for name, count in found.counts.items() if name in policy.counts}


def _findings(job: Job, context: Context, policy: Policy | None) -> Findings | None:
    """A check of a node's own data; None where it has none, or the task cannot check."""
    own = context.node_config.get("data")
    if own is None or not isinstance(job.task, Classification):
        return None
    return job.task.examined(Path(str(own)).expanduser(), *(policy.narrowed if policy else ()))


def _require_fit(job: Job, context: Context, policy: Policy | None) -> None:
    """Check a node's own data before it trains first; what is wrong goes to its own log.

    Raises DataError where training is impossible.
    """
    if "checked" in context.state or (found := _findings(job, context, policy)) is None:
        return
    for problem in found.problems:
        _log.log(logging.ERROR if problem.fatal else logging.WARNING, "data check: %s", problem.logged)
    if found.fatal:
        fatal = sum(problem.fatal for problem in found.problems)
        raise DataError(
            f"{context.node_config['data']} cannot be trained on, for {fatal} reasons that the log tells "
            "above: mend them; fedapp check tells whether all is well"
        )
    context.state["checked"] = ConfigRecord({"fit": True})


def _of_round(task: Stream, data: Data, server_round: int, context: Context) -> Data:
    """What a round takes of data that grow. An alarm of drift goes to the client's own log."""
    partition, own = int(context.node_config.get("partition-id", 0)), "data" in context.node_config
    state = load_state(context, STREAM)
    data, kept, drifted = task.of_round(data, server_round, partition, state, own)
    store_state(context, STREAM, {**kept, DRIFT: np.array([drifted], np.int64)})
    if drifted:
        _log.warning(
            "node %s: examples of round %s differ from the first window (chi-square tests, alarm=%g)",
            context.node_id, server_round, task.alarm,
        )  # fmt: skip
    return data


def releases(job: Job) -> Sequence[Release]:
    """What one reply of a job releases; nothing where it is unprotected.

    Where cohorts are hidden a client is one of those that might have been drawn, in every round of the run,
    so its first reply stands for all of them.
    """
    return job.releases(job.rounds, 1) if not job.test_seeded else ()


def installed() -> Path:
    """The folder of the fedapp that the participant installed: the one behind the bundle's, if any."""
    running = Path(fedapp.__file__).parent
    others = [entry for entry in sys.path if Path(entry).resolve() != running.parent.resolve()]
    found = PathFinder.find_spec("fedapp", others)
    return running if found is None or found.origin is None else Path(found.origin).parent


def _as_installed() -> bool:
    """Whether the fedapp that runs is the installed one; where they are one folder nothing is read."""
    running, own = Path(fedapp.__file__).parent, installed()
    if running == own:
        return True
    changed = digests(running).items() ^ digests(own).items()
    for name in sorted({name for name, _ in changed}):
        _log.warning("the run's fedapp differs from the installed one in %s", name)
    return not changed


def _policy(context: Context) -> Policy | None:
    path = context.node_config.get("policy")
    return None if path is None else Policy.load(Path(str(path)).expanduser())


def _books(context: Context) -> tuple[Ledger, str] | None:
    """The ledger, and the id that these data have in it."""
    path, data_id = context.node_config.get("ledger"), context.node_config.get("data-id")
    if path is None:
        return None
    if data_id is None:
        raise ConfigError('a ledger needs to know whose budget to charge: give the node data-id="<name>"')
    return Ledger(Path(str(path))), str(data_id)


def _kept(books: tuple[Ledger, str], context: Context, server_round: int, purpose: str) -> bytes | None:
    """The reply that this node has charged for and made before."""
    ledger, data_id = books
    return ledger.stored(data_id, context.run_id, server_round, purpose, node=context.node_id)
