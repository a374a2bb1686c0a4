"""What a training run is asked to do: one frozen value, checked when it is made, stored with the run.

Sizes count samples (sequences of `sequence_length` tokens) unless a name says otherwise. Pure: no I/O, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from sihe.core.errors import ConfigError, InvalidInput
from sihe.core.ids import check_name
from sihe.models.recompute_config import RecomputeConfig
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.recovery import RecoveryConfig, feasible_workers
from sihe.training.schedule import ScheduleKind

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Packing = Literal["windows", "documents"]
# What may change between the attempts of one run: none of these decides which numbers are computed, but for rounding.
_FREE = {
    *("parallel", "recompute", "world_size", "micro_batch", "threads_per_rank", "max_restarts", "collective_timeout_s"),
    *(
        "checkpoint_every",
        "keep_checkpoints",
        "background_checkpoints",
        "log_every",
        "model_name",
        "alias",
        "dataset",
        "recovery",
    ),
}
_FREE_OF_DATA = {"prefetch", "cache_bytes", "cache_folder"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the decoder; the vocabulary comes from the data set."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    """As many as `num_heads` when left out."""
    head_dim: int | None = None
    """`hidden_size / num_heads` when left out."""
    intermediate_size: int | None = None
    """8/3 of `hidden_size`, rounded up to a multiple of 64, when left out (arXiv 2002.05202, section 2)."""
    max_positions: int | None = None
    """The sequence length of the training when left out."""
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    family: dict[str, Any] = field(default_factory=dict)
    """Other settings of `sihe.models.ModelConfig` by name: experts, and `attention`, `positions`, `layers`."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads"):
            _check(f"model.{name}", getattr(self, name) >= 1, "at least 1", getattr(self, name))
        if self.head_dim is None:
            _check(
                "model.hidden_size",
                self.hidden_size % self.num_heads == 0,
                f"a multiple of num_heads ({self.num_heads}) when head_dim is left out",
                self.hidden_size,
            )

    def resolved(self, sequence_length: int) -> dict[str, Any]:
        """The sizes with nothing left out, as `sihe.models.config.ModelConfig` takes them."""
        return {
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": self.head_dim or self.hidden_size // self.num_heads,
            "intermediate_size": self.intermediate_size or -(-self.hidden_size * 8 // (3 * 64)) * 64,
            "max_positions": self.max_positions or sequence_length,
            "rope_theta": self.rope_theta,
            "tie_embeddings": self.tie_embeddings,
            **self.family,
        }


@dataclass(frozen=True)
class OptimizerConfig:
    """Which rule moves the weights, and its settings by name; what is not named has the rule's default.

    The settings are checked with the plan of the run, by `sihe.training.optimizers.make_rule`.
    """

    kind: str = "adamw"
    """adamw, adamw8bit, lion, muon or sgd."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mixing:
    """A part of a run with constant weights of its data sets, which are named as `dataset` is."""

    weights: dict[str, float]
    until_sample: int | None = None
    """The first sample of the next part; left out in the last."""


@dataclass(frozen=True)
class DataConfig:
    """What samples are made of, and how they are read."""

    packing: Packing = "windows"
    """windows: tokens one after the other, cut wherever a sample is full. documents: whole documents side by side."""
    document_masks: bool = False
    """Whether attention stays inside of a document, with positions from 0 in each; always with packing "documents"."""
    mixture: tuple[Mixing, ...] = ()
    """Several data sets; left out, there is one. `dataset` is then the one whose tokenizer the model takes."""
    max_epochs: float = math.inf
    """How often a data set of the mixture may be seen; a run that would need more is refused."""
    prefetch: int = 2
    """Batches that are read ahead."""
    cache_bytes: int = 32 * 2**30
    """Of the local disk, at most for shards of data sets at URLs; all ranks of a machine share it."""
    cache_folder: str | None = None
    """Where these shards are kept, on each machine: a local disk. Left out, among the data sets of the home folder."""

    def __post_init__(self) -> None:
        _check("data.packing", self.packing in get_args(Packing), " or ".join(get_args(Packing)), self.packing)
        _check("data.prefetch", self.prefetch >= 0, "not negative", self.prefetch)
        _check("data.cache_bytes", self.cache_bytes >= 1, "positive", self.cache_bytes)
        _check("data.max_epochs", self.max_epochs > 0, "positive", self.max_epochs)


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run. Raises `ConfigError` that names the key."""

    dataset: str
    """A data set folder, a name under the home folder (`stdlib`, `stdlib@3f2a…`), or the URL of such a folder that
    fsspec knows (`s3://…`), whose shards each machine then keeps in a cache (`data.cache_bytes`)."""
    model: ModelShape
    model_name: str
    """The model of which the result becomes a version."""
    sequence_length: int
    micro_batch: int
    """Samples that one rank puts through the model at once."""
    global_batch: int
    """Samples in one optimizer step, over all ranks and micro-batches."""
    max_steps: int
    peak_lr: float
    warmup_steps: int
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak."""
    schedule: ScheduleKind = "cosine"
    """How the learning rate goes on after the warm-up."""
    decay_steps: int = 0
    """Last steps of the schedule "wsd", in which the rate falls; 0 for every other."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip_norm: float = 1.0
    """The gradients' global norm is scaled down to this."""
    ema_decay: float | None = None
    """Of a running average of the weights, such as 0.999, which is then what the run gives: the exported and registered
    model. Left out, the last weights are. Early steps decay less: (1 + n) / (10 + n) at step n."""
    precision: Precision = "auto"
    """Of weights and activations; the optimizer's master weights and the sums of gradients are float32 in any case.
    "auto" is bf16 where the processor multiplies it in hardware, else fp32. fp16 comes with dynamic loss scaling."""
    seed: int = 0
    world_size: int = 1
    """Data-parallel ranks, where `parallel` is left out."""
    parallel: ParallelPlan | None = None
    """How the model and the batch are spread over ranks."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """What the backward pass computes again in place of keeping it."""
    data: DataConfig = field(default_factory=DataConfig)
    threads_per_rank: int | None = None
    """By default the processors of this machine, shared out."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; the last step always writes one."""
    keep_checkpoints: int = 2
    background_checkpoints: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in memory."""
    log_every: int = 1
    """Steps from one point of the tracked curves to the next; the run's own log has every step."""
    max_restarts: int = 3
    collective_timeout_s: float = 120.0
    """A rank that keeps the others waiting longer ends the attempt. Longer than the slowest checkpoint."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What happens about failures, and with how many ranks the run may go on."""
    alias: str | None = None
    """Set to the new model version when the run ends."""

    def __post_init__(self) -> None:
        positive = ("sequence_length", "micro_batch", "global_batch", "max_steps", "world_size", "checkpoint_every")
        for name in (*positive, "keep_checkpoints", "log_every"):
            _check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("warmup_steps", "seed", "max_restarts"):
            _check(name, getattr(self, name) >= 0, "not negative", getattr(self, name))
        for name in ("peak_lr", "clip_norm", "collective_timeout_s"):
            value = getattr(self, name)
            _check(name, value > 0 and math.isfinite(value), "a positive number", value)
        decay = self.ema_decay
        _check("ema_decay", decay is None or 0 <= decay < 1, "left out, or at least 0 and below 1", decay)
        _check("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "between 0 and 1", self.min_lr_ratio)
        _check("precision", self.precision in get_args(Precision), " or ".join(get_args(Precision)), self.precision)
        _check(
            "warmup_steps",
            self.warmup_steps <= self.max_steps,
            f"at most max_steps ({self.max_steps})",
            self.warmup_steps,
        )
        threads = self.threads_per_rank
        _check("threads_per_rank", threads is None or threads >= 1, "at least 1", threads)
        _check(
            "world_size",
            self.parallel is None or self.world_size in (1, self.parallel.world_size),
            f"left out where 'parallel' says how many ranks there are ({self.plan.world_size})",
            self.world_size,
        )
        self.plan.check_batch(
            global_batch=self.global_batch, micro_batch=self.micro_batch, sequence_length=self.sequence_length
        )
        _ = self.world_sizes  # checks the numbers of workers
        try:
            check_name("model", self.model_name)
            check_name("alias", self.alias or "none")
        except InvalidInput as error:
            raise ConfigError(f"training setting 'model_name' or 'alias': {error}", key="model_name") from error

    @property
    def plan(self) -> ParallelPlan:
        """How the run is spread over ranks."""
        return self.parallel or ParallelPlan(dp=self.world_size)

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Every number of ranks with which the run can go on. Raises `ConfigError`."""
        return feasible_workers(self.plan, self.recovery, global_batch=self.global_batch, micro_batch=self.micro_batch)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each rank adds up in one step."""
        return self.global_batch // (self.micro_batch * self.plan.batch_ranks)

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step."""
        return self.global_batch * self.sequence_length

    def identity(self) -> dict[str, Any]:
        """The settings that decide which numbers the run computes (up to rounding), flat.

        What is left out may differ when a run goes on: ranks, micro-batches, check points and where things are.
        """
        values = {key: value for key, value in asdict(self).items() if key not in {*_FREE, "model"}}
        values["data"] = {key: value for key, value in values["data"].items() if key not in _FREE_OF_DATA}
        if self.ema_decay is None:
            del values["ema_decay"]  # runs from before there were averages compute the same
        return values | {f"model.{key}": value for key, value in self.model.resolved(self.sequence_length).items()}

    def public(self) -> dict[str, Any]:
        """Every setting as plain values."""
        return asdict(self)

    def with_changes(self, **changes: Any) -> TrainConfig:
        """A copy with other values, checked again."""
        return replace(self, **changes)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from plain values, such as YAML gives. Raises `ConfigError` for an unknown or missing key."""
        from pydantic import TypeAdapter, ValidationError

        _refuse_unknown(values, cls, "")
        parts = {
            "model": ModelShape,
            "parallel": ParallelPlan,
            "optimizer": OptimizerConfig,
            "recompute": RecomputeConfig,
            "data": DataConfig,
            "recovery": RecoveryConfig,
        }
        for name, part in parts.items():
            if isinstance(inner := values.get(name), Mapping):
                _refuse_unknown(inner, part, f"{name}.")
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):
                raise cause from error
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise ConfigError(
                    f"training setting {key!r} is missing: add it to the file or with --set", key=key
                ) from error
            raise ConfigError(
                f"training setting {key!r}: {first['msg'].lower()}, got {first['input']!r}", key=key
            ) from error


def _check(key: str, holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"training setting {key!r} must be {expected}, got {value!r}", key=key)


def _refuse_unknown(values: Mapping[str, Any], kind: type[Any], prefix: str) -> None:
    known = [prefix + item.name for item in fields(kind)]
    for key in (f"{prefix}{key}" for key in values):
        if key not in known:
            raise ConfigError(f"unknown training setting {key!r}: known are {', '.join(known)}", key=key)
