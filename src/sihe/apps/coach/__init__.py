"""The coach: the map of the field, its questions, and labs whose numbers are measured on your machine."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CoachService": "sihe.apps.coach.service",
        "LabResult": "sihe.apps.coach.labs.types",
        "Map": "sihe.apps.coach.types",
        "Topic": "sihe.apps.coach.types",
    },
)
