"""The process beside a node that does the work of one run: torch and the data stay loaded between messages.

It runs the installed fedapp. The node tells it who it is, then sends message after message through a pipe and
gets each reply with the context after it. It knows neither the server nor the node's key.
"""

import logging
import os
import sys
import traceback
from multiprocessing.connection import Connection
from types import TracebackType

from fedapp.deploy.frames import context_of, message_of, of_context, of_message
from fedapp.errors import DataError, FedappError
from fedapp.orphan import end_with


def main() -> None:
    """Serve one run until the node closes the pipe, or is gone."""
    end_with(os.getppid())
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
    """Tells of exceptions of which kind they are, and where: their words may quote the data.

    fedapp's own errors, but for those about data, tell how to mend something, and quote nothing.
    """

    def formatException(  # noqa: N802
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """One line, after the frames where it is no error of fedapp's own."""
        kind, error, trace = ei
        if kind is None:
            return ""
        if isinstance(error, FedappError) and not isinstance(error, DataError):
            return f"{kind.__name__}: {error}"
        frames = "" if isinstance(error, DataError) else "".join(traceback.format_tb(trace))
        return f"{frames}{kind.__name__}, whose words may quote data: see `fedapp check`"


if __name__ == "__main__":
    main()
