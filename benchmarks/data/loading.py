"""Loading token batches: tokens/s of loading alone, and the share of a training run that waits for data.

    ours              MixtureStream over windows, in the thread that asks
    ours, prefetched  the same behind a Prefetcher
    ours, packed      whole documents with masks, prefetched
    torch             DataLoader with two workers over the same mapped file, shuffled by torch, default collation

One data set of 32 M random tokens (documents of about 600), batches of 16 x 1024. In the second part each batch costs
a known time: a sleep, which leaves the processor to the loader as a GPU would, or matrix products, which do not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import alternate, at_least, at_most, print_table, report
from sihe.data.loading import (
    MixtureSource,
    MixtureStage,
    MixtureStream,
    PackedSamples,
    Prefetcher,
    Samples,
    TokenDataset,
    WindowSamples,
    write_dataset,
)

TOKENS, VOCABULARY, DOCUMENT = 1 << 25, 32_000, 600
BATCH, LENGTH = 16, 1024
COMPUTE_S = 0.02
WORKERS = 2


def main() -> None:
    """Writes the data set, measures every contender in turn, reports the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = _dataset(Path(folder) / "set")
        windows = WindowSamples(dataset, "train", LENGTH)
        packed = PackedSamples(dataset, "train", LENGTH)
        loaders: dict[str, Callable[[], Iterator[object]]] = {
            "ours": lambda: _stream(windows),
            "ours, prefetched": lambda: Prefetcher(_stream(windows)),
            "ours, packed": lambda: Prefetcher(_stream(packed)),
            "torch": lambda: iter(_TorchLoader(dataset)),
        }
        speed = alternate(
            {name: lambda load=load: _tokens_per_second(load(), options.batches) for name, load in loaders.items()},
            repeats=options.repeats,
        )
        print("loading alone")
        print_table(speed, unit="tokens/s", baseline="torch")
        claims = [
            at_least(
                "loading alone, beside torch's DataLoader with two workers",
                statistics.median(speed["ours"]),
                statistics.median(speed["torch"]),
                unit="tokens/s",
                ratio=1.0,
            )
        ]
        for kind, compute in (("sleep", _sleep), ("products", _products())):
            stalls = alternate(
                {
                    name: lambda load=load, compute=compute: 100 * _stall(load(), compute)
                    for name, load in loaders.items()
                },
                repeats=options.repeats,
            )
            print(f"\nwaiting for data where a batch costs {1e3 * COMPUTE_S:.0f} ms of {kind}")
            print_table(stalls, unit="% of the run", baseline="torch")
            claims.append(
                at_most(
                    f"waiting for data behind a prefetcher, {kind}",
                    statistics.median(stalls["ours, prefetched"]),
                    unit="%",
                    limit=1.0 if kind == "sleep" else 3.0,
                )
            )
        print(f"\npacked: {packed.report.padding_share:.2%} padding, {packed.report.cut_share:.1%} of documents cut\n")
    report(__file__, claims)


def _dataset(folder: Path) -> TokenDataset:
    generator = np.random.default_rng(0)
    with write_dataset(
        folder,
        name="random",
        version="1",
        vocab_size=VOCABULARY,
        eos_token_id=0,
        created_at="2026-01-01T00:00:00+00:00",
    ) as writer:
        for _ in range(TOKENS >> 22):
            tokens = generator.integers(1, VOCABULARY, 1 << 22)
            tokens[generator.random(1 << 22) < 1 / DOCUMENT] = 0
            writer.append("train", tokens)
    return TokenDataset.open(folder)


def _stream(samples: Samples) -> MixtureStream:
    return MixtureStream([MixtureSource("a", samples)], [MixtureStage({"a": 1})], global_batch=BATCH, seed=1)


class _Windows(Dataset[Tensor]):
    """The windows of one mapped shard, as nanoGPT's and most tutorials' loaders have them."""

    def __init__(self, path: Path) -> None:
        self._tokens = np.memmap(path, np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // LENGTH

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._tokens[index * LENGTH : index * LENGTH + LENGTH + 1].astype(np.int64))


class _TorchLoader:
    """Starts its workers before the first batch is asked for, so that forking them is not counted."""

    def __init__(self, dataset: TokenDataset) -> None:
        windows = _Windows(dataset.folder / dataset.manifest.splits["train"][0].file)
        self._loader = DataLoader(windows, batch_size=BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._loader)


def _tokens_per_second(loader: Iterator[object], batches: int) -> float:
    next(loader)
    started = time.perf_counter()
    for _ in range(batches):
        next(loader)
    seconds = time.perf_counter() - started
    _close(loader)
    return batches * BATCH * LENGTH / seconds


def _stall(loader: Iterator[object], compute: Callable[[], None], batches: int = 60) -> float:
    """The share of `batches` steps that is spent asking for the batch; the first is not counted."""
    next(loader)
    waiting = 0.0
    started = time.perf_counter()
    for _ in range(batches):
        compute()
        asked = time.perf_counter()
        next(loader)
        waiting += time.perf_counter() - asked
    share = waiting / (time.perf_counter() - started)
    _close(loader)
    return share


def _close(loader: Iterator[object]) -> None:
    if isinstance(loader, Prefetcher):
        loader.close()


def _sleep() -> None:
    time.sleep(COMPUTE_S)


def _products() -> Callable[[], None]:
    """Matrix products on one thread that take about as long as the sleep."""
    matrix = torch.randn(384, 384)

    def once() -> None:
        until = time.perf_counter() + COMPUTE_S
        while time.perf_counter() < until:
            matrix @ matrix

    return once


if __name__ == "__main__":
    main()
