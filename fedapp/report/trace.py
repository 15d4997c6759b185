"""trace.json: every stage of every process on a time line, in the Chrome trace event format.

https://ui.perfetto.dev opens it. The format is Google's "Trace Event Format": complete events (ph X, ts and
dur in microseconds) and metadata events (ph M), which name the tracks.
"""

import json
from collections.abc import Iterable
from typing import Any

from fedapp.stages import Span


def trace_json(spans: Iterable[Span], left_out: int, started: float, workers: int) -> str:
    """One track a process: the server and so many workers. Times count from `started`."""
    events: list[dict[str, Any]] = []
    for track in range(workers + 1):
        name = f"worker {track - 1}" if track else "server"
        for kind, said in (
            ("process_name", {"name": name}),
            ("process_sort_index", {"sort_index": track}),
            ("thread_name", {"name": name}),
        ):
            events.append({"ph": "M", "name": kind, "pid": track, "tid": track, "args": said})
    for span in spans:
        start, end = (round(1e9 * (time - started)) for time in (span.start, span.end))
        known = {"round": span.round, "partition": span.partition}
        events.append(
            {
                "ph": "X",
                "name": span.stage,
                "pid": span.track,
                "tid": span.track,
                "ts": start / 1000,
                "dur": (end - start) / 1000,
                "args": {key: value for key, value in known.items() if value is not None},
            }
        )
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    told = json.dumps({"events left out": left_out})
    return f'{{"displayTimeUnit":"ms","otherData":{told},"traceEvents":[\n{lines}\n]}}\n'
