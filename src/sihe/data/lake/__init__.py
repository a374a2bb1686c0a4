"""Tables that remember every version of themselves (Delta Lake), in a folder or an object store."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Commit": "sihe.data.lake.types",
        "Lake": "sihe.data.lake.lake",
        "LakeTable": "sihe.data.lake.table",
    },
)
