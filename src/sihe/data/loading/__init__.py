"""Token data sets on disk, and the order in which training reads them."""

from sihe.core.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Batch": "sihe.data.loading.samples",
        "BatchShare": "sihe.data.loading.share",
        "BatchStream": "sihe.data.loading.stream",
        "DatasetManifest": "sihe.data.loading.manifest",
        "DatasetWriter": "sihe.data.loading.writer",
        "LoadReport": "sihe.data.loading.prefetch",
        "MixtureSource": "sihe.data.loading.mixture",
        "MixtureStage": "sihe.data.loading.mixture",
        "MixtureStream": "sihe.data.loading.mixture",
        "PackedSamples": "sihe.data.loading.packing",
        "PackingReport": "sihe.data.loading.packing",
        "Prefetcher": "sihe.data.loading.prefetch",
        "Proportions": "sihe.data.loading.proportions",
        "SampleOrder": "sihe.data.loading.order",
        "Samples": "sihe.data.loading.samples",
        "Shard": "sihe.data.loading.manifest",
        "ShardCache": "sihe.data.loading.cache",
        "Split": "sihe.data.loading.manifest",
        "TokenDataset": "sihe.data.loading.dataset",
        "TokenSplit": "sihe.data.loading.dataset",
        "WindowSamples": "sihe.data.loading.samples",
        "concatenation_report": "sihe.data.loading.packing",
        "find_dataset": "sihe.data.loading.catalog",
        "write_dataset": "sihe.data.loading.writer",
    },
)
