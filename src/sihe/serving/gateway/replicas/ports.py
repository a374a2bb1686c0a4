"""What a route needs of whatever a replica holds, in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from sihe.serving.engine.ports import EngineObserver
from sihe.serving.engine.stream import GenerationStream, Relay
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.gateway.replicas.config import Backend
from sihe.serving.gateway.settings import ModelSettings

if TYPE_CHECKING:
    from sihe.core.tracking import ModelVersion


class Served(Protocol):
    """Anything loaded that answers requests: a generating engine, an encoder, a predictive model."""

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        ...

    @property
    def num_sequences(self) -> int:
        """Requests that wait or run."""
        ...

    def warm(self) -> None:
        """Answers one real request, so that the first user meets neither a cold engine nor a broken model."""
        ...

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Takes no more requests and frees everything: after what has begun, for at most `timeout_s`, or at once."""
        ...


class ReplicaEngine(Served, Protocol):
    """A loaded version that generates."""

    def submit(
        self, request: GenerationRequest, *, on_done: Callable[[], None] | None = None, relay: Relay | None = None
    ) -> GenerationStream:
        """Starts a request, whose events go to `relay` if one is given.

        `on_done` is called once, from any thread, when it has left the engine.

        Raises what is wrong with the request, `QueueFull`, and `EngineClosed`, `EngineDead` or `ReplicaLost` where
        another replica may take it.
        """
        ...


class Load(Protocol):
    """Brings a version into memory where the backend says."""

    def __call__(
        self, version: ModelVersion, settings: ModelSettings, backend: Backend, observer: EngineObserver, /
    ) -> Served:
        """What was loaded. Raises what is wrong with the version, or that there is no room."""
        ...
