"""What a node is doing, counted as it works."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import httpx
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedapp.deploy.metrics import Metric, counted, metric

_KINDS = "train", "evaluate", "query"
_DECLINED = ErrorCode.INVALID_FAB, ErrorCode.MOD_FAILED_PRECONDITION


@dataclass
class Activity:
    """Counts since this process began; any thread may read them at any time.

    As an interceptor of Flower's client it sees each request to the server, and what came of it.
    """

    reached: bool = False
    working: bool = False
    round: int = 0  # of the message worked on last
    contact: float = 0.0  # when the server answered last, by time.time; 0 before the first time
    sent: int = 0  # bytes of requests, without what HTTP and TLS add
    received: int = 0
    messages: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_KINDS, 0)))
    replies: Counter[str] = field(
        default_factory=lambda: Counter(answered=0, declined=0, failed=0, unwanted=0)
    )
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))  # of work
    _requests: Lock = field(default_factory=Lock)  # what works and what gives a sign of life make some each

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Count a request and its answer."""
        try:
            response = call_next(context)
        except httpx.TransportError:
            self.reached = False
            raise
        with self._requests:
            self.sent += len(context.request.content)
            self.received += len(response.content)
        self.reached = response.status_code < 500  # else a server, or a proxy before it, that will be back
        if self.reached:
            self.contact = time.time()
        return response

    @contextmanager
    def work(self, message_type: str, at: int = 0) -> Iterator[None]:
        """Count a message, of round `at` (0: of none), and the time that it takes."""
        kind = message_type.partition(".")[0]
        kind = kind if kind in _KINDS else "other"  # it comes from outside, and labels stay few
        self.messages[kind] += 1
        self.round = at or self.round
        begun, self.working = time.monotonic(), True
        try:
            yield
        finally:
            self.working = False
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.monotonic() - begun

    def reply(self, reply: Message, taken: bool) -> None:
        """Count a reply, which the server took or did not."""
        if not taken:
            self.replies["unwanted"] += 1
        elif reply.has_error():
            self.replies["declined" if reply.error.code in _DECLINED else "failed"] += 1
        else:
            self.replies["answered"] += 1

    @property
    def trouble(self) -> str | None:
        """One word on why this node is of no use now; None where it is."""
        if self.reached or self.working:
            return None
        return "unreachable" if self.contact else "starting"

    def metrics(self) -> Iterator[Metric]:
        """All of it, for Prometheus. Counts are copied at once: meanwhile the other thread goes on."""
        name = "fedapp_client_connected", "fedapp_client_last_contact_timestamp_seconds"
        yield metric(name[0], "gauge", "Whether the server answers.", int(self.reached))
        yield metric(name[1], "gauge", "When the server answered last; 0 before that.", self.contact)
        yield metric("fedapp_client_round", "gauge", "Round of the last message; 0 before that.", self.round)
        messages, replies, seconds = dict(self.messages), dict(self.replies), dict(self.seconds)
        yield counted("fedapp_client_messages_total", "Messages worked on.", "kind", messages)
        yield counted("fedapp_client_replies_total", "What came of messages.", "outcome", replies)
        yield counted("fedapp_client_work_seconds_total", "Time at work.", "kind", seconds)
        yield metric(
            "fedapp_client_sent_bytes_total", "counter", "Bytes of requests that were answered.", self.sent
        )
        yield metric("fedapp_client_received_bytes_total", "counter", "Bytes of answers.", self.received)
