"""How an engine runs: sizes and limits, checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sihe.core.errors import ConfigError

DType = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine.

    `dtype="auto"` takes the one that the checkpoint was saved in, or float32 where the processor would crawl in it.
    `max_context` (tokens) defaults to the model's own. `kv_cache_bytes` bounds the cache, by default a quarter of the
    memory that is free when the engine loads; fewer than `max_batch_size` sequences run at once where it does not hold
    them. `token_budget` bounds the tokens of one step: every running sequence decodes one, and prompts are read in
    chunks within what remains, so it bounds how long a long prompt can delay everyone else's next token.
    """

    dtype: DType = "auto"
    max_batch_size: int = 32
    max_context: int | None = None
    token_budget: int = 512
    kv_cache_bytes: int | None = None
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ConfigError(f"dtype must be auto, bfloat16 or float32, got {self.dtype!r}", key="dtype")
        for name in ("max_batch_size", "max_context", "token_budget", "kv_cache_bytes", "max_waiting"):
            value = getattr(self, name)
            if value is None and name in ("max_context", "kv_cache_bytes"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}", key=name)
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
