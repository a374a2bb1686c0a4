"""Jobs on machines: launchers that start, watch and restart processes. Knows nothing of what those compute."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "FileCapacity": "sihe.cluster.capacity",
        "FolderNotShared": "sihe.cluster.errors",
        "Heartbeat": "sihe.cluster.heartbeats",
        "JobStopped": "sihe.cluster.errors",
        "Launcher": "sihe.cluster.ports",
        "LocalLauncher": "sihe.cluster.launchers.local",
        "NodeUnfit": "sihe.cluster.errors",
        "NotEnoughSlots": "sihe.cluster.errors",
        "ProcessJob": "sihe.cluster.types",
        "RankFailed": "sihe.cluster.types",
        "RankHung": "sihe.cluster.types",
        "RanksLost": "sihe.cluster.errors",
        "RanksStarted": "sihe.cluster.types",
        "RayLauncher": "sihe.cluster.launchers.ray.launcher",
        "RestartPolicy": "sihe.cluster.types",
        "Restarting": "sihe.cluster.types",
        "StragglerSeen": "sihe.cluster.types",
        "WatchPolicy": "sihe.cluster.types",
        "WorkersChanged": "sihe.cluster.types",
    },
)
