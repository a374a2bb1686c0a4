"""The court: settings, errors, records, objects, tracking and telemetry. Knows no other room."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Clock": "sihe.core.clock",
        "FakeClock": "sihe.core.clock",
        "ModelVersion": "sihe.core.tracking",
        "ObjectStore": "sihe.core.storage",
        "Records": "sihe.core.records",
        "Run": "sihe.core.tracking",
        "Settings": "sihe.core.settings",
        "SystemClock": "sihe.core.clock",
        "Tracking": "sihe.core.tracking",
        "Workspace": "sihe.core.workspace",
    },
)
