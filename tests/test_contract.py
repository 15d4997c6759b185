"""What fedapp relies on in flwr that flwr does not promise: each private name, and the behaviour behind it.

flwr is pinned to one minor version. Raise the pin only with this file green.
"""

import ast
import inspect
import logging
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from base64 import b64decode
from copy import copy
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.args import add_args_runtime_dependency_install
from flwr.common.constant import (
    ISOLATION_MODE_PROCESS,
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    Status,
    SType,
    SubStatus,
)
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkState
from flwr.server.superlink.utils import check_abort
from flwr.serverapp import Grid, strategy
from flwr.supercore import log
from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NodeStatus,
)
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.retry import http_retry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import fedapp
from fedapp.deploy import front, holding, objects
from fedapp.deploy.activity import Activity
from fedapp.deploy.going_on import SILENT
from fedapp.deploy.state import State
from fedapp.strategies import STREAMED

PRIVATE = {
    "flwr.app.message": {"remove_content_from_message"},
    "flwr.cli.build": {"build_fab_from_files"},
    "flwr.clientapp.typing": {"Mod"},
    "flwr.common.constant": {
        "ErrorCode",
        "HEARTBEAT_MAX_INTERVAL",
        "HEARTBEAT_MIN_INTERVAL",
        "ISOLATION_MODE_PROCESS",
        "SType",
        "SUPERLINK_NODE_ID",
        "SYSTEM_TIME_TOLERANCE",
        "Status",
        "SubStatus",
        "TIMESTAMP_HEADER",
        "TIMESTAMP_TOLERANCE",
        "TRANSPORT_TYPE_GRPC_RERE",
    },
    "flwr.common.serde": {
        "context_from_proto",
        "context_to_proto",
        "fab_from_proto",
        "fab_to_proto",
        "message_from_proto",
        "message_to_proto",
        "recorddict_from_proto",
        "recorddict_to_proto",
        "run_from_proto",
        "user_config_to_proto",
    },
    "flwr.proto.control_pb2": {
        "ListNodesRequest",
        "ListRunsRequest",
        "RegisterNodeRequest",
        "StartRunRequest",
        "StopRunRequest",
        "StreamLogsRequest",
        "UnregisterNodeRequest",
    },
    "flwr.proto.fab_pb2": {"GetFabRequest"},
    "flwr.proto.fleet_pb2": {
        "ActivateNodeRequest",
        "ActivateNodeResponse",
        "DeactivateNodeRequest",
        "PullMessagesRequest",
        "PushMessagesRequest",
        "PushMessagesResponse",
        "RegisterNodeFleetRequest",
    },
    "flwr.proto.heartbeat_pb2": {"SendNodeHeartbeatRequest"},
    "flwr.proto.message_pb2": {
        "ConfirmMessageReceivedRequest",
        "Context",
        "Message",
        "ObjectTree",
        "PullObjectRequest",
        "PullObjectResponse",
        "PushObjectRequest",
        "PushObjectResponse",
    },
    "flwr.proto.node_pb2": {"Node", "NodeInfo"},
    "flwr.proto.run_pb2": {"GetRunRequest"},
    "flwr.proto.runtime_pb2": {"PullAppMessagesRequest", "PushAppMessagesRequest"},
    "flwr.server.superlink.linkstate": {"LinkState"},
    "flwr.server.superlink.linkstate.linkstate_factory": {"LinkStateFactory"},
    "flwr.server.superlink.linkstate.sql_linkstate": {"SqlLinkState"},
    "flwr.server.superlink.utils": {"check_abort"},
    "flwr.simulation": {"run_simulation"},
    "flwr.supercore": {"log"},
    "flwr.supercore.constant": {
        "FLEET_HTTP_PUBLIC_KEY_HEADER",
        "FLEET_HTTP_SIGNATURE_HEADER",
        "TASK_TOKEN_HEADER",
    },
    "flwr.supercore.control": {"ControlHttpClient"},
    "flwr.supercore.date": {"now"},
    "flwr.supercore.error": {"FlowerError"},
    "flwr.supercore.fab": {"Fab"},
    "flwr.supercore.inflatable.inflatable_object": {
        "InflatableObject",
        "get_all_nested_objects",
        "get_object_tree",
        "iterate_object_tree",
        "no_object_id_recompute",
    },
    "flwr.supercore.inflatable.inflatable_utils": {
        "ObjectPullError",
        "ObjectPushError",
        "inflate_object_from_contents",
    },
    "flwr.supercore.interceptors": {"RuntimeVersionHttpInterceptor"},
    "flwr.supercore.primitives.asymmetric": {
        "bytes_to_public_key",
        "public_key_to_bytes",
        "uses_nist_ec_curve",
        "verify_signature",
    },
    "flwr.supercore.protobuf.client": {"ProtobufCall", "ProtobufClient", "ProtobufRequestContext"},
    "flwr.supercore.protobuf.constants": {"PROTOBUF_MEDIA_TYPE"},
    "flwr.supercore.run": {"Run"},
    "flwr.supercore.state.schema.linkstate_models": {"MessageIns", "MessageRes"},
    "flwr.supercore.task_identity": {"TaskIdentity"},
    "flwr.supercore.utils": {"uint64_to_int64"},
    "flwr.superlink.auth_plugin": {"NoOpControlAuthnPlugin"},
    "flwr.superlink.cli.flower_superlink": {"SuperLinkLifespan"},
    "flwr.supercore.corestate.in_memory_corestate": {"InMemoryCoreState", "ObjectPushSession"},
    "flwr.supercore.object_store.in_memory_object_store": {"InMemoryObjectStore"},
    "flwr.superlink.config_loader": {"SuperLinkLifespanConfig"},
    "flwr.superlink.grid": {"HttpGrid"},
    "flwr.superlink.main": {"create_app"},
    "flwr.supernode.fleet_http_client": {"FleetHttpClient"},
    "flwr.supernode.node_auth_http_interceptor": {"NodeAuthHttpInterceptor"},
}
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1


