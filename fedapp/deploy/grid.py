"""The grid that a ServerApp has behind `fedapp server`: Flower's, with all parts of a message at once."""

from collections.abc import Iterable
from typing import cast

from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents
from flwr.superlink.grid import HttpGrid

from fedapp.deploy.objects import deliver, fetch, post


class FewRequests(HttpGrid):
    """Two requests for all messages that go out, and three for each reply, where Flower takes one a part."""

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        going, client = list(messages), self._runtime_client
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(message)) for message in going],
            message_object_trees=[get_object_tree(message) for message in going],
        )
        answer, parts = client.PushMessages(request), {}
        for message in going:
            parts.update(get_all_nested_objects(message))
        wanted = dict.fromkeys(answer.objects_to_push)
        deliver(self._post, self.node, run_id, answer.session_id, parts, wanted)
        return cast(list[str], answer.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there; an error stands for one whose parts do not come."""
        client, run = self._runtime_client, self.run.run_id
        answer = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        found = []
        for told, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            name = told.metadata.message_id
            try:
                contents = fetch(self._post, self.node, run, tree)
            except ObjectPullError as error:
                lost = message_from_proto(told)
                lost.__dict__["_error"] = Error(ErrorCode.MESSAGE_UNAVAILABLE, str(error))
                found.append(lost)
                continue
            client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name)
            )
            message = cast(Message, inflate_object_from_contents(name, contents))
            message.metadata.__dict__["_message_id"] = name
            found.append(message)
        return found

    def _post(self, name: str, body: bytes) -> bytes:
        client = self._runtime_client
        return cast(bytes, self._retry_invoker.invoke(lambda: post(client, f"/v1/runtime/{name}", body)))


def few_requests(grid: Grid) -> Grid:
    """The same grid with fewer requests, if it is Flower's own for deployments."""
    if not isinstance(grid, HttpGrid):
        return grid
    found = FewRequests(grid._addr, grid._insecure, grid._cert, token=grid._token)
    found.set_run(grid.run)
    return found
