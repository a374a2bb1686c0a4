"""The shape of a decoder and its translation from and to config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import ConfigError
from sihe.models.config import ModelConfig
from sihe.models.errors import UnsupportedModel

BASE = ModelConfig(
    vocab_size=100,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_positions=128,
)
# As LlamaConfig of transformers 4 writes it, and of transformers 5.
OLD = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEW = {key: value for key, value in OLD.items() if not key.startswith("rope_")} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 8))
    vocab = draw(st.integers(1, 2**17))
    eos = draw(st.lists(st.integers(0, vocab - 1), max_size=3))
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=draw(st.integers(1, 8192)),
        num_layers=draw(st.integers(1, 100)),
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        intermediate_size=draw(st.integers(1, 32768)),
        max_positions=draw(st.integers(1, 2**20)),
        rope_theta=draw(st.floats(1.0, 1e8)),
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        tie_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.none() | st.integers(0, vocab - 1)),
        eos_token_id=eos[0] if eos else None,
        more_eos_token_ids=tuple(eos[1:]),
    )


@given(configs())
def test_config_json_gives_back_the_same_configuration(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("values", [OLD, NEW], ids=["transformers 4", "transformers 5"])
def test_both_layouts_of_the_rotary_base_are_read(values: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(values)
    assert config.rope_theta == 5e5
    assert config.head_dim == 128
    assert config.num_parameters == 6_738_415_616  # Llama 2 7B, counted by hand in the model's paper as "7B"


def test_defaults_of_a_sparse_config_json_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sparse = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    theirs = transformers.LlamaConfig(**sparse)
    ours = ModelConfig.from_hf(sparse)
    assert ours == replace(
        ModelConfig.from_hf(theirs.to_dict()),
        # transformers fills these two in from its class, which is not the file's to say
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_parameters.rope_type"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.from_hf(OLD | change)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 5}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": "dynamic"}, "rope_parameters"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_parameters.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "positions.scaling.factor"),
        ({"model_type": "sihe"}, "sihe"),
        ({"model_type": "sihe", "sihe": {"vocab": 3}}, "vocab"),
        ({"model_type": None}, "model_type"),
        ({"rms_norm_eps": 0.0}, "norm_eps"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"eos_token_id": 32000}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_a_wrong_entry_is_named(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(OLD | change)
    assert caught.value.key == key


def test_a_configuration_checks_itself() -> None:
    with pytest.raises(ConfigError, match="num_kv_heads divides num_heads = 4, got 3"):
        replace(BASE, num_kv_heads=3)
    with pytest.raises(ConfigError, match="vocab_size is a positive whole number, got 0"):
        replace(BASE, vocab_size=0)


def test_every_end_token_is_kept() -> None:
    config = ModelConfig.from_hf(OLD | {"eos_token_id": [2, 5, 7]})
    assert config.eos_token_id == 2
    assert config.eos_token_ids == (2, 5, 7)
    assert BASE.eos_token_ids == ()


def test_operations_per_token_by_hand() -> None:
    # embedding 100 x 64; a layer: q 64 x 64, k and v 64 x 32 each, o 64 x 64, three of 64 x 96, two norms; a last norm
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert BASE.num_parameters == 100 * 64 + 2 * layer + 64
    assert BASE.flops_per_token(32) == 6 * BASE.num_parameters + 12 * 2 * 64 * 32
    untied = replace(BASE, tie_embeddings=False)
    assert untied.num_parameters == BASE.num_parameters + 6400
    assert untied.flops_per_token(32) == BASE.flops_per_token(32)
