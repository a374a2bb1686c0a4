"""Ranks on the nodes of a Ray cluster. Needs the extra `ray`."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"RayLauncher": "sihe.cluster.launchers.ray.launcher"})
