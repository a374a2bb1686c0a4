"""Whole documents packed into samples, so that few are cut and little is padded.

Plain concatenation cuts a document wherever a sample ends: the model then predicts from a context that is not there.
Best-fit packing (Ding et al. 2024, arXiv 2404.10830, section 2) cuts only documents longer than a sample and puts the
pieces, longest first, each into the fullest sample that still has room (best-fit decreasing). What stays empty is
padded. The index is computed once for a split and a length, and mapped into memory by every rank.

Shapes: B samples, T positions; a sample has room for T + 1 tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sihe.core.errors import InvalidInput
from sihe.core.files import exclusive, new_directory, write_file
from sihe.core.telemetry import logger
from sihe.data.errors import DatasetTooSmall
from sihe.data.loading.dataset import TokenDataset
from sihe.data.loading.documents import document_starts
from sihe.data.loading.samples import Batch

_FORMAT = 1
_LOCK_S = 3600.0  # a first index over a trillion tokens takes that long
_log = logger(__name__)


@dataclass(frozen=True)
class PackingReport:
    """What packing did to a split."""

    documents: int
    cut_documents: int
    """Documents that do not lie in one sample."""
    samples: int
    tokens: int
    """That can be trained on; the second half of a cut document begins with the last token of the first."""
    padding: int
    """Places of samples without a token."""

    @property
    def padding_share(self) -> float:
        """Of all places."""
        return self.padding / (self.padding + self.tokens)

    @property
    def cut_share(self) -> float:
        """Of all documents."""
        return self.cut_documents / self.documents


@dataclass(frozen=True)
class PackingIndex:
    """Which pieces of the split make up each sample."""

    pieces: np.ndarray
    """int64 [pieces, 2]: first token and length, sample by sample."""
    offsets: np.ndarray
    """int64 [samples + 1]: where each sample's pieces begin in `pieces`."""
    report: PackingReport


class PackedSamples:
    """The samples of a packed split; batches always say which document a token belongs to.

    The index lies in `folder`, by default the data set's own; where that cannot be written, every process computes it.
    Raises `DatasetTooSmall` when no document has two tokens.
    """

    has_documents = True

    def __init__(self, dataset: TokenDataset, split: str, sequence_length: int, *, folder: Path | None = None) -> None:
        if sequence_length < 1:
            raise InvalidInput(f"sequence_length is positive, got {sequence_length!r}")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self._split = dataset.split(split)
        self._index = load_index(dataset, split, sequence_length, folder or dataset.folder)
        if not len(self):
            raise DatasetTooSmall(dataset.folder, split, tokens=len(self._split), needed=2)

    def __len__(self) -> int:
        return len(self._index.offsets) - 1

    @property
    def report(self) -> PackingReport:
        """What packing did to the split."""
        return self._index.report

    def read(self, numbers: np.ndarray) -> Batch:
        """One copy for each piece of a document."""
        tokens_BT1 = np.full((len(numbers), self.sequence_length + 1), -1, np.int64)
        documents_BT1 = np.full_like(tokens_BT1, -1)
        for row, number in enumerate(numbers):
            place = 0
            first, last = self._index.offsets[number], self._index.offsets[number + 1]
            for document, (start, length) in enumerate(self._index.pieces[first:last].tolist()):
                tokens_BT1[row, place : place + length] = self._split.tokens(start, start + length)
                documents_BT1[row, place : place + length] = document
                place += length
        return Batch(tokens_BT1, documents_BT1)


