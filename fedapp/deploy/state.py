"""Flower's state of a server: nodes, runs and the envelopes of messages in SQLite, their contents in memory.

What a message carries is of use while its run goes on, and no run outlives the server's process: its
successor asks anew. Flower keeps it in SQLite too, object by object, at 80 ms of a core for each message.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Container

from flwr.app import Message
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState, ObjectPushSession
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import select

_LOOK_S, _LOOK_EACH_S = 1.0, 0.001  # from one look at all to the next; more for each message awaited


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
        self._looked, self._due = 0.0, defaultdict[int, float](float)  # by run, when all is to be looked at
        self.federation_manager.linkstate = self
        factory.state_instance = self

    def _cleanup_expired_task_tokens(self) -> None:
        """Look for processes that are gone now and then: Flower does before each question for a run."""
        if time.monotonic() >= self._looked + _LOOK_S:
            self._looked = time.monotonic()
            super()._cleanup_expired_task_tokens()

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """The replies among what is awaited; now and then also the errors of those that will not come.

        Flower loads all that is awaited each time, at 65 us a message, and answers come one by one.
        """
        if time.monotonic() >= self._due[run_id]:
            self._due[run_id] = time.monotonic() + _LOOK_S + _LOOK_EACH_S * len(message_ids)
            return super().get_message_res(message_ids, run_id)
        awaited = MessageRes.reply_to_message_id.in_(message_ids), MessageRes.delivered_at == ""
        with self.session() as session:
            replied = session.scalars(select(MessageRes.reply_to_message_id).where(*awaited)).all()
        return super().get_message_res(message_ids.intersection(replied), run_id)

    def awaited(self, run_id: int) -> set[str]:
        """The messages of a run whose replies no ServerApp has."""
        of_run = MessageIns.run_id == uint64_to_int64(run_id)
        with self.session() as session:
            return set(session.scalars(select(MessageIns.message_id).where(of_run)))

    @property
    def sessions(self) -> Container[str]:
        """The sessions in which parts of replies are still to come."""
        return self._object_push_sessions.keys()
