"""What Prometheus sees of traffic: requests by arm, and what became of copies and log records."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_per_registry: dict[int, TrafficMetrics] = {}


class TrafficMetrics:
    """The metrics of traffic on one registry. Labels are names that deployers choose, never a client's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry  # kept, so that its id is not given to another one
        arm = ("deployment", "arm")
        self.requests = Counter("sihe_traffic_requests", "requests by arm", (*arm, "ending"), registry=registry)
        self.rerouted = Counter(
            "sihe_traffic_rerouted", "requests that the stable arm took from one that could not", arm, registry=registry
        )
        self.latency = Histogram(
            "sihe_traffic_latency_seconds", "whole answers", arm, buckets=_SECONDS, registry=registry
        )
        self.ttft = Histogram("sihe_traffic_ttft_seconds", "first tokens", arm, buckets=_SECONDS, registry=registry)
        self.copies = Counter("sihe_shadow_copies", "copies of requests", ("deployment", "fate"), registry=registry)
        self.records = Counter("sihe_request_log_records", "log records", ("fate",), registry=registry)

    @classmethod
    def on(cls, registry: CollectorRegistry = REGISTRY) -> TrafficMetrics:
        """The one set of metrics of a registry, however many gateways share it."""
        if id(registry) not in _per_registry:
            _per_registry[id(registry)] = cls(registry)
        return _per_registry[id(registry)]
