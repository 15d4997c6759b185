"""The Flower ClientApp: what a client answers to train, evaluate and query messages."""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedapp import ckks, config
from fedapp.ckks import Ckks
from fedapp.downlink import Plain
from fedapp.dp_step import DpStep
from fedapp.errors import FedappError
from fedapp.job import Job
from fedapp.privacy.consent import consent, data_of
from fedapp.privacy.secret import BATCH, CLIENT, source
from fedapp.records import ARRAYS, CONFIG, METRICS, UPDATE, WEIGHT, load_state, store_state
from fedapp.running_sum import Own
from fedapp.scaffold import STEERED
from fedapp.secagg import Client
from fedapp.secagg.wire import answer, masked
from fedapp.stages import DECODE, ENCODE, EVALUATE, TRAIN
from fedapp.tasks import Data
from fedapp.training import Sgd
from fedapp.vector import values
from fedapp.wire import compress

FAILED = "the client failed; its own log says why"
Next = Callable[[Message, Context], Message]
_log = logging.getLogger("fedapp.client")


def client_app(job_of: Callable[[Context], Job], own: Own | None = None) -> ClientApp:
    """The app of a run; `job_of` finds the job from the context (deployment) or knows it (local engine).

    `own` is told what packets decode to, where the same process adds them up.
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
        at = _round(message), partition_of(context)
        secret = source(job.privacy.test_seed, CLIENT, *at)
        if job.terms is not None:
            encode = partial(job.terms.encode, rng=job.public_rng(at[0], 0, use=3), secret=secret)
            return masked(_secure(job), encode)(message, context, call_next)
        if isinstance(job.aggregation, Ckks):
            return ckks.encrypted(message, context, call_next)
        if job.wire_codec is None:
            return call_next(message, context)
        rng = job.public_rng(*at, use=1)
        mod = compress(job.wire_codec, rng, job.mechanism, secret, job.recall, own)
        return mod(message, context, call_next)

    @app.train(mods=[guard, consent(job_of), downlink, uplink])
    @TRAIN
    def train(message: Message, context: Context) -> Message:
        """Load, fit, reply with the trained weights, or a sum; the mod `uplink` then encodes the update."""
        job = job_of(context)
        load(job, message.content.array_records[ARRAYS])
        trainer = job.trainer
        mu = message.content.config_records[CONFIG].get("proximal-mu")  # strategy=fedprox sends it
        if isinstance(trainer, Sgd) and isinstance(mu, float):
            trainer = trainer.pulled(mu)
        at = _round(message), partition_of(context)
        rng, data = job.public_rng(*at, use=0), _on(job, data_of(job, message, context))
        if isinstance(trainer, DpStep):
            secret = source(job.privacy.test_seed, BATCH, *at)
            total = Array(trainer.total(job.task, job.model, data, secret))
            return Message(RecordDict({ARRAYS: ArrayRecord({UPDATE: total})}), reply_to=message)
        state, progress = load_state(context, "trainer"), (_round(message) - 1) / max(1, job.rounds)
        fit = trainer.fit
        if job.steers and isinstance(trainer, Sgd):
            steered = message.content.array_records[STEERED]
            way = [torch.tensor(values(steered[name])) for name, _ in job.model.named_parameters()]
            fit = partial(trainer.fit, way=[part.to(job.torch_device) for part in way])
        metrics, state = fit(job.task, job.model, data, state, rng, progress)
        store_state(context, "trainer", state)
        trained = ArrayRecord(job.model.state_dict())
        return Message(RecordDict({ARRAYS: trained, METRICS: MetricRecord({**metrics})}), reply_to=message)

    @app.evaluate(mods=[guard, consent(job_of), downlink])
    @EVALUATE
    def evaluate(message: Message, context: Context) -> Message:
        """Test the received weights on the client's own data; refused under differential privacy."""
        job = job_of(context)
        if job.privacy.unit is not None:
            raise PermissionError("metrics of private data do not leave the client")
        load(job, message.content.array_records[ARRAYS])
        data = _on(job, data_of(job, message, context))
        metrics = job.task.evaluate(job.model, data) if len(data) else {"accuracy": 0.0, "loss": 0.0}
        return Message(RecordDict({METRICS: MetricRecord({**metrics, WEIGHT: len(data)})}), reply_to=message)

    @app.query(mods=[guard])
    def query(message: Message, context: Context) -> Message:
        """Say which partition this node holds; -1 where it brings its own data."""
        return Message(RecordDict({CONFIG: ConfigRecord({"partition-id": partition_of(context, -1)})}),
                       reply_to=message)  # fmt: skip

    def take_part(stage: str) -> None:
        @app.query(stage, mods=[guard])
        @ENCODE
        def reply(message: Message, context: Context) -> Message:
            """One stage of secure aggregation."""
            return answer(_secure(job_of(context)), stage, message, context)

    app.query("key", mods=[guard])(ckks.answer_key)
    app.query("open", mods=[guard])(ckks.answer_open)
    for stage in ("advertise", "share", "unmask"):
        take_part(stage)
    return app


def local_app(job: Job) -> ClientApp:
    """The app of the local engine's workers: the clients', and a test of the server's model.

    A process that has touched CUDA forks no more workers that could. So the server never does, and has one of
    them test its model.
    """
    app = client_app(lambda _: job, job.own if job.fold else None)

    @app.query("test", mods=[guard])
    @EVALUATE
    def test(message: Message, context: Context) -> Message:
        """Test the weights on the server's test set."""
        data = job.task.test_data()
        assert data is not None
        load(job, message.content.array_records[ARRAYS])
        metrics = job.task.evaluate(job.model, data)
        return Message(RecordDict({METRICS: MetricRecord({**metrics})}), reply_to=message)

    return app


def _secure(job: Job) -> Client:
    """This node's end of secure aggregation; FedappError where the run has none."""
    if job.terms is None:
        raise FedappError("this run has no secure aggregation")
    return Client(job.terms.kept, job.terms.modulus, job.dropouts)


def guard(message: Message, context: Context, call_next: Next) -> Message:
    """Flower sends `str(exception)`, which may quote private data: the log gets it, nobody else."""
    try:
        return call_next(message, context)
    except Exception:
        _log.exception("node %s failed on a %s message", context.node_id, message.metadata.message_type)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILED), reply_to=message)


def load(job: Job, arrays: ArrayRecord) -> None:
    """Copy received weights into the resident model, in place."""
    own = job.model.state_dict()
    if arrays.keys() != own.keys():
        raise ValueError("received weights are not of this model")
    for name, tensor in own.items():
        if tensor.device.type == "cpu":
            np.copyto(
                tensor.numpy(), values(arrays[name])
            )  # read once; torch would copy what is read-only first
        else:
            tensor.copy_(torch.tensor(values(arrays[name])))


def partition_of(context: Context, default: int = 0) -> int:
    """The partition that a node holds, by its configuration."""
    return int(context.node_config.get("partition-id", default))


def _round(message: Message) -> int:
    return int(str(message.content.config_records[CONFIG]["server-round"]))


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
