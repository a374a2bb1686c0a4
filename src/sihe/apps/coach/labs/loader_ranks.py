"""What the process of `loader.prefetch` runs: batches whose cost is known, read ahead by the house's prefetcher.

T  tokens of a sample
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sihe.data.loading import TokenDataset, write_dataset
from sihe.data.loading.prefetch import Prefetcher
from sihe.data.loading.stream import BatchStream

_TIME = 16  # tokens of a sample
_GLOBAL_BATCH = 8
_BATCHES = 12  # of one epoch
_POLL_S = 0.001
_PATIENCE_S = 30.0


class CostlyStream:
    """The batches of `stream`, each after as many seconds as `costs_s` says."""

    def __init__(self, stream: BatchStream, costs_s: list[float]) -> None:
        self._stream = stream
        self._costs_s = iter(costs_s)

    @property
    def next_sample(self) -> int:
        """The position of the stream."""
        return self._stream.next_sample

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        time.sleep(next(self._costs_s))
        return next(self._stream)


def loading(
    rank: int, world_size: int, *, depths: list[int], costs_s: list[float], step_s: float, depth: int, taken: int
) -> dict[str, Any]:
    """The stall share at each of `depths`, and what a resume after `taken` batches gives at 1, 2 and 4 ranks."""
    del rank, world_size
    with tempfile.TemporaryDirectory(prefix="sihe-lab-loader-") as name:
        dataset = _dataset(Path(name, "counting"))
        shares = [_stall_share(dataset, one, costs_s, step_s) for one in depths]
        return {"stall_shares": shares, **_resumed(dataset, depth, taken)}


def _dataset(folder: Path) -> TokenDataset:
    """Tokens 0, 1, 2, …: a token says which sample it is of."""
    with write_dataset(
        folder,
        name=folder.name,
        version="1",
        vocab_size=1 << 16,
        eos_token_id=0,
        created_at="2026-01-01T00:00:00+00:00",
    ) as writer:
        writer.append("train", np.arange(_GLOBAL_BATCH * _BATCHES * _TIME + 1))
        writer.add_file("tokenizer.json", b"{}")
    return TokenDataset.open(folder)


def _stream(dataset: TokenDataset, *, rank: int = 0, world_size: int = 1, start_sample: int = 0) -> BatchStream:
    return BatchStream(
        dataset,
        split="train",
        sequence_length=_TIME,
        global_batch=_GLOBAL_BATCH,
        seed=0,
        rank=rank,
        world_size=world_size,
        start_sample=start_sample,
    )


def _stall_share(dataset: TokenDataset, depth: int, costs_s: list[float], step_s: float) -> float:
    with Prefetcher(CostlyStream(_stream(dataset), costs_s), depth=depth) as batches:
        for _ in costs_s:
            next(batches)
            time.sleep(step_s)
        return batches.report.stall_share


def _resumed(dataset: TokenDataset, depth: int, taken: int) -> dict[str, Any]:
    """Positions after `taken` batches, and the samples of the epoch when the rest is read by 1, 2 and 4 ranks."""
    undisturbed = [_ids(batch) for batch, _ in zip(_stream(dataset), range(_BATCHES), strict=False)]
    stream = _stream(dataset)
    with Prefetcher(stream, depth=depth) as batches:
        before = [_ids(next(batches)) for _ in range(taken)]
        position = batches.next_sample
        deadline = time.monotonic() + _PATIENCE_S
        while stream.next_sample < position + depth * _GLOBAL_BATCH and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        read_ahead = stream.next_sample - position
    found: dict[str, Any] = {
        "next_sample": position,
        "read_ahead": read_ahead,
        "differing": [],
        "repeated": 0,
        "missed": 0,
    }
    for world_size in (1, 2, 4):
        streams = [
            _stream(dataset, rank=rank, world_size=world_size, start_sample=position) for rank in range(world_size)
        ]
        after = [[sample for one in streams for sample in _ids(next(one))] for _ in range(_BATCHES - taken)]
        found["differing"].append(sum(one != other for one, other in zip(before + after, undisturbed, strict=True)))
        seen = list(chain.from_iterable(before + after))
        found["repeated"] += len(seen) - len(set(seen))
        found["missed"] += _GLOBAL_BATCH * _BATCHES - len(set(seen))
    return found


def _ids(batch: np.ndarray) -> list[int]:
    return [int(first) // _TIME for first in batch[:, 0]]
