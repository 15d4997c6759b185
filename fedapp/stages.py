"""Where the time goes: seconds by stage, and the spans of a trace where one is asked for.

A process is in one stage at any moment, the innermost that it has entered:

    train      a client's training, with loading weights and reading its data
    encode     making bytes of an update or of weights: mechanism, codec, masks, encryption
    transfer   serializing and measuring messages, reading pipes; on Flower's grids handing messages over
    decode     making numbers of bytes, at either end
    aggregate  adding up, noise on the sum, the strategy's step; a worker's part in adding up too
    evaluate   testing the model
    idle       workers: nothing to do, or what they did was lost
    wait       the server: until replies come, or pipes take what it writes, which counts where it is read
    other      drawing cohorts, accounting, Flower's own code

A round's seconds are those of the server and of all workers. The server's make up the time that the round
took, and the workers' that time by their number: all stages add up to (workers + 1) times the round. What a
worker did counts in the round in which its answer came. On Flower's grids only the server's stages are known.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from time import perf_counter
from types import TracebackType
from typing import NamedTuple, ParamSpec, TypeVar

NAMES = "train", "encode", "transfer", "decode", "aggregate", "evaluate", "idle", "wait", "other"
MOST, LEAST = 200_000, 2e-6  # spans that a trace holds, some 25 MB of JSON; seconds of the shortest
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Span(NamedTuple):
    """A time in one stage, and none within it, by `time.perf_counter`, which forked processes share.

    Track 0 is the server, 1 and up are the workers.
    """

    stage: str
    start: float
    end: float
    track: int = 0
    round: int | None = None
    partition: int | None = None


Told = tuple[dict[str, float], list[Span]]
"""What a worker tells with an answer: its seconds by stage since the one before, and its spans."""


class Clock:
    """The stages of this process; at the server also what workers have told."""

    def __init__(self) -> None:
        self.begin(traced=False)

    def begin(self, traced: bool) -> None:
        """Forget everything: here begins a run, or a worker. `traced` keeps spans, the first `MOST`."""
        self.traced, self.spans, self.left_out = traced, list[Span](), 0
        self._round: int | None = None
        self._owed = 0.0  # seconds that workers told of beyond what they had: begun in rounds before
        self._open, self._since = ["other"], 0.0
        self._restart()

    def enter(self, stage: str) -> None:
        """Time belongs to this stage, until `leave`."""
        self._spend()
        self._open.append(stage)

    def leave(self) -> None:
        """Back to the stage before."""
        self._spend()
        self._open.pop()

    def tell(self) -> Told:
        """A worker's seconds and spans since it told them last; its waiting is the server's to count."""
        seconds = {stage: s for stage, s in self._own.items() if s and stage != "wait"}
        spans = [span for span in self.spans if span.stage != "wait"]
        self.spans = []
        self._restart()
        return seconds, spans

    def hear(self, told: Told, track: int, partition: int) -> None:
        """What a worker told, who worked for the client of this partition."""
        seconds, spans = told
        for stage, s in seconds.items():
            self._workers[stage] += s
        for span in spans:
            self._keep(span._replace(track=track, round=self._round, partition=partition))

    def begin_round(self, number: int) -> None:
        """What was before belongs to no round."""
        self._restart()
        self._round, self._began = number, self._since

    def end_round(self, workers: int | None) -> dict[str, float | None]:
        """Seconds of the round by stage, of this process and so many workers; None where nobody knows."""
        self._spend()
        if self.traced:
            self._keep(Span("round", self._began, self._since, 0, self._round))
        stages: dict[str, float | None] = {name: self._own[name] + self._workers[name] for name in NAMES}
        if workers is None:
            stages["train"] = stages["idle"] = None
        else:
            spare = workers * sum(self._own.values()) - sum(self._workers.values()) - self._owed
            stages["idle"], self._owed = max(0.0, spare), max(0.0, -spare)
        self._restart()
        return {name: None if s is None else round(s, 6) for name, s in stages.items()}

    def _spend(self) -> None:
        """Time until now belongs to the innermost stage."""
        now, stage = perf_counter(), self._open[-1]
        self._own[stage] += now - self._since
        if self.traced and now - self._since >= LEAST:
            self._keep(Span(stage, self._since, now, 0, self._round))
        self._since = now

    def _restart(self) -> None:
        self._own, self._workers = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
        self._since = perf_counter()

    def _keep(self, span: Span) -> None:
        if len(self.spans) < MOST:
            self.spans.append(span)
        else:
            self.left_out += 1


CLOCK = Clock()


class Stage:
    """`with ENCODE:` or `@ENCODE`: what is inside belongs to this stage, but for the stages within it.

    It costs about half a microsecond. Not around a `yield`: others would run inside; see `each`.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        CLOCK.enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        CLOCK.leave()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def staged(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return staged

    def each(self, things: Iterable[T]) -> Iterator[T]:
        """These things; making each of them belongs to this stage."""
        rest = iter(things)
        while True:
            with self:
                try:
                    thing = next(rest)
                except StopIteration:
                    return
            yield thing


TRAIN, ENCODE, TRANSFER, DECODE = Stage("train"), Stage("encode"), Stage("transfer"), Stage("decode")
AGGREGATE, EVALUATE, WAIT, OTHER = Stage("aggregate"), Stage("evaluate"), Stage("wait"), Stage("other")


def total(rounds: list[Mapping[str, float | None] | None]) -> dict[str, float | None] | None:
    """Seconds of all rounds by stage; None for a stage, or for all, that some round does not know."""
    known = [stages for stages in rounds if stages is not None]
    if len(known) < len(rounds) or not known:
        return None
    sums: dict[str, float | None] = {}
    for name in NAMES:
        seconds = [stages.get(name) for stages in known]
        found = [s for s in seconds if s is not None]
        sums[name] = round(sum(found), 6) if len(found) == len(seconds) else None
    return sums