def test_every_private_name_in_use_is_in_this_file() -> None:
    used: dict[str, set[str]] = {}
    for path in Path(fedapp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flwr":
                used.setdefault(node.module, set()).update(alias.name for alias in node.names)
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "flwr" for alias in node.names)
    assert {module: names for module, names in used.items() if module not in PUBLIC} == PRIVATE
    for module, names in used.items():
        for name in names:
            assert hasattr(import_module(module), name)


def test_the_pin_is_the_version_that_was_tried() -> None:
    assert version("flwr").startswith("1.41.")


def test_task_identity_gives_new_messages_their_sender() -> None:
    """`TaskIdentity`: process-wide attributes that `Message()` reads, and that refuse to be read unset."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 8, 9
    metadata = Message(RecordDict(), 5, MessageType.TRAIN).metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (7, 8, 9)
    assert metadata.dst_node_id == 5


def test_the_superlink_is_node_1() -> None:
    """`SUPERLINK_NODE_ID`: the server's own id, which no client has."""
    assert SUPERLINK_NODE_ID == 1


def test_a_reply_goes_back_where_its_message_came_from() -> None:
    """`metadata.__dict__`, `_message_id` and `_group_id`: there are no setters; a reply carries both back."""
    message = Message(RecordDict(), 5, MessageType.TRAIN)
    assert message.metadata.message_id == ""
    message.metadata.__dict__["_message_id"] = "mine"
    message.metadata.__dict__["_group_id"] = "nonce"
    assert message.metadata.message_id == "mine"
    for reply in (
        Message(RecordDict(), reply_to=message),
        Message(Error(ErrorCode.CLIENT_APP_CRASHED, "died"), reply_to=message),
    ):
        assert (reply.metadata.reply_to_message_id, reply.metadata.group_id) == ("mine", "nonce")
        assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (5, SUPERLINK_NODE_ID)


def test_a_copied_message_can_carry_other_content() -> None:
    """`copy(message)`: shallow, so that an envelope can travel without the content."""
    message = Message(RecordDict({"config": ConfigRecord({"a": 1})}), 5, MessageType.TRAIN)
    envelope = copy(message)
    envelope.content = RecordDict()
    assert "config" in message.content
    assert "config" not in envelope.content
    assert envelope.metadata is message.metadata


