"""The batches of a run, as its configuration asks for them: one data set or a mixture, cut or packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sihe.core.errors import ConfigError
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.mixture import MixtureSource, MixtureStage, MixtureStream
from sihe.data.loading.packing import PackedSamples
from sihe.data.loading.prefetch import SampleStream
from sihe.data.loading.samples import Batch, Samples, WindowSamples
from sihe.data.loading.stream import BatchStream
from sihe.training.config import TrainConfig


def open_batches(
    config: TrainConfig,
    dataset: Path,
    sources: Mapping[str, Path],
    *,
    rank: int = 0,
    ranks: int = 1,
    start_sample: int = 0,
) -> SampleStream[np.ndarray | Batch]:
    """This rank's batches, from sample `start_sample` of the run on; `ranks` share each batch out.

    `dataset` is where the configuration's data set lies, `sources` where those of its mixture do. Raises `ConfigError`
    that names the setting, and what the streams raise: everything that can be known before the first batch.
    """
    if not sources and config.data.packing == "windows" and not config.data.document_masks:
        return BatchStream(
            TokenDataset.open(dataset),
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
        [
            MixtureSource(name, _samples(config, folder), config.data.max_epochs)
            for name, folder in (sources or {config.dataset: dataset}).items()
        ],
        stages or [MixtureStage({config.dataset: 1.0})],
        global_batch=config.global_batch,
        seed=config.seed,
        rank=rank,
        world_size=ranks,
        start_sample=start_sample,
        stop_sample=config.max_steps * config.global_batch,
    )


def _samples(config: TrainConfig, folder: Path) -> Samples:
    dataset = TokenDataset.open(folder)
    if config.data.packing == "documents":
        return PackedSamples(dataset, "train", config.sequence_length)
    return WindowSamples(dataset, "train", config.sequence_length, masks_documents=config.data.document_masks)
