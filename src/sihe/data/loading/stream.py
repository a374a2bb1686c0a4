"""The batches that one rank trains on, in an order that does not know how many ranks there are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sihe.core.errors import InvalidInput
from sihe.data.errors import DatasetTooSmall
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.order import SampleOrder
from sihe.data.loading.share import BatchShare

_READ_AHEAD = 4096  # positions whose samples are computed at once: numpy's cost per call falls under 1 µs a sample


class BatchStream:
    """An endless iterator of int64 [global_batch / world_size, sequence_length + 1].

    Sample i is the tokens [i·T, i·T + T + 1): inputs and, shifted by one, their targets. Epoch follows epoch, each in
    another order. Batch k of all ranks together, stacked by rank, is the same at every world size, and `next_sample`
    is the whole state: give it back as `start_sample`, also at another world size or batch, and not one sample is
    repeated or left out. Raises `InvalidInput` and `DatasetTooSmall` when made, before the first step.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        split: str,
        sequence_length: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
    ) -> None:
        if sequence_length < 1 or start_sample < 0:
            raise InvalidInput(
                "sequence_length must be positive and start_sample not negative, "
                f"got {sequence_length!r}, {start_sample!r}"
            )
        self._share = BatchShare(global_batch, rank, world_size)
        self._tokens = dataset.split(split)
        self.num_samples = (len(self._tokens) - 1) // sequence_length
        if self.num_samples < 1:
            raise DatasetTooSmall(dataset.folder, split, tokens=len(self._tokens), needed=sequence_length + 1)
        self._order = SampleOrder(self.num_samples, seed)
        self._sequence_length = sequence_length
        self.next_sample = start_sample
        self._ahead = np.empty(0, np.int64)
        self._ahead_first = start_sample

    @property
    def epoch(self) -> float:
        """Passes over the data so far; 1.5 is the middle of the second."""
        return self.next_sample / self.num_samples

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        first = self.next_sample + self._share.offset
        batch = self._tokens.windows(self._samples(first) * self._sequence_length, self._sequence_length + 1)
        self.next_sample += self._share.global_batch
        return batch

    def _samples(self, first: int) -> np.ndarray:
        start, count = first - self._ahead_first, self._share.local_batch
        if not 0 <= start <= len(self._ahead) - count:
            self._ahead_first, start = first, 0
            self._ahead = self._order.samples(first, max(count, min(_READ_AHEAD, self.num_samples)))
        return self._ahead[start : start + count]
