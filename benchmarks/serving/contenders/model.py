"""The model that every contender serves: random weights of a real shape, a tokenizer trained on Python's library."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks.serving.contenders.worker import VOCAB_SIZE
from sihe.models.config import ModelConfig

SHAPE = ModelConfig(  # 124.7 M parameters, 100.1 M of them outside the embedding
    vocab_size=VOCAB_SIZE,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=2048,
    max_positions=2048,
    tie_embeddings=False,
)


def model_folder(home: Path) -> Path:
    """The model's folder under `home`, made where it is not there yet."""
    import torch

    from sihe.models.checkpoint import save_model
    from sihe.models.decoder import Decoder

    folder = home / "model"
    if folder.exists():
        return folder
    half = home / "model.part"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    torch.manual_seed(0)
    save_model(Decoder(SHAPE), half)
    _save_tokenizer(half)
    half.rename(folder)
    return folder


def library_texts(limit_bytes: int) -> Iterator[str]:
    """Sources of Python's standard library, by name, until `limit_bytes` of them."""
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        if size > limit_bytes:
            return
        yield text


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(library_texts(8_000_000), trainer)
    tokenizer.add_tokens([f"<unused {at}>" for at in range(VOCAB_SIZE - tokenizer.get_vocab_size())])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=SHAPE.max_positions).save_pretrained(folder)
