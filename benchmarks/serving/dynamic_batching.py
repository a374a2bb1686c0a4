"""What batching of predictive requests gains, and what waiting for company costs: latency and throughput by policy.

Callers in a closed loop (each sends its next request when it has its answer) ask a predictor for one row at a time, in
the same process, so that batching is measured and not HTTP. The policies:

- `none`: one request a batch;
- `at once`: whatever waits when the model is free goes together, nobody is held back;
- `adaptive`: as deployed by default, held back for at most a millisecond while company is likely;
- `always`: held back for the whole millisecond unless the batch fills.

A lone caller shows the price of waiting, 64 callers the gain. Then arrivals at random moments (Poisson) at a rate that
`none` cannot serve: what is refused, and how late the rest is.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Claim, alternate, at_least, at_most, print_table, report
from sihe.serving.errors import QueueFull
from sihe.serving.predictive.config import PredictiveConfig
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.registration import save_sklearn, save_torch
from sihe.serving.predictive.types import InferenceRequest

POLICIES = {
    "none": PredictiveConfig(max_batch_size=1, max_delay_ms=0),
    "at once": PredictiveConfig(max_batch_size=64, max_delay_ms=0),
    "adaptive": PredictiveConfig(max_batch_size=64, max_delay_ms=1),
    "always": PredictiveConfig(max_batch_size=64, max_delay_ms=1, wait="always"),
}
FEATURES = 64


@dataclass(frozen=True)
class Load:
    """What callers saw: answers a second, and how long each took, in milliseconds."""

    rate: float
    p50_ms: float
    p99_ms: float
    batch_rows: float


class Network(torch.nn.Module):
    """A small ranking network: 64 features, two hidden layers of 1,024."""

    def __init__(self) -> None:
        super().__init__()
        widths = (FEATURES, 1024, 1024, 1)
        layers: list[torch.nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A score a row."""
        return self.layers(x)


def save_models(home: Path) -> dict[str, Path]:
    """A forest (scikit-learn) and a network (PyTorch)."""
    from sklearn.ensemble import RandomForestClassifier

    rows = np.random.default_rng(0).normal(size=(2000, FEATURES))
    forest = RandomForestClassifier(100, max_depth=8, random_state=0, n_jobs=1).fit(rows, rows[:, 0] > 0)
    save_sklearn(forest, home / "forest", example=rows[:2], outputs=["probabilities"])
    torch.manual_seed(0)
    save_torch(Network().eval(), home / "network", example={"x": torch.ones(2, FEATURES)})
    return {"forest, scikit-learn": home / "forest", "network, PyTorch": home / "network"}


def closed_loop(predictor: Predictor, row: Mapping[str, Any], callers: int, seconds: float) -> Load:
    """So many callers, each with one request in the air, for so long."""
    outputs = tuple(spec.name for spec in predictor.description.outputs)
    stop = time.perf_counter() + seconds
    took_ms: list[float] = []
    rows: list[int] = []

    def call() -> None:
        mine, sizes = [], []
        while (begun := time.perf_counter()) < stop:
            result = predictor.submit(InferenceRequest(row, outputs)).result()
            mine.append((time.perf_counter() - begun) * 1e3)
            sizes.append(result.batch_rows)
        took_ms.extend(mine)
        rows.extend(sizes)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _load(took_ms, rows, time.perf_counter() - begun)


def open_loop(predictor: Predictor, row: Mapping[str, Any], rate: float, seconds: float) -> tuple[Load, int]:
    """Poisson arrivals; what was answered, and how many were refused."""
    outputs = tuple(spec.name for spec in predictor.description.outputs)
    draw = random.Random(0)
    took_ms: list[float] = []
    rows: list[int] = []
    refused, sent = 0, []
    begun = at = time.perf_counter()
    while at < begun + seconds:
        at += draw.expovariate(rate)
        time.sleep(max(0.0, at - time.perf_counter()))
        try:
            future = predictor.submit(InferenceRequest(row, outputs))
        except QueueFull:
            refused += 1
            continue
        # From the moment at which it was due, so that a slow sender does not make the model look fast.
        future.add_done_callback(partial(_note, took_ms, rows, at))
        sent.append(future)
    for future in sent:
        future.result()
    return _load(took_ms, rows, time.perf_counter() - begun), refused


