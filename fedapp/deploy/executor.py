"""The process beside a node that does the work of one run: torch and the data stay loaded between messages.

It runs the installed fedapp. The node tells it who it is, then sends message after message through a pipe and
gets each reply with the context after it. It knows neither the server nor the node's key.
"""

import logging
import os
import sys
import threading
import time
from multiprocessing.connection import Connection

from fedapp.deploy.frames import context_of, message_of, of_context, of_message


def main() -> None:
    """Serve one run until the node closes the pipe, or is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
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


def _end_with(parent: int) -> None:
    """End this process with its parent, in the middle of training too."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
