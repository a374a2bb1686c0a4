"""Reading a token data set: mapped into memory, and checked against its checksums before the first token is used.

Checking costs one pass over the files, so the first process that does it leaves a stamp (`.verified.json`) which names
each file's size, inode and times; the other ranks, and later runs, read the stamp. It is void as soon as any file was
touched, and after a day, because a disk can go bad without touching a file.

A data set at a URL is read through a cache (`cached.py`): its manifest and tokenizer come at once, each shard, checked,
when the first sample needs it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from sihe.core.errors import ConfigError, CorruptData, InvalidInput
from sihe.core.files import exclusive, sha256_of, write_file
from sihe.core.telemetry import logger
from sihe.data.loading.cache import ShardCache
from sihe.data.loading.cached import CachedMaps, cached_dataset
from sihe.data.loading.manifest import FILE_NAME, DatasetManifest, Shard, Split, check_ids, read_manifest, split_named
from sihe.data.loading.remote import is_url

Verification = Literal["hashed", "stamp", "skipped", "on use"]
_STAMP = ".verified.json"
_STAMP_LIFE_S = 24 * 3600.0
_REMEDY = "delete the data set's folder and prepare it again, or copy the file back"
_log = logger(__name__)


class ShardMaps(Protocol):
    """The shards of a split as arrays of token ids, by number."""

    def __getitem__(self, index: int, /) -> np.ndarray:
        """The shard `index`; not to be kept longer than the call that asked."""
        ...


class TokenSplit:
    """One split as a single row of tokens, over however many shards."""

    def __init__(self, name: Split, shards: tuple[Shard, ...], maps: ShardMaps) -> None:
        self.name = name
        self._maps = maps
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The token ids (int64) from `start` up to `stop`. Raises `InvalidInput` outside of the split."""
        if not 0 <= start <= stop <= len(self):
            raise InvalidInput(f"split {self.name!r} has {len(self):,} tokens, got [{start}, {stop})")
        return self._across(start, stop - start).astype(np.int64)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int64 [len(starts), length]: from each start, `length` tokens. Raises `InvalidInput` outside of the split."""
        if starts.size == 0:
            return np.empty((0, length), np.int64)
        if length < 0 or starts.min() < 0 or starts.max() + length > len(self):
            raise InvalidInput(
                f"split {self.name!r} has {len(self):,} tokens, got windows of {length} "
                f"from {int(starts.min())} … {int(starts.max())}"
            )
        result = np.empty((starts.size, length), np.int64)
        shard_of = np.searchsorted(self._starts, starts, side="right") - 1
        inside = starts + length <= self._starts[shard_of + 1]
        for shard in np.unique(shard_of[inside]):
            rows = np.flatnonzero(inside & (shard_of == shard))
            first = starts[rows] - self._starts[shard]
            result[rows] = self._maps[int(shard)][first[:, None] + np.arange(length)]
        for row in np.flatnonzero(~inside):
            result[row] = self._across(int(starts[row]), length)
        return result

    def sequences(self, length: int, batch: int) -> Iterator[np.ndarray]:
        """Every whole sequence once, in order: int64 [≤ batch, length + 1]; for evaluation."""
        starts = np.arange((len(self) - 1) // length, dtype=np.int64) * length
        for first in range(0, len(starts), batch):
            yield self.windows(starts[first : first + batch], length + 1)

    def _across(self, start: int, length: int) -> np.ndarray:
        pieces: list[np.ndarray] = [np.empty(0, np.int64)] if not length else []
        while length:
            shard = int(np.searchsorted(self._starts, start, side="right")) - 1
            offset = start - int(self._starts[shard])
            pieces.append(self._maps[shard][offset : offset + length])
            start, length = start + pieces[-1].size, length - pieces[-1].size
        return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]


class TokenDataset:
    """A token data set, opened for reading. Any number of processes may share it."""

    def __init__(
        self, folder: Path, manifest: DatasetManifest, verification: Verification, maps: Mapping[Split, ShardMaps]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.verification = verification
        self._maps = maps
        self._splits = {name: TokenSplit(name, shards, maps[name]) for name, shards in manifest.splits.items()}

    @classmethod
    def open(
        cls, folder: Path | str, *, verify: bool | Literal["again"] = True, cache: ShardCache | None = None
    ) -> TokenDataset:
        """The data set in `folder`, or at a URL that fsspec knows, whose shards are then kept in `cache`.

        `verify=True` compares every file with its checksum unless a stamp says that it was done within a day and no
        file was touched since; `"again"` ignores the stamp; `False` looks at the sizes alone. Shards at a URL are
        always compared, when they are first used. The attribute `verification` says which it was. Raises `NotFound`,
        `CorruptData`, also for token ids that the vocabulary does not have; for a URL also `ConfigError` without a
        cache, `Unreachable`, `Unauthorized`.
        """
        if is_url(folder):
            if cache is None:
                raise ConfigError(f"a data set at a URL, {folder}, needs a local cache for its shards", key="cache")
            local, manifest, cached = cached_dataset(str(folder), cache)
            return cls(local, manifest, "on use", cached)
        folder = Path(folder).absolute()
        manifest = read_manifest(folder)
        verification: Verification = "skipped"
        if verify:
            verification = _verify(folder, manifest, trust_stamp=verify != "again")
        maps = {
            name: [_map(folder / shard.file, shard, manifest.token_dtype) for shard in shards]
            for name, shards in manifest.splits.items()
        }
        return cls(folder, manifest, verification, maps)

    def remote_split(self, name: Split) -> CachedMaps | None:
        """The shards of a split that lie at a URL; None for a local data set."""
        maps = self._maps[name]
        return maps if isinstance(maps, CachedMaps) else None

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The id that ends each document."""
        return self.manifest.eos_token_id

    def split(self, name: str) -> TokenSplit:
        """The split `train` or `held_out`. Raises `InvalidInput`."""
        return self._splits[split_named(name)]

    def num_tokens(self, split: str) -> int:
        """Tokens in a split."""
        return len(self.split(split))


