"""One replica of a version, from LOADING to GONE: what it holds, how much of it is in use, and whether it does well."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

from sihe.core.errors import InternalError
from sihe.core.tracking import ModelVersion
from sihe.serving.engine.ports import RequestStats, StepStats
from sihe.serving.engine.stream import GenerationStream, Relay
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EngineClosed, WrongCapability
from sihe.serving.gateway.replicas.config import Backend
from sihe.serving.gateway.replicas.ledger import Ledger
from sihe.serving.gateway.replicas.ports import Load, ReplicaEngine, Served
from sihe.serving.gateway.replicas.types import ReplicaState, ReplicaStatus
from sihe.serving.gateway.settings import ModelSettings

_ORDER = list(ReplicaState)


class Replica:
    """Owns what was loaded for one version. States only move forward; `on_change` hears of each, and of its death."""

    def __init__(
        self,
        version: ModelVersion,
        settings: ModelSettings,
        backend: Backend,
        on_change: Callable[[], None],
        *,
        id: int = 0,
    ) -> None:
        self.id = id
        self.version = version
        self.settings = settings
        self.backend = backend
        self.state = ReplicaState.LOADING
        self.is_warm = False
        self.kv_used = 0.0
        self._on_change = on_change
        self._served: Served | None = None
        self.ledger = Ledger()
        self.changing_adapters = threading.Lock()  # held by whoever loads or unloads what the records want

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def served_by(self) -> str:
        """The version as answers name it."""
        return f"{self.version.name}@{self.version.version}"

    @property
    def is_alive(self) -> bool:
        """Whether what it holds still works."""
        return self._served is not None and self._served.is_alive

    @property
    def capability(self) -> str | None:
        """What it is for: generation, embeddings, rerank, …; None while nothing is loaded."""
        served = self._served
        return None if served is None else str(getattr(served, "capability", "generation"))

    @property
    def is_serving(self) -> bool:
        """Whether requests may come."""
        return self.state is ReplicaState.READY and self.is_alive

    def load(self, load: Load) -> None:
        """Brings the version into memory. Raises what is wrong with it, or that there is no room."""
        self._served = load(self.version, self.settings, self.backend, _Gauge(self))

    def warm(self) -> None:
        """Answers one real request. Raises what is wrong with the model."""
        self._move(ReplicaState.WARMING)
        self.held().warm()
        self.is_warm = True
        self._on_change()

    def open(self) -> None:
        """Lets requests in."""
        self._move(ReplicaState.READY)

    def begin_drain(self) -> None:
        """No request begins here from now on; `retire` waits for those that have begun."""
        self._move(ReplicaState.DRAINING)

    def retire(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Finishes what has begun, for at most `timeout_s` (or, without `drain`, ends it with an error), and frees the
        memory. Blocks. Safe to call again: two who close a route may meet here."""
        if self.state is ReplicaState.READY:
            self._move(ReplicaState.DRAINING)
        served = self._served
        if served is not None:
            served.close(drain=drain, timeout_s=timeout_s)
        self._served = None
        if self.state is not ReplicaState.GONE:
            self._move(ReplicaState.GONE)

    def abandon(self) -> None:
        """Ends, with an error, what a `retire` in another thread waits for."""
        served = self._served
        if served is not None:
            served.close(drain=False)

    def status(self) -> ReplicaStatus:
        """State and load."""
        served = self._served
        return ReplicaStatus(self.version.version, self.state, served.num_sequences if served else 0)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def held(self) -> Served:
        """What was loaded. Raises `EngineClosed` when it is not there (any more): ask the next replica."""
        served = self._served
        if served is None:
            raise EngineClosed(f"{self.served_by} is {self.state}")
        return served

    def submit(
        self,
        request: GenerationRequest,
        work: float,
        now_s: float,
        *,
        on_done: Callable[[], None] | None = None,
        relay: Relay | None = None,
    ) -> GenerationStream:
        """Starts a request of so much `work`. Raises what the engine raises."""

        def done() -> None:
            self.ledger.release(work)
            if on_done is not None:
                on_done()

        self.ledger.take(work, now_s)
        try:
            return self._generator().submit(request, on_done=done, relay=relay)
        except BaseException:
            self.ledger.withdraw(work)
            raise

    def _generator(self) -> ReplicaEngine:
        held, capability = self.held(), self.capability
        if capability not in ("generation", None):
            raise WrongCapability(self.served_by, wanted="generation", has=str(capability))
        return cast(ReplicaEngine, held)

    @property
    def in_flight(self) -> int:
        """Requests that were sent here and have not left."""
        return self.ledger.in_flight

    def _move(self, state: ReplicaState) -> None:
        if _ORDER.index(state) <= _ORDER.index(self.state):
            raise InternalError(f"a replica cannot go from {self.state} to {state}")
        self.state = state
        self._on_change()

    def _died(self) -> None:
        self._on_change()


class _Gauge:
    """Watches a replica's engine (an `EngineObserver`): how full its cache is, and when it ends."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def on_step(self, stats: StepStats) -> None:
        """Keeps the share of the cache in use."""
        self._replica.kv_used = stats.kv_used_tokens / max(1, stats.kv_capacity_tokens)

    def on_request(self, stats: RequestStats) -> None:
        """Of no use here."""

    def on_close(self) -> None:
        """The engine has ended: if nobody closed it, it is to be replaced at once."""
        self._replica._died()
