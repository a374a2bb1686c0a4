"""Decoders with layer norms and plain feed-forward layers: GPT-2, BLOOM.

Dropout is not computed here: their entries for it are passed over when read, and written as 0.
"""

from __future__ import annotations

from typing import Any

from sihe.models.architecture import AttentionConfig, LayerConfig, PositionConfig
from sihe.models.families.entries import (
    ACTIVATIONS,
    WRITTEN,
    Values,
    choice,
    flag,
    heads,
    named,
    need,
    number,
    read_tokens,
    require,
    size,
    write_tokens,
)


def read_gpt2(values: Values) -> dict[str, Any]:
    """The fields behind a GPT-2's config.json."""
    need(values, "vocab_size", "n_embd", "n_layer", "n_head")
    require(
        values,
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    )
    width = size(values, "n_embd")
    return {
        "vocab_size": size(values, "vocab_size"),
        **heads(width, size(values, "n_head")),
        "num_layers": size(values, "n_layer"),
        "intermediate_size": size(values, "n_inner", 4 * width),
        "max_positions": size(values, "n_positions", 1024),
        "norm_eps": number(values, "layer_norm_epsilon", 1e-5),
        "tie_embeddings": flag(values, "tie_word_embeddings", default=True),
        "attention": AttentionConfig(qkv_bias=True, out_bias=True),
        "positions": PositionConfig("learned"),
        "layers": LayerConfig(
            norm="layer",
            gated=False,
            activation=choice(values, "activation_function", "gelu_new", ACTIVATIONS),  # type: ignore[arg-type]  # checked by the value
            mlp_bias=True,
        ),
        **read_tokens(values),
    }


def write_gpt2(fields: Values) -> dict[str, Any]:
    """A GPT-2's config.json."""
    return {
        **named("GPT2LMHeadModel", "gpt2"),
        "vocab_size": fields["vocab_size"],
        "n_embd": fields["hidden_size"],
        "n_layer": fields["num_layers"],
        "n_head": fields["num_heads"],
        "n_inner": fields["intermediate_size"],
        "n_positions": fields["max_positions"],
        "layer_norm_epsilon": fields["norm_eps"],
        "activation_function": WRITTEN[fields["layers"].activation],
        "tie_word_embeddings": fields["tie_embeddings"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **write_tokens(fields),
    }


def read_bloom(values: Values) -> dict[str, Any]:
    """The fields behind a BLOOM's config.json. It names no longest sequence: `seq_length`, or 2048, is taken."""
    values = {"hidden_size": values.get("n_embed"), **values}
    need(values, "vocab_size", "hidden_size", "n_layer", "n_head")
    require(values, {"apply_residual_connection_post_layernorm": False})
    width = size(values, "hidden_size")
    return {
        "vocab_size": size(values, "vocab_size"),
        **heads(width, size(values, "n_head")),
        "num_layers": size(values, "n_layer"),
        "intermediate_size": 4 * width,
        "max_positions": size(values, "seq_length", 2048),
        "norm_eps": number(values, "layer_norm_epsilon", 1e-5),
        "tie_embeddings": flag(values, "tie_word_embeddings", default=True),
        "attention": AttentionConfig(qkv_bias=True, out_bias=True),
        "positions": PositionConfig("alibi"),
        "layers": LayerConfig(norm="layer", gated=False, activation="gelu_tanh", mlp_bias=True, embedding_norm=True),
        **read_tokens(values),
    }


def write_bloom(fields: Values) -> dict[str, Any]:
    """A BLOOM's config.json."""
    return {
        **named("BloomForCausalLM", "bloom"),
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "n_layer": fields["num_layers"],
        "n_head": fields["num_heads"],
        "seq_length": fields["max_positions"],
        "layer_norm_epsilon": fields["norm_eps"],
        "tie_word_embeddings": fields["tie_embeddings"],
        **write_tokens(fields),
    }
