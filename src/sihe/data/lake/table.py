"""One table of the lake: rows are appended, and every version stays readable, unless its owner removes and purges.

Several processes may append at once and every append is kept. An append with a `key` happens once, however often and
from however many processes it is called: that is what lets a job that was killed simply run again.
"""

from __future__ import annotations

import bisect
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, SchemaMismatchError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler

from sihe.core.errors import Busy, CorruptData, InternalError, InvalidInput, NotFound, SiheError, Unreachable
from sihe.core.files import disk_errors, exclusive
from sihe.core.ids import new_id
from sihe.data.errors import SchemaMismatch
from sihe.data.lake.types import Commit

if TYPE_CHECKING:
    from collections.abc import Iterable

_ATTEMPTS = 30
_PAUSE_S = 0.02  # first pause after a lost race; doubles up to a second, with jitter so that the losers part
_KEY = "sihe.key"
_APPEND_ID = "sihe.append"
_CONFIGURATION = {"delta.logRetentionDuration": "interval 36500 days"}  # Delta forgets versions after 30 days by itself
_WRONG_PREDICATE = ("sql parser error", "No field named", "Error during planning", "type_coercion")


class LakeTable:
    """A Delta table. Made by `Lake.table`; holds no open file, so it may be kept and shared."""

    def __init__(self, name: str, url: str, *, storage_options: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.url = url
        self._storage_options = dict(storage_options or {})

    def exists(self) -> bool:
        """Whether anything was ever appended. Raises `CorruptData`, `Unreachable`."""
        try:
            self._open()
        except NotFound:
            return False
        return True

    @property
    def version(self) -> int:
        """The newest version. Raises `NotFound`, `CorruptData`."""
        return self._open().version()

    def append(self, rows: pa.Table, *, key: str | None = None, properties: Mapping[str, str] | None = None) -> int:
        """Adds rows; the version that they made. With a `key`, an append of that key that is there already is it.

        The first append fixes the columns, and the table's own `properties` (Delta's, over the house's); later rows
        may have the columns in any order and in types that convert without loss. Raises `SchemaMismatch`, `NoSpace`,
        `CorruptData`, and `Busy` when other writers win every race.
        """

        def attempt() -> int:
            table = self._open_or_none()
            if table is None:
                with self._creating():
                    return self._write_once(self._open_or_none(), rows, key, properties)
            return self._write_once(table, rows, key, properties)

        return self._retry(attempt)

    def version_of(self, key: str) -> int | None:
        """The version that the append with this `key` made, or None. Raises `CorruptData`."""
        table = self._open_or_none()
        if table is None or table.transaction_version(key) is None:
            return None
        return self._version_with(key, table.version())

    def read(
        self, version: int | None = None, columns: Sequence[str] | None = None, *, where: str | None = None
    ) -> pa.Table:
        """The rows as of a version (the newest by default), in no promised order.

        `columns` selects some; `where` is an SQL predicate such as `"licence = 'MIT'"`, and files whose statistics
        exclude it are not read. Raises `NotFound` for a version or column, `CorruptData`.
        """
        table = self._open_as_of(version)
        schema = pa.schema(table.schema().to_arrow())
        names = list(schema.names) if columns is None else list(columns)
        for name in names:
            if name not in schema.names:
                raise NotFound("column", name, hint=f"table {self.name!r} has {', '.join(schema.names)}")
        with self._errors():
            found = pa.table(table.scan(columns=names, predicate=where).read_all())
            return found.cast(pa.schema([schema.field(name) for name in names]))  # the engine reads strings as views

    def history(self, limit: int | None = None) -> list[Commit]:
        """The versions, newest first, `limit` at most. Raises `NotFound`, `CorruptData`.

        Read from the log's own files: delta-rs numbers its history wrongly while others commit.
        """
        newest = self.version
        oldest = -1 if limit is None else max(newest - limit, -1)
        commits = []
        for version in range(newest, oldest, -1):
            entry = self._log_entry(version)
            if entry is None:  # tables that others made may forget old versions
                break
            try:
                commits.append(_commit(version, entry))
            except ValueError as error:
                raise CorruptData(f"{self.url}/_delta_log", f"the entry of version {version} is not JSON") from error
        return commits

    # ---- what is not kept for ever -----------------------------------------------------------------------------------

    def remove(self, where: str) -> int | None:
        """Takes the rows out that the SQL predicate is true of; the version that this made, None where there are none.

        Older versions have them until `purge`. Raises `NotFound`, `InvalidInput` for a wrong predicate, `NoSpace`,
        `CorruptData`, and `Busy` when other writers win every race.
        """

        def attempt() -> int:
            table = self._open()
            with self._errors():
                table.delete(where)
                return table.version()

        first, *_ = self._open().schema().fields
        if self.read(columns=[first.name], where=where).num_rows == 0:  # a version of its own would change nothing
            return None
        return self._retry(attempt)

    def purge(self, *, older_than_h: int = 1) -> int:
        """Deletes the files that the newest version has had no row in for so many hours; how many there were.

        What was removed is gone then, also for who reads an older version: `CorruptData` tells them so. Whoever began
        to read or write less than that time ago is not disturbed. Raises `NotFound`, `CorruptData`, `Unreachable`.
        """

        def attempt() -> int:
            table = self._open()

            def vacuum(*, dry_run: bool) -> list[str]:
                return table.vacuum(older_than_h, dry_run=dry_run, enforce_retention_duration=False, full=True)

            with self._errors():
                found = vacuum(dry_run=True)
                if "://" not in self.url:  # those that were deleted before are named again
                    found = [name for name in found if (Path(self.url) / name).exists()]
                if found:
                    vacuum(dry_run=False)
                return len(found)

        return self._retry(attempt)

    # ---- opening and writing ----------------------------------------------------------------------------------------

    def _open(self, version: int | None = None) -> DeltaTable:
        with self._errors():
            return DeltaTable(self.url, version=version, storage_options=self._storage_options)

    def _open_or_none(self) -> DeltaTable | None:
        try:
            return self._open()
        except NotFound:
            return None

    def _open_as_of(self, version: int | None) -> DeltaTable:
        newest = self._open()
        if version is None or version == newest.version():
            return newest
        if not 0 <= version < newest.version():
            oldest = self.history()[-1].version
            hint = f"table {self.name!r} has the versions {oldest} to {newest.version()}"
            raise NotFound("version", str(version), hint=hint)
        return self._open(version)

    @contextmanager
    def _creating(self) -> Iterator[None]:
        """One process at a time creates the table: of two, delta-rs may commit both, also when they have one key.

        That holds on a local disk. On an object store the first append of a table is the caller's to make once.
        """
        if "://" in self.url:
            yield
            return
        folder = Path(self.url)
        with exclusive(folder.parent / f".{folder.name}.lock"):
            yield

    def _write_once(
        self, table: DeltaTable | None, rows: pa.Table, key: str | None, properties: Mapping[str, str] | None
    ) -> int:
        if table is not None and key is not None and table.transaction_version(key) is not None:
            return self._version_with(key, table.version())
        return self._write(table, rows, key, {**_CONFIGURATION, **(properties or {})})

    def _write(self, table: DeltaTable | None, rows: pa.Table, key: str | None, properties: Mapping[str, str]) -> int:
        append_id = new_id("append")
        with self._errors():
            write_deltalake(
                self.url if table is None else table,
                rows if table is None else self._fit(rows, pa.schema(table.schema().to_arrow())),
                mode="error"
                if table is None
                else "append",  # of two that create the table, one starts over and appends
                configuration=dict(properties) if table is None else None,
                storage_options=self._storage_options,
                writer_properties=WriterProperties(compression="ZSTD"),
                commit_properties=CommitProperties(
                    custom_metadata={_APPEND_ID: append_id} | ({_KEY: key} if key is not None else {}),
                    app_transactions=[Transaction(key, 1)] if key is not None else None,
                ),
            )
        # A write does not report its version, and the table object may have moved past it, so the log is asked. (Of two
        # writes that create a table, delta-rs may commit the loser as version 1.)
        for version in range((table or self._open()).version(), -1, -1):
            if append_id in (self._log_entry(version) or ""):
                return version
        raise InternalError(f"table {self.name!r} has no commit {append_id!r}, though it was written")

    def _fit(self, rows: pa.Table, schema: pa.Schema) -> pa.Table:
        if sorted(rows.column_names) != sorted(schema.names):
            raise SchemaMismatch(
                self.name, f"expected the columns {', '.join(schema.names)}, got {', '.join(rows.column_names)}"
            )
        try:
            return rows.select(schema.names).cast(schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SchemaMismatch(self.name, str(error)) from error

    def _retry(self, attempt: Callable[[], int]) -> int:
        pause_s = _PAUSE_S
        for _ in range(_ATTEMPTS):
            try:
                return attempt()
            except _LostRace:
                time.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(2 * pause_s, 1.0)
        raise Busy(f"table {self.name!r}: other writers won {_ATTEMPTS} races in a row: try again when fewer write")

    # ---- the log ----------------------------------------------------------------------------------------------------

    def _log_entry(self, version: int) -> str | None:
        with self._errors():
            store = DeltaStorageHandler(self.url, self._storage_options)
            try:
                content: bytes = store.open_input_file(f"_delta_log/{version:020d}.json").read()
            except FileNotFoundError:
                return None
            return content.decode()

    def _version_with(self, key: str, newest: int) -> int:
        """The first version that knows the append `key`, by bisection: from there on every version does."""
        return bisect.bisect_left(
            range(newest), True, key=lambda version: self._open(version).transaction_version(key) is not None
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What delta-rs and Arrow raise, as the house's errors."""
        try:
            with disk_errors(Path(self.url)):
                yield
        except SiheError:
            raise
        except TableNotFoundError as error:
            raise NotFound("table", self.name, hint=f"nothing was appended to {self.url} yet") from error
        except SchemaMismatchError as error:
            raise SchemaMismatch(self.name, _first_line(error)) from error
        except CommitFailedError as error:
            raise _LostRace from error
        except Exception as error:
            message = _first_line(error)
            if "already exists" in message:
                raise _LostRace from error
            if "://" in self.url and _mentions(message, ("error sending request", "Generic S3 error", "timed out")):
                raise Unreachable(self.url, message) from error
            if _mentions(message, _WRONG_PREDICATE):
                raise InvalidInput(
                    f"the predicate on table {self.name!r} is not valid SQL for it: {message}"
                ) from error
            if isinstance(error, DeltaError | pa.ArrowException | OSError) or type(error) is Exception:
                hint = "restore the file from a copy, or read an older version; see  sihe lake show"
                raise CorruptData(self.url, message, hint=hint) from error
            raise


class _LostRace(Exception):
    """Another writer committed first; the append must be tried again on the newer version."""


def _mentions(message: str, words: Iterable[str]) -> bool:
    return any(word in message for word in words)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _commit(version: int, entry: str) -> Commit:
    actions = [json.loads(line) for line in entry.splitlines() if line]
    info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    rows = info.get("operationMetrics", {}).get("num_added_rows")
    return Commit(
        version=version,
        at=datetime.fromtimestamp(info.get("timestamp", 0) / 1000, UTC),
        operation=str(info.get("operation", "unknown")).lower(),
        rows_added=None if rows is None else int(rows),
        key=info.get(_KEY),
    )
