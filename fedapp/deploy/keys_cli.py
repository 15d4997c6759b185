"""`fedapp keys`: make keys, or take those that there are; vouch for the code that is installed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedapp.deploy import keys
from fedapp.deploy.bundle import sign
from fedapp.errors import FedappError


def main(arguments: Sequence[str]) -> None:
    """Run one subcommand; exits 2 on a wrong one. Raises FedappError for what does not fit."""
    parser = argparse.ArgumentParser("fedapp keys", description=keys.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("init", help="operator: a CA, a server certificate, an operator's token")
    again = commands.add_parser("renew", help="operator: a new server certificate of the same CA")
    own = commands.add_parser("node", help="participant: a node's key; prints the half for the operator")
    for command in (first, again):
        command.add_argument("--host", action="append", default=[], help="a name or address of the server")
        command.add_argument("--folder", type=Path, default=keys.FOLDER, help="server's folder (%(default)s)")
        command.add_argument("--days", type=int, default=365, help="the certificate holds (%(default)s)")
        command.add_argument("--ca-key", type=Path, help="the key of a CA that exists already")
        command.add_argument("--certificate", type=Path, help="one that exists already, and its chain")
        command.add_argument("--key", type=Path, help="its key")
    first.add_argument("--ca", type=Path, help="a CA that exists already: its certificate")
    first.add_argument("--force", action="store_true", help="replace what is there: all must join anew")
    own.add_argument("--out", type=Path, default=Path("node.key"), help="its file (%(default)s)")
    own.add_argument("--force", action="store_true", help="replace the key that is there")
    vouch = commands.add_parser("sign", help="operator: vouch for the fedapp that is installed here")
    vouch.add_argument("--key", type=Path, required=True, help="of ssh-keygen -t ed25519 -N ''")
    given = parser.parse_args(arguments)
    if given.command == "init":
        old = given.folder / keys.CA_KEY
        had = old.exists()
        if _is_given(given, given.ca):
            keys.take(given.folder, given.certificate, given.key, given.ca, given.force)
        else:
            keys.init(given.folder, given.host, given.days, given.ca, given.ca_key, given.force)
        if had and not old.exists():
            print(f"{old} is removed: it was the key of the CA before")
        both = f"{keys.CA} with {keys.TOKEN}"
        print(f"{given.folder}: give {keys.CA} to all participants, and {both} to who submits runs")
        print("next: fedapp server" + ("" if given.folder == keys.FOLDER else f" --folder {given.folder}"))
    elif given.command == "renew":
        if _is_given(given, given.folder / keys.CA):
            hosts = keys.bring(given.folder, given.certificate, given.key)
        else:
            hosts = keys.renew(given.folder, given.host, given.days, given.ca_key)
        print(f"{given.folder / keys.CERTIFICATE} is new, for {', '.join(hosts)}")
        print("a running server takes it on SIGHUP: systemctl reload, or kill -HUP with its process id")
    elif given.command == "sign":
        line = sign(given.key)
        print(
            "runs that are sent from here carry the signature; a policy that trusts it lists, under signers:"
        )
        print(line)
    else:
        print(f"send this line to the operator; {given.out} stays here:", flush=True)
        print(keys.node(given.out, given.force))


def _is_given(given: argparse.Namespace, ca: Path | None) -> bool:
    """Whether the certificate is given, and not to be made. Raises FedappError where it is so by half."""
    if given.certificate is None and given.key is None:
        return False
    if None in (given.certificate, given.key, ca) or given.host or given.ca_key:
        raise FedappError(
            "--certificate, --key and, for init, --ca belong together: give all of them, without --ca-key, "
            "and without --host, for the certificate says the names"
        )
    return True
