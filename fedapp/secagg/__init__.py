"""Secure aggregation: the server learns the sum of the clients' vectors, and no client's own.

Four stages, or five, each a message to every client and a reply from those still there (Bonawitz et al. 2017,
"Practical Secure Aggregation", figure 4, on the k-regular graph of Bell et al. 2020, "Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead", algorithm 2):

    advertise   client: two fresh X25519 keys                       server: seats on a graph, neighbours' keys
    share       client: Shamir shares of its masking key and of     server: passes them on
                its self-mask seed, sealed for each neighbour
    mask        client: values + self mask +- a mask with every     server: adds up what arrives
                neighbour, modulo m
    confirm     client: a signature of who is alive                 server: passes the signatures on
    unmask      client: of each neighbour one share, of the seed    server: takes the self masks, and what the
                if it is alive, of the masking key if not           dropped left behind, off the sum

`confirm` is there where clients have a roster: long-term signing keys, and the public ones of all.

`Client` and `Server` only compute: messages, replies and a client's state are dicts of ints and bytes, as
Flower's ConfigRecord holds them, and who carries them is not their concern. Both ends know size, modulus,
`Plan`.

*Formal guarantees.* Released to the server: the sum modulo m over the clients whose masked vectors arrived,
who these are, and when each dropped out. Against: a semi-honest server (it follows the protocol and keeps
all it sees) together with up to `Plan.colluding` of the cohort, for as long as X25519, HKDF-SHA256, ChaCha20
and ChaCha20-Poly1305 are what they are held to be. To them the other clients' vectors are uniform modulo m,
but for their sum. It has at least `Plan.least` and threshold + 1 terms, colluders' included: below that
nobody unmasks, and the round is lost. Complete graph: with certainty. Sparse graph: but for a chance of
2**-40 over the server's secret seating, if colluders and dropouts are chosen without knowing it. What the sum
itself says is left to differential privacy.

*Without a roster* an active server is not covered. What clients do check: none answers a stage twice in a
session, so no vector is masked twice; a request to unmask is one bit a neighbour, so none can ask for both
secrets of a client; too few neighbours, repeated keys, old sessions, and fewer alive than the threshold are
refused. On the complete graph 2 * threshold > neighbours + colluders, so a server that tells clients
different stories of who is alive gets both secrets of nobody; but with such stories it can still single out
one client, whose few known partners it declares dead to the others. Keys come through the server: one that
puts its own in their place reads every vector, and it can fill a cohort with clients that it made up.

*With a roster* (`Client.signing_key`, `.roster`; the graph is complete) the same is released against a server
that sends, withholds, repeats and invents whatever it likes, together with up to `Plan.colluding` of the
cohort that it picks; as long as Ed25519 and SHA-256, too, are what they are held to be, all honest clients
have the same plan, each signing key is in one session at a time, and state moves forward. (Bonawitz et al.
2017, section 6.2, on figure 4 with its consistency check; signatures are of a digest of all keys too, since
here session numbers come again in other runs.) The reasons, for n clients, c of them colluding, threshold t,
2t > n - 1 + c:

- Keys are signed by who is on the roster, each signer once. Old ones, of another run with the same session
  number, serve for nothing: a client counts as neighbours, and lets be alive, only those who sealed shares
  for its fresh key, which takes a private key that never leaves its client.
- Who unmasks has seen t others sign the same keys and survivors. Two such sets of t + 1 signers have
  2 (t + 1) - n > c in common, so an honest one, who signs once: all honest clients unmask for the same
  survivors. So of each client at most one secret is opened: the threshold is above c.
- Every signer masked with all the survivors. At most n - t - 2 other honest clients are no signers, and a
  survivor has masked with t - c > n - t - 2 honest ones at least: with a signer, whose mask stays unless both
  are in a sum. So nothing but the sum over all survivors comes off its masks.

State must move forward: whoever can set a client's state back can ask it twice; without a roster, a client
that lost its state believes an old session new.

Not covered: whether a client's values are valid (one client can spoil a sum unseen), availability, timing.
"""

from fedapp.secagg.client import Client
from fedapp.secagg.plan import Graph, Plan
from fedapp.secagg.record import Record
from fedapp.secagg.roster import Identity
from fedapp.secagg.server import Server

__all__ = ["Client", "Graph", "Identity", "Plan", "Record", "Server"]
