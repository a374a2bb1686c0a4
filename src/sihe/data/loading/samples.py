"""What a stream asks of a split cut into samples, and the batch that it makes of them.

Shapes: B samples, T positions; a sample has T + 1 tokens, inputs and, shifted by one, their targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sihe.data.errors import DatasetTooSmall
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.documents import document_ids


@dataclass(frozen=True)
class Batch:
    """Samples to train on."""

    tokens: np.ndarray
    """int64 [B, T + 1]; -1 after the end of a sample that is not full."""
    documents: np.ndarray | None = None
    """int64 [B, T + 1], ascending from 0 in each sample, -1 where there is no token; None where documents mix."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> np.ndarray:
        """[B, T] token ids; 0 where there is none."""
        return np.maximum(self.tokens[:, :-1], 0)

    @property
    def targets(self) -> np.ndarray:
        """[B, T], the token after each input, -1 where there is none or where it begins another document."""
        targets = self.tokens[:, 1:]
        if self.documents is None:
            return targets
        return np.where(self.documents[:, 1:] == self.documents[:, :-1], targets, -1)

    @property
    def input_documents(self) -> np.ndarray | None:
        """[B, T] of the inputs: attention stays among positions with the same number."""
        return None if self.documents is None else self.documents[:, :-1]

    @property
    def positions(self) -> np.ndarray:
        """[B, T] of the inputs, from 0 in each document."""
        places = np.broadcast_to(np.arange(self.tokens.shape[1] - 1), self.inputs.shape)
        if self.input_documents is None:
            return places
        begins = np.ones(places.shape, bool)
        begins[:, 1:] = self.input_documents[:, 1:] != self.input_documents[:, :-1]
        return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


class Samples(Protocol):
    """A split cut into samples of one length."""

    @property
    def dataset(self) -> TokenDataset:
        """Where the tokens come from."""
        ...

    @property
    def sequence_length(self) -> int:
        """T."""
        ...

    @property
    def has_documents(self) -> bool:
        """Whether batches say which document each token belongs to."""
        ...

    def __len__(self) -> int:
        """How many samples there are; at least one."""
        ...

    def read(self, numbers: np.ndarray) -> Batch:
        """The samples with those numbers, in that order."""
        ...


class WindowSamples:
    """Sample i is the tokens [i·T, i·T + T + 1), wherever documents end.

    With `masks_documents`, batches say which document each token belongs to. Raises `DatasetTooSmall` when made.
    """

    def __init__(
        self, dataset: TokenDataset, split: str, sequence_length: int, *, masks_documents: bool = False
    ) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        self._split = dataset.split(split)
        self.has_documents = masks_documents
        self._count = (len(self._split) - 1) // sequence_length
        if self._count < 1:
            raise DatasetTooSmall(dataset.folder, split, tokens=len(self._split), needed=sequence_length + 1)

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: np.ndarray) -> Batch:
        """One gathering from the mapped shards."""
        tokens_BT1 = self._split.windows(numbers * self.sequence_length, self.sequence_length + 1)
        if not self.has_documents:
            return Batch(tokens_BT1)
        return Batch(tokens_BT1, document_ids(tokens_BT1, self.dataset.eos_token_id))
