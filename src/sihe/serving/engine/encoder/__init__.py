"""The encoder: one model in memory that turns texts into vectors, or pairs of texts into scores."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "EmbeddingRequest": "sihe.serving.engine.encoder.types",
        "Encoded": "sihe.serving.engine.encoder.types",
        "EncoderEngine": "sihe.serving.engine.encoder.engine",
        "EncodeJob": "sihe.serving.engine.encoder.job",
        "RerankRequest": "sihe.serving.engine.encoder.types",
    },
)
