"""A small token data set with a real tokenizer, for tests that train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sihe.data.loading.writer import write_dataset

_TEXT = "the court has four wings, and each wing has a door to the court; who walks once around has seen the house. "


def make_dataset(folder: Path, *, name: str = "court", version: str = "v1", repeats: int = 40, seed: int = 0) -> Path:
    """Writes `<folder>/<name>/<version>`: a shuffled text of about `repeats` x 110 characters, tokenised."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    words = np.random.default_rng(seed).permutation((_TEXT * repeats).split())
    ids = np.array(tokenizer.encode(" ".join(words)).ids)
    cut = len(ids) * 9 // 10
    target = folder / name / version
    with write_dataset(
        target,
        name=name,
        version=version,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=tokenizer.token_to_id("<|eos|>"),
        created_at="2026-01-01T00:00:00+00:00",
    ) as writer:
        writer.append("train", ids[:cut])
        writer.append("held_out", ids[cut:])
        writer.add_file("tokenizer.json", tokenizer.to_str().encode())
        special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
        writer.add_file("tokenizer_config.json", json.dumps(special).encode())
    return target
