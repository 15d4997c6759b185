"""The parts of a message in one request, where Flower's APIs take a request for each.

A message is a tree of objects: itself, its records, their arrays, pieces of these. Flower's state
still keeps them one by one; what is saved is the way there and back, and looking each time how the run is.
"""

import asyncio
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.inflatable.inflatable_object import InflatableObject, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from fedapp.deploy.bounded import Answer, Refused, body_of, parsed
from fedapp.deploy.holding import HOLD_S, SETTLE_S, Bell

PULL, PUSH = "pull-objects", "push-objects"  # paths beside those of Flower that end without the s
ONE = "push-object"  # Flower's, for stock SuperNodes
_LENGTH = struct.Struct("<I")
_AT_ONCE, _BYTES = (
    16,
    8 << 20,
)  # objects that one request asks for, bytes that it brings; one has 5 MiB at most
Requests = Sequence[PullObjectRequest] | Sequence[PushObjectRequest]


def joined(parts: Iterable[bytes]) -> bytes:
    """Parts one after the other, each after its length (uint32)."""
    return b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))


def parted(data: bytes) -> Iterator[bytes]:
    """The parts that `joined` joined. Raises ValueError where it did not."""
    at = 0
    while at < len(data):
        if at + _LENGTH.size > len(data):
            raise ValueError("a length is cut off")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            raise ValueError("a part is cut off")
        yield data[at : at + length]
        at += length


async def serve(
    path: str,
    coming: Bell,
    gone: Bell,
    receive: Receive,
    answer: Answer,
    most: int,
    state: LinkState,
    allowed: Callable[[Requests], None],
    store: Callable[[PushObjectRequest], bool],
) -> None:
    """Hand out many objects, or take them; what was taken rings `gone`.

    Of those asked for, what is announced and not here yet is waited for, a while, by `coming`. `most` is in
    bytes; `allowed` and `store` raise Refused.
    """
    body = await body_of(receive, most)
    parts = [body] if path.endswith(ONE) else _parts(body)
    if path.endswith(PULL):
        asked = [parsed(PullObjectRequest, part) for part in parts]
        await run_in_threadpool(allowed, asked)
        await _send(answer, joined(_bytes(map(_answer_of, await _found(asked, coming, state)))))
        return
    given = [parsed(PushObjectRequest, part) for part in parts]
    await run_in_threadpool(allowed, given)
    stored = await run_in_threadpool(lambda: [store(one) for one in given])
    gone.ring()
    said = _bytes(PushObjectResponse(stored=one) for one in stored)
    await _send(answer, b"".join(said) if path.endswith(ONE) else joined(said))


async def _found(
    asked: Sequence[PullObjectRequest], coming: Bell, state: LinkState
) -> Iterable[bytes | None]:
    """The contents, in order: empty where an announced one did not come, None where nobody announced it."""
    found: dict[int, bytes | None] = dict.fromkeys(range(len(asked)), b"")

    def look() -> None:
        for place, content in found.items():
            if content == b"":
                found[place] = state.get_object(asked[place].run_id, asked[place].object_id)

    until = asyncio.get_running_loop().time() + HOLD_S
    while True:
        rung = coming.next
        await run_in_threadpool(look)
        remaining = until - asyncio.get_running_loop().time()
        if remaining <= 0 or coming.over or b"" not in found.values():
            return found.values()
        try:
            await asyncio.wait_for(rung.wait(), remaining)
        except TimeoutError:
            return found.values()
        await asyncio.sleep(SETTLE_S)


def fetch(post: Callable[[str, bytes], bytes], node: Node, run: int, tree: ObjectTree) -> dict[str, bytes]:
    """All objects of a message, by their names. Raises ObjectPullError where one does not come."""
    names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
    contents: dict[str, bytes] = {}
    for begin in range(0, len(names), _AT_ONCE):
        some = names[begin : begin + _AT_ONCE]
        requests = [PullObjectRequest(node=node, run_id=run, object_id=name) for name in some]
        answers = parted(post(PULL, joined(request.SerializeToString() for request in requests)))
        for name, data in zip(some, answers, strict=True):
            found = PullObjectResponse.FromString(data)
            if not found.object_available:
                raise ObjectPullError(name, "it did not come")
            contents[name] = found.object_content
    return contents


def deliver(
    post: Callable[[str, bytes], bytes],
    node: Node,
    run: int,
    session: str,
    objects: Mapping[str, InflatableObject],
    wanted: Iterable[str],
) -> int:
    """Send the objects that are wanted; returns how many bytes. Raises ObjectPushError."""
    size, some = 0, list[PushObjectRequest]()

    def send() -> None:
        answers = parted(post(PUSH, joined(request.SerializeToString() for request in some)))
        for request, data in zip(some, answers, strict=True):
            if not PushObjectResponse.FromString(data).stored:
                raise ObjectPushError(request.object_id, run, session)
        some.clear()

    for name in wanted:
        content = objects[name].deflate()
        if some and sum(len(request.object_content) for request in some) + len(content) > _BYTES:
            send()
        some.append(
            PushObjectRequest(
                node=node, run_id=run, object_id=name, object_content=content, session_id=session
            )
        )
        size += len(content)
    if some:
        send()
    return size


def post(client: ProtobufClient, path: str, body: bytes) -> bytes:
    """Post to a path of fedapp's own, with the headers of Flower's client. Raises httpx.HTTPError."""
    headers = {"content-type": PROTOBUF_MEDIA_TYPE}
    request = client._client.build_request("POST", f"{client._base_url}{path}", content=body, headers=headers)
    response = client._send(ProtobufRequestContext(path, PullObjectRequest(), request))
    response.raise_for_status()
    return response.content


def _answer_of(content: bytes | None) -> PullObjectResponse:
    there = content is not None
    return PullObjectResponse(
        object_found=there, object_available=bool(content), object_content=content or b""
    )


def _parts(body: bytes) -> list[bytes]:
    try:
        return list(parted(body))
    except ValueError as error:
        raise Refused(400, f"the request cannot be read: {error}") from error


def _bytes(found: Iterable[PullObjectResponse | PushObjectResponse]) -> Iterator[bytes]:
    return (one.SerializeToString() for one in found)


async def _send(answer: Answer, body: bytes) -> None:
    headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode())]
    await answer({"type": "http.response.start", "status": 200, "headers": headers})
    await answer({"type": "http.response.body", "body": body})
