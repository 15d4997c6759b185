"""Error feedback: nothing is lost but what a lost reply held, and a run decides on `codec.feedback=auto`."""

import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from grids import local
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console

from fedapp import config, server_app
from fedapp.client_app import client_app
from fedapp.codec import Codec
from fedapp.codec.chain import ErrorFeedback, pipeline
from fedapp.codec.feedback import AutoFeedback
from fedapp.codec.packet import decode_update
from fedapp.codec.per_layer import PerLayer
from fedapp.codec.rate_distortion import RateDistortion, default
from fedapp.engine.local import LocalGrid
from fedapp.errors import ConfigError
from fedapp.records import ARRAYS, METRICS, UPDATE, WEIGHT, load_state
from fedapp.report.folder import RunFolder
from fedapp.vector import layout_of, unravel
from fedapp.wire import compress

PLAIN = "task=digits privacy=none"
SHAPES = {"conv": (8, 3, 3, 3), "conv.bias": (8,), "linear": (40, 60), "linear.bias": (40,), "scale": ()}


def job_of(overrides: str) -> Any:
    return config.job(config.compose(overrides))


def keeping() -> dict[str, Codec]:
    """What conf/codec/ offers with error feedback, or with `auto`, which a run at half a bit turns on."""
    found = {}
    for path in sorted((config.CONF / "codec").glob("*.yaml")):
        settings: Any = OmegaConf.load(path)
        feedback = settings.get("feedback")
        if feedback:
            low = "codec.rate=0.5" if feedback == "auto" else ""
            found[path.stem] = job_of(f"{PLAIN} codec={path.stem} {low}").codec
    return found


KEEPING = keeping()
every_keeper = pytest.mark.parametrize("codec", KEEPING.values(), ids=KEEPING.keys())


# What is sent and what is owed


class Client:
    """One client behind the mod, whose weights move by what a test says."""

    def __init__(self, codec: Codec) -> None:
        LocalGrid(ClientApp(), [1], workers=0)  # sets the run and the node that messages are made with
        self.weights = ArrayRecord(
            {name: Array(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()}
        )
        self.layout = layout_of(self.weights)
        self.context = Context(1, 2, {}, RecordDict(), {})
        self._codec, self._rng = codec, np.random.default_rng(0)

    def train(self, update: NDArray[np.float32]) -> NDArray[np.float64]:
        """The update, as the server decodes it from the reply."""
        trained = ArrayRecord(
            {name: Array(value) for name, value in unravel(update, self.layout, self.weights).items()}
        )
        content = RecordDict({ARRAYS: trained, METRICS: MetricRecord({WEIGHT: 1})})
        message = Message(RecordDict({ARRAYS: self.weights}), 2, "train")
        reply = compress(self._codec, self._rng)(
            message, self.context, lambda asked, _: Message(content, reply_to=asked)
        )
        packet = reply.content.array_records[ARRAYS][UPDATE].data
        return decode_update(packet, self._codec, self.layout).astype(np.float64)

    @property
    def owed(self) -> NDArray[np.float64]:
        return load_state(self.context, "codec")["residual"].astype(np.float64)


def updates(count: int) -> list[NDArray[np.float32]]:
    size, rng = sum(int(np.prod(shape)) for shape in SHAPES.values()), np.random.default_rng(3)
    return [(rng.standard_t(4, size) * 0.1 / (k + 1)).astype(np.float32) for k in range(count)]


def same(sent: NDArray[np.float64], expected: NDArray[np.float64]) -> bool:
    """But for float32 rounding."""
    return bool(np.allclose(sent, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max())))


