"""A folder of collections, opened without a server."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from sihe.core.errors import AlreadyExists
from sihe.core.files import new_directory
from sihe.core.ids import check_name, new_id
from sihe.vectors.checks import check_dim, check_metric
from sihe.vectors.collection import Collection
from sihe.vectors.manifest import FILE_NAME, Manifest
from sihe.vectors.types import Metric


class Database:
    """Collections under `folder`, each in a folder of its own. May be shared by threads; `close` frees the locks.

    With `verify` (the default) every segment's checksum is computed when it is opened.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self._folder = folder
        self._verify = verify
        self._open: dict[str, Collection] = {}
        self._lock = threading.Lock()

    def create(self, name: str, dim: int, metric: Metric = "cosine") -> Collection:
        """A new, empty collection. Raises `AlreadyExists`."""
        check_name("collection", name)
        manifest = Manifest(name, check_dim(dim), check_metric(metric))
        try:
            with new_directory(self._folder / name) as staging:
                (staging / manifest.log).touch()
                manifest.write(staging)
        except AlreadyExists as error:
            raise AlreadyExists("collection", name, hint="open it, or drop it first") from error
        return self.collection(name)

    def collection(self, name: str) -> Collection:
        """The collection of that name; the same object each time. Raises `NotFound` or `CorruptData`."""
        check_name("collection", name)
        with self._lock:
            if name not in self._open:
                self._open[name] = Collection(self._folder / name, verify=self._verify)
            return self._open[name]

    def drop(self, name: str) -> None:
        """Removes a collection and its files. Raises `NotFound`, or `WriterBusy` while another process writes to it."""
        collection = self.collection(name)
        grave = self._folder / f".{new_id('dropped')}"
        with self._lock, collection.writing():
            (self._folder / name).rename(grave)
            self._open.pop(name, None)
        collection.close()
        shutil.rmtree(grave, ignore_errors=True)

    def names(self) -> list[str]:
        """The collections, in alphabetical order."""
        if not self._folder.is_dir():
            return []
        return sorted(entry.parent.name for entry in self._folder.glob(f"[!.]*/{FILE_NAME}"))

    def close(self) -> None:
        """Closes every collection. The database can be used again afterwards."""
        with self._lock:
            for collection in self._open.values():
                collection.close()
            self._open.clear()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
