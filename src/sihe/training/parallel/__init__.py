"""Splitting a model and its training over ranks, from outside of the model."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ParallelMesh": "sihe.training.parallel.mesh",
        "ParallelModel": "sihe.training.parallel.apply",
        "ParallelPlan": "sihe.training.parallel.plan",
    },
)
