"""A data set at a URL: its small files come at once, its shards through the cache when they are needed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from sihe.core.errors import AlreadyExists, CorruptData, TooLarge
from sihe.core.files import new_directory, write_file
from sihe.core.telemetry import logger
from sihe.data.loading.cache import Lease, RemoteShard, ShardCache
from sihe.data.loading.manifest import FILE_NAME, DatasetManifest, Split, check_ids, read_manifest
from sihe.data.loading.remote import RemoteFolder

_log = logger(__name__)


class CachedMaps:
    """The shards of one split, each in use from its first reading on.

    Where the cache has no room for another one, this process gives up the one that it used longest ago.
    """

    def __init__(self, cache: ShardCache, shards: list[RemoteShard], manifest: DatasetManifest) -> None:
        self._cache = cache
        self._shards = shards
        self._manifest = manifest
        self._open: OrderedDict[int, tuple[Lease, np.ndarray]] = OrderedDict()

    def __getitem__(self, index: int, /) -> np.ndarray:
        if index not in self._open:
            lease = self._lease(self._shards[index])
            tokens: np.ndarray[Any, Any] = np.memmap(lease.path, self._manifest.token_dtype, mode="r").view(np.ndarray)
            check_ids(tokens, self._manifest, self._shards[index].url)
            self._open[index] = (lease, tokens)
        self._open.move_to_end(index)
        return self._open[index][1]

    def _lease(self, shard: RemoteShard) -> Lease:
        while True:
            try:
                return self._cache.lease(shard)
            except TooLarge:
                if not self._open:
                    raise
                number, (lease, _) = self._open.popitem(last=False)
                lease.close()
                _log.debug("shard_given_up", shard=self._shards[number].url)


def cached_dataset(url: str, cache: ShardCache) -> tuple[Path, DatasetManifest, dict[Split, CachedMaps]]:
    """A local folder with all of the data set but its shards, the manifest, and the shards by split.

    Raises `NotFound`, `CorruptData`, `Unreachable`.
    """
    source = RemoteFolder(url)
    content = source.read(FILE_NAME)
    folder = cache.folder / "datasets" / hashlib.sha256(content).hexdigest()[:16]
    if not folder.exists():
        try:
            with new_directory(folder) as staging:
                _fill(staging, source, content)
        except AlreadyExists:  # another process did it in the meantime
            _log.debug("dataset_fetched_by_another", url=url)
    manifest = read_manifest(folder)
    maps = {
        split: CachedMaps(
            cache,
            [RemoteShard(source, shard.file, shard.tokens * manifest.token_bytes, shard.sha256) for shard in shards],
            manifest,
        )
        for split, shards in manifest.splits.items()
    }
    return folder, manifest, maps


def _fill(staging: Path, source: RemoteFolder, content: bytes) -> None:
    write_file(staging / FILE_NAME, content)
    for name, digest in read_manifest(staging).files.items():
        url = f"{source.url}/{name}"
        if Path(name).name != name:  # a name from elsewhere must not lead out of the folder
            raise CorruptData(url, "its name is not that of a file in the data set's folder")
        data = source.read(name)
        actual = hashlib.sha256(data).hexdigest()
        if actual != digest:
            raise CorruptData(url, f"its SHA-256 is {actual[:12]}… and {digest[:12]}… was written")
        write_file(staging / name, data)
