"""A folder, or a prefix of an object store, that holds tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sihe.core.errors import ConfigError, NotFound, Unreachable
from sihe.core.ids import check_name
from sihe.core.lazy import require
from sihe.data.lake.table import LakeTable

_EXTRAS = {"s3": "s3"}


class Lake:
    """The tables under a local path, a `file://` URL, or an object store such as `s3://bucket/lake`.

    `storage_options` go to the object store's client (delta-rs); without them it reads the usual environment
    variables, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.
    """

    def __init__(self, url_or_path: str | Path, *, storage_options: Mapping[str, str] | None = None) -> None:
        location = str(url_or_path)
        if location.startswith("file://"):
            location = location.removeprefix("file://")
        self._local = None if "://" in location else Path(location).absolute()
        self.url = str(self._local or location.rstrip("/"))
        self._storage_options = dict(storage_options or {})

    def table(self, name: str) -> LakeTable:
        """The table `name`; its first append creates it. Raises `InvalidInput` for a name that cannot be a folder."""
        check_name("table", name)
        return LakeTable(name, f"{self.url}/{name}", storage_options=self._storage_options)

    def names(self) -> list[str]:
        """The tables that there are, sorted. Raises `Unreachable`."""
        if self._local is not None:
            return sorted(path.parent.name for path in self._local.glob("*/_delta_log") if path.is_dir())
        scheme = self.url.partition("://")[0]
        fsspec = require("fsspec", extra=_EXTRAS.get(scheme, "dev"))
        try:
            files, root = fsspec.core.url_to_fs(self.url)
            found = files.glob(f"{root}/*/_delta_log")
        except (ValueError, ImportError) as error:
            raise ConfigError(f"lake {self.url!r} is not usable: {error}") from error
        except (ConnectionError, TimeoutError) as error:
            raise Unreachable(self.url, str(error)) from error
        return sorted(str(path).rstrip("/").split("/")[-2] for path in found)

    def existing(self, name: str) -> LakeTable:
        """The table `name`, which must be there. Raises `NotFound` that names the tables there are."""
        found = self.table(name)
        if not found.exists():
            names = ", ".join(self.names()) or "none yet"
            raise NotFound("table", name, hint=f"the lake {self.url} has: {names}")
        return found
