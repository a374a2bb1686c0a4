"""A data set at a URL: its small files come at once, its shards through the cache when they are needed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from threading import Thread

import numpy as np

from sihe.core.errors import AlreadyExists, CorruptData, NotFound, SiheError
from sihe.core.files import new_directory, write_file
from sihe.core.telemetry import logger
from sihe.data.loading.cache import RemoteShard, ShardCache
from sihe.data.loading.manifest import FILE_NAME, DatasetManifest, Split, check_ids, read_manifest
from sihe.data.loading.remote import RemoteFolder

_log = logger(__name__)


class CachedMaps:
    """The shards of one split, by number."""

    def __init__(self, cache: ShardCache, shards: list[RemoteShard], manifest: DatasetManifest) -> None:
        self._cache = cache
        self._shards = shards
        self._manifest = manifest
        self._checked: set[int] = set()

    @property
    def largest_bytes(self) -> int:
        """Of the largest shard."""
        return max((shard.size_bytes for shard in self._shards), default=0)

    def check(self) -> None:
        """Asks whether every shard is there with its size; reads none. Raises `NotFound`, `CorruptData`."""
        sizes = self._shards[0].source.sizes() if self._shards else {}
        for shard in self._shards:
            if shard.name not in sizes:
                raise NotFound("remote file", shard.url, hint="publish the data set again")
            if sizes[shard.name] != shard.size_bytes:
                reason = f"it has {sizes[shard.name]:,} bytes and {shard.size_bytes:,} were written"
                raise CorruptData(shard.url, reason, hint="publish the data set again")

    def fetch_ahead(self, *, first: int = 0) -> None:
        """Begins to fetch what the cache can hold, in a thread, from shard `first` on and round.

        Without effect where not all of it fits: it would push out what is being read. Errors are logged only: whoever
        reads the shard meets them.
        """
        if self._shards and sum(shard.size_bytes for shard in self._shards) <= self._cache.limit_bytes:
            order = [*self._shards[first:], *self._shards[:first]]
            Thread(target=self._fetch, args=(order,), name="shards-ahead", daemon=True).start()

    def _fetch(self, shards: list[RemoteShard]) -> None:
        for shard in shards:
            try:
                self._cache.lease(shard).close()
            except SiheError as error:
                _log.warning("shard_not_fetched_ahead", shard=shard.url, reason=str(error))
                return

    def __getitem__(self, index: int, /) -> np.ndarray:
        tokens = self._cache.held(self._shards[index]).array(self._manifest.token_dtype)
        if index not in self._checked:
            check_ids(tokens, self._manifest, self._shards[index].url)
            self._checked.add(index)
        return tokens


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
