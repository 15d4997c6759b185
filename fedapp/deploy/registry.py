"""`fedapp nodes`: which nodes may take part."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from fedapp.deploy import control, keys
from fedapp.errors import FedappError


def main(arguments: Sequence[str]) -> None:
    """Run one subcommand; exits 2 on a wrong one. Raises FedappError for what does not fit."""
    parser = argparse.ArgumentParser("fedapp nodes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="all nodes, and which are there now")
    register = commands.add_parser("register", help="let a node in, by the public half of its key")
    unregister = commands.add_parser(
        "unregister", help="shut a node out, for ever: it needs a new key to return"
    )
    register.add_argument(
        "key", nargs="+", help="a file (node.key.pub), or the line that `fedapp keys node` prints"
    )
    register.add_argument("--name", help="what to call it in the list")
    unregister.add_argument("node_id", type=int)
    for command in (listed, register, unregister):
        control.arguments(command)
    given = parser.parse_args(arguments)
    if given.command == "register":
        pem = public_key(given.key)  # before anything is asked
    with control.of(given) as client:
        if given.command == "list":
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
            print("\n".join(map(said, nodes)) or "no node yet: fedapp nodes register node.key.pub")
        elif given.command == "register":
            node = client.RegisterNode(RegisterNodeRequest(public_key=pem, name=given.name))
            print(f"node {node.node_id} is registered: {keys.fingerprint(pem)}")
        else:
            client.UnregisterNode(UnregisterNodeRequest(node_id=given.node_id))
            print(f"node {given.node_id} is shut out; its key can never be registered again")


def public_key(words: Sequence[str]) -> bytes:
    """A node's public key, in PEM: from a file, or from the words of its line."""
    text = " ".join(words)
    if len(words) == 1 and not text.startswith("ecdsa-"):
        try:
            text = Path(text).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise FedappError(f"cannot read {text} ({error}): give node.key.pub, or its line") from error
    if "PRIVATE KEY" in text:
        raise FedappError("that is a private key, which never leaves its node: register node.key.pub")
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FedappError(
            f"no public key in OpenSSH's format ({error}): `fedapp keys node` makes one"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise FedappError("the key is no ECDSA key on a NIST curve: `fedapp keys node` makes one")
    return public_key_to_bytes(key)


def said(node: NodeInfo) -> str:
    """One line on a node."""
    seen = node.last_activated_at[:19].replace("T", " ")
    since = {"online": f"since {seen}", "offline": f"last joined {seen}"}.get(node.status, "")
    if node.status == "online" and node.online_until < time.time():
        since = "silent"
    parts = (f"{node.node_id:<20}", f"{node.status:12}", keys.fingerprint(node.public_key), node.name, since)
    return "  ".join(part for part in parts if part).rstrip()
