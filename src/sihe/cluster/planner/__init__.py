"""Predicts memory and time of a training step before anybody pays for it, and searches the plan to pay for.

Pure but for `measurement`: shapes, clusters and plans are values of this room's own, which rooms above convert from
theirs.
"""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CLUSTERS": "sihe.cluster.planner.presets",
        "ClusterSpec": "sihe.cluster.planner.types",
        "Layout": "sihe.cluster.planner.types",
        "MODELS": "sihe.cluster.planner.presets",
        "MemoryEstimate": "sihe.cluster.planner.memory",
        "StepEstimate": "sihe.cluster.planner.step",
        "TransformerShape": "sihe.cluster.planner.types",
        "compare": "sihe.cluster.planner.comparison",
        "estimate_step": "sihe.cluster.planner.step",
        "predict_memory": "sihe.cluster.planner.memory",
        "search_layouts": "sihe.cluster.planner.search",
    },
)
