"""Goodput over HTTP beside vLLM's server: requests a second that met an objective of TTFT and TPOT, at several rates.

Arrivals are a Poisson process, many prompts share a prefix, prefix caches are on. The client is open-loop: it sends
what is due however many are under way, so a server that falls behind is seen to. Each server answers the same
requests at the same moments; one is awake at a time, in turn. `sent` and `completed` are counted: a request that did
not come whole is a failure, whatever the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Claim, at_least, report
from benchmarks.serving.contenders import servers
from benchmarks.serving.contenders.client import Outcome, send_all
from benchmarks.serving.contenders.model import model_folder
from benchmarks.serving.contenders.pool import ContenderFailed, end_on_signal, quiet
from benchmarks.serving.contenders.workload import Arrival, arrivals, queries

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Objective:
    """What a request must keep to count."""

    ttft_s: float
    tpot_s: float

    def is_met(self, outcome: Outcome) -> bool:
        """Whether it came whole and in time."""
        return not outcome.error and outcome.ttft_s <= self.ttft_s and outcome.tpot_s <= self.tpot_s


@dataclass(frozen=True)
class Round:
    """One server at one rate, once."""

    outcomes: Sequence[Outcome]
    duration_s: float

    @property
    def completed(self) -> list[Outcome]:
        """Those that came whole."""
        return [outcome for outcome in self.outcomes if not outcome.error]

    def goodput(self, objective: Objective) -> float:
        """Requests a second of the arrivals' time that met the objective."""
        return sum(objective.is_met(outcome) for outcome in self.outcomes) / self.duration_s

    def percentiles(self, of: str) -> tuple[float, float, float]:
        """p50, p95 and p99 of `ttft_s` or `tpot_s` in milliseconds, of what came whole; 0 where nothing did."""
        values = sorted(getattr(outcome, of) * 1e3 for outcome in self.completed)
        if len(values) < 2:
            return (values or [0.0])[0], (values or [0.0])[0], (values or [0.0])[0]
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return cuts[49], cuts[94], cuts[98]


def start(folder: Path, chosen: argparse.Namespace) -> list[servers.Server]:
    """Those that can be had."""
    home = folder.parent
    makers = {
        f"sihe {dtype}": lambda dtype=dtype: servers.ours(
            folder,
            {"dtype": dtype, "max_context": servers.CONTEXT},
            name=f"sihe {dtype}",
            log=home / f"server sihe {dtype}.log",
        )
        for dtype in chosen.precisions
    }
    makers["vllm bfloat16"] = lambda: servers.vllm(folder, log=home / "server vllm.log")
    started = []
    for name, make in makers.items():
        if chosen.only and name.split()[0] not in chosen.only:
            continue
        try:
            started.append(make())
        except ContenderFailed as failure:
            print(f"left out: {failure}", flush=True)
    return started


def measure(server: servers.Server, sent: Sequence[Arrival], chosen: argparse.Namespace) -> Round:
    """Sends all to one server."""
    with quiet(chosen.lock), server.awake():
        outcomes = asyncio.run(send_all(server.url, server.model, sent, timeout_s=TIMEOUT_S))
    return Round(outcomes, chosen.duration)


def show(name: str, rounds: Sequence[Round], objective: Objective) -> None:
    """One line: medians over the rounds."""
    sent = sum(len(found.outcomes) for found in rounds)
    completed = sum(len(found.completed) for found in rounds)
    goodput = [found.goodput(objective) for found in rounds]
    line = f"  {name:16} sent {sent}, completed {completed}; goodput {statistics.median(goodput):5.2f}/s "
    line += f"({min(goodput):.2f}, {max(goodput):.2f})"
    for of in ("ttft_s", "tpot_s"):
        middle = [
            statistics.median(column) for column in zip(*(found.percentiles(of) for found in rounds), strict=True)
        ]
        line += f"; {of[:4].upper()} p50/95/99 " + "/".join(f"{value:.0f}" for value in middle) + " ms"
    late = max((outcome.late_s for found in rounds for outcome in found.outcomes), default=0.0)
    print(f"{line}; sent at most {late * 1e3:.0f} ms late", flush=True)
    for error in sorted({outcome.error for found in rounds for outcome in found.outcomes if outcome.error})[:3]:
        print(f"    {error}")


def parse() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8], help="requests a second")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of arrivals")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ttft", type=float, default=1.0, help="the objective: seconds until the first token")
    parser.add_argument("--tpot", type=float, default=0.1, help="the objective: seconds for each further token")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "int8"], help="of ours")
    parser.add_argument("--only", nargs="+", metavar="SERVER", help="sihe, vllm")
    parser.add_argument("--quick", action="store_true", help="one repeat of 10 s at two rates")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where GSM8K and SQuAD lie")
    parser.add_argument("--lock", type=Path, help="a file to hold while timing, shared with what else computes here")
    parser.add_argument("--home", type=Path, default=Path("build/benchmarks/serving"), help="where the model is kept")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rates, chosen.duration, chosen.repeats = [1, 4], 10.0, 1
    return chosen


def main() -> int:
    """Every rate, every server in turn; 1 when ours was not measured."""
    chosen = parse()
    end_on_signal()
    objective = Objective(chosen.ttft, chosen.tpot)
    folder = model_folder(chosen.home.resolve())
    found = queries(chosen.data, seed=0)
    running = start(folder, chosen)
    claims: list[Claim] = []
    try:
        for server in running:  # what compiles at the first request does so now
            measure(server, arrivals(found[-40:], rate_per_s=2, duration_s=4, seed=1), chosen)
        for rate in chosen.rates:
            print(f"\n{rate:g} requests/s for {chosen.duration:g} s, TTFT {chosen.ttft:g} s, TPOT {chosen.tpot:g} s")
            rounds: dict[str, list[Round]] = {server.name: [] for server in running}
            for repeat in range(chosen.repeats):
                # Other questions each time, so that no round finds its own prompts in a cache.
                at = repeat * len(found) // chosen.repeats
                sent = arrivals(found[at:] + found[:at], rate_per_s=rate, duration_s=chosen.duration, seed=repeat)
                for server in running:
                    rounds[server.name].append(measure(server, sent, chosen))
            for name, measured in rounds.items():
                show(name, measured, objective)
            claims += claims_of(rate, rounds, objective)
    finally:
        for server in running:
            server.close()
    report(__file__, claims)
    return 0 if any(server.name.startswith("sihe") for server in running) else 1


def claims_of(rate: float, rounds: dict[str, list[Round]], objective: Objective) -> list[Claim]:
    """Ours against vLLM's goodput, and that everything sent was completed."""
    claims = []
    peer = next((measured for name, measured in rounds.items() if name.startswith("vllm")), None)
    for name, measured in rounds.items():
        if not name.startswith("sihe"):
            continue
        sent = sum(len(found.outcomes) for found in measured)
        completed = sum(len(found.completed) for found in measured)
        title = f"{name}, {rate:g} requests/s"
        claims.append(
            Claim(f"{title}: completed = sent", completed, None, None, "requests", f"= {sent}", completed == sent)
        )
        if peer is not None:
            mine, theirs = (statistics.median(found.goodput(objective) for found in side) for side in (measured, peer))
            if theirs:
                claims.append(at_least(f"{title}: goodput", mine, theirs, unit="requests/s", ratio=1.0))
            else:
                claims.append(Claim(f"{title}: goodput", mine, 0.0, None, "requests/s", "> the peer", mine > 0))
    return claims


if __name__ == "__main__":
    sys.exit(main())
