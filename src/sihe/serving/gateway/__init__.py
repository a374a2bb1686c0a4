"""The gateway: deployments that follow a model reference, and requests that never notice a swap."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Deployment": "sihe.serving.gateway.types",
        "DeploymentStatus": "sihe.serving.gateway.types",
        "Gateway": "sihe.serving.gateway.gateway",
        "ReplicaState": "sihe.serving.gateway.types",
    },
)
