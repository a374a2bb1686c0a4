"""Serving: an engine that turns requests into tokens, and a gateway that keeps deployments on the right version."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Engine": "sihe.serving.engine.engine",
        "EngineConfig": "sihe.serving.engine.config",
        "Gateway": "sihe.serving.gateway.gateway",
        "GenerationEvent": "sihe.serving.engine.types",
        "GenerationRequest": "sihe.serving.engine.types",
        "GenerationStream": "sihe.serving.engine.stream",
        "Usage": "sihe.serving.engine.types",
    },
)
