"""The Flower ClientApp: what a client answers to train, evaluate and query messages."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedapp import ckks, config
from fedapp.assignment import SECONDS, WHOLE, Part, part_in
from fedapp.ckks import Ckks
from fedapp.downlink import Plain
from fedapp.dp_step import DpStep
from fedapp.errors import FedappError
from fedapp.facts import ASKS
from fedapp.job import Job
from fedapp.models import load
from fedapp.privacy.consent import consent, counts_of, data_of, facts_of
from fedapp.privacy.secret import BATCH, CLIENT, source
from fedapp.public_rng import Use
from fedapp.records import (
    ARRAYS,
    CONFIG,
    DRIFT,
    METRICS,
    STREAM,
    UPDATE,
    WEIGHT,
    array_record,
    config_record,
    load_state,
    round_of,
    store_state,
)
from fedapp.scaffold import STEERED
from fedapp.secagg import Client
from fedapp.secagg.wire import answer, masked
from fedapp.stages import DECODE, ENCODE, EVALUATE, TRAIN
from fedapp.tasks import EVALUATION_BATCH, Data, Score
from fedapp.tasks.stream import Stream
from fedapp.training import Sgd
from fedapp.vector import array_of, held, record_with, values
from fedapp.wire import compress

FAILED = "the client failed; its own log says why"
Next = Callable[[Message, Context], Message]
_log = logging.getLogger("fedapp.client")


def client_app(job_of: Callable[[Context], Job], here: bool = False) -> ClientApp:
    """The app of a run; `job_of` finds the job from the context (deployment) or knows it (local engine).

    `here`: the same process adds up what packets hold.
    """
    app = ClientApp(mods=[])

    @DECODE
    def downlink(message: Message, context: Context, call_next: Next) -> Message:
        job = job_of(context)
        if isinstance(job.downlink, Plain):
            return call_next(message, context)
        return job.receive(message, context, call_next)

    @ENCODE
    def uplink(message: Message, context: Context, call_next: Next) -> Message:
        job = job_of(context)
        at = round_of(message), partition_of(context)
        secret = source(job.privacy.test_seed, CLIENT, *at)
        if job.terms is not None:
            encode = partial(job.terms.encode, rng=job.public_rng(at[0], 0, Use.SUM), secret=secret)
            return masked(_secure(job, context), encode, at[0], job.rounds)(message, context, call_next)
        if isinstance(job.aggregation, Ckks):
            return ckks.encrypted(message, context, call_next)
        if job.wire_codec is None:
            return call_next(message, context)
        rng = job.public_rng(*at, Use.CODEC)
        part = _part(job, message)
        mod = compress(job.wire_codec, rng, job.mechanism, secret, job.recall, part, here)
        return mod(message, context, call_next)

    @app.train(mods=[guard, consent(job_of), downlink, uplink])
    @TRAIN
    def train(message: Message, context: Context) -> Message:
        """Load, fit, reply with the trained weights, or a sum; the mod `uplink` then encodes the update."""
        job, started = job_of(context), time.perf_counter()
        load(job.model, array_record(message.content))
        trainer = job.trainer
        mu = config_record(message.content).get("proximal-mu")  # strategy=fedprox sends it
        if isinstance(trainer, Sgd) and isinstance(mu, float):
            trainer = trainer.pulled(mu)
        if job.assigns and isinstance(trainer, Sgd):
            trainer = replace(trainer, part=_part(job, message))
        server_round, partition = round_of(message), partition_of(context)
        data = _on(job, job.split(data_of(job, message, context), partition)[0])
        if isinstance(trainer, DpStep):
            secret = source(job.privacy.test_seed, BATCH, server_round, partition)
            total = Array(trainer.total(job.task, job.model, data, secret))
            return Message(RecordDict({ARRAYS: record_with({UPDATE: total})}), reply_to=message)
        fit, state = trainer.fit, load_state(context, "trainer")
        if job.steers and isinstance(trainer, Sgd):
            steered = array_record(message.content, STEERED)
            way = [torch.tensor(values(steered[name])) for name, _ in job.model.named_parameters()]
            fit = partial(trainer.fit, way=[part.to(job.torch_device) for part in way])
        rng = job.public_rng(server_round, partition, Use.TRAINING)
        progress = (server_round - 1) / max(1, job.rounds)
        metrics, state = fit(job.task, job.model, data, state, rng, progress)
        store_state(context, "trainer", state)
        if isinstance(job.task, Stream) and job.privacy.unit is None:
            metrics[DRIFT] = int(load_state(context, STREAM)[DRIFT][0])
        of = array_of if job.wire_codec is None else held
        # The memory is the model's, which the mod `uplink` is done with before another client trains it.
        weights = job.model.state_dict()
        trained = record_with({name: of(value.cpu().numpy()) for name, value in weights.items()})
        if job.assigns:
            metrics |= {SECONDS: time.perf_counter() - started}
        return Message(RecordDict({ARRAYS: trained, METRICS: MetricRecord({**metrics})}), reply_to=message)

    @app.evaluate(mods=[guard, consent(job_of), downlink])
    @EVALUATE
    def evaluate(message: Message, context: Context) -> Message:
        """Test the received weights on what the client held out; refused under differential privacy.

        Where clients do not test, a selection may ask for the loss on what they train on.
        """
        job = job_of(context)
        if job.privacy.unit is not None:
            raise PermissionError("metrics of private data do not leave the client")
        load(job.model, array_record(message.content))
        trained, held_out = job.split(data_of(job, message, context), partition_of(context))
        data = _on(job, held_out if job.evaluate == "clients" else trained)
        metrics = job.task.evaluate(job.model, data) if len(data) else {"accuracy": 0.0, "loss": 0.0}
        return Message(RecordDict({METRICS: MetricRecord({**metrics, WEIGHT: len(data)})}), reply_to=message)

    @app.query(mods=[guard])
    def query(message: Message, context: Context) -> Message:
        """Say which partition this node holds; -1 where it brings its own data."""
        return Message(RecordDict({CONFIG: ConfigRecord({"partition-id": partition_of(context, -1)})}),
                       reply_to=message)  # fmt: skip

    @app.query("facts", mods=[guard])
    def facts(message: Message, context: Context) -> Message:
        """Tell what the server asks of this node, as far as that may leave."""
        asked = config_record(message.content)[ASKS]
        told = facts_of(job_of(context), context, asked if isinstance(asked, list) else [])
        return Message(RecordDict({CONFIG: ConfigRecord({**told})}), reply_to=message)

    @app.query("check", mods=[guard, consent(job_of)])
    def check(message: Message, context: Context) -> Message:
        """Tell what the node's policy lets out of a check of its data."""
        counts = ConfigRecord({**counts_of(job_of(context), context)})
        return Message(RecordDict({CONFIG: counts}), reply_to=message)

    def take_part(stage: str) -> None:
        @app.query(stage, mods=[guard])
        @ENCODE
        def reply(message: Message, context: Context) -> Message:
            """One stage of secure aggregation."""
            return answer(_secure(job_of(context), context), stage, message, context)

    app.query("key", mods=[guard])(ckks.answer_key)
    app.query("open", mods=[guard])(ckks.answer_open)
    for stage in ("advertise", "share", "confirm", "unmask"):
        take_part(stage)
    return app


