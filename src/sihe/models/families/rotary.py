"""Llama and the families built like it: rotary positions, RMSNorm, gated feed-forward layers."""

from __future__ import annotations

from typing import Any

from sihe.models.architecture import AttentionConfig, LatentConfig, PositionConfig
from sihe.models.errors import UnsupportedModel
from sihe.models.families.entries import (
    Values,
    flag,
    named,
    need,
    number,
    read_tokens,
    require,
    size,
    write_tokens,
)
from sihe.models.families.scaling import read_rope, write_rope

_SHAPE = {
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
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _read(
    values: Values,
    *,
    max_positions: int = 2048,
    theta: float = 1e4,
    eps: float = 1e-6,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    need(values, *_NEEDED)
    require(values, {"hidden_act": "silu"})
    heads = size(values, "num_attention_heads")
    positions = size(values, "max_position_embeddings", max_positions)
    theta, scaling, positions = read_rope(values, theta, positions)
    return {
        "vocab_size": size(values, "vocab_size"),
        "hidden_size": size(values, "hidden_size"),
        "num_layers": size(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": size(values, "num_key_value_heads", kv_heads or heads),
        "head_dim": size(values, "head_dim", head_dim or size(values, "hidden_size") // heads),
        "intermediate_size": size(values, "intermediate_size"),
        "max_positions": positions,
        "rope_theta": theta,
        "norm_eps": number(values, "rms_norm_eps", eps),
        "tie_embeddings": flag(values, "tie_word_embeddings", default=False),
        "positions": PositionConfig(scaling=scaling),
        **read_tokens(values),
    }


def _write(fields: Values) -> dict[str, Any]:
    scaling = fields["positions"].scaling
    shape = {theirs: fields[ours] for ours, theirs in _SHAPE.items()}
    if scaling is not None and scaling.kind == "dynamic":
        shape["max_position_embeddings"] = scaling.original_positions
    return {**shape, "hidden_act": "silu", **write_rope(fields["rope_theta"], scaling), **write_tokens(fields)}


def read_llama(values: Values) -> dict[str, Any]:
    """The fields behind a Llama's config.json."""
    require(values, {"mlp_bias": False})
    biased = flag(values, "attention_bias", default=False)
    return _read(values) | {"attention": AttentionConfig(qkv_bias=biased, out_bias=biased)}


def write_llama(fields: Values) -> dict[str, Any]:
    """A Llama's config.json."""
    biased = {"attention_bias": fields["attention"].qkv_bias, "mlp_bias": False}
    return named("LlamaForCausalLM", "llama") | _write(fields) | biased


def read_mistral(values: Values) -> dict[str, Any]:
    """The fields behind a Mistral's config.json: a Llama with a sliding window."""
    window = size(values, "sliding_window", 4096) if values.get("sliding_window", 4096) is not None else None
    fields = _read(values, max_positions=4096 * 32, kv_heads=8)
    return fields | {"attention": AttentionConfig(window=window)}


def write_mistral(fields: Values) -> dict[str, Any]:
    """A Mistral's config.json."""
    return named("MistralForCausalLM", "mistral") | _write(fields) | {"sliding_window": fields["attention"].window}


def read_qwen2(values: Values) -> dict[str, Any]:
    """The fields behind a Qwen2's config.json: a Llama with biases on queries, keys and values."""
    _refuse_mixed_layers(values)
    return _read(values, max_positions=32768) | {"attention": AttentionConfig(qkv_bias=True)}


def write_qwen2(fields: Values) -> dict[str, Any]:
    """A Qwen2's config.json."""
    return named("Qwen2ForCausalLM", "qwen2") | _write(fields) | {"use_sliding_window": False}


def read_qwen3(values: Values) -> dict[str, Any]:
    """The fields behind a Qwen3's config.json: a Llama with normalised queries and keys."""
    _refuse_mixed_layers(values)
    biased = flag(values, "attention_bias", default=False)
    shape = AttentionConfig(qkv_bias=biased, out_bias=biased, qk_norm=True)
    return _read(values, max_positions=32768, head_dim=128) | {"attention": shape}


def write_qwen3(fields: Values) -> dict[str, Any]:
    """A Qwen3's config.json."""
    biased = {"attention_bias": fields["attention"].qkv_bias, "use_sliding_window": False}
    return named("Qwen3ForCausalLM", "qwen3") | _write(fields) | biased


def _refuse_mixed_layers(values: Values) -> None:
    require(values, {"use_sliding_window": False})
    kinds = values.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise UnsupportedModel("layer_types", kinds, "'full_attention' in each layer")


def read_mixtral(values: Values) -> dict[str, Any]:
    """The fields behind a Mixtral's config.json: a Llama of which each layer is a mixture of experts."""
    require(values, {"sliding_window": None, "router_jitter_noise": 0.0})
    fields = _read(values, max_positions=4096 * 32, theta=1e6, eps=1e-5, kv_heads=8)
    coefficient = number(values, "router_aux_loss_coef", 0.001)
    balanced = {"router_balance": "loss", "balance_coefficient": coefficient}
    return fields | {
        "num_experts": size(values, "num_local_experts", 8),
        "experts_per_token": size(values, "num_experts_per_tok", 2),
        "expert_intermediate_size": fields["intermediate_size"],
        **(balanced if coefficient else {"router_balance": "none"}),
    }


def write_mixtral(fields: Values) -> dict[str, Any]:
    """A Mixtral's config.json."""
    return {
        **named("MixtralForCausalLM", "mixtral"),
        **_write(fields),
        "intermediate_size": fields["expert_intermediate_size"],
        "num_local_experts": fields["num_experts"],
        "num_experts_per_tok": fields["experts_per_token"],
        "router_aux_loss_coef": fields["balance_coefficient"] if fields["router_balance"] == "loss" else 0.0,
        "sliding_window": None,
    }


def read_deepseek_v2(values: Values) -> dict[str, Any]:
    """The fields behind a DeepSeek-V2's config.json, all of whose layers are dense: latent attention."""
    need(values, "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    require(values, {"attention_bias": False, "mlp_bias": False})
    rotary = size(values, "qk_rope_head_dim")
    fields = _read({**values, "head_dim": rotary + size(values, "qk_nope_head_dim")})
    if fields["positions"].scaling is not None:
        raise UnsupportedModel("rope_parameters.rope_type", fields["positions"].scaling.kind, "'default' here")
    dense = values.get("first_k_dense_replace", 0)
    if not isinstance(dense, int) or dense < fields["num_layers"]:
        raise UnsupportedModel("first_k_dense_replace", dense, f"{fields['num_layers']}, all layers dense")
    latent = LatentConfig(
        kv_rank=size(values, "kv_lora_rank"),
        rotary_dim=rotary,
        value_dim=size(values, "v_head_dim"),
        q_rank=None if values.get("q_lora_rank", 1536) is None else size(values, "q_lora_rank", 1536),
    )
    return fields | {"attention": AttentionConfig(latent=latent)}


def write_deepseek_v2(fields: Values) -> dict[str, Any]:
    """A dense DeepSeek-V2's config.json."""
    latent = fields["attention"].latent or LatentConfig(kv_rank=1, rotary_dim=2, value_dim=1)
    return {
        **named("DeepseekV2ForCausalLM", "deepseek_v2"),
        **_write(fields),
        "head_dim": latent.rotary_dim,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank,
        "qk_rope_head_dim": latent.rotary_dim,
        "qk_nope_head_dim": max(fields["head_dim"] - latent.rotary_dim, 1),
        "v_head_dim": latent.value_dim,
        "first_k_dense_replace": fields["num_layers"],
        "attention_bias": False,
        "mlp_bias": False,
    }
