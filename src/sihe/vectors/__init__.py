"""The vector database: durable collections with exact search behind the interface that approximate search will keep."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Collection": "sihe.vectors.collection",
        "Database": "sihe.vectors.database",
        "Filter": "sihe.vectors.filter",
        "Hit": "sihe.vectors.types",
        "Point": "sihe.vectors.types",
        "parse_filter": "sihe.vectors.filter",
    },
)