def _map(path: Path, shard: Shard, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CorruptData(path, "the file is missing", hint=_REMEDY) from error
    expected = shard.tokens * dtype.itemsize
    if size != expected:
        raise CorruptData(path, f"it has {size:,} bytes and {expected:,} were written", hint=_REMEDY)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)  # indexing the subclass costs 3 times as much


def _verify(folder: Path, manifest: DatasetManifest, *, trust_stamp: bool) -> Verification:
    expected = dict(manifest.files)
    expected.update({shard.file: shard.sha256 for shards in manifest.splits.values() for shard in shards})
    try:
        with exclusive(folder / ".verified.lock", timeout_s=600.0):
            if trust_stamp and _stamp_holds(folder, expected):
                return "stamp"
            before = {"at": time.time(), "files": _identities(folder, expected)}
            _compare(folder, expected)
            _check_ids(folder, manifest)
            write_file(folder / _STAMP, json.dumps(before).encode())
    except CorruptData:
        raise
    except OSError as error:  # a read-only or full disk: the data are checked all the same, by each process
        _log.info("dataset_stamp_not_written", folder=str(folder), reason=str(error))
        _compare(folder, expected)
        _check_ids(folder, manifest)
    return "hashed"


def _compare(folder: Path, expected: dict[str, str]) -> None:
    for name, digest in sorted(expected.items()):
        path = folder / name
        try:
            actual = sha256_of(path)
        except FileNotFoundError as error:
            raise CorruptData(path, "the file is missing", hint=_REMEDY) from error
        except OSError as error:
            raise CorruptData(path, f"it cannot be read: {error.strerror}", hint=_REMEDY) from error
        if actual != digest:
            raise CorruptData(path, f"its SHA-256 is {actual[:12]}… and {digest[:12]}… was written", hint=_REMEDY)


def _check_ids(folder: Path, manifest: DatasetManifest) -> None:
    for shards in manifest.splits.values():
        for shard in shards:
            check_ids(_map(folder / shard.file, shard, manifest.token_dtype), manifest, folder / shard.file)


def _identities(folder: Path, names: dict[str, str]) -> dict[str, list[int]]:
    found = {}
    for name in (FILE_NAME, *sorted(names)):
        try:
            status = (folder / name).stat()
        except FileNotFoundError as error:
            raise CorruptData(folder / name, "the file is missing", hint=_REMEDY) from error
        found[name] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return found


def _stamp_holds(folder: Path, names: dict[str, str]) -> bool:
    try:
        stamp = json.loads((folder / _STAMP).read_bytes())
        age_s = time.time() - stamp["at"]
        return bool(0 <= age_s < _STAMP_LIFE_S and stamp["files"] == _identities(folder, names))
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent, or not ours: hash again
        return False
