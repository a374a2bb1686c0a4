"""Documents to answers: hybrid retrieval over an index of chunks, and answers whose citations are checked."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Answer": "sihe.apps.rag.types",
        "Citation": "sihe.apps.rag.types",
        "IndexReport": "sihe.apps.rag.types",
        "Passage": "sihe.apps.rag.types",
        "RagService": "sihe.apps.rag.service",
    },
)