def test_content_is_the_same_object_each_time() -> None:
    """Broadcasts share one content, and the engine and the byte counter tell so by identity."""
    content = RecordDict()
    message = Message(content, 5, MessageType.TRAIN)
    assert message.content is content
    assert message.content is message.content


def test_a_strategy_sends_one_content_to_all() -> None:
    class View:
        def get_node_ids(self) -> list[int]:
            return [2, 3, 4]

    view: Any = View()
    arrays = ArrayRecord({"a": Array(np.zeros(3, np.float32))})
    asked = list(strategy.FedAvg(min_available_nodes=1).configure_train(4, arrays, ConfigRecord(), view))
    assert sorted(message.metadata.dst_node_id for message in asked) == [2, 3, 4]
    assert all(message.content is asked[0].content for message in asked)
    content = asked[0].content
    assert content.array_records["arrays"] is arrays
    assert content.config_records["config"]["server-round"] == 4


def test_error_codes() -> None:
    """`ErrorCode`: what a failed client and a dead process are told apart by."""
    assert ErrorCode.CLIENT_APP_RAISED_EXCEPTION != ErrorCode.CLIENT_APP_CRASHED
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "fixed text")
    assert (error.code, error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "fixed text")


def test_serialized_content_is_what_crosses_the_wire() -> None:
    """`recorddict_to_proto`: the protobuf whose bytes are counted; it loses nothing."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({"update": Array("uint8", (3,), "fedapp.packet", b"abc")}),
            "metrics": MetricRecord({"num-examples": 3}),
        }
    )
    proto = recorddict_to_proto(content)
    size = len(proto.SerializeToString())
    assert 3 < size < 120
    back = recorddict_from_proto(proto)
    assert back.array_records["arrays"]["update"].data == b"abc"
    assert back.array_records["arrays"]["update"].stype == "fedapp.packet"


def test_arrays_are_numpy_files_without_pickle() -> None:
    """`Array`: stype numpy.ndarray, version 1.0 of the format; objects are refused both ways."""
    array = Array(np.arange(3, dtype=np.float32))
    assert array.stype == SType.NUMPY == "numpy.ndarray"
    assert array.data[:8] == b"\x93NUMPY\x01\x00"
    with pytest.raises(ValueError, match="allow_pickle"):
        Array(np.array([{}], dtype=object))
    with pytest.raises(TypeError):
        Array("uint8", (3,), "fedapp.packet", b"abc").numpy()


def test_records_keep_the_order_of_their_arrays() -> None:
    names = ["z", "a", "m"]
    record = ArrayRecord({name: Array(np.zeros(1)) for name in names})
    back = recorddict_from_proto(recorddict_to_proto(RecordDict({"arrays": record})))
    assert list(back.array_records["arrays"]) == names


def test_metrics_are_numbers_and_no_bools() -> None:
    with pytest.raises(TypeError):
        MetricRecord({"num-examples": True})
    assert type(MetricRecord({"num-examples": 3})["num-examples"]) is int


def test_mods_wrap_the_handler_from_the_outside_in() -> None:
    """`Mod`: (message, context, call_next) -> reply; the first of `@app.train(mods=[...])` is outermost."""
    calls = []

    def mod(name: str) -> Mod:
        def call(message: Message, context: Context, call_next: Any) -> Message:
            calls.append(name)
            reply: Message = call_next(message, context)
            calls.append(f"{name} done")
            return reply

        return call

    app = ClientApp()

    @app.train(mods=[mod("outer"), mod("inner")])
    def train(message: Message, context: Context) -> Message:
        calls.append("train")
        return Message(RecordDict(), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    app(Message(RecordDict(), 5, MessageType.TRAIN), Context(1, 5, {}, RecordDict(), {}))
    assert calls == ["outer", "inner", "train", "inner done", "outer done"]
    app(Message(RecordDict(), 5, MessageType.QUERY), Context(1, 5, {}, RecordDict(), {}))


def test_a_grid_is_these_methods() -> None:
    """`Grid` and `Run`: what the local engine has to be."""
    assert Grid.__abstractmethods__ == {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    }
    assert inspect.isclass(Run)


def test_strategies_that_are_streamed_exist_and_average() -> None:
    for name in STREAMED - {"Scaffold"}:  # which is ours, and FedAvg
        kind = getattr(strategy, name)
        assert issubclass(kind, strategy.FedAvg)
        assert kind.__name__ == name


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian", "Krum", "QFedAvg", "Bulyan"])
def test_strategies_take_what_the_settings_pass_to_all(name: str) -> None:
    settings = inspect.signature(getattr(strategy, name)).parameters
    assert {"fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes"} <= set(settings)
    assert "min_available_nodes" in settings


def test_fedprox_sends_its_pull_and_qfedavg_reads_the_loss() -> None:
    class View:
        def get_node_ids(self) -> list[int]:
            return [2]

    view: Any = View()
    arrays = ArrayRecord({"a": Array(np.zeros(3, np.float32))})
    everyone = {"min_train_nodes": 1, "min_available_nodes": 1}
    prox = strategy.FedProx(proximal_mu=0.5, **everyone)  # type: ignore[arg-type]
    (asked,) = prox.configure_train(1, arrays, ConfigRecord(), view)
    assert asked.content.config_records["config"]["proximal-mu"] == 0.5
    assert inspect.signature(strategy.QFedAvg).parameters["train_loss_key"].default == "train_loss"


def test_the_log_is_flowers_logger() -> None:
    """`log`: takes (level, text, *arguments), and `logging.getLogger("flwr")` silences it."""
    assert getattr(log, "__self__", None) is logging.getLogger("flwr")


def test_the_simulation_runtime_starts_in_a_process_of_ours() -> None:
    """`run_simulation`: public, and to be removed; it hands a grid to a ServerApp, and passes on to Ray."""
    taken = inspect.signature(import_module("flwr.simulation").run_simulation).parameters
    assert list(taken)[:3] == ["server_app", "client_app", "num_supernodes"]
    assert taken["backend_name"].default == "ray"
    assert "backend_config" in taken
    runtime = inspect.getsource(import_module("flwr.simulation.run_simulation"))
    assert {"init_args", "client_resources"} <= set(re.findall(r"\w+", runtime))


def test_telemetry_and_update_checks_are_off_before_flwr_is_imported() -> None:
    code = (
        "import fedapp, os, sys; assert 'flwr' not in sys.modules;"
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'],"
        "os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "RAY_"))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "0"]


def test_the_superlinks_paths() -> None:
    """`PROTOBUF_REQUEST_TYPES`: each path of Flower's is one that the front has a rule for."""
    prefixes = "/v1/control/", "/v1/fleet/", "/v1/runtime/"
    assert {path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith(prefixes)} == set()
    fleet = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    flowers = front._NODES_OWN - {objects.PULL, objects.PUSH} | {"register-node", "unregister-node"}
    assert fleet == {f"/v1/fleet/{name}" for name in flowers}
    pushes = {
        f"/v1/{api}/{name}" for api in ("fleet", "runtime") for name in ("push-messages", "push-object")
    }
    assert pushes < {path for _, path in PROTOBUF_REQUEST_TYPES}


