"""The process beside a node that does the work of one run: torch and the data stay loaded between messages.

It runs the installed fedapp. The node tells it who it is, then sends message after message through a pipe and
gets each reply with the context after it. It knows neither the server nor the node's key.
"""

import logging
import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from types import TracebackType

from fedapp.deploy.frames import context_of, message_of, of_context, of_message
from fedapp.errors import DataError, FedappError


def main() -> None:
    """Serve one run until the node closes the pipe, or is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    output = logging.StreamHandler()  # the node's, which adds the time
    output.setFormatter(Discreet("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[output])
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    pipe = Connection(int(sys.argv[1]))
    from flwr.supercore.task_identity import TaskIdentity

    from fedapp.client_app import app

    try:
        context = context_of(pipe.recv_bytes())
        TaskIdentity.task_id, TaskIdentity.run_id = 0, context.run_id
        TaskIdentity.node_id = context.node_id
        while True:
            reply = app(message_of(pipe.recv_bytes()), context)
            pipe.send_bytes(of_message(reply))
            pipe.send_bytes(of_context(context))
    except (EOFError, BrokenPipeError):  # the node is gone, or needs this process no more
        return


class Discreet(logging.Formatter):
    """Tells of an exception where it was and of which kind, not in its words: those may quote the data."""

    def formatException(  # noqa: N802
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """The frames, without the values in them."""
        kind, error, trace = ei
        if kind is None:
            return ""
        said = f"{''.join(traceback.format_tb(trace))}{kind.__name__}"
        quotes = not isinstance(error, FedappError) or isinstance(error, DataError)
        return f"{said}, whose words may quote data: see `fedapp check`" if quotes else f"{said}: {error}"


def _end_with(parent: int) -> None:
    """End this process with its parent, in the middle of training too."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
