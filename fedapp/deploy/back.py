"""The listener on the loopback address: Flower's Runtime API, which its own secrets guard."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from flwr.proto.message_pb2 import PushObjectRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import TASK_TOKEN_HEADER
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from fedapp.deploy import objects
from fedapp.deploy.bounded import QUESTION, Answer, Refused, headers_of, through
from fedapp.deploy.disk import Disk
from fedapp.deploy.holding import Pushes, hold, nothing, unavailable
from fedapp.deploy.objects import Requests

_RUNTIME = "/v1/runtime/"
_ALWAYS = f"{_RUNTIME}send-task-heartbeat", f"{_RUNTIME}acquire-task"  # on a full disk too
_REPLY_S = 0.5  # the longest that a ServerApp waits for replies, before it looks at its clock again
_TASK_S = 2.0  # the longest that a task waits which nobody told of: one from before a restart


@dataclass
class Back:
    """What SuperExec and the ServerApps reach: the Runtime API only."""

    app: ASGIApp
    state: LinkState
    pushes: Pushes
    disk: Disk
    max_body: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through; wake nodes that wait for what it pushed."""
        if scope["type"] != "http":
            return
        path, answer = scope["path"], Answer(send)
        try:
            if not path.startswith(_RUNTIME):
                raise Refused(404, "there is nothing here")
            if path not in _ALWAYS:
                self.disk.require()
            if path == f"{_RUNTIME}acquire-task":
                await self._acquire(scope, receive, answer)
            elif path in (f"{_RUNTIME}{objects.PULL}", f"{_RUNTIME}{objects.PUSH}"):
                await self._objects(path, headers_of(scope), receive, answer)
            elif path == f"{_RUNTIME}pull-object":
                await hold(self.app, scope, receive, answer, self.pushes.replies, unavailable)
            elif path == f"{_RUNTIME}pull-messages":  # a node that is gone is found by asking, too
                bell, most = self.pushes.replies, self.max_body  # the question names all that is awaited
                await hold(self.app, scope, receive, answer, bell, nothing, seconds=_REPLY_S, most=most)
            else:
                await through(self.app, scope, receive, answer, self.max_body)
        except Refused as refused:
            await answer.refuse(refused, receive)
        if path == f"{_RUNTIME}push-messages":
            self.pushes.messages.ring()
        elif path == f"{_RUNTIME}push-object":
            self.pushes.parts.ring()
        elif path in (f"{_RUNTIME}create-task", f"{_RUNTIME}start-automation"):
            self.pushes.tasks.set()

    async def _objects(
        self, path: str, headers: dict[bytes, bytes], receive: Receive, answer: Answer
    ) -> None:
        """Hand out, or take, many parts of a run's messages at once."""
        state, token = self.state, headers.get(TASK_TOKEN_HEADER.encode(), b"").decode("latin-1")
        task = await run_in_threadpool(state.get_task_by_token, token) if token else None
        if task is None:
            raise Refused(401, "this needs the token of a task")

        def allowed(asked: Requests) -> None:
            if any(request.run_id != task.run_id for request in asked):
                raise Refused(403, "this is no request of this run")

        def store(one: PushObjectRequest) -> bool:
            return state.store_object(one.run_id, one.session_id, one.object_id, one.object_content)

        bells = self.pushes.replies, self.pushes.parts
        await objects.serve(path, *bells, receive, answer, self.max_body, state, allowed, store)

    async def _acquire(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        """Ask for a task once there may be one: Flower takes 10 ms of a core to say that there is none."""
        tasks = self.pushes.tasks
        with suppress(TimeoutError):
            await asyncio.wait_for(tasks.wait(), _TASK_S)
        tasks.clear()
        await through(self.app, scope, receive, answer, QUESTION)
        if answer.size:  # a task, and there may be more
            tasks.set()
