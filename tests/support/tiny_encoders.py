"""Encoder folders small enough for a unit test, as Hugging Face and sentence-transformers lay them out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from sihe.models.checkpoint import save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.encoder import Encoder
from support.tiny_models import tiny_config, tiny_tokenizer

_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump",
]
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@cache
def word_tokenizer() -> Tokenizer:
    """WordPiece, with BERT's special tokens; truncation and padding are on, as real files have them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        _TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def save_word_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json."""
    copy = Tokenizer.from_str(word_tokenizer().to_str())
    copy.enable_truncation(8)
    copy.enable_padding(length=8)
    copy.save(str(folder / "tokenizer.json"))


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """Weights far from their small initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.7 if "embedding" in name else weight.shape[1] ** -0.5 * 1.5, generator=generator)
            else:
                weight.uniform_(-0.3, 0.3, generator=generator)
                weight.add_(float("bias" not in name))
    return model.eval()


def tiny_embedder(folder: Path, *, seed: int = 0, **more: Any) -> Path:
    """A BERT with pooling by the mean and vectors of length 1, in the layout of sentence-transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(scrambled(Encoder(ModelConfig.from_hf({**BERT, **more})), seed), folder)  # type: ignore[arg-type]  # the model comes back
    save_word_tokenizer(folder)
    write_modules(folder, "pooling_mode_mean_tokens")
    return folder


def tiny_reranker(folder: Path, *, seed: int = 0, labels: int = 1) -> Path:
    """A BERT that scores pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"architectures": ["BertForSequenceClassification"], "num_labels": labels}
    save_model(scrambled(Encoder(ModelConfig.from_hf({**BERT, **names})), seed), folder)  # type: ignore[arg-type]
    save_word_tokenizer(folder)
    return folder


def tiny_decoder_embedder(folder: Path, *, seed: int = 0) -> Path:
    """A decoder whose last token's state is the vector, with prompts of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(scrambled(Decoder(tiny_config()), seed), folder)  # type: ignore[arg-type]
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|eos|>", special_tokens=[("<|eos|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_modules(folder, "pooling_mode_lasttoken")
    prompts = {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


def write_modules(folder: Path, pooling: str, *, normalise: bool = True, width: int = 32, **more: Any) -> None:
    """modules.json and the pooling that it names."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalise else [])]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    values = {"word_embedding_dimension": width, pooling: True, **more}
    (folder / "1_Pooling/config.json").write_text(json.dumps(values), encoding="utf-8")
