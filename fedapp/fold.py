"""Replies read and added where they are made: the sums of worker processes, in memory that they share.

The sums are of integers, so it changes no bit which worker adds what. What a worker has added outlives it.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from flwr.app import ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from fedapp.exact_sum import ExactSum
from fedapp.records import ARRAYS, array_record, config_record, record_in, size_of
from fedapp.running_sum import Reader, RunningSum, Tally, terms_in
from fedapp.stages import AGGREGATE, TRANSFER

Collect = Callable[[], Iterable[ExactSum | None]]
"""What brings the sum of each slot, None where it is lost; each is valid until the iteration ends."""
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
    """One exact sum a worker, in anonymous memory made before the workers are forked: it ends with them."""

    def __init__(self, read: Reader, weights: ArrayRecord, slots: int) -> None:
        self._read = read
        size = RunningSum(weights).size
        memory = np.frombuffer(mmap.mmap(-1, 8 * slots * (1 + 2 * size)), np.int64).reshape(slots, -1)
        self._adding, self._limbs = memory[:, 0], memory[:, 1:].reshape(slots, 2, size)
        self._sums = [RunningSum(weights, ExactSum(size, limbs)) for limbs in self._limbs]
        self._answers, self._arrived = 0, [0] * slots  # of this worker; of the one in each slot
        self._spoiled = set[int]()
        ExactSum(size).add(np.zeros(size, np.float32), 1)  # compiled once, for all workers

    @AGGREGATE
    def add(self, slot: int, message: Message, reply: Message) -> Answer:
        """A worker's end: add a train reply to the sum of this slot; one that does not decode is an error."""
        self._answers += 1
        train = message.metadata.message_type == MessageType.TRAIN
        if reply.has_error() or not train or record_in(reply.content, ARRAYS, ArrayRecord) is None:
            return as_it_is(reply)
        with TRANSFER:
            size = size_of(reply.content)
        received = array_record(message.content)
        terms = terms_in(config_record(message.content))
        self._adding[slot] = self._answers  # see `lost`
        try:
            return self._sums[slot].take(reply, self._read, received, terms), size
        except Exception as error:
            return Error(ErrorCode.MOD_FAILED_PRECONDITION, str(error))

    def arrived(self, slot: int) -> None:
        """The next answer of a slot is here."""
        self._arrived[slot] += 1

    def lost(self, slot: int) -> None:
        """The worker of a slot is dead: what it added and nobody heard of is in the sum, or a part of it."""
        if self._adding[slot] > self._arrived[slot]:
            self._spoiled.add(slot)
        self._adding[slot] = self._arrived[slot] = 0

    def collect(self) -> Iterator[ExactSum | None]:
        """The sum of each slot where it lies, None where it is spoiled; all are zero again at the end."""
        try:
            for slot, limbs in enumerate(self._limbs):
                yield None if slot in self._spoiled else ExactSum(limbs.shape[-1], limbs)
        finally:
            self._limbs[:] = 0
            self._spoiled.clear()
