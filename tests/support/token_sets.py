"""Token data sets of a few documents, for tests and measurements of loading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sihe.data.loading import TokenDataset, write_dataset

EOS = 0


def write_tokens(
    folder: Path,
    pieces: Iterable[np.ndarray],
    *,
    vocab_size: int = 1000,
    shard_tokens: int = 64,
    eos_token_id: int = EOS,
    tokenizer: bytes = b"{}",
) -> Path:
    """A data set with those tokens to train on, and none held out."""
    with write_dataset(
        folder,
        name=folder.name,
        version="1",
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        created_at="2026-01-01T00:00:00+00:00",
        shard_tokens=shard_tokens,
    ) as writer:
        for piece in pieces:
            writer.append("train", piece)
        writer.add_file("tokenizer.json", tokenizer)
    return folder


def counting(folder: Path, first: int, count: int, **settings: object) -> TokenDataset:
    """Tokens first, first + 1, …: a token says where it comes from."""
    write_tokens(folder, [np.arange(first, first + count)], **{"vocab_size": 100_000, **settings})  # type: ignore[arg-type]
    return TokenDataset.open(folder)


def documents(lengths: Iterable[int]) -> list[np.ndarray]:
    """Documents of those lengths, eos included; document d holds the tokens 1000·(d + 1), 1000·(d + 1) + 1, …"""
    found = []
    for number, length in enumerate(lengths, start=1):
        tokens = 1000 * number + np.arange(length)
        tokens[-1] = EOS
        found.append(tokens)
    return found