def test_what_a_state_keeps_of_messages_is_behind_these_methods() -> None:
    """`State`: Flower's state in memory has them for objects and sessions; they use nothing else of it."""
    given = {name for name in vars(State) if vars(State)[name] is vars(InMemoryCoreState).get(name)}
    assert given == {
        *("start_session", "delete_sessions_in_run", "preregister_object_tree", "store_object", "get_object"),
        "_cleanup_push_session",
    }
    assert given == {  # all methods that touch sessions
        name
        for name, method in vars(InMemoryCoreState).items()
        if inspect.isfunction(method) and "_object_push" in inspect.getsource(method) and name != "__init__"
    }
    source = "".join(inspect.getsource(vars(InMemoryCoreState)[name]) for name in given)
    assert set(re.findall(r"self\.(\w+)", source)) - given == {
        *("_lock_object_push_sessions", "_object_push_sessions", "_object_push_session_by_root"),
        *("object_store", "_on_push_session_expired"),
    }
    sql = {name for name, method in vars(SqlCoreState).items() if "ObjectPushSession" in source_of(method)}
    assert sql - given == {"_claim_pending_object"}  # which store_object alone calls
    assert "linkstate_factory.state()" in inspect.getsource(create_app)
    assert "self._object_store" in inspect.getsource(vars(SqlCoreState)["object_store"].fget)


