"""Whether a model and a data set mean the same by a token id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sihe.apps.evaluation.errors import VocabularyMismatch
from sihe.core.errors import CorruptData, NotFound

if TYPE_CHECKING:
    from sihe.data.loading import TokenDataset

_MEANING = ("model", "normalizer", "pre_tokenizer", "added_tokens")  # what decides which id stands for what


def check_vocabulary(folder: Path, model: str, vocab_size: int, dataset: TokenDataset) -> None:
    """Raises `VocabularyMismatch` when the model in `folder` reads other tokens than the data set holds."""
    if dataset.vocab_size > vocab_size:
        reason = f"its vocabulary has {vocab_size} tokens and the data set's {dataset.vocab_size}"
        raise VocabularyMismatch(model, dataset.manifest.key, reason)
    ours, theirs = (_meaning(place / "tokenizer.json") for place in (folder, dataset.folder))
    different = [part for part in _MEANING if ours.get(part) != theirs.get(part)]
    if different:
        reason = f"their tokenizers differ in {', '.join(repr(part) for part in different)}"
        raise VocabularyMismatch(model, dataset.manifest.key, reason)


def _meaning(path: Path) -> dict[str, Any]:
    """The parts of a tokenizer, in the one form that the `tokenizers` library writes them in."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise NotFound("tokenizer", str(path), hint="without it nobody knows what the token ids mean")
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare class
        raise CorruptData(path, f"it is not a tokenizer: {error}") from error
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    return parts
