"""The data wing: tables of the lake, text into token data sets, and their loading by training."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BatchStream": "sihe.data.loading.stream",
        "Document": "sihe.data.text.types",
        "Lake": "sihe.data.lake.lake",
        "LakeTable": "sihe.data.lake.table",
        "PreparedDataset": "sihe.data.text.types",
        "SampleOrder": "sihe.data.loading.order",
        "Skipped": "sihe.data.text.types",
        "TextService": "sihe.data.text.service",
        "TokenDataset": "sihe.data.loading.dataset",
    },
)
