"""What Prometheus sees of serving. Counters and histograms a deployment; gauges a loaded version, gone when it goes."""

from __future__ import annotations

import threading

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sihe.serving.engine.ports import RequestStats, StepStats

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_per_registry: dict[int, ServingMetrics] = {}


class ServingMetrics:
    """The metrics of every deployment on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry  # kept, so that its id is not given to another one
        self.lock = threading.Lock()
        self.loads: dict[
            tuple[str, str], dict[int, StepStats]
        ] = {}  # (deployment, version) → the newest of each replica
        deployment = ("deployment",)
        replica = ("deployment", "version")
        self.requests = _counter(registry, "requests", "requests ended", (*deployment, "outcome"))
        self.tokens = _counter(registry, "tokens", "tokens of ended requests", (*deployment, "kind"))
        self.queue = _histogram(registry, "queue_seconds", "from submission to a place in the batch", deployment)
        self.ttft = _histogram(registry, "ttft_seconds", "from submission to the first token", deployment)
        self.tpot = _histogram(registry, "tpot_seconds", "mean time of a request's later tokens", deployment)
        self.step = _histogram(registry, "step_seconds", "one engine step", deployment)
        self.running = _gauge(registry, "running", "sequences in the batch", replica)
        self.waiting = _gauge(registry, "waiting", "sequences that wait for a place in the batch", replica)
        self.preemptions = _counter(registry, "preemptions", "sequences that gave their blocks to others", deployment)
        self.drafts = _counter(registry, "draft_tokens", "tokens tried ahead of the model", (*deployment, "outcome"))
        self.kv_used = _gauge(registry, "kv_used_ratio", "share of the KV cache that sequences hold", replica)
        self.kv_cached = _gauge(registry, "kv_cached_ratio", "share of the KV cache kept for later prompts", replica)

    @classmethod
    def on(cls, registry: CollectorRegistry = REGISTRY) -> ServingMetrics:
        """The one set of metrics of a registry, however many gateways share it."""
        if id(registry) not in _per_registry:
            _per_registry[id(registry)] = cls(registry)
        return _per_registry[id(registry)]


class ReplicaMetrics:
    """Watches one engine (an `EngineObserver`) of one deployment."""

    def __init__(self, metrics: ServingMetrics, deployment: str, version: int) -> None:
        self._metrics = metrics
        self._deployment = deployment
        self._labels = (deployment, str(version))
        self._step = metrics.step.labels(deployment)

    def on_step(self, stats: StepStats) -> None:
        """Times the step and shows how full the engine is."""
        self._step.observe(stats.duration_s)
        metrics = self._metrics
        self._show(stats)
        if stats.preempted:
            metrics.preemptions.labels(self._deployment).inc(stats.preempted)
        if stats.drafted_tokens:
            rejected = stats.drafted_tokens - stats.accepted_tokens
            metrics.drafts.labels(self._deployment, "accepted").inc(stats.accepted_tokens)
            metrics.drafts.labels(self._deployment, "rejected").inc(rejected)

    def on_request(self, stats: RequestStats) -> None:
        """Counts the request, its tokens and its waits."""
        metrics, name = self._metrics, self._deployment
        metrics.requests.labels(name, stats.outcome).inc()
        metrics.tokens.labels(name, "prompt").inc(stats.prompt_tokens)
        metrics.tokens.labels(name, "cached_prompt").inc(stats.cached_tokens)
        metrics.tokens.labels(name, "completion").inc(stats.completion_tokens)
        timed = ((metrics.queue, stats.queue_s), (metrics.ttft, stats.ttft_s), (metrics.tpot, stats.tpot_s))
        for histogram, value in timed:
            if value is not None:
                histogram.labels(name).observe(value)

    def on_close(self) -> None:
        """Takes the gauges of a version's last replica off the page."""
        self._show(None)

    def _show(self, stats: StepStats | None) -> None:
        """The gauges of a version are those of all its replicas together; with None this one is gone."""
        metrics = self._metrics
        gauges = (metrics.running, metrics.waiting, metrics.kv_used, metrics.kv_cached)
        with metrics.lock:
            loads = metrics.loads.setdefault(self._labels, {})
            loads.pop(id(self), None)
            if stats is not None:
                loads[id(self)] = stats
            if not loads:
                del metrics.loads[self._labels]  # versions come and go for as long as the process runs
                for gauge in gauges:
                    gauge.remove(*self._labels)
                return
            capacity = sum(load.kv_capacity_tokens for load in loads.values())
            values = (
                sum(load.running for load in loads.values()),
                sum(load.waiting for load in loads.values()),
                sum(load.kv_used_tokens for load in loads.values()) / capacity,
                sum(load.kv_cached_tokens for load in loads.values()) / capacity,
            )
            for gauge, value in zip(gauges, values, strict=True):
                gauge.labels(*self._labels).set(value)


def _counter(registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...]) -> Counter:
    return Counter(f"sihe_serving_{name}", text, labels, registry=registry)


def _gauge(registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
    return Gauge(f"sihe_serving_{name}", text, labels, registry=registry)


def _histogram(registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
    return Histogram(f"sihe_serving_{name}", text, labels, buckets=_SECONDS, registry=registry)
