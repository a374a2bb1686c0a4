"""Documents as one row of tokens: `<|bos|>` text `<|eos|>`, document after document, cut into sequences by the reader.

Which documents are held out depends on each document's hash alone, so adding text never moves a document from one
split to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sihe.core.errors import InvalidInput
from sihe.data.text.tokenizer import TextEncoder
from sihe.data.text.types import Document

_BATCH_CHARACTERS = 2_000_000


def choose_held_out(digests: Iterable[str], share: float) -> set[str]:
    """The SHA-256 digests (hex) of the documents to hold out: about `share` of them. Raises `InvalidInput`.

    A corpus so small that chance would leave one side empty gives that side one document, by the order of the hashes.
    """
    if not 0 <= share <= 0.5:
        raise InvalidInput(f"held_out is a share in [0, 0.5], got {share!r}")
    ordered = sorted(set(digests))
    chosen = {digest for digest in ordered if int(digest[:16], 16) < share * 2**64}
    if share and len(ordered) > 1:
        chosen = (chosen or {ordered[0]}) - ({ordered[-1]} if len(chosen) == len(ordered) else set())
    return chosen if len(ordered) > 1 else set()


def tokenize(documents: Sequence[Document], encoder: TextEncoder) -> Iterator[np.ndarray]:
    """The tokens of each document, framed by `<|bos|>` and `<|eos|>`, in order."""
    for batch in _batches(documents):
        for ids in encoder.encode([document.text for document in batch]):
            yield np.concatenate([[encoder.bos], ids, [encoder.eos]])


def _batches(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    start, size = 0, 0
    for index, document in enumerate(documents):
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or index == len(documents) - 1:
            yield documents[start : index + 1]
            start, size = index + 1, 0
