"""Jobs on machines: launchers that start, watch and restart processes. Knows nothing of what those compute."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "JobStopped": "sihe.cluster.errors",
        "Launcher": "sihe.cluster.ports",
        "LocalLauncher": "sihe.cluster.launchers.local",
        "ProcessJob": "sihe.cluster.types",
        "RankFailed": "sihe.cluster.types",
        "RanksLost": "sihe.cluster.errors",
        "RanksStarted": "sihe.cluster.types",
        "RestartPolicy": "sihe.cluster.types",
        "Restarting": "sihe.cluster.types",
    },
)
