"""What HTTP costs a step: the engine's step time with 64 open streams that are read, beside 64 answers sent whole.

Both are the same requests to the same server; only with streams is there something to write and to read each token.
The server's own clock times its steps (`sihe_serving_step_seconds` of `/metrics`). By default the engine computes on
one processor, since the readers need one too: what is left is what the server itself takes from the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import urllib.request
from functools import partial
from pathlib import Path

from benchmarks.harness import Claim, alternate, print_table, report
from benchmarks.serving.contenders import servers
from benchmarks.serving.contenders.client import send_all
from benchmarks.serving.contenders.model import library_texts, model_folder
from benchmarks.serving.contenders.pool import end_on_signal, quiet
from benchmarks.serving.contenders.workload import Arrival, Query

LIMIT = 1.05  # x the step without streams: what two runs of the same differ by here


def step_totals(server: servers.Server) -> tuple[float, float]:
    """Seconds in steps since the server started, and how many steps."""
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for kind in ("sum", "count"):
        name = f"sihe_serving_step_seconds_{kind}{{"
        found[kind] = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
    return found["sum"], found["count"]


def step_ms(server: servers.Server, asked: list[Arrival], lock: Path | None, *, streamed: bool) -> float:
    """Mean milliseconds of a step while all of `asked` are answered. Raises `RuntimeError` where one was not."""
    with quiet(lock), server.awake():
        seconds, steps = step_totals(server)
        outcomes = asyncio.run(send_all(server.url, server.model, asked, timeout_s=300, streamed=streamed))
        seconds_after, steps_after = step_totals(server)
    failed = {outcome.error for outcome in outcomes if outcome.error}
    if failed:
        raise RuntimeError(f"requests failed: {sorted(failed)[:3]}")
    return 1e3 * (seconds_after - seconds) / (steps_after - steps)


def main() -> int:
    """Measures both in turn and claims their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--lock", type=Path, help="a file to hold while timing, shared with what else computes here")
    parser.add_argument("--home", type=Path, default=Path("build/benchmarks/serving"), help="where the model is kept")
    chosen = parser.parse_args()
    end_on_signal()
    folder = model_folder(chosen.home.resolve())
    settings = {"dtype": chosen.precision, "max_context": 512, "threads": chosen.threads}
    settings["max_batch_size"] = chosen.streams
    log = folder.parent / "server http cost.log"
    server = servers.ours(folder, settings, name="http cost", log=log)
    text = "".join(library_texts(200_000))
    asked = [Arrival(0.0, Query(text[60 * at : 60 * at + 60], chosen.tokens)) for at in range(chosen.streams)]
    try:
        for streamed in (False, True):  # warm, and the prompts into the cache, which both find them in
            step_ms(server, asked, chosen.lock, streamed=streamed)
        figures = alternate(
            {
                "answers in one piece": partial(step_ms, server, asked, chosen.lock, streamed=False),
                "streams": partial(step_ms, server, asked, chosen.lock, streamed=True),
            },
            repeats=chosen.repeats,
        )
    finally:
        server.close()
    print_table(figures, unit="ms a step", baseline="answers in one piece")
    whole, streams = (statistics.median(values) for values in figures.values())
    name = f"a step with {chosen.streams} streams open, {chosen.threads} engine threads"
    claim = Claim(
        name, streams, whole, streams / whole, "ms", f"<= {LIMIT} x without streams", streams <= LIMIT * whole
    )
    report(__file__, [claim])
    return 0


if __name__ == "__main__":
    sys.exit(main())
