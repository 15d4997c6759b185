"""Replies that do not bring back the nonce of what was asked cost themselves, and nothing else."""

import logging
from collections.abc import Iterable

import pytest
from flwr.app import Message
from grids import Elsewhere, rounds_on

from fedapp import config
from fedapp.client_app import client_app
from fedapp.job import Job

FAST = "task=digits privacy=none model=logistic clients=4 rounds=3 evaluate=none"
BUFFERED = "strategy=fedbuff strategy.buffer=3 strategy.concurrency=3"
LIAR = 7


class Tampering(Elsewhere):
    """A grid on which one node's replies are changed on their way, from the second on."""

    def __init__(self, job: Job, how: str) -> None:
        super().__init__(client_app(lambda _: job), [5, 6, LIAR, 8])
        self.how, self.first = how, dict[str, str]()
        self.nonces = list[str]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.nonces += [message.metadata.group_id for message in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (reply,) = super().pull_messages(message_ids)
        metadata = reply.metadata.__dict__
        if metadata["_src_node_id"] != LIAR or metadata["_message_type"] != "train":
            return [reply]
        kept = self.first.setdefault("nonce", metadata["_group_id"])
        if kept != metadata["_group_id"]:
            if self.how == "another's":
                metadata["_src_node_id"] = 8
            else:
                metadata["_group_id"] = {"missing": "", "wrong": "0" * 32, "repeated": kept}[self.how]
        return [reply]


@pytest.mark.parametrize("mode", ["", BUFFERED])
@pytest.mark.parametrize("how", ["missing", "wrong", "repeated", "another's"])
def test_a_reply_without_its_nonce_costs_itself(
    how: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = config.job(config.compose(f"{FAST} {mode}"))
    grid = Tampering(job, how)
    with caplog.at_level(logging.WARNING, "flwr"):
        _, records = rounds_on(job, grid)
    assert sum(record.failures for record in records) > 0
    assert all(record.failures <= 1 for record in records)
    assert all(record.replies == 3 for record in records[1:])
    assert "it does not bring back the nonce" in caplog.text
    assert len(set(grid.nonces)) == len(grid.nonces)
    assert all(len(nonce) == 32 for nonce in grid.nonces)
