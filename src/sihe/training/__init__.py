"""Training: a configuration becomes a run, its ranks, its checkpoints, and a registered model version."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ModelShape": "sihe.training.config",
        "StepDone": "sihe.training.types",
        "TrainConfig": "sihe.training.config",
        "TrainResult": "sihe.training.types",
        "TrainRun": "sihe.training.types",
        "TrainingService": "sihe.training.service",
        "load_config": "sihe.training.presets.reader",
    },
)
