"""Lab `batch.dynamic`: what waiting for company costs and brings, with the batcher that serves predictive models."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from sihe.apps.coach.labs.ranks import run_ranks
from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text
from sihe.serving.predictive.batching import BatchPolicy, BatchQueue, Item

BATCHES = (1, 2, 4, 8, 16, 32)
LOADS = (0.1, 0.5, 0.9, 2.0)
_LABELS = {
    "alone": Text(zh="不攒批", en="No batches"),
    "fixed": Text(zh="固定等待", en="A fixed delay"),
    "adaptive": Text(zh="自适应", en="Adaptive"),
}


@dataclass(frozen=True, slots=True)
class Served:
    """What a policy did with a stream of requests."""

    mean_s: float
    p99_s: float
    mean_batch: float


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Measures a model at each of `BATCHES`, then lets the batcher serve Poisson arrivals at that cost."""
    delay_s, requests = float(parameters["delay"]) / 1e3, int(parameters["requests"])
    (seconds,) = run_ranks(
        "sihe.apps.coach.labs.dynamic_batch_ranks:costs",
        {"batches": list(BATCHES)},
        world_size=1,
        limit_s=limit_s,
        threads=1,
    )
    costs = dict(zip(BATCHES, seconds, strict=True))
    policies = {
        "alone": BatchPolicy(1, 0.0, adaptive=False),
        "fixed": BatchPolicy(BATCHES[-1], delay_s, adaptive=False),
        "adaptive": BatchPolicy(BATCHES[-1], delay_s),
    }
    found = {
        name: [serve(policy, arrivals(load / costs[1], requests), costs) for load in LOADS]
        for name, policy in policies.items()
    }
    lone = {name: serve(policy, [10.0 * delay_s * n for n in range(200)], costs) for name, policy in policies.items()}
    low, high = 0, len(LOADS) - 1
    return Measurement(
        values={
            "one": costs[1] * 1e3,
            "many": costs[BATCHES[-1]] * 1e3,
            "rate-gain": BATCHES[-1] * costs[1] / costs[BATCHES[-1]],
            "lone-fixed": (lone["fixed"].mean_s - costs[1]) * 1e3,
            "lone-adaptive": (lone["adaptive"].mean_s - costs[1]) * 1e3,
            "low-alone": found["alone"][low].p99_s * 1e3,
            "low-fixed": found["fixed"][low].p99_s * 1e3,
            "low-adaptive": found["adaptive"][low].p99_s * 1e3,
            "high-alone": found["alone"][high].p99_s * 1e3,
            "high-fixed": found["fixed"][high].p99_s * 1e3,
            "high-adaptive": found["adaptive"][high].p99_s * 1e3,
            "high-batch": found["adaptive"][high].mean_batch,
        },
        tables=(_table(found),),
        series=tuple(_series(name, found[name]) for name in policies),
    )


def arrivals(rate_per_s: float, number: int) -> list[float]:
    """Times of a Poisson stream; the same gaps, scaled, for every rate."""
    draws, now_s, times = random.Random(7), 0.0, []
    for _ in range(number):
        now_s += draws.expovariate(rate_per_s)
        times.append(now_s)
    return times


def cost_of(rows: int, costs: Mapping[int, float]) -> float:
    """Seconds of a batch of `rows`, between those that were measured by a straight line."""
    sizes = sorted(costs)
    above = next(size for size in sizes if size >= rows)
    below = max(size for size in sizes if size <= rows)
    if above == below:
        return costs[rows]
    share = (rows - below) / (above - below)
    return costs[below] + share * (costs[above] - costs[below])


def serve(policy: BatchPolicy, times: list[float], costs: Mapping[int, float]) -> Served:
    """The batcher's own queue, fed by arrivals at `times`, with one device that takes `costs` for a batch."""
    queue = BatchQueue(policy)
    waits: list[float] = []
    sizes: list[int] = []
    free_s, now_s, following = 0.0, times[0], 0
    while following < len(times) or len(queue):
        while following < len(times) and times[following] <= now_s:
            queue.add(Item(following, 0, 1, times[following]))
            following += 1
        batch = queue.take(now_s) if now_s >= free_s and len(queue) else None
        if batch is not None:
            free_s = now_s + cost_of(batch.rows, costs)
            sizes.append(batch.rows)
            waits += [free_s - item.arrived_s for item in batch.items]
        moments = [times[following]] if following < len(times) else []
        if len(queue):
            wake_s = queue.wake_s()
            assert wake_s is not None, "something waits"
            # A moment that rounds to now would be asked for again and again.
            moments.append(free_s if free_s > now_s else max(wake_s, now_s + 1e-9))
        now_s = min(moments, default=now_s)
    waits.sort()
    return Served(sum(waits) / len(waits), waits[int(0.99 * (len(waits) - 1))], sum(sizes) / len(sizes))


def _table(found: Mapping[str, list[Served]]) -> Table:
    return Table(
        key="latency",
        title=Text(zh="延迟的第 99 百分位与平均批次", en="99th percentile of latency, and the mean batch"),
        columns=(
            Column(label=Text(zh="到达率，占单独服务能力之比", en="Arrivals over what serves alone")),
            *(Column(label=_LABELS[name], unit="ms", provenance="modelled") for name in found),
            Column(label=Text(zh="平均批次，固定", en="Mean batch, fixed"), provenance="modelled"),
            Column(label=Text(zh="平均批次，自适应", en="Mean batch, adaptive"), provenance="modelled"),
        ),
        rows=tuple(
            (
                load,
                *(round(served[place].p99_s * 1e3, 2) for served in found.values()),
                round(found["fixed"][place].mean_batch, 2),
                round(found["adaptive"][place].mean_batch, 2),
            )
            for place, load in enumerate(LOADS)
        ),
    )


def _series(name: str, served: list[Served]) -> Series:
    return Series(
        key=name,
        chart="latency",
        label=_LABELS[name],
        x=Axis(label=Text(zh="到达率 / 单独服务的能力", en="Arrivals over what serves alone"), log=True),
        y=Axis(label=Text(zh="延迟，第 99 百分位", en="Latency, 99th percentile"), unit="ms", log=True),
        provenance="modelled",
        points=tuple((load, one.p99_s * 1e3) for load, one in zip(LOADS, served, strict=True)),
    )
