"""From a configuration to what the ranks will do, with everything that can be checked before the first step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sihe.core.errors import ConfigError, CorruptData, NoSpace, NotFound
from sihe.core.files import write_file
from sihe.data.loading.cache import ShardCache
from sihe.data.loading.catalog import find_dataset
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.manifest import DatasetManifest
from sihe.data.loading.remote import is_url
from sihe.models.config import ModelConfig
from sihe.training.batches import open_batches, readers
from sihe.training.config import TrainConfig
from sihe.training.schedule import ScheduleConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What a model folder takes over from its data set."""
_OPTIMIZER_BYTES = 12  # a parameter's float32 master weight and two moments
_AVERAGE_BYTES = 4
_WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class TrainPlan:
    """A configuration with its data set and model, checked. `identity` says what the run computes."""

    config: TrainConfig
    dataset: Path
    dataset_key: str
    model: ModelConfig
    identity: dict[str, Any]
    sources: dict[str, Path] = field(default_factory=dict)
    """The data sets of the mixture, by the names that the configuration gives them."""
    cache: Path | None = None
    """Where shards of data sets at URLs are kept; the folders above hold all else of these."""

    @property
    def identity_digest(self) -> str:
        """A short name for what the run computes."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def schedule(self) -> ScheduleConfig:
        """The learning rate of each step. Raises `ConfigError`."""
        return ScheduleConfig(
            peak_lr=self.config.peak_lr,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.config.max_steps,
            min_ratio=self.config.min_lr_ratio,
            kind=self.config.schedule,
            decay_steps=self.config.decay_steps,
        )

    @property
    def checkpoint_bytes(self) -> int:
        """About what one checkpoint takes."""
        average = 0 if self.config.ema_decay is None else _AVERAGE_BYTES
        return self.model.num_parameters * (_WEIGHT_BYTES[self.config.precision] + _OPTIMIZER_BYTES + average)

    @property
    def threads_per_rank(self) -> int:
        """Threads of one rank."""
        return self.config.threads_per_rank or max(1, _processors() // self.config.plan.world_size)

    def check_space(self, folder: Path) -> None:
        """Raises `NoSpace` when the checkpoints that the run keeps, and the one being written, would not fit."""
        needed = self.checkpoint_bytes * (self.config.keep_checkpoints + 1)
        if shutil.disk_usage(folder).free < needed:
            raise NoSpace(folder, needed_bytes=needed)

    def write(self, path: Path) -> None:
        """Stores the plan for the ranks to read."""
        values = {
            "config": self.config.public(),
            "dataset": str(self.dataset),
            "dataset_key": self.dataset_key,
            "model": asdict(self.model),
            "identity": self.identity,
            "sources": {name: str(path) for name, path in self.sources.items()},
            "cache": None if self.cache is None else str(self.cache),
        }
        write_file(path, json.dumps(values, indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> TrainPlan:
        """The plan that `write` stored. Raises `CorruptData`."""
        try:
            values = json.loads(path.read_bytes())
            return cls(
                config=TrainConfig.from_mapping(values["config"]),
                dataset=Path(values["dataset"]),
                dataset_key=values["dataset_key"],
                model=ModelConfig(**values["model"]),
                identity=values["identity"],
                sources={name: Path(path) for name, path in values.get("sources", {}).items()},
                cache=Path(values["cache"]) if values.get("cache") else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptData(path, f"it is not a training plan: {error}") from error


def make_plan(config: TrainConfig, datasets: Path) -> TrainPlan:
    """Checks `config` against its data set, a folder, URL or name under `datasets`, and settles what it leaves open.

    Of a data set at a URL the manifest and the tokenizer are fetched, and shards are looked for but not read. Raises
    `NotFound`, `CorruptData` (checksums; at a URL, sizes), `DatasetTooSmall`, `ConfigError`, `Unreachable`.
    """
    if config.precision == "auto":
        from sihe.models.precision import native_bf16  # imports torch

        config = config.with_changes(precision="bf16" if native_bf16() else "fp32")
    _check_rule(config)
    names = {config.dataset, *(name for part in config.data.mixture for name in part.weights)}
    cache = Path(config.data.cache_folder or datasets / ".cache").absolute() if any(map(is_url, names)) else None
    opened = {name: _open(name, config, datasets, cache) for name in names}
    dataset = opened[config.dataset]
    folder = dataset.folder
    sources = {name: opened[name].folder for part in config.data.mixture for name in part.weights}
    open_batches(config, folder, sources, cache=cache)  # makes the checks that need the data sets; it reads no batch
    sizes = config.model.resolved(config.sequence_length)
    if sizes["max_positions"] < config.sequence_length:
        raise ConfigError(
            f"training setting 'model.max_positions' must be at least sequence_length ({config.sequence_length}), "
            f"got {sizes['max_positions']!r}",
            key="model.max_positions",
        )
    manifest = dataset.manifest
    known = {each.name for each in fields(ModelConfig)}
    if unknown := [name for name in config.model.family if name not in known]:
        raise ConfigError(
            f"training setting 'model.family' has no {unknown[0]!r}: known are {', '.join(sorted(known))}",
            key="model.family",
        )
    model = ModelConfig(
        vocab_size=manifest.vocab_size,
        bos_token_id=_bos_token_id(folder),
        eos_token_id=manifest.eos_token_id,
        **sizes,
    )
    config.plan.check_model(model)
    if config.plan.cp > 1 and (config.data.document_masks or config.data.packing == "documents"):
        raise ConfigError("parallel setting 'cp' must be 1 with document masks", key="parallel.cp")
    identity = config.identity() | {"dataset": manifest.key, "dataset.sha256": _content_digest(manifest)}
    for name in sources:
        identity[f"source.{name}"] = _content_digest(opened[name].manifest)
    plan = TrainPlan(config, folder, manifest.key, model, identity, sources, cache)
    plan.schedule.at(0)  # one that cannot be says so
    return plan


def _open(name: str, config: TrainConfig, datasets: Path, cache: Path | None) -> TokenDataset:
    """The data set that `config` calls `name`, with all of its shards where they should be."""
    if not is_url(name):
        folder = find_dataset(name, datasets)
        if name == config.dataset:
            _check_tokenizer(folder)  # before its checksum is missed
        return TokenDataset.open(folder)
    assert cache is not None
    dataset = TokenDataset.open(name, cache=ShardCache(cache, limit_bytes=config.data.cache_bytes))
    far = dataset.remote_split("train")
    assert far is not None
    if far.largest_bytes * readers(config) > config.data.cache_bytes:
        raise ConfigError(
            f"training setting 'data.cache_bytes' must be at least {far.largest_bytes * readers(config):,}, a largest "
            f"shard of {name} for each of {readers(config)} ranks, got {config.data.cache_bytes!r}",
            key="data.cache_bytes",
        )
    far.check()
    if name == config.dataset:
        _check_tokenizer(dataset.folder)
    return dataset


def _check_tokenizer(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            hint = "the trained model could not be used without; prepare the data set with  sihe text prepare"
            raise NotFound("tokenizer file", str(folder / name), hint=hint)


def _check_rule(config: TrainConfig) -> None:
    from sihe.training.optimizers.catalog import make_rule  # imports torch

    try:
        make_rule(config.optimizer.kind, config.optimizer.settings)
    except ConfigError as error:
        raise ConfigError(f"training setting 'optimizer': {error}", key=f"optimizer.{error.key}") from error


def _content_digest(manifest: DatasetManifest) -> str:
    shards = [[shard.tokens, shard.sha256] for shard in manifest.splits["train"]]
    return hashlib.sha256(json.dumps([manifest.dtype, manifest.vocab_size, shards]).encode()).hexdigest()[:16]


def _bos_token_id(folder: Path) -> int | None:
    """The id of the token that begins a text, from the tokenizer's files; `None` where there is none."""
    try:
        name = json.loads((folder / "tokenizer_config.json").read_bytes()).get("bos_token")
        tokens = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
    except (ValueError, KeyError, AttributeError) as error:
        raise CorruptData(folder / "tokenizer.json", f"it is not a tokenizer: {error}") from error
    return next((int(token["id"]) for token in tokens if token["content"] == name), None)


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
