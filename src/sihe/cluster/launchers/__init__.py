"""Launchers: ways to start the ranks of a job, behind `sihe.cluster.ports.Launcher`."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LocalLauncher": "sihe.cluster.launchers.local",
        "RayLauncher": "sihe.cluster.launchers.ray.launcher",
        "chosen": "sihe.cluster.launchers.choice",
        "supervised": "sihe.cluster.launchers.rank",
    },
)
