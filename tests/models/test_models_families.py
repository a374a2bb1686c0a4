"""Every family that transformers computes too: its files, its outputs and its gradients, on random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sihe.core.errors import ConfigError
from sihe.models.architecture import AttentionConfig, LayerConfig, PositionConfig, RopeScaling
from sihe.models.checkpoint import load_config, load_encoder, load_model, save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.encoder import Encoder
from sihe.models.places import sinusoids
from sihe.models.rope import frequencies
from sihe.models.score_bias import AlibiBias, RelativeBias

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

LIMIT = 1e-4  # of the promise; measured errors are below 1e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CLASSIC: dict[str, Any] = {
    "vocab_size": 101,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(**rope: Any) -> Callable[[], nn.Module]:
    parameters = {"rope_theta": 1e4, **rope}
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=parameters)
    return lambda: transformers.LlamaForCausalLM(config)


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama, biases": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attention_bias=True)),
    "llama, linear": llama(rope_type="linear", factor=4.0),
    "llama, dynamic": llama(rope_type="dynamic", factor=2.0),
    "llama, llama3": llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "llama, yarn": llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "llama, yarn with mscale": llama(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.3
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=9)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=16)),
    "deepseek_v2": lambda: transformers.DeepseekV2ForCausalLM(deepseek(q_lora_rank=12)),
    "deepseek_v2, wide queries": lambda: transformers.DeepseekV2ForCausalLM(deepseek(q_lora_rank=None)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**CLASSIC, **NO_DROPOUT, n_embd=32, n_positions=64)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**CLASSIC, hidden_size=32)),
    "bloom, six heads": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(**{**CLASSIC, "n_head": 6}, hidden_size=36)
    ),
}


def deepseek(*, q_lora_rank: int | None) -> Any:
    return transformers.DeepseekV2Config(
        **{**SHAPE, "num_key_value_heads": 4},
        q_lora_rank=q_lora_rank,
        kv_lora_rank=10,
        qk_rope_head_dim=6,
        qk_nope_head_dim=8,
        v_head_dim=5,
        first_k_dense_replace=2,
    )


def far_from_start(model: nn.Module) -> nn.Module:
    """Biases and norms too get random values: at their initial ones they would hide in the outputs."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(-0.5, 0.5)
                if "bias" not in name:
                    weight.add_(1.0)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference at any position, over the largest value there."""
    error = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
    return float(error.detach().max())


@pytest.fixture(params=DECODERS.values(), ids=DECODERS.keys())
def theirs(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return far_from_start(request.param())


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(101, (2, 50), generator=torch.Generator().manual_seed(1))


def test_decoders_agree(theirs: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    """Logits, files written by us, and gradients, which go through the files as if they were weights."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert sum(weight.numel() for weight in ours.parameters()) == ours.config.num_parameters
    expected = theirs(tokens).logits
    assert relative_error(ours(tokens), expected) <= LIMIT

    functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    ours.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    save_model(ours, tmp_path / "ours")
    assert load_config(tmp_path / "ours") == ours.config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    weights = theirs.state_dict()
    assert back.state_dict().keys() == weights.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, weights[name]), name

    with torch.no_grad():
        for weight in (*ours.parameters(), *theirs.parameters()):
            weight.copy_(weight.grad)
    save_model(ours, tmp_path / "gradients")
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gradients").state_dict()
    for name, gradient in theirs.state_dict().items():
        # A key's bias moves all scores of a query alike: its gradient is zero but for rounding.
        allowed = LIMIT * gradient.norm() + 1e-4 * (name.endswith("k_proj.bias"))
        assert float((got[name] - gradient).norm()) <= allowed, name


def test_dynamic_scaling_goes_by_the_length() -> None:
    torch.manual_seed(0)
    theirs = DECODERS["llama, dynamic"]().eval()
    config = ModelConfig.from_hf(theirs.config.to_dict())
    assert config.max_positions == 128
    longer = torch.randint(101, (2, 90))
    with torch.no_grad():
        ours = Decoder(config)
        ours.load_state_dict(rotary_weights(theirs, ours))
        for length in (90, 30, 80):
            assert relative_error(ours(longer[:, :length]), theirs(longer[:, :length]).logits) <= LIMIT
            positions_BT = torch.arange(length).expand(2, -1)
            assert relative_error(ours(longer[:, :length], positions_BT), theirs(longer[:, :length]).logits) <= LIMIT