def total(vectors: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    whole: NDArray[np.float64] = np.sum(np.asarray(vectors, np.float64), axis=0)
    return whole


def test_all_that_keep_are_found() -> None:
    assert set(KEEPING) >= {"default", "topk", "sign", "stc", "powersgd", "perchannel", "binary"}
    assert all(isinstance(codec, ErrorFeedback) for codec in KEEPING.values())


@every_keeper
def test_what_was_sent_and_what_is_owed_are_the_updates(codec: Codec) -> None:
    client, moved = Client(codec), updates(8)
    sent = []
    for count, update in enumerate(moved, 1):
        sent.append(client.train(update))
        assert same(total(sent) + client.owed, total(moved[:count]))
    assert np.linalg.norm(client.owed) > 0


@every_keeper
def test_a_lost_reply_loses_its_packet_and_nothing_else(codec: Codec) -> None:
    client, moved, lost = Client(codec), updates(8), 3
    sent = [client.train(update) for update in moved]
    arrived = total([packet for k, packet in enumerate(sent) if k != lost])
    assert same(arrived + client.owed, total(moved) - sent[lost])


@every_keeper
def test_a_reply_whose_context_was_not_stored_shifts_the_sum_by_what_the_residual_moved(codec: Codec) -> None:
    """Flower sends a reply before it stores the context; a process may die between the two."""
    client, moved, died = Client(codec), updates(8), 3
    sent, shift = [], np.zeros(1)
    for k, update in enumerate(moved):
        before = RecordDict(dict(client.context.state))
        owed = client.owed if k else shift
        sent.append(client.train(update))
        if k == died:
            shift = owed - client.owed
            client.context.state = before
    assert np.linalg.norm(shift) > 0
    assert same(total(sent) + client.owed, total(moved) + shift)


@every_keeper
def test_a_client_that_fails_keeps_what_it_owed(codec: Codec) -> None:
    client, moved = Client(codec), updates(3)
    sent = [client.train(moved[0])]
    with pytest.raises(ValueError, match="NaN or infinite values in conv"):
        client.train(np.full_like(moved[1], np.nan))
    sent.append(client.train(moved[2]))
    assert same(total(sent) + client.owed, moved[0].astype(np.float64) + moved[2])


# codec.feedback=auto

DECIDED = [  # overrides, whether it is on, and what the run says
    ("", True, "codec.rate=1 is up to 1 bit per parameter, .* every round"),
    ("clients=11", False, "at 1 where all take part in every round; codec.rate=1 is above"),
    ("codec.rate=1.01", False, "it pays below 1 bit per parameter, .*; codec.rate=1.01 is above"),
    ("codec.rate=0.99", True, "codec.rate=0.99 is up to 1 bit per parameter, .* every round"),
    ("codec.rate=0.25", True, "codec.rate=0.25 is up to 1 bit"),
    ("codec.rate=2", False, "codec.rate=2 is above"),
    ("codec.step=1", False, "codec.step=1 is above"),
    ("codec.step=2", True, "codec.step=2 is up to"),
    ("codec.nmse=0.05", False, "codec.nmse=0.05 is above"),
    ("codec.nmse=0.3", True, "codec.nmse=0.3 is up to"),
    ("codec.nmse=0.05 codec.step=2", True, "codec.step=2 is up to"),  # the step counts, as in the codec
    ("codec.nmse=0.05 codec.rate=0.1", False, "codec.nmse=0.05 is above"),
    ("codec.rate=0.25 codec.trellis=true", True, "codec.rate=0.25 is up to"),
    ("codec.rate=0.25 cohort=10", True, "every round"),
    ("codec.rate=0.25 clients=40", True, "25 % of the rounds"),
    ("codec.rate=0.25 clients=41", False, "24.4 % of the rounds, .* too late"),
    ("codec.rate=0.25 clients=100", False, "10 % of the rounds, .* too late"),
    ("codec.rate=0.25 privacy=example", False, "under privacy=example .* noise"),
]


@pytest.mark.parametrize(("overrides", "on", "said"), DECIDED)
def test_the_run_decides_and_says_why(overrides: str, on: bool, said: str) -> None:
    cohort = "cohort=10" if "clients" in overrides else ""
    job = job_of(f"{PLAIN} {cohort} {overrides}")
    assert isinstance(job.codec, ErrorFeedback if on else RateDistortion)
    assert re.match(f"Error feedback is {'on' if on else 'off'}: .*{said}", job.said)
    again = job_of(f"{PLAIN} {cohort} {overrides} seed=1")
    assert (again.codec, again.said) == (job.codec, job.said)


@pytest.mark.parametrize("codec", ["default codec.rate=0.1 codec.feedback=true", "topk", "eden", "identity"])
def test_what_is_set_is_neither_decided_nor_explained(codec: str) -> None:
    job = job_of(f"{PLAIN} clients=100 cohort=10 codec={codec}")
    assert isinstance(job.codec, ErrorFeedback) == (codec not in ("eden", "identity"))
    assert job.said is None


@pytest.mark.parametrize(
    ("overrides", "products"),
    [("", False), ("codec.rate=0.9", True), ("codec.nmse=0.01", True), ("codec.step=1", True),
     ("codec.rate=0.9 strategy=scaffold", False), ("strategy=scaffold codec.products=true", True),
     ("codec.rate=0.9 codec.feedback=true", True), ("codec.feedback=false", False),
     ("codec.products=false", False), ("codec.rate=0.5 codec.products=false", False)],
)  # fmt: skip
def test_products_are_left_where_control_variates_steer(overrides: str, products: bool) -> None:
    codec = job_of(f"{PLAIN} {overrides}").codec
    codec = codec.codec if isinstance(codec, ErrorFeedback) else codec
    assert isinstance(codec, RateDistortion)
    assert codec.products == products


def test_under_example_level_privacy_a_user_may_set_it() -> None:
    assert isinstance(job_of("task=digits codec.feedback=true").codec, ErrorFeedback)


def test_a_part_of_an_update_decides_nothing() -> None:
    codec, undecided = PerLayer((("conv*", pipeline()),), default(feedback="auto")), default(feedback="auto")
    assert isinstance(undecided, AutoFeedback)
    client = Client(codec)
    with pytest.raises(ConfigError, match=r"codec.rest .* set feedback=true or false"):
        client.train(updates(1)[0])


@pytest.mark.parametrize(("rate", "on"), [(0.5, True), (2, False)])
def test_both_ends_of_a_run_use_what_was_decided(rate: float, on: bool, tmp_path: Path) -> None:
    tree = config.compose(f"{PLAIN} clients=3 rounds=2 codec.rate={rate} engine.workers=1")
    job, shown = config.job(tree), Console(file=io.StringIO(), width=200)
    sizes = [len(part) for part in job.task.partitions()]
    job.prepare()
    with local(job).grid(client_app(lambda _: config.job(tree)), sizes, job.in_round) as grid:
        summary = server_app.run(job, tree, grid, RunFolder(tmp_path), shown, time.perf_counter())
        states = [load_state(context, "codec") for context in grid._contexts.values()]
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(r["replies"], r["failures"]) for r in rounds] == [(3, 0), (3, 0)]  # all were decoded
    kept = {"residual", "codec.miss", "codec.step"} if on else {"miss"}
    assert [set(state) for state in states] == [kept] * 3
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(f"Error feedback is {'on' if on else 'off'}: ")
    assert text.count("rror feedback") == 1
    assert summary.note is None
