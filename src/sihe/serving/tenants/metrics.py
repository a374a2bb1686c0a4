"""What Prometheus sees of tenants. Only names that an operator gave become labels, and only so many of them."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from sihe.serving.tenants.usage import Outcome, Tally

MAX_TENANT_LABELS = 200
OTHERS = "(others)"  # no tenant's name has brackets
_per_registry: dict[int, TenantMetrics] = {}


class TenantMetrics:
    """The counters on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry  # kept, so that its id is not given to another one
        self._named: set[str] = set()
        self._requests = Counter("sihe_tenant_requests", "requests ended", ("tenant", "outcome"), registry=registry)
        self._tokens = Counter("sihe_tenant_tokens", "tokens of ended requests", ("tenant", "kind"), registry=registry)
        self._refused = Counter("sihe_tenant_refused", "requests refused", ("tenant", "reason"), registry=registry)
        self._denied = Counter("sihe_keys_denied", "requests without a good key", ("reason",), registry=registry)
        self._alone = Counter(
            "sihe_rates_counted_alone", "requests counted here because Redis did not answer", registry=registry
        )

    @classmethod
    def on(cls, registry: CollectorRegistry = REGISTRY) -> TenantMetrics:
        """The one set of counters of a registry."""
        if id(registry) not in _per_registry:
            _per_registry[id(registry)] = cls(registry)
        return _per_registry[id(registry)]

    def ended(self, tenant: str, outcome: Outcome, tally: Tally) -> None:
        """Counts a request that was let in."""
        name = self._label(tenant)
        self._requests.labels(name, outcome).inc()
        for kind, tokens in (
            ("prompt", tally.prompt_tokens),
            ("cached", tally.cached_tokens),
            ("completion", tally.completion_tokens),
        ):
            if tokens:
                self._tokens.labels(name, kind).inc(tokens)

    def refused(self, tenant: str, reason: str) -> None:
        """Counts a request that a limit, a quota or a missing right kept out."""
        self._refused.labels(self._label(tenant), reason).inc()

    def denied(self, reason: str) -> None:
        """Counts a request that showed no good key."""
        self._denied.labels(reason).inc()

    def counted_alone(self) -> None:
        """Counts a request whose rates only this process knows of."""
        self._alone.inc()

    def _label(self, tenant: str) -> str:
        if tenant not in self._named:
            if len(self._named) >= MAX_TENANT_LABELS:
                return OTHERS
            self._named.add(tenant)
        return tenant
