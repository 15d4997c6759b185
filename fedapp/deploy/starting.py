"""How runs begin on a server, and go on there after the server was gone."""

import shlex
from collections.abc import Sequence
from hashlib import sha256

from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run

from fedapp.deploy.bundle import bundle
from fedapp.errors import FedappError

_RESUME = "resume="


def start(client: ControlHttpClient, overrides: Sequence[str]) -> int:
    """Send the installed fedapp and settings; returns the number of the run."""
    content = bundle()
    answer = client.StartRun(
        StartRunRequest(
            fab=fab_to_proto(Fab(sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto({"overrides": shlex.join(overrides)}),
        )
    )
    if not answer.HasField("run_id"):
        raise FedappError(f"the server did not start the run: {answer.note or 'its log says why'}")
    return int(answer.run_id)


def go_on(client: ControlHttpClient, run: Run) -> int:
    """Start a run that takes up an earlier one where its last checkpoint is; returns its number."""
    given = [word for word in shlex.split(overrides_of(run)) if not word.startswith(_RESUME)]
    return start(client, [*given, f"{_RESUME}{experiment(run.run_id, overrides_of(run))}"])


def experiment(number: int, overrides: str) -> int:
    """The number of the run that an experiment began with, which its later runs name."""
    named = [word.removeprefix(_RESUME) for word in shlex.split(overrides) if word.startswith(_RESUME)]
    return int(named[-1]) if named and named[-1].isdecimal() else number


def overrides_of(run: Run) -> str:
    """The settings that a run was sent with."""
    return str(run.override_config.get("overrides", ""))
