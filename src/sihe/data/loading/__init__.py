"""Token data sets on disk, and the order in which training reads them."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BatchStream": "sihe.data.loading.stream",
        "DatasetManifest": "sihe.data.loading.manifest",
        "DatasetWriter": "sihe.data.loading.writer",
        "SampleOrder": "sihe.data.loading.order",
        "Shard": "sihe.data.loading.manifest",
        "Split": "sihe.data.loading.manifest",
        "TokenDataset": "sihe.data.loading.dataset",
        "TokenSplit": "sihe.data.loading.dataset",
        "find_dataset": "sihe.data.loading.catalog",
        "write_dataset": "sihe.data.loading.writer",
    },
)
