"""What reaches a server with an operator's token: Flower's Control API, and the run folders."""

import argparse
import os
import ssl
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedapp.deploy import keys
from fedapp.deploy.address import Address
from fedapp.errors import FedappError

ADDRESS = "address"  # file in the server's folder, while it runs: its URL on this machine


@dataclass(frozen=True)
class Access:
    """A server, `host:port`, the CA that proves it (None: the system's), and the operator's token.

    `called`: what its certificate calls it, where that may be another name.
    """

    server: str
    ca: Path | None
    token: str
    called: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it is spoken to without TLS: `fedapp server --insecure`, on this machine only."""
        return self.ca is None and Address.of(self.server).local

    @property
    def proven_by(self) -> dict[str, str]:
        """What a request of httpx takes to have the certificate checked for another name than the URL's."""
        return {} if self.called is None else {"sni_hostname": self.called}

    def control(self) -> ControlHttpClient:
        """A client of Flower's Control API."""
        return ControlHttpClient(
            f"http{'' if self.plain else 's'}://{self.server}",
            interceptors=[_Bearer(self)],
            verify=self._trust(),
        )

    def fetch(self, run_id: int, into: Path) -> None:
        """Bring a run's folder into a folder, which is made. Raises FedappError where there is none."""
        url = f"http{'' if self.plain else 's'}://{self.server}/fedapp/runs/{run_id}/folder"
        headers = {"Authorization": f"Bearer {self.token}"}
        with (
            _told(self),
            httpx.Client(verify=self._trust(), timeout=30) as client,
            client.stream("GET", url, headers=headers, extensions=self.proven_by) as response,
            tempfile.TemporaryFile() as file,
        ):
            if response.is_error:
                response.read()
                _raise(self, response)
            for chunk in response.iter_bytes():
                file.write(chunk)
            file.seek(0)
            into.mkdir(parents=True, exist_ok=True)
            try:
                with tarfile.open(fileobj=file) as archive:
                    archive.extractall(into, filter="data")
            except tarfile.TarError as error:
                raise FedappError(
                    f"the folder of run {run_id} came back broken ({error}): ask again"
                ) from error

    def _trust(self) -> ssl.SSLContext | bool:
        if self.plain:
            return False
        try:
            return ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise FedappError(
                f"{self.ca} is no CA certificate ({error}): it is the operator's ca.pem"
            ) from error


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add to a parser where the server is and what opens it; `access` and `of` read them."""
    group = parser.add_argument_group("the server", "On its own machine, nothing of this is needed.")
    group.add_argument("--folder", type=Path, default=keys.FOLDER, help="the server's folder (%(default)s)")
    group.add_argument("--server", metavar="HOST:PORT", default=os.environ.get("FEDAPP_SERVER"))
    group.add_argument("--ca", type=Path, default=_path("FEDAPP_CA"), help="its CA certificate, ca.pem")
    group.add_argument("--token-file", type=Path, default=_path("FEDAPP_TOKEN_FILE"), help="operator.token")


def access(options: argparse.Namespace) -> Access:
    """What `arguments` asked: by flags or FEDAPP_SERVER, FEDAPP_CA, FEDAPP_TOKEN_FILE; else by folder."""
    token = keys.token(options.token_file or options.folder / keys.TOKEN)
    if options.server is not None:
        return Access(str(Address.of(options.server)), options.ca, token)
    try:
        scheme, _, address = (options.folder / ADDRESS).read_text().strip().partition("://")
    except OSError as error:
        raise FedappError(
            f"no server runs from {options.folder}: start `fedapp server`, or name one by --server HOST:PORT"
        ) from error
    if scheme == "http":
        return Access(str(Address.of(address)), None, token)
    ca = options.ca or options.folder / keys.CA
    return Access(str(Address.of(address)), ca, token, keys.called(options.folder))


def of(options: argparse.Namespace) -> ControlHttpClient:
    """The client that `arguments` asked for."""
    return access(options).control()


class _Bearer:
    """Adds the token to each request, and tells errors in one line."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send with the token; FedappError where the server cannot be reached or refuses."""
        context.request.headers["Authorization"] = f"Bearer {self._access.token}"
        context.request.extensions |= self._access.proven_by
        with _told(self._access):
            response = call_next(context)
        if response.is_error:
            _raise(self._access, response)
        return response


@contextmanager
def _told(access: Access) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        said = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in said:
            repair = (
                f"check that {access.ca or 'the system'} is the operator's ca.pem, and the name and clock"
            )
        elif isinstance(error, httpx.ConnectError):
            repair = "check address and port, and that `fedapp server` runs"
        else:
            repair = "try again"
        raise FedappError(f"cannot reach {access.server} ({said}): {repair}") from error


def _raise(access: Access, response: httpx.Response) -> None:
    try:
        body = response.json()
        said = str(body.get("detail") or body.get("public_message") or body)
    except (ValueError, AttributeError):
        said = response.text.strip()[:200]
    raise FedappError(f"{access.server} refuses ({response.status_code}): {said}")


def _path(name: str) -> Path | None:
    return Path(os.environ[name]) if name in os.environ else None