def concatenation_report(dataset: TokenDataset, split: str, sequence_length: int) -> PackingReport:
    """What cutting the row of tokens every `sequence_length` does: the figures to hold packing against."""
    starts = document_starts(dataset.split(split), dataset.eos_token_id)
    samples = (int(starts[-1]) - 1) // sequence_length
    firsts, lasts = starts[:-1], starts[1:] - 1
    cut = int(np.count_nonzero(firsts // sequence_length != np.maximum(lasts - 1, firsts) // sequence_length))
    return PackingReport(len(firsts), cut, samples, samples * (sequence_length + 1), 0)


def load_index(dataset: TokenDataset, split: str, sequence_length: int, folder: Path) -> PackingIndex:
    """The index that lies in `folder`; computed first where there is none. Of many processes one computes."""
    shards = [shard.sha256 for shard in dataset.manifest.splits[dataset.split(split).name]]
    key = hashlib.sha256(json.dumps([_FORMAT, dataset.eos_token_id, shards]).encode()).hexdigest()[:16]
    path = folder / f".packed-{split}-{sequence_length}-{key}"
    try:
        with exclusive(folder / f"{path.name}.lock", timeout_s=_LOCK_S):
            if not path.exists():
                _save(path, pack(dataset, split, sequence_length))
    except OSError as error:  # a read-only or full disk: packed all the same, by each process
        _log.info("packing_index_not_written", folder=str(folder), reason=str(error))
        return pack(dataset, split, sequence_length)
    report = PackingReport(**json.loads((path / "report.json").read_bytes()))
    pieces, offsets = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("pieces", "offsets"))
    return PackingIndex(pieces.view(np.ndarray), offsets.view(np.ndarray), report)


def _save(path: Path, index: PackingIndex) -> None:
    with new_directory(path) as staging:
        np.save(staging / "pieces.npy", index.pieces)
        np.save(staging / "offsets.npy", index.offsets)
        write_file(staging / "report.json", json.dumps(asdict(index.report)).encode())


def pack(dataset: TokenDataset, split: str, sequence_length: int) -> PackingIndex:
    """Packs the documents of a split. Depends on their lengths and order alone."""
    starts = document_starts(dataset.split(split), dataset.eos_token_id)
    pieces = _pieces(starts, sequence_length)
    order = np.argsort(-pieces[:, 1], kind="stable")
    sample_of = best_fit(pieces[order, 1], sequence_length + 1)
    by_sample = np.argsort(sample_of, kind="stable")
    samples = int(sample_of.max()) + 1 if len(sample_of) else 0
    offsets = np.searchsorted(sample_of[by_sample], np.arange(samples + 1)).astype(np.int64)
    lengths = np.diff(starts)
    tokens = int(pieces[:, 1].sum())
    report = PackingReport(
        documents=len(lengths),
        cut_documents=int(np.count_nonzero(lengths > sequence_length + 1)),
        samples=samples,
        tokens=tokens,
        padding=samples * (sequence_length + 1) - tokens,
    )
    return PackingIndex(pieces[order][by_sample], offsets, report)


def _pieces(starts: np.ndarray, sequence_length: int) -> np.ndarray:
    """int64 [pieces, 2], first token and length: whole documents, longer ones cut with one token in common.

    A document of one token has nothing to predict and gives no piece.
    """
    targets = np.diff(starts) - 1
    counts = -(-targets // sequence_length)
    document = np.repeat(np.arange(len(targets)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = starts[document] + number * sequence_length
    lengths = np.minimum(targets[document] - number * sequence_length, sequence_length) + 1
    return np.stack([firsts, lengths], axis=1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [pieces]: the sample of each piece, for `lengths` that descend and are in 1..capacity.

    Each piece goes where it leaves the least room, or into a new sample. Pieces of one length are placed together: a
    sample with the least sufficient room r takes ⌊r / length⌋ of them before another one can be the best. Complexity:
    linear in the pieces, and at most one search for each pair of a length and a room.
    """
    sample_of = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    has_room = np.zeros(capacity + 1, bool)
    opened = placed = 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            best = length + int(has_room[length:].argmax())
            is_new = not has_room[best]
            room = capacity if is_new else best
            each = room // length
            wanted = -(-count // each)
            if is_new:
                samples = list(range(opened, opened + wanted))
                opened += wanted
            else:
                samples = with_room[room][:wanted]
                del with_room[room][:wanted]
                has_room[room] = bool(with_room[room])
            now = min(count, each * len(samples))
            sample_of[placed : placed + now] = np.repeat(samples, each)[:now]
            placed, count = placed + now, count - now
            last = now - each * (len(samples) - 1)
            for left, whose in ((room - each * length, samples[:-1]), (room - last * length, samples[-1:])):
                if left and whose:
                    with_room[left] += whose
                    has_room[left] = True
    return sample_of
