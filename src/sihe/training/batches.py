"""The batches of a run, as its configuration asks for them: one data set or a mixture, cut or packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sihe.core.errors import ConfigError
from sihe.data.loading.cache import ShardCache
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.mixture import MixtureSource, MixtureStage, MixtureStream
from sihe.data.loading.packing import PackedSamples
from sihe.data.loading.prefetch import SampleStream
from sihe.data.loading.remote import is_url
from sihe.data.loading.samples import Batch, Samples, WindowSamples
from sihe.data.loading.stream import BatchStream
from sihe.training.config import TrainConfig


def open_batches(
    config: TrainConfig,
    dataset: Path,
    sources: Mapping[str, Path],
    *,
    cache: Path | None = None,
    rank: int = 0,
    ranks: int = 1,
    start_sample: int = 0,
) -> SampleStream[np.ndarray | Batch]:
    """This rank's batches, from sample `start_sample` of the run on; `ranks` share each batch out.

    `dataset` is where the configuration's data set lies, `sources` where those of its mixture do, and `cache` where
    shards of those at URLs are kept, which begin to arrive at once. Raises `ConfigError` that names the setting, and
    what the streams raise: everything that can be known before the first batch.
    """
    shards = None if cache is None else ShardCache(cache, limit_bytes=config.data.cache_bytes, readers=readers(config))
    opened = {
        name: open_dataset(name, folder, shards) for name, folder in (sources or {config.dataset: dataset}).items()
    }
    for each in opened.values():
        if (far := each.remote_split("train")) is not None:
            far.fetch_ahead(first=rank * len(each.manifest.splits["train"]) // ranks)
    if not sources and config.data.packing == "windows" and not config.data.document_masks:
        return BatchStream(
            opened[config.dataset],
            split="train",
            sequence_length=config.sequence_length,
            global_batch=config.global_batch,
            seed=config.seed,
            rank=rank,
            world_size=ranks,
            start_sample=start_sample,
        )
    if sources and config.dataset not in sources:
        raise ConfigError(
            f"training setting 'dataset' must be one of the mixture's ({', '.join(sources)}), got {config.dataset!r}",
            key="dataset",
        )
    stages = [MixtureStage(part.weights, part.until_sample) for part in config.data.mixture]
    return MixtureStream(
        [MixtureSource(name, _samples(config, each), config.data.max_epochs) for name, each in opened.items()],
        stages or [MixtureStage({config.dataset: 1.0})],
        global_batch=config.global_batch,
        seed=config.seed,
        rank=rank,
        world_size=ranks,
        start_sample=start_sample,
        stop_sample=config.max_steps * config.global_batch,
    )


def open_dataset(name: str, folder: Path, cache: ShardCache | None) -> TokenDataset:
    """The data set that a configuration calls `name`: at that URL, or in the local `folder`."""
    return TokenDataset.open(name, cache=cache) if is_url(name) else TokenDataset.open(folder)


def readers(config: TrainConfig) -> int:
    """How many ranks may read from one cache at a time."""
    return max(config.world_sizes)


def _samples(config: TrainConfig, dataset: TokenDataset) -> Samples:
    if config.data.packing == "documents":
        return PackedSamples(dataset, "train", config.sequence_length)
    return WindowSamples(dataset, "train", config.sequence_length, masks_documents=config.data.document_masks)
