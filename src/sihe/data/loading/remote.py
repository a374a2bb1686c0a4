"""A folder of files behind a URL that fsspec knows, read only: memory, another disk, S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from sihe.core.errors import ConfigError, NotFound, Unauthorized, Unreachable
from sihe.core.lazy import require

_EXTRAS = {"s3": ("s3fs", "s3")}


class RemoteFolder:
    """The files under `url`. Raises `ConfigError` for a URL that cannot be, `MissingExtra`."""

    def __init__(self, url: str) -> None:
        scheme = urlsplit(url).scheme
        if scheme in _EXTRAS:
            require(_EXTRAS[scheme][0], extra=_EXTRAS[scheme][1])
        fsspec = require("fsspec", extra="dev")
        self.url = url.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{url!r} is not a URL of a data set: {error}") from error
        self._root: Any = root

    def read(self, name: str) -> bytes:
        """The whole file. Raises `NotFound`, `Unauthorized`, `Unreachable`."""
        return b"".join(self.pieces(name, 1 << 20))

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """The file in pieces of at most `size` bytes. Raises `NotFound`, `Unauthorized`, `Unreachable`."""
        with self._errors(name), self._files.open(f"{self._root}/{name}", "rb", block_size=size) as file:
            while piece := file.read(size):
                yield piece

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in the folder, by name: one request. Raises `NotFound`, `Unauthorized`, `Unreachable`."""
        with self._errors(""):
            listed = self._files.ls(self._root, detail=True)
        return {str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0) for entry in listed}

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(
                "remote file", f"{self.url}/{name}", hint="is the data set still published there?"
            ) from error
        except PermissionError as error:
            raise Unauthorized(f"{self.url}/{name} may not be read: {error}") from error
        except (ConnectionError, TimeoutError) as error:
            raise Unreachable(self.url, str(error)) from error


def is_url(reference: object) -> bool:
    """Whether `reference` is a URL, and not a path."""
    return isinstance(reference, str) and "://" in reference
