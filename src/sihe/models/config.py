"""The shape of a decoder, as one value, and its translation from and to the config.json of a Hugging Face Llama.

Pure: needs no torch. What the decoder cannot compute is refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sihe.core.errors import ConfigError
from sihe.models.errors import UnsupportedModel


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU. Checks itself.

    `num_kv_heads` divides `num_heads`; equal means plain multi-head attention, 1 means multi-query. `max_positions`
    is the longest sequence in tokens. `eos_token_ids` are all the tokens that end a text; `eos_token_id` is the first.
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

    def __post_init__(self) -> None:
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

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return () if self.eos_token_id is None else (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def num_parameters(self) -> int:
        """Weights in total; a tied head counts once."""
        embedding = self.vocab_size * self.hidden_size
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        return embedding * (1 if self.tie_embeddings else 2) + self.num_layers * layer + self.hidden_size

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L d T.

        N counts the weights that multiply (an untied embedding is a look-up and does not), d is the width of all
        heads. Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311), appendix B; attention is counted in full, though
        a causal kernel may skip half of it.
        """
        lookup = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        width = self.num_heads * self.head_dim
        return 6 * (self.num_parameters - lookup) + 12 * self.num_layers * width * sequence_length

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `transformers` 4 and 5 read as a Llama."""
        eos: int | list[int] | None = list(self.eos_token_ids) if self.more_eos_token_ids else self.eos_token_id
        shape = {theirs: getattr(self, ours) for ours, theirs in _TO_HF.items()}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **shape,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": self.rope_theta,  # where transformers 4 looks
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},  # where transformers 5 looks
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
        }

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration behind a Llama's config.json, in the layout of `transformers` 4 or 5.

        Raises `UnsupportedModel` for what the decoder does not compute, `ConfigError` for a missing or wrong entry.
        """
        for key, supported in _REQUIRED.items():
            value = values.get(key, supported)
            if value != supported:
                raise UnsupportedModel(key, value, repr(supported))
        missing = [key for key in _NEEDED if values.get(key) is None]
        if missing:
            raise ConfigError(f"config.json lacks {missing[0]!r}: it must describe a Llama model", key=missing[0])
        heads = _size(values, "num_attention_heads")
        bos, eos = _tokens(values, "bos_token_id"), _tokens(values, "eos_token_id")
        tied = values.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise ConfigError(
                f"config.json: tie_word_embeddings is true or false, got {tied!r}", key="tie_word_embeddings"
            )
        return cls(
            vocab_size=_size(values, "vocab_size"),
            hidden_size=_size(values, "hidden_size"),
            num_layers=_size(values, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_size(values, "num_key_value_heads", heads),
            head_dim=_size(values, "head_dim", _size(values, "hidden_size") // heads),
            intermediate_size=_size(values, "intermediate_size"),
            max_positions=_size(values, "max_position_embeddings", 2048),
            rope_theta=_rope_theta(values),
            norm_eps=_number(values, "rms_norm_eps", 1e-6),
            tie_embeddings=tied,
            bos_token_id=bos[0] if bos else None,
            eos_token_id=eos[0] if eos else None,
            more_eos_token_ids=tuple(eos[1:]),
        )


_TO_HF = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_SIZES = tuple(item.name for item in fields(ModelConfig))[:8]
_REQUIRED: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_NEEDED = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {key} is a positive whole number, got {value!r}", key=key)
    return value


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is a number, got {value!r}", key=key)
    return float(value)


def _tokens(values: Mapping[str, Any], key: str) -> list[int]:
    """Token ids: config.json has none, one, or a list of them."""
    value = values.get(key)
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ConfigError(f"config.json: {key} is a token id or a list of them, got {value!r}", key=key)
    return tokens


def _rope_theta(values: Mapping[str, Any]) -> float:
    """The base of the rotary angles; refuses every way of stretching them."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: rope_parameters is a mapping, got {rope!r}", key="rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedModel("rope_parameters.rope_type", kind, "'default'")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel("partial_rotary_factor", partial, "1.0")
    return _number(rope if "rope_theta" in rope else values, "rope_theta", 10000.0)
