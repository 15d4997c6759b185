"""Sums made by workers, and the pipe to them: the bits of the server's sum, and faults that cost a share."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from grids import Elsewhere, bits, rounds_on
from grids import rounds_here as run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedapp import config
from fedapp.client_app import client_app, partition_of
from fedapp.codec.rate_distortion import RateDistortion
from fedapp.engine import channel
from fedapp.engine.arena import Arena
from fedapp.engine.channel import Channel
from fedapp.exact_sum import ExactSum
from fedapp.fold import Fold, Folded
from fedapp.job import Job
from fedapp.running_sum import RunningSum

FAST = "task=digits privacy=none model=logistic clients=5 rounds=2 engine.workers=2"


def job_of(overrides: str = "") -> Job:
    return config.job(config.compose(f"{FAST} {overrides}"))


# Exact sums


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_sum_of_sums_is_the_sum(groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts, whole = [ExactSum(7) for _ in range(groups)], ExactSum(7)
    for _ in range(12):
        x, weight = rng.standard_t(2, 7).astype(np.float32), int(rng.integers(1, 6000))
        parts[rng.integers(groups)].add(x, weight)
        whole.add(x, weight)
    total = ExactSum(7)
    for part in parts:
        total.merge(part)
    assert total.weight == whole.weight
    assert total.total().tobytes() == whole.total().tobytes()


# Whole rounds


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "codec=identity downlink=coded",
        "codec=default codec.feedback=true cohort=3",
        "strategy=fedadam",
        "model=small_cnn codec=topk",
        "privacy=central_gaussian privacy.test_seed=1 privacy.quantile=0.5 cohort=3",
    ],
)
def test_workers_add_up_what_the_server_would(setting: str) -> None:
    folded, rounds = run(job_of(setting))
    assert job_of(setting).fold is not None
    plain, same = run(job_of(setting), fold=False)
    assert bits(folded.arrays) == bits(plain.arrays)
    for a, b in zip(rounds, same, strict=True):
        assert (a.accuracy, a.uplink_bytes, a.downlink_bytes, a.replies) == (
            b.accuracy, b.uplink_bytes, b.downlink_bytes, b.replies,
        )  # fmt: skip


def test_a_worker_decodes_no_packet_that_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode, parent = multiprocessing.Value("i", 0), RateDistortion.decode, os.getpid()

    def counting(*given: Any) -> Any:
        if os.getpid() != parent:
            with decoded.get_lock():
                decoded.value += 1
        return decode(*given)

    monkeypatch.setattr(RateDistortion, "decode", counting)
    job = job_of("downlink=plain")
    told, _ = run(job)
    assert decoded.value == 0
    not_told, _ = run(job, client_app(lambda _: job))
    assert decoded.value == 10
    assert bits(told.arrays) == bits(not_told.arrays)


@pytest.mark.parametrize(
    "setting", ["strategy=fedmedian", "codec=identity", "aggregation=ckks", "privacy=distributed_gaussian"]
)
def test_what_needs_more_than_a_sum_is_not_added_up(setting: str) -> None:
    assert job_of(setting).fold is None


def test_buffers_are_added_up_too() -> None:
    def build(input_shape: tuple[int, ...], classes: int) -> nn.Module:
        width = int(np.prod(input_shape))
        return nn.Sequential(nn.Flatten(), nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))

    job = job_of()
    job = replace(job, task=replace(job.task, build=build))  # type: ignore[type-var]
    folded, plain = (run(job, fold=fold)[0] for fold in (True, False))
    assert folded.arrays["2.num_batches_tracked"].numpy() > 1
    assert bits(folded.arrays) == bits(plain.arrays)


def test_a_client_elsewhere_cannot_say_that_it_was_added() -> None:
    job = job_of()
    app = client_app(lambda _: job)

    def lies(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and partition_of(context) == 0:
            return Message(RecordDict({"config": ConfigRecord({"slot": 0, "size": 1})}), reply_to=message)
        return app(message, context)

    _, rounds = rounds_on(job, Elsewhere(lies, [2, 3, 4, 5, 6]))  # type: ignore[arg-type]
    assert [(r.replies, r.failures) for r in rounds] == [(4, 1), (4, 1)]


# Faults


def without(job: Job, lost: set[int]) -> bytes:
    """The model where these partitions fail in each round, and nobody is lost otherwise."""
    app = client_app(lambda _: job)

    def fails(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and partition_of(context) in lost:
            raise RuntimeError("no")
        return app(message, context)

    return bits(run(job, fails)[0].arrays)


def test_a_worker_killed_while_it_trains_keeps_what_it_added() -> None:
    job = job_of("engine.workers=1 rounds=1")
    app = client_app(lambda _: job)

    def dies(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and partition_of(context) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return app(message, context)

    federation, rounds = run(job, dies)
    assert [(r.replies, r.failures) for r in rounds] == [(4, 1)]
    assert bits(federation.arrays) == without(job_of("engine.workers=1 rounds=1"), {2})


def test_a_worker_killed_while_it_adds_spoils_its_own_sum_only(monkeypatch: pytest.MonkeyPatch) -> None:
    take, parent, calls = RunningSum.take, os.getpid(), multiprocessing.Value("i", 0)

    def dies(self: RunningSum, reply: Message, *rest: Any) -> Any:
        tally = take(self, reply, *rest)
        with calls.get_lock():
            calls.value += 1
            third = calls.value == 3
        if os.getpid() != parent and third:
            os.kill(os.getpid(), signal.SIGKILL)
        return tally

    monkeypatch.setattr(RunningSum, "take", dies)
    federation, rounds = run(job_of("rounds=2"))
    assert rounds[0].failures >= 1
    assert rounds[0].replies + rounds[0].failures == 5
    assert [(r.replies, r.failures) for r in rounds[1:]] == [(5, 0)]
    assert np.isfinite(federation.arrays["linear.bias"].numpy()).all()


def answered(job: Job) -> tuple[Fold, Message, Message]:
    """A fold, and a train message with its reply."""
    makes = job.fold
    assert makes is not None
    content = RecordDict({"arrays": job.initial, "config": ConfigRecord({"server-round": 1})})
    message = Message(content, 2, "train")
    context = Context(1, 2, {"partition-id": 0, "num-partitions": job.clients}, RecordDict(), {})
    return makes(1), message, client_app(lambda _: job)(message, context)


@pytest.mark.parametrize(("added", "heard", "spoiled"), [(1, 1, False), (2, 1, True), (2, 2, False)])
def test_a_sum_is_spoiled_where_an_answer_to_what_was_added_never_came(
    added: int, heard: int, spoiled: bool
) -> None:
    """A worker may add the next update before the server hears of the one before."""
    fold, message, reply = answered(job_of("downlink=plain"))
    for _ in range(added):
        assert isinstance(fold.add(0, message, deepcopy(reply)), tuple)
    for _ in range(heard):
        fold.arrived(0)
    fold.lost(0)
    assert [one is None for one in fold.collect()] == [spoiled]


def test_answers_that_add_nothing_are_counted_too() -> None:
    fold, message, reply = answered(job_of("downlink=plain"))
    nothing = Message(Error(1, "no"), reply_to=message)
    for answer in (nothing, reply, nothing):
        fold.add(0, message, answer)
        fold.arrived(0)
    fold.lost(0)
    assert [one is None for one in fold.collect()] == [False]


def test_an_update_that_does_not_decode_costs_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    read = RunningSum.take

    def refuses(self: RunningSum, reply: Message, *rest: Any) -> Any:
        arrays = reply.content.array_records["arrays"]
        update = arrays["update"]
        if len(update.data) % 2:
            arrays["update"] = Array(update.dtype, update.shape, update.stype, update.data[:-1])
        return read(self, reply, *rest)

    monkeypatch.setattr(RunningSum, "take", refuses)
    _, rounds = run(job_of("codec.step=0.5"))
    assert all(r.replies + r.failures == 5 for r in rounds)
    assert any(r.failures for r in rounds)


@pytest.mark.parametrize(
    "setting",
    ["engine.workers=2 rounds=2 round_timeout=2", "engine.workers=1 rounds=2 engine.client_timeout=2"],
)
def test_who_is_late_is_ended_and_not_in_a_later_sum(setting: str) -> None:
    job = job_of(setting)
    app, began = client_app(lambda _: job), time.monotonic()

    def sleeps(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and partition_of(context) == 1:
            time.sleep(60)
        return app(message, context)

    federation, rounds = run(job, sleeps)
    assert [(r.replies, r.failures) for r in rounds] == [(4, 1), (4, 1)]
    assert time.monotonic() - began < 30
    assert bits(federation.arrays) == without(job_of(setting), {1})


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_round_that_is_over_left_undone_is_in_no_later_sum(workers: int) -> None:
    """Clients sleep in round 1 until its time is over; those behind them are never asked on its weights."""
    setting = f"clients=6 rounds=2 engine.workers={workers} round_timeout=2"
    job, begun = job_of(setting), multiprocessing.get_context("fork").SimpleQueue()
    app = client_app(lambda _: job)

    def sleeps(message: Message, context: Context) -> Message:
        number = message.content.config_records["config"]["server-round"]
        if message.metadata.message_type == "train":
            begun.put((number, partition_of(context)))
        if number == 1 and message.metadata.message_type == "train":
            time.sleep(60)
        return app(message, context)

    _, rounds = run(job, sleeps)
    assert [(r.replies, r.failures) for r in rounds] == [(0, 6), (6, 0)]
    asked = [begun.get() for _ in range(workers + 6)]
    assert begun.empty()
    assert [number for number, _ in asked] == [1] * workers + [2] * 6


def test_a_folded_reply_says_whom_it_answers() -> None:
    Elsewhere(client_app(lambda _: job_of()), [3])
    asked = Message(RecordDict(), 7, "train")
    asked.metadata.__dict__["_message_id"] = "one"
    reply = Folded(0, None, 5, asked)  # type: ignore[arg-type]
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == ("one", 7)
    assert reply.has_content()


# The pipe


def ends() -> tuple[Channel, Channel]:
    """The end that asks, and the one that answers."""
    one, other = multiprocessing.get_context("fork").Pipe()
    return Channel(one, asks=True), Channel(other)


def passed(sender: Channel, receiver: Channel, thing: object) -> tuple[Any, int]:
    """What arrives, and how many bytes it took."""
    taken, send = [], sender.pipe.send_bytes

    class Counted:
        def send_bytes(self, data: Any) -> None:
            taken.append(len(data))
            send(data)

    pipe, sender.pipe = sender.pipe, Counted()  # type: ignore[assignment]
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(receiver.receive()))
    reader.start()
    sender.send(thing)
    reader.join()
    sender.pipe = pipe
    return got[0], sum(taken)


def test_a_large_piece_crosses_once_in_either_direction() -> None:
    here, there = ends()
    piece = os.urandom(100_000)
    first, size = passed(here, there, {"a": piece, "b": (piece, 1)})
    assert first == {"a": piece, "b": (piece, 1)}
    assert first["a"] is first["b"][0]
    assert 100_000 < size < 101_000
    back, size = passed(there, here, [first["a"], 2])
    assert back[0] is piece
    assert size < 1000
    again, size = passed(here, there, piece)
    assert again is first["a"]
    assert size < 1000


def test_equal_pieces_that_are_not_the_same_both_cross() -> None:
    here, there = ends()
    one, other = bytes(10_000), bytes(bytearray(10_000))
    assert passed(here, there, [one, other])[1] > 20_000


class Here:
    """A pipe between two ends of one process, where what is written waits; nothing takes any room."""

    def __init__(self, mine: deque[bytes], theirs: deque[bytes]) -> None:
        self._mine, self._theirs = mine, theirs

    def send_bytes(self, data: bytes) -> None:
        self._theirs.append(bytes(bytearray(data)))  # as another process has it

    def recv_bytes(self) -> bytes:
        return self._mine.popleft()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 11), max_size=5)), max_size=60),
       st.booleans())  # fmt: skip
def test_requests_that_do_not_wait_for_answers_all_arrive(
    steps: list[tuple[bool, list[int]]], large: bool
) -> None:
    """Pieces that go both ways at any time, and more than are remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "MOST", 30_000)
        here, there = ends()
        if large:
            here._room = 0  # all that is asked while another is not answered waits
        ours, theirs = deque[bytes](), deque[bytes]()
        here.pipe, there.pipe = Here(ours, theirs), Here(theirs, ours)  # type: ignore[assignment]
        pieces = [os.urandom(5000 + 500 * i) for i in range(12)]
        known = [{piece: piece for piece in pieces} for _ in range(2)]  # the object that each end has of each
        asked, answered = deque[list[bytes]](), deque[list[bytes]]()

        def answer(chosen: list[int]) -> None:
            got = there.receive()
            assert got == asked.popleft()
            known[1] |= {piece: piece for piece in got}
            answered.append([known[1][pieces[i]] for i in chosen])
            there.send(answered[-1])

        def hear() -> None:
            got = here.receive()
            assert got == answered.popleft()
            known[0] |= {piece: piece for piece in got}

        for asks, chosen in steps:
            if asks and len(asked) + len(answered) < 3:
                asked.append([known[0][pieces[i]] for i in chosen])
                here.send(asked[-1])
            elif theirs:
                answer(chosen)
            elif answered:
                hear()
            assert here._size == sum(map(len, here._pieces.values()))
        while asked or answered:
            if theirs:
                answer([])
            hear()
        here.send(None)
        there.receive()
        there.send(None)
        here.receive()
        assert here._pieces == there._pieces
        assert here._size == there._size == sum(map(len, here._pieces.values())) <= 30_000
        assert len(here._names) == len(there._names) == len(here._pieces)
        assert not any(here._leaving)


