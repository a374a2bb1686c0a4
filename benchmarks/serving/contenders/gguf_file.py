"""A Llama of a Hugging Face folder as a GGUF file of float32, without its tokenizer: prompts are token ids.

The names and the order of rows are those of llama.cpp's own converter (`convert_hf_to_gguf.py`, `LlamaModel`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, target: Path) -> None:
    """Writes `target` by one rename."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    half = target.with_suffix(".part")
    writer = gguf.GGUFWriter(half, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, values in load_file(folder / "model.safetensors").items():
        if "q_proj" in name:
            values = _interleaved(values, heads)
        elif "k_proj" in name:
            values = _interleaved(values, kv_heads)
        writer.add_tensor(_name(name), np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    half.rename(target)


def _name(name: str) -> str:
    part = name.removesuffix(".weight")
    if part in _TOP:
        return f"{_TOP[part]}.weight"
    layer, _, inner = part.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[inner]}.weight"


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows reordered from halves (Hugging Face) to pairs (llama.cpp's "normal" RoPE)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _rope_base(config: dict[str, object]) -> float:
    parameters = config.get("rope_parameters")
    found = parameters.get("rope_theta") if isinstance(parameters, dict) else config.get("rope_theta")
    return float(found) if isinstance(found, (int, float)) else 10000.0
