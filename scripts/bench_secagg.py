"""What secure aggregation costs: bits per parameter of all its bytes, and time, beside float32.

usage: .venv/bin/python scripts/bench_secagg.py [--clients 10] [--parameters 26146 1200000] [--noise 1.0]

A round of privacy=distributed_gaussian without Flower and without training: every client encodes an update of
Gaussian noise, and all stages run in this process; with a roster, where it says so, clients sign what they
say. Bytes are those of the records as Flower serializes them,
up (to the server) and down, over all parameters of all clients; `smaller` is float32 one way over both.
`noise` is what rounding to the grid makes of it: 1 is what the noise multiplier asks for. A second table is
of aggregation=ckks (extra ckks): keys, ciphertexts, the opened sum. Weights on their way out are in neither.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedapp import ckks, secagg
from fedapp.privacy.distributed import DistributedGaussian
from fedapp.records import size_of
from fedapp.secagg.record import Record
from fedapp.secagg.roster import make


def bytes_of(records: dict[int, Record]) -> int:
    return sum(size_of(RecordDict({"secagg": ConfigRecord({**record})})) for record in records.values())


Done = TypeVar("Done")


class Clock:
    """How long each end has worked."""

    def __init__(self) -> None:
        self.seconds = {"client": 0.0, "server": 0.0}

    def __call__(self, end: str, act: Callable[..., Done], *given: Any) -> Done:
        started = time.perf_counter()
        done = act(*given)
        self.seconds[end] += time.perf_counter() - started
        return done

    def ms(self, end: str) -> float:
        return 1000 * self.seconds[end]


def measure(
    clients: int, parameters: int, keep: float, bits: int | None, noise: float, signed: bool = False
) -> str:
    privacy = DistributedGaussian(epsilon=None, noise_multiplier=noise, keep=keep, bits=bits)
    terms, clock = privacy.terms(parameters, clients, 1), Clock()
    plan = secagg.Plan(colluding=max(privacy.tolerated, 1 / clients), dropouts=privacy.tolerated)
    known = make(clients) if signed else ()
    roster = known[0].roster if known else frozenset[bytes]()
    server = secagg.Server(range(clients), terms.kept, terms.modulus, 1, plan, roster=roster)
    everyone = [secagg.Client(terms.kept, terms.modulus, plan)] * clients
    if known:
        everyone = [replace(everyone[0], signing_key=one.signing_key, roster=roster) for one in known]
    states, up, down = dict[int, Record](), 0, 0
    updates = np.random.default_rng(0).normal(size=(clients, parameters)).astype(np.float32)
    secret = np.random.default_rng(1).bytes
    for stage in ("advertise", "share", "mask", *(("confirm",) if signed else ()), "unmask"):
        messages = clock("server", getattr(server, stage))
        down += bytes_of(messages)
        for number, message in messages.items():
            state = states.get(number, {})
            given: list[Any] = [message, state]
            if stage == "mask":
                public = np.random.default_rng(7)
                given.append(clock("client", terms.encode, updates[number], public, secret))
            reply, states[number] = clock("client", getattr(everyone[number], stage), *given)
            up += bytes_of({number: reply})
            clock("server", server.take, number, reply)
    total = clock("server", server.total)
    mean = clock("server", terms.decode, total, clients, np.random.default_rng(7))
    assert mean.shape == (parameters,)
    ways = [8 * way / parameters / clients for way in (up, down)]
    raised = terms.noise / terms.clip / noise
    return (
        f"| {parameters:,} | {keep:g} | {'yes' if signed else 'no'} "
        f"| {terms.bits} | {raised:.3f} | {ways[0]:.3f} | {ways[1]:.3f} | {32 / sum(ways):.1f}x "
        f"| {clock.ms('client') / clients:.0f} | {clock.ms('server'):.0f} |"
    )


def measure_ckks(clients: int, parameters: int) -> str:
    """The same for aggregation=ckks: keys, ciphertexts, and the sum that the key holder opens."""
    clock, updates = Clock(), np.random.default_rng(0).normal(size=(clients, parameters))
    secret, public = clock("client", ckks.keys)
    total, up, down = clock("server", ckks.EncryptedSum, public, parameters), 0, clients * len(public)
    for update in updates:
        ciphertexts = clock("client", ckks.encrypt, update, public)
        up += sum(map(len, ciphertexts))
        clock("server", total.add, ciphertexts)
    summed = clock("server", total.serialize)
    down += sum(map(len, summed))
    opened = clock("client", ckks.decrypt, summed, secret)
    up += len(public) + 4 * len(opened)
    error = np.abs(opened - updates.sum(0)).max() / clients
    ways = [way / 4 / parameters / clients for way in (up, down)]
    return (
        f"| {parameters:,} | {ways[0]:.2f}x | {ways[1]:.2f}x | {error:.1e} "
        f"| {clock.ms('client') / clients:.0f} | {clock.ms('server'):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--parameters", type=int, nargs="+", default=[26_146, 1_200_000])
    parser.add_argument("--noise", type=float, default=1.0)
    options = parser.parse_args()
    measure(options.clients, 1000, 1.0, None, options.noise)  # compiles the sampler
    print(
        "| parameters | kept | roster | bits of one | noise | up | down | smaller | client, ms | server, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for parameters in options.parameters:
        for keep, bits, signed in ((1.0, None, False), (0.1, None, False), (0.1, 12, False), (0.1, 12, True)):
            print(measure(options.clients, parameters, keep, bits, options.noise, signed), flush=True)
    print(
        "\n| parameters, ckks | up, of float32 | down, of float32 | error of a mean "
        "| client, ms | server, ms |"
    )
    print("|---|---|---|---|---|---|")
    for parameters in options.parameters:
        print(measure_ckks(options.clients, parameters), flush=True)


if __name__ == "__main__":
    main()
