"""Model folders small enough for a unit test: random weights, a byte-level tokenizer of their own, a chat template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sihe.models.checkpoint import save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder

SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant', 'system'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "你好，世界 — héllo 🙂"]


@cache
def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE over a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def tiny_config(*, num_kv_heads: int = 2, max_positions: int = 128, eos: bool = True) -> ModelConfig:
    """Two layers, four heads."""
    return ModelConfig(
        vocab_size=320,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        intermediate_size=64,
        max_positions=max_positions,
        tie_embeddings=False,
        bos_token_id=0,
        eos_token_id=1 if eos else None,
    )


def tiny_model(
    folder: Path, *, seed: int = 0, config: ModelConfig | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """A model folder whose greedy output depends on the seed; weights wide enough that no two logits nearly tie."""
    config = config or tiny_config()
    torch.manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[1] ** -0.5 * 2)
    save_model(model.to(dtype), folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "chat_template": TEMPLATE}
    if config.eos_token_id is not None:
        settings["eos_token"] = "<|eos|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
