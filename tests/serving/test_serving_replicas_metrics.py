"""What Prometheus sees of several replicas of one version."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from sihe.serving.engine.ports import StepStats
from sihe.serving.gateway.metrics import ReplicaMetrics, ServingMetrics


def step(running: int, waiting: int, used: int) -> StepStats:
    return StepStats(0.01, running, 0, running, waiting, kv_used_tokens=used, kv_capacity_tokens=100)


def test_gauges_are_sums_until_the_last_replica_is_gone() -> None:
    registry = CollectorRegistry()
    metrics = ServingMetrics.on(registry)
    one, two = ReplicaMetrics(metrics, "chat", 3), ReplicaMetrics(metrics, "chat", 3)

    def seen() -> list[float | None]:
        labels = {"deployment": "chat", "version": "3"}
        return [
            registry.get_sample_value(f"sihe_serving_{name}", labels)
            for name in ("running", "waiting", "kv_used_ratio")
        ]

    one.on_step(step(4, 1, 100))
    two.on_step(step(2, 0, 0))
    assert seen() == [6, 1, 0.5]
    one.on_step(step(3, 0, 50))
    assert seen() == [5, 0, 0.25]
    one.on_close()
    assert seen() == [2, 0, 0.0]
    one.on_close()
    two.on_close()
    assert seen() == [None, None, None]


def test_nothing_is_kept_of_versions_that_have_gone() -> None:
    metrics = ServingMetrics.on(CollectorRegistry())
    for version in range(1, 50):
        replica = ReplicaMetrics(metrics, "chat", version)
        replica.on_step(step(1, 0, 10))
        replica.on_close()
    assert metrics.loads == {}
