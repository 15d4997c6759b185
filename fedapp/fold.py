"""Replies read and added where they are made: the sums of worker processes, in memory that they share.

The sums are of integers, so it changes no bit which worker adds what. What a worker has added outlives it.
"""

import mmap
from collections.abc import Callable

import numpy as np
from flwr.app import ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from fedapp.exact_sum import ExactSum
from fedapp.records import ARRAYS, CONFIG, size_of
from fedapp.running_sum import Reader, RunningSum, Tally, terms_in
from fedapp.stages import AGGREGATE, TRANSFER

Collect = Callable[[], list[ExactSum]]
"""What brings the sum of each slot."""
Answer = RecordDict | Error | tuple[Tally, int]
"""What a worker sends back: a reply as it is, or what counts of one that it has added, and its bytes."""


def as_it_is(reply: Message) -> Answer:
    """The answer where nothing is added up."""
    return reply.error if reply.has_error() else reply.content


class Folded(Message):
    """The reply of a client whose update is in the sum of a slot already; it had `size` bytes."""

    def __init__(self, slot: int, tally: Tally, size: int, asked: Message) -> None:
        super().__init__(RecordDict(), reply_to=asked)
        self.slot, self.tally, self.size = slot, tally, size


class Fold:
    """One exact sum a worker, in anonymous memory made before the workers are forked: it ends with them.

    A slot has room for two. A worker adds to a copy of its sum, and that becomes the sum once the answer is
    here; so whenever it dies, what it had added before is whole. A million values are copied in 1 to 3 ms.
    """

    def __init__(self, read: Reader, weights: ArrayRecord, slots: int) -> None:
        self._read = read
        size = RunningSum(weights).size
        memory = np.frombuffer(mmap.mmap(-1, 8 * slots * (1 + 4 * size)), np.int64).reshape(slots, -1)
        self._current, self._limbs = memory[:, 0], memory[:, 1:].reshape(slots, 2, 2, size)
        self._sums = [[RunningSum(weights, ExactSum(size, limbs)) for limbs in pair] for pair in self._limbs]
        ExactSum(size).add(np.zeros(size, np.float32), 1)  # compiled once, for all workers

    @AGGREGATE
    def add(self, slot: int, message: Message, reply: Message) -> Answer:
        """A worker's end: add a train reply to the sum of this slot; one that does not decode is an error."""
        train = message.metadata.message_type == MessageType.TRAIN
        if reply.has_error() or not train or ARRAYS not in reply.content.array_records:
            return as_it_is(reply)
        with TRANSFER:
            size = size_of(reply.content)
        received = message.content.array_records[ARRAYS]
        terms = terms_in(message.content.config_records[CONFIG])
        current = self._current[slot]
        self._limbs[slot, 1 - current] = self._limbs[slot, current]
        try:
            return self._sums[slot][1 - current].take(reply, self._read, received, terms), size
        except Exception as error:
            return Error(ErrorCode.MOD_FAILED_PRECONDITION, str(error))

    def arrived(self, slot: int) -> None:
        """The server's end: the answer of a worker that has added is here, and with it its sum counts."""
        self._current[slot] = 1 - self._current[slot]

    def collect(self) -> list[ExactSum]:
        """The sum of each slot; all begin at zero again."""
        sums = []
        for current, pair in zip(self._current, self._limbs, strict=True):
            sums.append(ExactSum(pair.shape[-1], pair[current].copy()))
            pair[current] = 0
        return sums
