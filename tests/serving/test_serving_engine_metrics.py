"""What Prometheus is told of the cache and of drafts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from sihe.serving.engine.ports import RequestStats, StepStats
from sihe.serving.gateway.metrics import ReplicaMetrics, ServingMetrics


def test_cache_and_drafts_are_counted_and_gauges_go_with_their_replica() -> None:
    registry = CollectorRegistry()
    replica = ReplicaMetrics(ServingMetrics.on(registry), "chat", 3)
    step = StepStats(
        duration_s=0.02,
        decode_tokens=4,
        prefill_tokens=0,
        running=4,
        waiting=1,
        kv_used_tokens=64,
        kv_capacity_tokens=256,
        kv_cached_tokens=32,
        preempted=2,
        drafted_tokens=10,
        accepted_tokens=7,
    )
    replica.on_step(step)
    replica.on_step(step)
    replica.on_request(RequestStats("stop", 100, 20, 48, queue_s=0.0, ttft_s=0.1, tpot_s=None))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"sihe_serving_{name}", {"deployment": "chat", **labels})

    assert value("kv_used_ratio", version="3") == 0.25
    assert value("kv_cached_ratio", version="3") == 0.125
    assert value("preemptions_total") == 4
    assert (value("draft_tokens_total", outcome="accepted"), value("draft_tokens_total", outcome="rejected")) == (14, 6)
    assert (value("tokens_total", kind="prompt"), value("tokens_total", kind="cached_prompt")) == (100, 48)
    replica.on_close()
    assert value("kv_cached_ratio", version="3") is None
