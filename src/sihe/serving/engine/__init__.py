"""The engine: one model in memory, one thread that batches every request continuously."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ChatMessage": "sihe.serving.engine.types",
        "Engine": "sihe.serving.engine.engine",
        "EngineConfig": "sihe.serving.engine.config",
        "Generation": "sihe.serving.engine.types",
        "GenerationEvent": "sihe.serving.engine.types",
        "GenerationRequest": "sihe.serving.engine.types",
        "GenerationStream": "sihe.serving.engine.stream",
        "Usage": "sihe.serving.engine.types",
    },
)
