"""Where a server is: host and port, and what of that is this machine."""

from dataclasses import dataclass
from ipaddress import ip_address

from fedapp.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """A host and a port; as text `host:port`, `[host]:port` of IPv6."""

    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> "Address":
        """Reads such text; raises ConfigError where it is none."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"the server must be HOST:PORT, got {text!r}: write fed.example.org:8443, say")
        return cls(host.strip("[]"), int(port))

    @property
    def local(self) -> bool:
        """Whether it is this machine, so that nothing crosses a network."""
        return is_loopback(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def from_here(host: str) -> str:
    """What this machine reaches a server by that listens on `host`, which may stand for all addresses."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return host
    if address.is_unspecified:
        address = ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"[{address}]" if address.version == 6 else str(address)
