"""Messages and contexts as bytes, between a node, its process and its disk: Flower's own protobuf."""

from flwr.app import ConfigRecord, Context, Message
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto

from fedapp.records import CONFIG, ROUND, record_in


def of_message(message: Message) -> bytes:
    """A message with all that it carries."""
    return bytes(message_to_proto(message).SerializeToString())


def message_of(data: bytes) -> Message:
    """The message that `of_message` wrote."""
    return message_from_proto(MessageProto.FromString(data))


def round_of(message: Message) -> int:
    """Which round a message belongs to; 0 for one before the rounds."""
    config = None if message.has_error() else record_in(message.content, CONFIG, ConfigRecord)
    return 0 if config is None else int(str(config.get(ROUND, 0)))


def of_context(context: Context) -> bytes:
    """Who a node is in a run, and what it keeps there."""
    return bytes(context_to_proto(context).SerializeToString())


def context_of(data: bytes) -> Context:
    """The context that `of_context` wrote."""
    return context_from_proto(ContextProto.FromString(data))
