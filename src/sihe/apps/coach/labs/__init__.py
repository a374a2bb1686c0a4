"""Labs: functions that measure a claim on your machine and set it beside the model and the literature."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Claim": "sihe.apps.coach.labs.types",
        "Lab": "sihe.apps.coach.labs.types",
        "LabResult": "sihe.apps.coach.labs.types",
        "Series": "sihe.apps.coach.labs.types",
        "Table": "sihe.apps.coach.labs.types",
        "labs": "sihe.apps.coach.labs.registry",
    },
)
