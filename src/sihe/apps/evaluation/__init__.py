"""How good a model is, in figures that can be repeated."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "EvaluationService": "sihe.apps.evaluation.service",
        "Perplexity": "sihe.apps.evaluation.types",
        "VocabularyMismatch": "sihe.apps.evaluation.errors",
    },
)