def rotary_weights(theirs: nn.Module, ours: Decoder) -> dict[str, Tensor]:
    """A transformers Llama's weights under our names."""
    found = theirs.state_dict()
    weights = {"embedding.weight": found["model.embed_tokens.weight"], "norm.weight": found["model.norm.weight"]}
    weights["head.weight"] = found["lm_head.weight"]
    for layer in range(ours.config.num_layers):
        old, new = f"model.layers.{layer}", f"blocks.{layer}"
        weights[f"{new}.attention_norm.weight"] = found[f"{old}.input_layernorm.weight"]
        weights[f"{new}.mlp_norm.weight"] = found[f"{old}.post_attention_layernorm.weight"]
        q, k, v = (found[f"{old}.self_attn.{letter}_proj.weight"].unflatten(0, (2, -1, 8)) for letter in "qkv")
        weights[f"{new}.attention.qkv.weight"] = torch.cat((q, k, v), dim=1).flatten(0, 2)
        weights[f"{new}.attention.out.weight"] = found[f"{old}.self_attn.o_proj.weight"]
        gate, up = found[f"{old}.mlp.gate_proj.weight"], found[f"{old}.mlp.up_proj.weight"]
        weights[f"{new}.mlp.gate_up.weight"] = torch.stack((gate, up))
        weights[f"{new}.mlp.down.weight"] = found[f"{old}.mlp.down_proj.weight"]
    return weights


def test_yarn_without_whole_dims() -> None:
    scaling = RopeScaling("yarn", 4.0, 256, truncate=False)
    whole = frequencies(64, 1e4, replace(scaling, truncate=True), 0, torch.device("cpu"))[0]
    ours, factor = frequencies(64, 1e4, scaling, 0, torch.device("cpu"))
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "truncate": False,
    }
    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=parameters)
    rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    torch.testing.assert_close(ours, rope.inv_freq)
    assert not torch.allclose(ours, whole)
    assert factor == pytest.approx(rope.attention_scaling) == 0.1 * math.log(4) + 1


# ---- BERT ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bert() -> Any:
    torch.manual_seed(0)
    shape = {**SHAPE, "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    del shape["num_key_value_heads"]
    return transformers.BertConfig(**shape)


def padded() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, types = torch.randint(101, (2, 20), generator=generator), torch.randint(2, (2, 20), generator=generator)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    return tokens, types, mask


def test_bert_predicts_masked_tokens_alike(bert: Any, tmp_path: Path) -> None:
    theirs = far_from_start(transformers.BertForMaskedLM(bert))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_encoder(tmp_path / "theirs")
    tokens, types, mask = padded()
    seen = mask.bool()
    expected = theirs(tokens, attention_mask=mask, token_type_ids=types).logits
    got = ours(tokens, documents_BT=mask, types_BT=types)
    assert relative_error(got[seen], expected[seen]) <= LIMIT
    assert relative_error(ours(tokens), theirs(tokens).logits) <= LIMIT

    targets = torch.where(seen & (torch.arange(20) % 3 == 0), tokens, -100)
    nll, count = ours.loss(tokens, targets, documents_BT=mask, types_BT=types)
    loss = functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    assert int(count) == int((targets >= 0).sum())
    torch.testing.assert_close(nll, loss)
    nll.backward()
    loss.backward()
    save_model(ours, tmp_path / "ours")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)
    with torch.no_grad():
        for weight in (*ours.parameters(), *theirs.parameters()):
            weight.copy_(weight.grad)
    save_model(ours, tmp_path / "gradients")
    gradients = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "gradients").state_dict()
    for name, gradient in theirs.state_dict().items():
        allowed = LIMIT * gradient.norm() + 1e-4 * name.endswith("key.bias")  # see above
        assert float((gradients[name] - gradient).norm()) <= allowed, name


def test_bert_pools_alike(bert: Any, tmp_path: Path) -> None:
    theirs = far_from_start(transformers.BertModel(bert))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_encoder(tmp_path / "theirs")
    tokens, types, mask = padded()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask, token_type_ids=types)
        hidden = ours.hidden(tokens, documents_BT=mask, types_BT=types)
        assert relative_error(hidden[mask.bool()], expected.last_hidden_state[mask.bool()]) <= LIMIT
        assert relative_error(ours(tokens, documents_BT=mask, types_BT=types), expected.pooler_output) <= LIMIT
    save_model(ours, tmp_path / "ours")
    assert load_config(tmp_path / "ours") == ours.config
    back = transformers.AutoModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())
    with pytest.raises(ConfigError, match="masked_token"):
        ours.logits(hidden)
    with pytest.raises(ConfigError, match="use an Encoder"):
        load_model(tmp_path / "ours")


