"""A uvicorn server on a socket that is bound already, with TLS or without."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fedapp.deploy import keys
from fedapp.deploy.bounded import Refusals

_IDLE_S = 30  # a connection without a request; clients drop theirs after 5 s
_END_S = 10  # for requests that are being answered when the server ends
HANDSHAKES = Refusals()


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
            HANDSHAKES.tell("a connection", "TLS handshake", said)
            raise
