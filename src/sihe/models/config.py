"""The shape of a decoder, as one value that checks itself. Pure: needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from sihe.core.errors import ConfigError
from sihe.models.architecture import AttentionConfig, LayerConfig, PositionConfig, Task, part
from sihe.models.errors import UnsupportedModel
from sihe.models.families.registry import FAMILIES, OWN, read_config

Balance = Literal["loss", "bias", "none"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder or encoder; with the defaults a Llama's: RMSNorm, rotary positions, SwiGLU. Checks itself.

    `num_kv_heads` divides `num_heads`; equal means plain multi-head attention, 1 means multi-query. `max_positions`
    is the longest sequence in tokens. `eos_token_ids` are all the tokens that end a text; `eos_token_id` is the first.

    With `num_experts` each layer is a mixture of them (see `sihe.models.moe`), every one `expert_intermediate_size`
    wide (0: as `intermediate_size`, which nothing else uses then), and beside them a shared one, if
    `shared_expert_size` is not 0. `balance_coefficient` is that of the balance loss of one layer; `capacity_factor`
    bounds the rows of one expert, as a multiple of their mean, and None drops nothing.

    `attention`, `positions` and `layers` may be given as mappings, as `dataclasses.asdict` and JSON have them. `task`
    is what the model ends in: the next token's logits (`Decoder`), of an `Encoder` a masked token's, a pooled vector,
    the hidden states themselves, or `num_labels` scores of a sequence.
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
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    positions: PositionConfig = field(default_factory=PositionConfig)
    layers: LayerConfig = field(default_factory=LayerConfig)
    task: Task = "next_token"
    num_labels: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "more_eos_token_ids", tuple(self.more_eos_token_ids))  # JSON has lists
        part(self, "attention", AttentionConfig, "attention")
        part(self, "positions", PositionConfig, "positions")
        part(self, "layers", LayerConfig, "layers")
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
        if self.task not in get_args(Task):
            raise ConfigError(f"task is one of {', '.join(get_args(Task))}, got {self.task!r}", key="task")
        self._check_parts()
        self._check_experts()

    def _check_parts(self) -> None:
        labels = self.num_labels
        if not isinstance(labels, int) or isinstance(labels, bool) or (labels > 0) != (self.task == "scored"):
            raise ConfigError(
                f"num_labels is above 0 with task = 'scored' and 0 without, got {labels!r} with {self.task!r}",
                key="num_labels",
            )
        if self.attention.causal != (self.task == "next_token"):
            raise ConfigError(
                f"attention.causal goes with task = 'next_token' and only with it, got {self.task!r}",
                key="attention.causal",
            )
        if self.num_experts and not self.layers.gated:
            raise ConfigError("layers.gated is true for a mixture of experts", key="layers.gated")
        latent = self.attention.latent
        if latent is None:
            return
        if self.positions.kind != "rope" or self.num_kv_heads != self.num_heads:
            raise ConfigError(
                "attention.latent goes with rotary positions and num_kv_heads = num_heads, "
                f"got {self.positions.kind!r} and {self.num_kv_heads} of {self.num_heads}",
                key="attention.latent",
            )
        if not latent.rotary_dim < self.head_dim:
            raise ConfigError(
                f"attention.latent.rotary_dim is less than head_dim = {self.head_dim}, got {latent.rotary_dim}",
                key="attention.latent.rotary_dim",
            )

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
        """Weights in total; a tied head counts once. What only an encoder has (its heads) does not count."""
        layers = self.layers
        norm = self.hidden_size * (2 if layers.norm == "layer" else 1)
        learned = self._learned_places
        rows = self.vocab_size * (1 if self.tie_embeddings else 2) + learned + layers.token_types
        norms = layers.norm_first + layers.embedding_norm
        layer = self._attention_parameters() + self._mlp_parameters(self.num_experts) + 2 * norm
        return rows * self.hidden_size + norms * norm + self.num_layers * layer

    @property
    def num_active_parameters(self) -> int:
        """Weights that one token meets: of a mixture the experts that it goes to."""
        idle = self._mlp_parameters(self.num_experts) - self._mlp_parameters(self.experts_per_token)
        return self.num_parameters - self.num_layers * idle

    @property
    def _learned_places(self) -> int:
        return self.max_positions + self.positions.offset if self.positions.kind == "learned" else 0

    def _attention_parameters(self) -> int:
        shape, latent = self.attention, self.attention.latent
        table = self.positions.buckets * self.num_heads if self.positions.kind == "relative" else 0
        if latent is not None:
            content = self.head_dim - latent.rotary_dim
            q_rank = latent.q_rank or 0
            q_up = (q_rank or self.hidden_size) * self.num_heads * self.head_dim
            kv_up = latent.kv_rank * self.num_heads * (content + latent.value_dim)
            down = self.hidden_size * (q_rank + latent.kv_rank + latent.rotary_dim)
            out = self.num_heads * latent.value_dim * self.hidden_size
            return q_up + kv_up + down + out + q_rank + latent.kv_rank + table
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        matrices = self.hidden_size * (rows + self.num_heads * self.head_dim)
        biases = rows * shape.qkv_bias + self.hidden_size * shape.out_bias
        return matrices + biases + 2 * self.head_dim * shape.qk_norm + table

    def _mlp_parameters(self, experts: int) -> int:
        """Weights of one feed-forward layer with so many of its experts."""
        if self.num_experts == 0:
            matrices = (3 if self.layers.gated else 2) * self.hidden_size * self.intermediate_size
            return matrices + (self.hidden_size + self.intermediate_size) * self.layers.mlp_bias
        width = experts * self.expert_intermediate_size + self.shared_expert_size
        return self.hidden_size * (3 * width + self.num_experts)

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L d T, whatever a window spares.

        N counts the weights that multiply (an untied embedding is a look-up and does not; of a mixture's experts those
        that a token goes to do), d is the width of all heads. Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311),
        appendix B; attention is counted in full, though a causal kernel may skip half of it.
        """
        learned = self._learned_places
        rows = (0 if self.tie_embeddings else self.vocab_size) + learned + self.layers.token_types
        latent = self.attention.latent
        width = self.num_heads * (self.head_dim + (latent.value_dim if latent else self.head_dim))
        looked_up = rows * self.hidden_size
        return 6 * (self.num_active_parameters - looked_up) + 6 * self.num_layers * width * sequence_length

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
