"""Flower's state of a server: nodes, runs and the envelopes of messages in SQLite, their contents in memory.

What a message carries is of use while its run goes on, and no run outlives the server's process: its
successor asks anew. Flower keeps it in SQLite too, object by object, at 80 ms of a core for each message.
"""

import threading
import time

from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState, ObjectPushSession
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

_LOOK_S = 1.0


class State(SqlLinkState):
    """SQLite, but for the objects of messages, and for who is bringing which of them.

    They take what all nodes are sent, once, and a reply a node: a ServerApp fetches replies as they come. A
    message without its objects, from before a restart, is dropped when its node asks for it.
    """

    start_session = InMemoryCoreState.start_session
    delete_sessions_in_run = InMemoryCoreState.delete_sessions_in_run
    preregister_object_tree = InMemoryCoreState.preregister_object_tree
    store_object = InMemoryCoreState.store_object
    get_object = InMemoryCoreState.get_object
    _cleanup_push_session = InMemoryCoreState._cleanup_push_session

    def __init__(self, factory: LinkStateFactory) -> None:
        """Take the place of the state that a factory has made, with its connections to the database."""
        vars(self).update(vars(factory.state()))
        self._object_store = InMemoryObjectStore()
        self._lock_object_push_sessions = threading.RLock()
        self._object_push_sessions = dict[str, ObjectPushSession]()
        self._object_push_session_by_root = dict[str, str]()
        self._looked = 0.0
        self.federation_manager.linkstate = self
        factory.state_instance = self

    def _cleanup_expired_task_tokens(self) -> None:
        """Look for processes that are gone now and then: Flower does before each question for a run."""
        if time.monotonic() >= self._looked + _LOOK_S:
            self._looked = time.monotonic()
            super()._cleanup_expired_task_tokens()