def source_of(thing: object) -> str:
    return inspect.getsource(thing) if inspect.isfunction(thing) else ""


def test_a_superlink_is_made_from_this() -> None:
    """`SuperLinkLifespanConfig`, `SuperLinkLifespan`, `create_app`: with `process`, nothing is started."""
    fields = set(inspect.signature(SuperLinkLifespanConfig).parameters)
    assert {"superexec_auth_secret", "enable_supernode_auth", "database", "isolation"} < fields
    assert len(fields) == 22
    assert list(inspect.signature(create_app).parameters) == ["config", "superlink_lifespan_class"]
    started = inspect.getsource(SuperLinkLifespan._start_superexec_if_needed)
    assert "config.isolation != ISOLATION_MODE_SUBPROCESS" in started
    assert ISOLATION_MODE_PROCESS == "process"


def test_no_run_installs_what_it_depends_on() -> None:
    """`add_args_runtime_dependency_install`: flower-superexec has its own flag, which is off unless given."""
    parser = ArgumentParser()
    add_args_runtime_dependency_install(parser)
    assert parser.parse_args([]).runtime_dependency_install is False
    own = inspect.getsource(import_module(flower_superexec.__module__))
    assert "    add_args_runtime_dependency_install(parser)\n" in own
    assert "runtime_dependency_install=args.runtime_dependency_install," in own


def test_an_empty_answer_to_a_pull_is_empty_bytes_and_an_object_to_come_is_two() -> None:
    """`PullMessagesResponse`, `PullObjectResponse`: what the front holds back."""
    assert PullMessagesResponse().SerializeToString() == b""
    coming = PullObjectResponse(object_found=True).SerializeToString()
    assert holding.unavailable(coming)
    assert not holding.unavailable(PullObjectResponse().SerializeToString())
    assert not holding.unavailable(
        PullObjectResponse(object_found=True, object_available=True, object_content=b"").SerializeToString()
    )


def test_a_nodes_signature_is_over_its_timestamp() -> None:
    """Header names, `sign_message`, `verify_signature`, tolerances: what a node's client sends."""
    key = ec.generate_private_key(ec.SECP384R1())
    seen: list[httpx.Request] = []

    def call(context: ProtobufRequestContext) -> httpx.Response:
        seen.append(context.request)
        return httpx.Response(200)

    asked = ProtobufRequestContext("any", PullMessagesResponse(), httpx.Request("POST", "http://here"))
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(asked, call)
    headers = seen[0].headers
    stamp, pem = headers[TIMESTAMP_HEADER], b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER])
    assert verify_signature(
        bytes_to_public_key(pem), stamp.encode(), b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER])
    )
    assert (TIMESTAMP_TOLERANCE, SYSTEM_TIME_TOLERANCE) == (300, 5)
    assert holding.HOLD_S < 30  # seconds that an HTTP client of flwr waits for an answer
    assert inspect.signature(ProtobufClient).parameters["timeout"].default == 30.0