def remote_app(settings: str) -> ClientApp:
    """The app of clients in processes that know nothing of the run but its settings, as YAML."""

    def job_of(context: Context) -> Job:
        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.ERROR)  # an actor warns that it is ended
        return config.job_in(settings)

    return client_app(job_of)


def local_app(job: Job) -> ClientApp:
    """The app of the local engine's workers: the clients', and the server's test (`ServerTest`)."""
    app = client_app(lambda _: job, here=job.fold is not None)

    @app.query("test", mods=[guard])
    @EVALUATE
    def test(message: Message, context: Context) -> Message:
        """Test the weights on a part of the server's test set: those batches, by their numbers."""
        data, config = job.task.test_data(), config_record(message.content)
        assert data is not None
        load(job.model, array_record(message.content))
        first, end = (EVALUATION_BATCH * int(str(config[name])) for name in ("first", "end"))
        scores = job.task.scores(job.model, Data(data.x[first:end], data.y[first:end]))
        metrics = MetricRecord({name: [getattr(score, name) for score in scores] for name in Score._fields})
        return Message(RecordDict({METRICS: metrics, CONFIG: config}), reply_to=message)

    return app


def _secure(job: Job, context: Context) -> Client:
    """This node's end of secure aggregation; FedappError where the run has none."""
    if job.secure is None:
        raise FedappError("this run has no secure aggregation")
    return job.secure.client(context, partition_of(context))


def guard(message: Message, context: Context, call_next: Next) -> Message:
    """Flower sends `str(exception)`, which may quote private data: the log gets it, nobody else."""
    try:
        return call_next(message, context)
    except Exception:
        _log.exception("node %s failed on a %s message", context.node_id, message.metadata.message_type)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED), reply_to=message)


def partition_of(context: Context, default: int = 0) -> int:
    """The partition that a node holds, by its configuration."""
    return int(context.node_config.get("partition-id", default))


def _part(job: Job, message: Message) -> Part:
    """The part of the work that a client is asked for."""
    return part_in(message) if job.assigns else WHOLE


def _on(job: Job, data: Data) -> Data:
    """The data where the model is; to CUDA from pinned memory, while this process goes on."""
    if job.torch_device.type == "cuda":
        data = Data(data.x.pin_memory(), data.y.pin_memory())
    x, y = (part.to(job.torch_device, non_blocking=True) for part in (data.x, data.y))
    return Data(x, y)


def _job_of(context: Context) -> Job:
    torch.set_num_threads(1)  # their number changes the last bits, and one seed is one result on all engines
    return config.job_of(str(context.run_config["overrides"]))


app = client_app(_job_of)
