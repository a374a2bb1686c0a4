"""What Prometheus sees of predictive models. Counters and histograms a deployment; gauges a loaded version."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from sihe.serving.predictive.ports import BatchStats, Outcome

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PREFIX = "sihe_predictive_"
_per_registry: dict[int, PredictiveMetrics] = {}


class PredictiveMetrics:
    """The metrics of every predictive deployment on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry  # kept, so that its id is not given to another one
        name = ("deployment",)
        self.requests = Counter(f"{_PREFIX}requests", "requests ended", (*name, "outcome"), registry=registry)
        self.rows = Counter(f"{_PREFIX}rows", "rows computed", name, registry=registry)
        self.batch = Histogram(
            f"{_PREFIX}batch_rows", "rows that were computed together", name, buckets=_ROWS, registry=registry
        )
        self.queue = Histogram(
            f"{_PREFIX}queue_seconds", "from submission to a batch", name, buckets=_SECONDS, registry=registry
        )
        self.compute = Histogram(
            f"{_PREFIX}compute_seconds", "one batch inside the model", name, buckets=_SECONDS, registry=registry
        )
        self.waiting = Gauge(f"{_PREFIX}waiting", "requests that wait", (*name, "version"), registry=registry)

    @classmethod
    def on(cls, registry: CollectorRegistry = REGISTRY) -> PredictiveMetrics:
        """The one set of metrics of a registry, however many gateways share it."""
        if id(registry) not in _per_registry:
            _per_registry[id(registry)] = cls(registry)
        return _per_registry[id(registry)]


class PredictorMetrics:
    """Watches one predictor (a `PredictorObserver`) of one deployment. `on_end` hears when it has ended."""

    def __init__(
        self, metrics: PredictiveMetrics, deployment: str, version: int, on_end: Callable[[], None] | None = None
    ) -> None:
        self._metrics = metrics
        self._deployment = deployment
        self._version = str(version)
        self._on_end = on_end

    def on_batch(self, stats: BatchStats) -> None:
        """Times the batch and shows who waits."""
        metrics, name = self._metrics, self._deployment
        metrics.rows.labels(name).inc(stats.rows)
        metrics.batch.labels(name).observe(stats.rows)
        metrics.compute.labels(name).observe(stats.compute_s)
        # Looked up each time: another replica of this version may have removed it when it went.
        metrics.waiting.labels(name, self._version).set(stats.waiting)

    def on_request(self, outcome: Outcome, queue_s: float | None) -> None:
        """Counts the request and its wait."""
        self._metrics.requests.labels(self._deployment, outcome).inc()
        if queue_s is not None:
            self._metrics.queue.labels(self._deployment).observe(queue_s)

    def on_close(self) -> None:
        """Takes the gauge of a version that is gone off the page."""
        self._metrics.waiting.remove(self._deployment, self._version)
        if self._on_end is not None:
            self._on_end()
