"""`fedapp ledger`: what a client's data has spent, what it may spend, and which ids overlap."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedapp.privacy.filter import UNITS
from fedapp.privacy.ledger import Ledger


def main(arguments: Sequence[str]) -> None:
    """Run one subcommand; exits 2 on a wrong one. Raises FedappError for what does not fit."""
    parser = argparse.ArgumentParser("fedapp ledger", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what was spent of what")
    limit = commands.add_parser("set-limit", help="the most that data may ever spend; makes the ledger")
    overlap = commands.add_parser("overlap", help="say that two ids name overlapping data")
    for command in (show, limit, overlap):
        command.add_argument("ledger", type=Path, help="its file")
    show.add_argument("--delta", type=float, default=1e-5, help="where there is no limit (default: 1e-5)")
    limit.add_argument("data_id")
    limit.add_argument("unit", choices=UNITS)
    limit.add_argument("epsilon", type=float)
    limit.add_argument("delta", type=float)
    overlap.add_argument("one")
    overlap.add_argument("other")
    given = parser.parse_args(arguments)
    if given.command == "set-limit" and not given.ledger.expanduser().exists():
        print(f"a new ledger: {given.ledger}")
    ledger = Ledger(given.ledger, new=given.command == "set-limit")
    if given.command == "set-limit":
        ledger.set_limit(given.data_id, given.unit, given.epsilon, given.delta)
    elif given.command == "overlap":
        ledger.overlap(given.one, given.other)
    print(said(ledger, getattr(given, "delta", 1e-5)))


def said(ledger: Ledger, delta: float) -> str:
    """Of each budget its releases by mechanism, and a line for each unit: what is spent, and each limit."""
    lines = []
    for ids in ledger.budgets():
        lines.append(f"{', '.join(ids)}: {ledger.count(ids[0])} releases")
        for mechanism, adversary, many in ledger.mechanisms(ids[0]):
            lines.append(f"  {many} by privacy={mechanism}, against {adversary}")
        limits = ledger.limits(ids[0])
        for unit in UNITS:
            deltas = dict.fromkeys([limit.delta for limit in limits if limit.unit == unit]) or [delta]
            for at in deltas:
                of = [limit.epsilon for limit in limits if (limit.unit, limit.delta) == (unit, at)]
                bound = f"of {min(of):g}" if of else "without a limit"
                spent = ledger.spent(ids[0], at)[unit]
                lines.append(f"  {unit:8} epsilon {spent:.4g} {bound} at delta {at:g}")
    return "\n".join(lines) or "no data yet"
