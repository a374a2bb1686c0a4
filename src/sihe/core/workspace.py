"""A workspace: settings with what they open. Every room's service takes one, and nothing is global."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sihe.core.clock import Clock, SystemClock
from sihe.core.errors import ConfigError
from sihe.core.settings import Settings

if TYPE_CHECKING:
    from sihe.core.records import Records
    from sihe.core.storage import ObjectStore
    from sihe.core.tracking import Tracking


class Workspace:
    """Records, objects and tracking under one home folder; each opens when it is first used.

    `close` (or leaving it as a context manager) frees the database connections.
    """

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock: Clock = clock or SystemClock()
        self.home = settings.home.absolute()
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"home {str(self.home)!r} cannot be a folder: {error.strerror}", key="home") from error

    def path(self, *parts: str) -> Path:
        """A path inside the home folder, such as `path("runs", run_id)`; not created."""
        return self.home.joinpath(*parts)

    @cached_property
    def records(self) -> Records:
        """The records database, migrated."""
        from sihe.core.records import Records

        records = Records(self.settings.records_url)
        records.migrate()
        return records

    @cached_property
    def objects(self) -> ObjectStore:
        """The object store."""
        from sihe.core.storage import ObjectStore

        return ObjectStore(self.settings.objects_url)

    @cached_property
    def tracking(self) -> Tracking:
        """Runs and the model registry."""
        from sihe.core.tracking import Tracking

        return Tracking(
            self.settings.tracking_uri, self.records, self.objects, self.clock, cache=self.path("cache", "models")
        )

    def close(self) -> None:
        """Frees what was opened. The workspace can be used again afterwards."""
        if "records" in self.__dict__:
            self.records.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
