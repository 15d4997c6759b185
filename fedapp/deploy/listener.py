"""A uvicorn server on a socket that is bound already, with TLS or without."""

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedapp.deploy import keys
from fedapp.deploy.bounded import Refusals

_IDLE_S = 30  # a connection without a request; clients drop theirs after 5 s
_HEAD_S, _HEAD = 10.0, 1 << 16  # seconds and bytes that the head of a request may take
_END_S = 10  # for requests that are being answered when the server ends
CONNECTIONS = Refusals()  # refused before they asked anything


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals alone: two of them share one loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def listener(app: ASGIApp, lifespan: bool = False, folder: Path | None = None) -> Listener:
    """A listener for an app; TLS with the certificate in a server's folder, where one is given."""
    config = uvicorn.Config(
        app,
        http=_Prompt,
        lifespan="on" if lifespan else "off",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_END_S,
        ssl_certfile=None if folder is None else folder / keys.CERTIFICATE,
        ssl_keyfile=None if folder is None else folder / keys.KEY,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
        config.ssl.sslobject_class = _Handshake
    return Listener(config)


class _Prompt(HttpToolsProtocol):
    """Hangs up on who is slow, or without end, in saying what it asks: uvicorn waits, and reads, for ever."""

    _waits: asyncio.TimerHandle | None = None  # for the head of a request, or its rest
    _head: int | None = None  # bytes of one that has begun

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take more of a request, or of the next one's head."""
        if self._waits is None and (self.cycle is None or self.cycle.response_complete):
            self._begin()
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > _HEAD:
                self._hang_up(f"its head has more than {_HEAD} bytes", 413)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._end()
        super().on_headers_complete()

    def _begin(self) -> None:
        slow = f"no whole head within {_HEAD_S:.0f} s", 408
        self._waits = self.loop.call_later(_HEAD_S, self._hang_up, *slow)

    def _end(self) -> None:
        self._head = None
        if self._waits is not None:
            self._waits.cancel()
        self._waits = None

    def _hang_up(self, why: str, status: int) -> None:
        self._end()
        if not self.transport.is_closing():
            CONNECTIONS.tell(":".join(map(str, self.client or ("unknown",))), "a request", why, status)
            self.transport.abort()


class _Handshake(ssl.SSLObject):
    """Tells of handshakes that fail, which asyncio does not: plain HTTP, a client that trusts another CA."""

    def do_handshake(self) -> None:
        """Shake hands."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            said = (error.reason or str(error)).lower().replace("_", " ")
            CONNECTIONS.tell("a connection", "TLS handshake", said)
            raise
