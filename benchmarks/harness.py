"""What every benchmark shares: alternating repeats, a table, and a JSON file of claims.

A script measures each contender `repeats` times in turn (A B A B …), so that a machine whose speed drifts slows both.
It quotes medians and their ratio, never a single run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """One sentence that a run confirms or not. `ratio` is ours over the peer's; `goal` is text such as ">= 1.1"."""

    name: str
    ours: float
    peer: float | None
    ratio: float | None
    unit: str
    goal: str
    holds: bool


def at_least(name: str, ours: float, peer: float, *, unit: str, ratio: float) -> Claim:
    """Ours is at least `ratio` times the peer's (more is better)."""
    actual = ours / peer
    return Claim(name, ours, peer, actual, unit, f">= {ratio} x the peer", actual >= ratio)


def at_most(name: str, ours: float, *, unit: str, limit: float) -> Claim:
    """Ours is at most `limit` (less is better)."""
    return Claim(name, ours, None, None, unit, f"<= {limit} {unit}", ours <= limit)


def alternate(contenders: Mapping[str, Callable[[], float]], *, repeats: int = 3) -> dict[str, list[float]]:
    """Each contender's figure, `repeats` times in turn; none is warmed up here."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, measure in contenders.items():
            figures[name].append(measure())
    return figures


def print_table(figures: Mapping[str, Sequence[float]], *, unit: str, baseline: str) -> None:
    """Minimum, median, maximum, and the ratio of medians to `baseline`'s."""
    base = statistics.median(figures[baseline])
    print(f"{'':28} {'min':>10} {'median':>10} {'max':>10}  {unit}, x {baseline}")
    for name, values in figures.items():
        middle = statistics.median(values)
        print(f"{name:28} {min(values):10.4g} {middle:10.4g} {max(values):10.4g}  {middle / base:.2f}")


def report(script: str, claims: Sequence[Claim]) -> None:
    """Writes `results/<room>/<name>.json` for the script at path `script` and prints its claims."""
    path = Path(script).resolve()
    target = RESULTS / path.parent.name / f"{path.stem}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {"commit": _commit(), "machine": _machine(), "claims": [asdict(claim) for claim in claims]}
    target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for claim in claims:
        print(format_claim(asdict(claim)))


def format_claim(claim: Mapping[str, object]) -> str:
    """One line: whether it holds, its name, figures and goal."""
    ratio = f", ratio {claim['ratio']:.2f}" if claim["ratio"] is not None else ""
    peer = f" against {claim['peer']:.4g}" if claim["peer"] is not None else ""
    verdict = "holds" if claim["holds"] else "DOES NOT HOLD"
    return f"{verdict}: {claim['name']}: {claim['ours']:.4g}{peer} {claim['unit']}{ratio} (goal {claim['goal']})"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": sys.version.split()[0], "system": platform.system()}