def test_first_checkpoints_of_bert_are_read(bert: Any, tmp_path: Path) -> None:
    """They say gamma and beta, and have a pooled vector and a second task beside the masked tokens."""
    from safetensors.torch import load_file, save_file

    theirs = far_from_start(transformers.BertForMaskedLM(bert))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(old | {"bert.pooler.dense.weight": torch.ones(2), "cls.seq_relationship.bias": torch.ones(2)}, path)
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert relative_error(load_encoder(tmp_path)(tokens), theirs(tokens).logits) <= LIMIT


def test_gpt2_files_without_a_prefix_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    theirs = far_from_start(DECODERS["gpt2"]())
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}, path)
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert relative_error(load_model(tmp_path)(tokens), theirs(tokens).logits) <= LIMIT


# ---- parts that transformers has inside other models ---------------------------------------------------------------


def test_t5_encoder_from_our_blocks() -> None:
    torch.manual_seed(0)
    shape = transformers.T5Config(
        vocab_size=101,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=20,
        dropout_rate=0.0,
    )
    theirs = far_from_start(transformers.T5EncoderModel(shape))
    ours = Encoder(
        ModelConfig(
            vocab_size=101,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            intermediate_size=48,
            max_positions=64,
            norm_eps=1e-6,
            attention=AttentionConfig(causal=False),
            positions=PositionConfig("relative", buckets=12, max_distance=20),
            layers=LayerConfig(gated=False, activation="relu"),
            task="masked_token",
        )
    )
    found = theirs.state_dict()
    with torch.no_grad():
        ours.embedding.weight.copy_(found["shared.weight"])
        ours.norm.weight.copy_(found["encoder.final_layer_norm.weight"])
        for layer, block in enumerate(ours.blocks):
            prefix = f"encoder.block.{layer}.layer"
            block.attention_norm.weight.copy_(found[f"{prefix}.0.layer_norm.weight"])
            q, k, v = (found[f"{prefix}.0.SelfAttention.{letter}.weight"].unflatten(0, (4, 1, 8)) for letter in "qkv")
            # T5 leaves scores as they are, here they are divided by the root of the head dim.
            block.attention.qkv.weight.copy_(torch.cat((q * 8**0.5, k, v), dim=1).flatten(0, 2))
            block.attention.out.weight.copy_(found[f"{prefix}.0.SelfAttention.o.weight"])
            shared = found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            block.attention.mix.bias.table.copy_(shared)
            block.mlp_norm.weight.copy_(found[f"{prefix}.1.layer_norm.weight"])
            block.mlp.up.weight.copy_(found[f"{prefix}.1.DenseReluDense.wi.weight"])
            block.mlp.down.weight.copy_(found[f"{prefix}.1.DenseReluDense.wo.weight"])
        tokens = torch.randint(101, (2, 50))
        assert relative_error(ours.hidden(tokens), theirs(tokens).last_hidden_state) <= LIMIT


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_t5(causal: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    shape = transformers.T5Config(d_model=8, d_kv=4, num_heads=3, is_decoder=causal)
    theirs = T5Attention(shape, has_relative_attention_bias=True, layer_idx=0)
    ours = RelativeBias(3, 32, 128, causal=causal)
    place = torch.arange(300)
    with torch.no_grad():
        ours.table.copy_(torch.randn(32, 3))
        theirs.relative_attention_bias.weight.copy_(ours.table)
        assert torch.equal(ours(place - place[:, None], torch.float32), theirs.compute_bias(300, 300)[0])


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    place = torch.arange(20)
    ours = AlibiBias(heads)(place - place[:, None], torch.float64)
    theirs = build_alibi_tensor(torch.ones(1, 20), heads, torch.float64).expand(heads, 20, 20)
    past = (place <= place[:, None]).expand(heads, -1, -1)
    # Theirs counts from the first key on, which shifts all scores of a query alike.
    distances = theirs - theirs.diagonal(dim1=1, dim2=2).unsqueeze(2)
    torch.testing.assert_close(ours[past], distances[past], rtol=1e-5, atol=1e-5)  # its slopes are float32


def test_sinusoids_are_those_of_distilbert() -> None:
    from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings

    table = torch.empty(50, 24)
    create_sinusoidal_embeddings(50, 24, table)
    torch.testing.assert_close(sinusoids(50, 24, torch.device("cpu")), table)
