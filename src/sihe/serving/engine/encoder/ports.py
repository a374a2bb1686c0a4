"""What a caller sees of an encoder, in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sihe.serving.engine.encoder.job import EncodeJob
from sihe.serving.engine.encoder.types import Capability, EmbeddingRequest, RerankRequest


class Encoder(Protocol):
    """A loaded version that makes vectors or scores. Whatever is served without `capability` generates."""

    capability: Capability

    def submit(
        self, request: EmbeddingRequest | RerankRequest, *, on_done: Callable[[], None] | None = None
    ) -> EncodeJob:
        """Starts a request. Raises what is wrong with it, `QueueFull`, `EngineClosed`, `EngineDead`."""
        ...
