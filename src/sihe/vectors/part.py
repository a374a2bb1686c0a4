"""Rows of a collection: the growing part in memory, and what every part, in memory or on disk, offers to a search.

Rows are only added and marked as dead, never moved: `died[row]` is the sequence number of the write that replaced or
removed it. A view at sequence number `s` sees the rows that existed then and that died later than `s`, so that readers
need no lock while a writer goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sihe.vectors.types import PointId, Vector

ALIVE = np.iinfo(np.int64).max
Rows = npt.NDArray[np.int64]


class Part(Protocol):
    """Rows with consecutive numbers from 0; `vectors` is [rows, dim] in float32, `norms` its Euclidean lengths."""

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """The vectors as they were written."""
        ...

    @property
    def norms(self) -> npt.NDArray[np.float32]:
        """Their lengths."""
        ...

    @property
    def died(self) -> npt.NDArray[np.int64]:
        """For each row the sequence number of the write that ended it, or `ALIVE`."""
        ...

    @property
    def ids(self) -> Sequence[PointId]:
        """The id of each row."""
        ...

    def payload(self, row: int) -> bytes:
        """The encoded payload of a row."""
        ...


def lengths(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Euclidean length of each row, summed in float64 so that large and tiny values neither overflow nor vanish."""
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)


class MemoryPart:
    """Rows that the log holds and no segment yet. One writer adds; readers keep to the rows that their view counts."""

    def __init__(self, dim: int) -> None:
        self.vectors: npt.NDArray[np.float32] = np.empty((0, dim), dtype=np.float32)
        self.norms: npt.NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self.died: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.ids: list[PointId] = []
        self.deleted: set[PointId] = set()
        self._payloads: list[bytes] = []
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """The encoded payload of a row."""
        return self._payloads[row]

    def add(self, ids: Sequence[PointId], vectors: npt.NDArray[np.float32], payloads: Sequence[bytes]) -> None:
        """Appends live rows. Arrays that a reader holds stay as they are: growth copies into new ones."""
        start, end = len(self), len(self) + len(ids)
        if end > len(self.died):
            self._grow(max(end, 2 * len(self.died), 64))
        self.vectors[start:end] = vectors
        self.norms[start:end] = lengths(vectors)
        self.died[start:end] = ALIVE
        self._payloads.extend(payloads)
        self.ids.extend(ids)
        self.size_bytes += vectors.nbytes + sum(map(len, payloads)) + 64 * len(ids)

    def _grow(self, capacity: int) -> None:
        used = len(self)
        for name in ("vectors", "norms", "died"):
            old: Vector = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
            new[:used] = old[:used]
            setattr(self, name, new)
