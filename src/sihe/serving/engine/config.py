"""How an engine runs: sizes and limits, checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from sihe.core.errors import ConfigError

DType = Literal["auto", "bfloat16", "float32", "int8", "int4"]
KvDType = Literal["auto", "bfloat16", "float32", "int8"]
Device = Literal["auto", "cpu", "cuda"]
SpeculationKind = Literal["none", "ngram", "draft"]
_MAX_STEP_S = 3600


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine.

    `dtype` is that of the weights: `auto` takes the one that the checkpoint was saved in; `int8` has a scale a column,
    `int4` a scale for every 32 weights, both with activations quantised row by row as they come, on a CPU. `kv_dtype`
    is that of the cache, by default float32 beside float32 weights and bfloat16 else; `int8` has a scale a token and
    head, on a CPU. `device` is by default a GPU where torch sees one. `threads` (a CPU's) default to the processors
    that the process may use. `max_context` (tokens) defaults to the model's own. `kv_cache_bytes` bounds the cache, by
    default a quarter of the memory that is free when the engine loads; fewer than `max_batch_size` sequences run at
    once where it does not hold them. Its memory is the system's until tokens touch it, which costs the requests that do
    (in a virtual machine, whose host finds memory late as well, up to a fifth of reading a prompt); with
    `reserve_cache` it is taken when the engine loads, which then takes longer. `token_budget` bounds the tokens of one
    step: every running sequence decodes one, and prompts are read in chunks within what remains. While somebody decodes
    chunks are also such that a step takes about `target_step_s` seconds: so long can a long prompt delay everyone
    else's next token, however slow the model is. `compile` is for models that torch computes: what lies between
    their attention layers goes through `torch.compile` while the engine warms up, which needs a compiler; steps with
    adapters and the draft model do without.

    `max_adapters` LoRA adapters can be loaded at once, beside each other in one batch; `adapters` are those to load
    from the start, each as `name=folder`.

    `speculation` tries up to `draft_tokens` further tokens in a step while that pays, and changes no answer's
    distribution: `ngram` proposes what followed the last tokens when they came before; `draft` asks the model in the
    folder `draft_model`, which knows the same tokens and gets a cache as large as `kv_cache_bytes` allows of its own.
    """

    dtype: DType = "auto"
    kv_dtype: KvDType = "auto"
    device: Device = "auto"
    threads: int | None = None
    max_batch_size: int = 32
    max_context: int | None = None
    token_budget: int = 512
    target_step_s: float = 0.5
    kv_cache_bytes: int | None = None
    reserve_cache: bool = False
    compile: bool = False
    max_waiting: int = 256
    speculation: SpeculationKind = "none"
    draft_model: str | None = None
    draft_tokens: int = 4
    max_adapters: int = 0
    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", DType),
            ("kv_dtype", KvDType),
            ("device", Device),
            ("speculation", SpeculationKind),
        ):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(
                    f"{name} is one of {', '.join(get_args(known))}, got {getattr(self, name)!r}", key=name
                )
        for name in (
            "max_batch_size",
            "max_context",
            "token_budget",
            "kv_cache_bytes",
            "max_waiting",
            "threads",
            "draft_tokens",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_context", "kv_cache_bytes", "threads"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}", key=name)
        target_s = self.target_step_s
        if isinstance(target_s, bool) or not isinstance(target_s, int | float) or not 0 < target_s <= _MAX_STEP_S:
            raise ConfigError(
                f"target_step_s is a number of seconds above 0, {_MAX_STEP_S:,} at most, got {target_s!r}",
                key="target_step_s",
            )
        for name in ("reserve_cache", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is true or false, got {getattr(self, name)!r}", key=name)
        object.__setattr__(self, "adapters", tuple(self.adapters))  # JSON has lists
        if not isinstance(self.max_adapters, int) or isinstance(self.max_adapters, bool) or self.max_adapters < 0:
            raise ConfigError(
                f"max_adapters is a whole number of 0 or more, got {self.max_adapters!r}", key="max_adapters"
            )
        if not all(isinstance(adapter, str) and all(adapter.partition("=")) for adapter in self.adapters):
            raise ConfigError(f"adapters are given as name=folder, got {self.adapters!r}", key="adapters")
        if len(self.adapters) > self.max_adapters:
            raise ConfigError(
                f"max_adapters = {self.max_adapters} holds fewer than the {len(self.adapters)} adapters that are named",
                key="max_adapters",
            )
        if (self.speculation == "draft") != (self.draft_model is not None):
            raise ConfigError(
                "draft_model is the folder of a model for speculation = 'draft': give both or neither",
                key="draft_model",
            )
        if self.token_budget <= self.max_batch_size:
            raise ConfigError(
                f"token_budget ({self.token_budget}) must exceed max_batch_size ({self.max_batch_size}): "
                "with a full batch decoding, no prompt could ever be read",
                key="token_budget",
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """The configuration that stored or posted `values` describe. Raises `ConfigError` that names the key."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown engine setting {key!r}: known are {', '.join(known)}", key=key)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """What differs from the defaults: what is stored with a deployment."""
        default = asdict(EngineConfig())
        return {key: value for key, value in asdict(self).items() if value != default[key]}