def test_what_is_read_of_flowers_clients_and_grid() -> None:
    """`HttpGrid`, `ProtobufClient`: what a grid of fewer requests takes over, and posts through."""
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="t")
    assert (grid._addr, grid._insecure, grid._cert, grid._token) == ("127.0.0.1:1", True, None, "t")
    assert isinstance(grid._runtime_client, ProtobufClient)
    assert grid._runtime_client._base_url == "http://127.0.0.1:1"
    assert isinstance(grid._runtime_client._client, httpx.Client)
    assert next(iter(inspect.signature(grid._runtime_client._send).parameters)) == "context"
    assert list(inspect.signature(HttpGrid._try_push_messages).parameters) == ["self", "run_id", "messages"]
    assert grid._retry_invoker.invoke(lambda: b"answer") == b"answer"
    assert grid._retry_invoker.max_tries is None  # while the server is busy, or its disk is full
    assert httpx.codes.SERVICE_UNAVAILABLE in http_retry._RETRYABLE_STATUS_CODES
    grid.close()


def test_an_interceptor_sees_each_request_of_a_node_and_its_answer() -> None:
    """`ProtobufCall`, `ProtobufRequestContext`: what `Activity` counts, in Flower's calls and in fedapp's."""
    activity = Activity()
    client = FleetHttpClient.from_server_address("127.0.0.1:1", True, None, [activity])
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=b"\x08\x07"))
    client._client = httpx.Client(transport=transport)
    asked = ActivateNodeRequest(public_key=b"key", heartbeat_interval=20)
    assert client.ActivateNode(asked).node_id == 7
    assert (activity.sent, activity.received) == (len(asked.SerializeToString()), 2)
    objects.post(client, "/v1/fleet/pull-objects", b"abc")
    assert (activity.sent, activity.received) == (len(asked.SerializeToString()) + 3, 4)
    client.close()


def test_what_metrics_read_of_runs_and_nodes() -> None:
    """`Run`, `Status`, `NodeInfo`: how they stand, in words that become labels, and when a run ended."""
    run = Run.create_empty(7)
    assert (run.status.status, run.status.sub_status, run.finished_at) == ("", "", "")
    assert (Status.PENDING, Status.RUNNING, Status.FINISHED) == ("pending", "running", "finished")
    assert (SubStatus.COMPLETED, SubStatus.FAILED, SubStatus.STOPPED) == ("completed", "failed", "stopped")
    assert (NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE) == (
        "registered", "online", "offline"
    )  # fmt: skip
    assert NodeInfo(status="online").status == "online"


def test_what_flower_says_of_a_run_whose_process_is_gone() -> None:
    assert f'"{SILENT}"' in inspect.getsource(SqlCoreState)


def test_a_message_expires() -> None:
    """`metadata.ttl`: seconds, with a setter; a reply made later than that is made all the same."""
    message = Message(RecordDict(), 5, MessageType.TRAIN)
    message.metadata.ttl = -1.0
    assert Message(RecordDict(), reply_to=message).metadata.ttl < 0


def test_what_uvicorn_tells_of_a_request() -> None:
    """`HttpToolsProtocol`, which comes with flwr: what tells that a head begins, and that it is whole."""
    for name in ("connection_made", "connection_lost", "data_received"):
        assert name in vars(HttpToolsProtocol)
    for name in ("on_message_begin", "on_headers_complete"):  # httptools calls them by these names
        assert list(inspect.signature(getattr(HttpToolsProtocol, name)).parameters) == ["self"]


def test_what_is_asked_of_the_superlinks_state() -> None:
    """`LinkState`, `check_abort`: what the front stores, finds and looks up itself."""
    for name, arguments in {
        "get_object": ["self", "run_id", "object_id"],
        "store_object": ["self", "run_id", "session_id", "object_id", "object_content"],
        "get_task_by_token": ["self", "token"],
        "acknowledge_node_heartbeat": ["self", "node_id", "heartbeat_interval"],
        "get_node_id_by_public_key": ["self", "public_key"],
        "get_run_status": ["self", "run_ids"],
        "get_node_info": ["self", "node_ids", "owner_aids", "statuses"],
        "get_run_info": [
            *("self", "run_ids", "statuses", "flwr_aids", "federation_ids", "order_by", "ascending"),
            *("limit", "skip"),
        ],
    }.items():
        assert list(inspect.signature(getattr(LinkState, name)).parameters) == arguments
    assert list(inspect.signature(check_abort).parameters) == ["run_id", "abort_status_list", "state"]
