"""One version of a model in memory, from LOADING to GONE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sihe.core.errors import InternalError
from sihe.core.tracking import ModelVersion
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EngineClosed
from sihe.serving.gateway.types import ReplicaState, ReplicaStatus

if TYPE_CHECKING:
    from sihe.serving.engine.engine import Engine

_ORDER = list(ReplicaState)
_WARM_TOKENS = 4


class Replica:
    """Owns the engine of one version. States only move forward; `on_change` hears of each."""

    def __init__(self, version: ModelVersion, settings: EngineConfig, on_change: Callable[[], None]) -> None:
        self.version = version
        self.settings = settings
        self.state = ReplicaState.LOADING
        self._on_change = on_change
        self._engine: Engine | None = None

    @property
    def is_serving(self) -> bool:
        """Whether requests may come."""
        return self.state is ReplicaState.READY and self._engine is not None and self._engine.is_alive

    def load(self, load: Callable[[ModelVersion, EngineConfig], Engine]) -> None:
        """Brings the engine into memory. Raises what is wrong with the version."""
        self._engine = load(self.version, self.settings)

    def warm(self) -> None:
        """Answers one real request, so that the first user meets neither a cold engine nor a broken model."""
        self._move(ReplicaState.WARMING)
        prompt = (0,)  # a token that every vocabulary has
        request = GenerationRequest(prompt=prompt, max_tokens=_WARM_TOKENS, temperature=0, ignore_eos=True)
        self._serving_engine().submit(request).result()

    def open(self) -> None:
        """Lets requests in."""
        self._move(ReplicaState.READY)

    def generate(self, request: GenerationRequest) -> GenerationStream:
        """Starts a request. Raises `EngineClosed` when draining has begun: ask the next replica."""
        return self._serving_engine().submit(request)

    def retire(self, *, drain: bool = True) -> None:
        """Finishes what has begun (or, without `drain`, ends it with an error) and frees the memory. Blocks."""
        if self.state is ReplicaState.READY:
            self._move(ReplicaState.DRAINING)
        engine = self._engine
        if engine is not None:
            engine.close(drain=drain)
        self._engine = None
        self._move(ReplicaState.GONE)

    def abandon(self) -> None:
        """Ends, with an error, what a `retire` in another thread waits for."""
        engine = self._engine
        if engine is not None:
            engine.close(drain=False)

    def status(self) -> ReplicaStatus:
        """State and load."""
        engine = self._engine
        return ReplicaStatus(self.version.version, self.state, engine.num_sequences if engine else 0)

    def _serving_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise EngineClosed(f"{self.version.name}@{self.version.version} is {self.state}")
        return engine

    def _move(self, state: ReplicaState) -> None:
        if _ORDER.index(state) <= _ORDER.index(self.state):
            raise InternalError(f"a replica cannot go from {self.state} to {state}")
        self.state = state
        self._on_change()
