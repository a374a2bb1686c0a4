"""Writing a token data set: shards grow on the way, and the folder appears whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sihe.core.errors import InternalError, InvalidInput
from sihe.core.files import new_directory, write_file
from sihe.data.loading.manifest import FILE_NAME, DatasetManifest, Shard, Split, token_type

SHARD_TOKENS = 1 << 26  # 128 MB of uint16: few files, and one damaged shard costs little to name


class _SplitWriter:
    """The shards of one split; the last one is open."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._tokens = 0

    def append(self, tokens: np.ndarray) -> None:
        while tokens.size:
            if self._file is None:
                self._file = (self._folder / self._name()).open("xb")
            piece = tokens[: self._shard_tokens - self._tokens]
            data = piece.astype(self._dtype).tobytes()
            self._file.write(data)
            self._hash.update(data)
            self._tokens += piece.size
            tokens = tokens[piece.size :]
            if self._tokens == self._shard_tokens:
                self._close_shard()

    def finish(self) -> tuple[Shard, ...]:
        self._close_shard()
        return tuple(self._shards)

    def abandon(self) -> None:
        """Frees the open file; what it holds will be removed with the folder."""
        if self._file is not None:
            self._file.close()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._shards.append(Shard(self._name(), self._tokens, self._hash.hexdigest()))
        self._file, self._hash, self._tokens = None, hashlib.sha256(), 0

    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.bin"


class DatasetWriter:
    """Takes tokens and files for one data set; made by `write_dataset`."""

    def __init__(self, folder: Path, *, vocab_size: int, eos_token_id: int, shard_tokens: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id
        self._dtype = np.dtype(token_type(vocab_size)).newbyteorder("<")
        self._splits: dict[Split, _SplitWriter] = {
            "train": _SplitWriter(folder, "train", self._dtype, shard_tokens),
            "held_out": _SplitWriter(folder, "held_out", self._dtype, shard_tokens),
        }
        self._files: dict[str, str] = {}

    def append(self, split: Split, tokens: np.ndarray) -> None:
        """Adds token ids (a 1-D integer array) to the end of a split. Raises `InvalidInput` for an id out of range."""
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab_size):
            raise InvalidInput(
                f"token ids must lie in [0, {self._vocab_size}), got {int(tokens.min())} … {int(tokens.max())}: "
                "is this the tokenizer of this data set?"
            )
        self._splits[split].append(tokens)

    def add_file(self, name: str, data: bytes) -> None:
        """Adds a file, such as `tokenizer.json`, to the folder."""
        write_file(self._folder / name, data)
        self._files[name] = hashlib.sha256(data).hexdigest()

    def _finish(
        self, *, name: str, version: str, created_at: str, lineage: tuple[str, ...], notes: Mapping[str, Any]
    ) -> None:
        manifest = DatasetManifest(
            name=name,
            version=version,
            dtype=token_type(self._vocab_size),
            vocab_size=self._vocab_size,
            eos_token_id=self._eos_token_id,
            splits={split: writer.finish() for split, writer in self._splits.items()},
            files=self._files,
            created_at=created_at,
            lineage=lineage,
            report=notes["report"],
            settings=notes["settings"],
        )
        if not manifest.num_tokens("train"):
            raise InternalError(f"data set {manifest.key} would have no token to train on")
        write_file(self._folder / FILE_NAME, manifest.to_json())

    def _abandon(self) -> None:
        for writer in self._splits.values():
            writer.abandon()


@contextmanager
def write_dataset(
    folder: Path,
    *,
    name: str,
    version: str,
    vocab_size: int,
    eos_token_id: int,
    created_at: str,
    lineage: tuple[str, ...] = (),
    report: Mapping[str, Mapping[str, int]] | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Iterator[DatasetWriter]:
    """Gives a writer; on a clean exit the finished data set becomes `folder` in one rename, otherwise nothing does.

    `report` is read at the end, so the caller may fill it on the way. Raises `AlreadyExists`, `NoSpace`, `Busy`.
    """
    with new_directory(folder) as staging:
        writer = DatasetWriter(staging, vocab_size=vocab_size, eos_token_id=eos_token_id, shard_tokens=shard_tokens)
        try:
            yield writer
            notes = {
                "report": {key: dict(counted) for key, counted in (report or {}).items()},
                "settings": dict(settings or {}),
            }
            writer._finish(name=name, version=version, created_at=created_at, lineage=lineage, notes=notes)
        finally:
            writer._abandon()
