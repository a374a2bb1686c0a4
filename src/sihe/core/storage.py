"""Objects by URL (fsspec): the same calls on a local folder, on S3 and in memory.

Local writes are atomic and durable; on object stores a put is atomic by their nature. Paths are relative to the
store's root, with `/` between parts, and cannot leave it.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sihe.core.errors import ConfigError, InvalidInput, NotFound, Unreachable
from sihe.core.files import disk_errors, write_file
from sihe.core.lazy import require

_EXTRAS = {"s3": ("s3fs", "s3")}


class ObjectStore:
    """Bytes under names. Safe for several processes: the last put of one name wins, and readers see whole objects."""

    def __init__(self, url: str) -> None:
        scheme = urlsplit(url).scheme or "file"
        if scheme in _EXTRAS:
            require(_EXTRAS[scheme][0], extra=_EXTRAS[scheme][1])
        fsspec = require("fsspec", extra="dev")
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"objects.url {url!r} is not usable: {error}", key="objects.url") from error
        self.url = url.rstrip("/")
        self._root = str(root).rstrip("/")
        self._local = Path(self._root) if scheme == "file" else None

    def put(self, name: str, data: bytes) -> str:
        """Stores `data` under `name`; its URL. Raises `NoSpace`, `Unreachable`."""
        if self._local is not None:
            write_file(self._local / self._check(name), data)
        else:
            self._remote("pipe_file", self._full(name), data)
        return f"{self.url}/{name}"

    def get(self, name: str) -> bytes:
        """The bytes under `name`. Raises `NotFound`, `Unreachable`."""
        data: bytes = self._remote("cat_file", self._full(name))
        return data

    def exists(self, name: str) -> bool:
        """Whether an object, or a prefix with objects, has that `name`."""
        return bool(self._remote("exists", self._full(name)))

    def list(self, prefix: str = "") -> list[str]:
        """Names of the objects under `prefix`, sorted. Names that start with a dot are writes in progress."""
        full = self._full(prefix) if prefix else self._root
        try:
            found: list[str] = self._remote("find", full)
        except NotFound:
            return []
        names = (str(path)[len(self._root) :].lstrip("/") for path in found)
        return sorted(name for name in names if not PurePosixPath(name).name.startswith("."))

    def delete(self, name: str) -> None:
        """Removes an object, or all under a prefix. Absent names are no error."""
        if self.exists(name):
            self._remote("rm", self._full(name), recursive=True)

    def put_tree(self, name: str, folder: Path) -> str:
        """Stores every file of `folder` under the prefix `name`; its URL."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                target = f"{name}/{file.relative_to(folder).as_posix()}"
                if self._local is None:
                    self._remote("put_file", str(file), self._full(target))
                else:
                    self._copy_in(file, self._local / self._check(target))
        return f"{self.url}/{name}"

    def get_tree(self, name: str, cache: Path) -> Path:
        """A local folder with the files under `name`: the store's own when it is local, else a copy in `cache`."""
        names = self.list(name)
        if not names:
            raise NotFound("object", f"{self.url}/{name}")
        if self._local is not None:
            return self._local / name
        for item in names:
            target = cache / item[len(name) :].lstrip("/")
            if not target.is_file():
                write_file(target, self.get(item))
        return cache

    def name_of(self, url: str) -> str:
        """The name behind a URL that this store gave out. Raises `InvalidInput` for any other."""
        if not url.startswith(self.url + "/"):
            raise InvalidInput(f"{url!r} is not in the object store {self.url!r}: was objects.url changed?")
        return self._check(url[len(self.url) + 1 :])

    def _copy_in(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.part")
        with disk_errors(target):
            try:
                shutil.copyfile(source, staging)
                staging.replace(target)
            except BaseException:
                staging.unlink(missing_ok=True)
                raise

    def _check(self, name: str) -> str:
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts:
            raise InvalidInput(f"an object name is a relative path without '..', got {name!r}")
        return name

    def _full(self, name: str) -> str:
        return f"{self._root}/{self._check(name)}"

    def _remote(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self._fs, method)(*args, **kwargs)
        except FileNotFoundError as error:
            raise NotFound("object", str(args[0])) from error
        except (ConnectionError, TimeoutError) as error:
            raise Unreachable(self.url, str(error)) from error
