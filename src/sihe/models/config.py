"""The shape of a decoder, as one value that checks itself. Pure: needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from sihe.core.errors import ConfigError
from sihe.models.errors import UnsupportedModel
from sihe.models.huggingface import FAMILIES, OWN, read_config

Balance = Literal["loss", "bias", "none"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU. Checks itself.

    `num_kv_heads` divides `num_heads`; equal means plain multi-head attention, 1 means multi-query. `max_positions`
    is the longest sequence in tokens. `eos_token_ids` are all the tokens that end a text; `eos_token_id` is the first.

    With `num_experts` each layer is a mixture of them (see `sihe.models.moe`), every one `expert_intermediate_size`
    wide (0: as `intermediate_size`, which nothing else uses then), and beside them a shared one, if
    `shared_expert_size` is not 0. `balance_coefficient` is that of the balance loss of one layer; `capacity_factor`
    bounds the rows of one expert, as a multiple of their mean, and None drops nothing.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    more_eos_token_ids: tuple[int, ...] = field(default=())
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    shared_expert_size: int = 0
    router_balance: Balance = "loss"
    balance_coefficient: float = 0.01
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "more_eos_token_ids", tuple(self.more_eos_token_ids))  # JSON has lists
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is a positive whole number, got {value!r}", key=name)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads divides num_heads = {self.num_heads}, got {self.num_kv_heads}", key="num_kv_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim is even (rotary positions turn pairs), got {self.head_dim}: change hidden_size or num_heads",
                key="head_dim",
            )
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is a positive number, got {getattr(self, name)!r}", key=name)
        for name, token in (("bos_token_id", self.bos_token_id), *(("eos_token_id", i) for i in self.eos_token_ids)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(f"{name} lies in 0..{self.vocab_size - 1} (vocab_size), got {token!r}", key=name)
        self._check_experts()

    def _check_experts(self) -> None:
        for name in ("num_experts", "experts_per_token", "expert_intermediate_size", "shared_expert_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name} is a whole number of 0 or more, got {value!r}", key=name)
        if self.num_experts == 0:
            for name in ("experts_per_token", "expert_intermediate_size", "shared_expert_size"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name} is 0 without experts (num_experts = 0), got {getattr(self, name)}", key=name
                    )
            return
        if self.expert_intermediate_size == 0:
            object.__setattr__(self, "expert_intermediate_size", self.intermediate_size)
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"experts_per_token lies in 1..{self.num_experts} (num_experts), got {self.experts_per_token}",
                key="experts_per_token",
            )
        if self.router_balance not in get_args(Balance):
            raise ConfigError(
                f"router_balance is one of {', '.join(get_args(Balance))}, got {self.router_balance!r}",
                key="router_balance",
            )
        if not 0 < self.balance_coefficient < float("inf"):
            raise ConfigError(
                f"balance_coefficient is a positive number, got {self.balance_coefficient!r}: "
                "router_balance = 'none' does without",
                key="balance_coefficient",
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < float("inf"):
            raise ConfigError(
                f"capacity_factor is a positive number or None, got {self.capacity_factor!r}", key="capacity_factor"
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return () if self.eos_token_id is None else (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def num_parameters(self) -> int:
        """Weights in total; a tied head counts once."""
        embedding = self.vocab_size * self.hidden_size
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + self._mlp_parameters(self.num_experts) + 2 * self.hidden_size
        return embedding * (1 if self.tie_embeddings else 2) + self.num_layers * layer + self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        """Weights that one token meets: of a mixture the experts that it goes to."""
        idle = self._mlp_parameters(self.num_experts) - self._mlp_parameters(self.experts_per_token)
        return self.num_parameters - self.num_layers * idle

    def _mlp_parameters(self, experts: int) -> int:
        """Weights of one feed-forward layer with so many of its experts."""
        if self.num_experts == 0:
            return 3 * self.hidden_size * self.intermediate_size
        width = experts * self.expert_intermediate_size + self.shared_expert_size
        return self.hidden_size * (3 * width + self.num_experts)

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L d T.

        N counts the weights that multiply (an untied embedding is a look-up and does not; of a mixture's experts those
        that a token goes to do), d is the width of all heads. Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311),
        appendix B; attention is counted in full, though a causal kernel may skip half of it.
        """
        lookup = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        width = self.num_heads * self.head_dim
        return 6 * (self.num_active_parameters - lookup) + 12 * self.num_layers * width * sequence_length

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `transformers` 4 and 5 read, or one of our own where they compute no such model."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for family in FAMILIES.values():
            if self._survives(written := family.write(values)):
                return written
        return FAMILIES[OWN].write(values)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration behind a config.json, in the layout of `transformers` 4 or 5.

        Raises `UnsupportedModel` for what the networks here do not compute, `ConfigError` for a missing or wrong entry.
        """
        found = read_config(values)
        names = {item.name for item in fields(cls)}
        for name in (*(found.keys() - names), *(_NEEDED - found.keys())):
            raise ConfigError(
                f"config.json: {name} is {'missing' if name in names else 'no field of a model'}", key=name
            )
        return cls(**found)

    def _survives(self, written: Mapping[str, Any]) -> bool:
        try:
            return self.from_hf(written) == self
        except (ConfigError, UnsupportedModel):
            return False


_NEEDED = {item.name for item in fields(ModelConfig) if item.default is MISSING and item.default_factory is MISSING}
_SIZES = tuple(item.name for item in fields(ModelConfig))[:8]