def _note(took_ms: list[float], rows: list[int], due_s: float, done: Any) -> None:
    took_ms.append((time.perf_counter() - due_s) * 1e3)
    rows.append(done.result().batch_rows)


def _load(took_ms: list[float], rows: list[int], seconds: float) -> Load:
    ordered = sorted(took_ms)
    return Load(
        rate=len(ordered) / seconds,
        p50_ms=ordered[len(ordered) // 2],
        p99_ms=ordered[int(len(ordered) * 0.99)],
        batch_rows=statistics.fmean(rows),
    )


def measure(model: str, folder: Path, callers: int, seconds: float) -> dict[str, Load]:
    """Prints one table of a model under so many callers; what each policy did, as medians over the repeats."""
    seen: dict[str, list[Load]] = {policy: [] for policy in POLICIES}
    predictors = {policy: Predictor.load(folder, config) for policy, config in POLICIES.items()}
    row = {name: array[:1] for name, array in predictors["none"]._example.items()}

    def once(policy: str) -> float:
        seen[policy].append(closed_loop(predictors[policy], row, callers, seconds))
        return seen[policy][-1].rate

    contenders: dict[str, Callable[[], float]] = {policy: partial(once, policy) for policy in POLICIES}
    try:
        for predictor in predictors.values():
            closed_loop(predictor, row, callers, 0.2)
        rates = alternate(contenders)
    finally:
        for predictor in predictors.values():
            predictor.close()
    print(f"\n{model}, {callers} callers")
    print_table(rates, unit="answers/s", baseline="none")
    found = {policy: _middle(loads) for policy, loads in seen.items()}
    for policy, load in found.items():
        print(
            f"{policy:28} p50 {load.p50_ms:8.3f} ms   p99 {load.p99_ms:8.3f} ms   {load.batch_rows:5.1f} rows a batch"
        )
    return found


def _middle(loads: list[Load]) -> Load:
    fields = ("rate", "p50_ms", "p99_ms", "batch_rows")
    return Load(*(statistics.median(getattr(load, field) for load in loads) for field in fields))


def measure_open(model: str, folder: Path, rate: float, seconds: float) -> None:
    """Prints what a rate of arrivals does to each policy."""
    print(f"\n{model}, {rate:.0f} arrivals/s at random")
    for policy, config in POLICIES.items():
        with Predictor.load(folder, config) as predictor:
            predictor.warm()
            row = {name: array[:1] for name, array in predictor._example.items()}
            load, refused = open_loop(predictor, row, rate, seconds)
        print(
            f"{policy:28} {load.rate:7.0f} answers/s   p50 {load.p50_ms:8.2f} ms   p99 {load.p99_ms:8.2f} ms   "
            f"{load.batch_rows:5.1f} rows a batch   {refused} refused"
        )


def main() -> None:
    """Both models, one caller and many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    chosen = parser.parse_args()
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as home:
        for model, folder in save_models(Path(home)).items():
            lone = measure(model, folder, 1, chosen.seconds)
            many = measure(model, folder, chosen.callers, chosen.seconds)
            mine, peer = many["adaptive"].rate, many["none"].rate
            name = f"{model}: adaptive against one request a batch"
            claims.append(at_least(f"{name}, {chosen.callers} callers", mine, peer, unit="answers/s", ratio=3.0))
            price = lone["adaptive"].p50_ms / lone["none"].p50_ms
            claims.append(at_most(f"{name}, one caller, median latency", price, unit="x", limit=1.1))
            measure_open(model, folder, 1.5 * peer, 2 * chosen.seconds)
    report(__file__, claims)


if __name__ == "__main__":
    main()