def test_a_request_that_the_pipe_has_no_room_for_waits_for_the_answer_before_it() -> None:
    """Else both ends could write, and none read."""
    here, there = ends()
    first, second = os.urandom(1000), [os.urandom(1 << 20) for _ in range(3)]
    here.send(first)
    here.send(second)  # returns, though nobody reads
    assert there.receive() == first
    assert not there.pipe.poll(0.05)
    there.send("done")
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(there.receive()))
    reader.start()
    assert here.receive() == "done"
    reader.join()
    assert got == [second]


def test_a_large_piece_of_the_server_lies_in_memory_that_its_workers_read() -> None:
    arena = Arena()
    (one, first), (two, second) = (multiprocessing.get_context("fork").Pipe() for _ in range(2))
    here, there, elsewhere = Channel(one, arena, asks=True), Channel(first, arena), Channel(second, arena)
    other = Channel(two, arena, asks=True)
    piece = os.urandom(200_000)
    for writer, reader in ((here, there), (other, elsewhere)):
        got, size = passed(writer, reader, {"a": piece})
        assert got == {"a": piece}
        assert size < 1000
    assert os.fstat(arena._file).st_size == len(piece)
    back, size = passed(there, here, [piece, got["a"]])  # a worker's own crosses the pipe
    assert back == [piece, piece]
    assert size > 200_000
    here.send(os.urandom(200_000))
    assert len(arena._told) == 2  # neither has answered
    here.close()
    other.close()
    assert not arena._told  # neither of them will ask again
    arena.close()
