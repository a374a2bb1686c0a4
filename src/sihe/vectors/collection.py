"""A durable collection of points: exact search, last write wins, one writing process and any number of reading ones.

A write is first appended to the log and synced, then carried out in memory, then acknowledged. When memory holds
`flush_bytes`, its rows become a segment and a new log begins; when there are too many segments, they become one. Each
such step ends with replacing the manifest, so that a process killed anywhere leaves the former state or the new one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sihe.core.errors import InvalidInput, SiheError
from sihe.vectors import payload as payload_
from sihe.vectors.checks import check_ids, check_k, check_query, check_vectors
from sihe.vectors.commit import GroupCommit
from sihe.vectors.errors import WriterBusy
from sihe.vectors.filter import Filter, parse_filter
from sihe.vectors.manifest import read_manifest
from sihe.vectors.operations import Delete, Operation, Upsert
from sihe.vectors.state import State, load_state, stamp_of
from sihe.vectors.types import CollectionInfo, Hit, Page, Payload, Point, PointId
from sihe.vectors.writer import FLUSH_BYTES, MAX_SEGMENTS, Writer

if TYPE_CHECKING:
    import numpy.typing as npt

    from sihe.vectors.view import View


class Collection:
    """One collection; made by `Database.create` or `Database.collection`. Every method may be called from any thread.

    The first write takes the collection's lock and keeps it until `close`; while another process holds it, writing
    raises `WriterBusy`. Reading never waits, and sees what other processes have written. After `close` the next call
    opens the collection again.
    """

    def __init__(
        self, folder: Path, *, verify: bool = True, flush_bytes: int = FLUSH_BYTES, max_segments: int = MAX_SEGMENTS
    ) -> None:
        self._folder = folder
        self._verify = verify
        self._limits = {"flush_bytes": flush_bytes, "max_segments": max_segments}
        manifest = read_manifest(folder)
        self.name, self.dim, self.metric = manifest.name, manifest.dim, manifest.metric
        self._state: State | None = None
        self._view: View | None = None
        self._writer: Writer | None = None
        self._process_lock = FileLock(folder / "writer.lock", timeout=0, thread_local=False)
        self._write_lock = threading.RLock()  # one commit, flush or compaction at a time
        self._state_lock = threading.RLock()  # held shortly: what is in memory changes
        self._commits = GroupCommit(self._commit, self._write_lock)

    # ---- writing --------------------------------------------------------------------------------------------------

    def upsert(
        self, ids: Sequence[PointId], vectors: npt.ArrayLike, payloads: Sequence[Payload | None] | None = None
    ) -> int:
        """Writes points, replacing those with the same id; how many are new. All of them are stored, or none.

        `vectors` is [len(ids), dim], finite, stored as float32. When this returns, the points survive a crash.
        Raises `InvalidInput`, `WriterBusy`, `NoSpace`.
        """
        checked = check_ids(ids, unique=True)
        matrix = check_vectors(vectors, len(checked), self.dim, self.metric)
        if payloads is not None and len(payloads) != len(checked):
            raise InvalidInput(f"expected as many payloads as ids ({len(checked)}), got {len(payloads)}")
        given = payloads if payloads is not None else [None] * len(checked)
        encoded = [payload_.encode(payload, f"payloads[{index}]") for index, payload in enumerate(given)]
        return self._commits.submit(Upsert(checked, matrix, encoded)) if checked else 0

    def delete(self, ids: Sequence[PointId]) -> int:
        """Removes points; how many there were. Unknown ids are ignored. Durable when it returns."""
        checked = check_ids(ids)
        return self._commits.submit(Delete(checked)) if checked else 0

    def flush(self) -> None:
        """Moves what only the log holds into a segment. Raises `NoSpace`; then nothing has changed."""
        with self.writing() as writer:
            writer.flush()

    def compact(self) -> None:
        """Rewrites everything as one segment without dead rows. Needs free space for a copy; raises `NoSpace`."""
        with self.writing() as writer:
            writer.compact()

    def close(self) -> None:
        """Frees the lock and the memory."""
        with self._write_lock, self._state_lock:
            if self._writer is not None:
                self._writer.close()
            self._writer = self._state = self._view = None
            self._process_lock.release(force=True)

    # ---- reading --------------------------------------------------------------------------------------------------

    def search(self, vector: npt.ArrayLike, k: int = 10, filter: Filter | dict[str, Any] | None = None) -> list[Hit]:
        """The `k` best points, best first, ties in the order of ids; exact. `filter` may be given as JSON."""
        query = check_query(vector, self.dim, self.metric)
        return self._read().search(query, check_k(k), _as_filter(filter))

    def get(self, ids: Sequence[PointId]) -> list[Point]:
        """The points with these ids, in this order; those that do not exist are left out."""
        checked = check_ids(ids)
        with self._state_lock:
            state = self._refresh()
            found = [state.point(id) for id in checked]
        return [point for point in found if point is not None]

    def count(self, filter: Filter | dict[str, Any] | None = None) -> int:
        """How many points there are, or satisfy `filter`."""
        return self._read().count(_as_filter(filter))

    def scroll(
        self, limit: int = 100, after: PointId | None = None, filter: Filter | dict[str, Any] | None = None
    ) -> Page:
        """Up to `limit` points in the order of ids, beginning behind `after` (the former page's `next`)."""
        start = None if after is None else check_ids([after])[0]
        return self._read().scroll(check_k(limit, "limit"), start, _as_filter(filter))

    def info(self) -> CollectionInfo:
        """What the collection is and holds."""
        with self._state_lock:
            state = self._refresh()
            return CollectionInfo(
                self.name, self.dim, self.metric, len(state.index), len(state.segments), state.log_end
            )

    # ---- below ----------------------------------------------------------------------------------------------------

    def _read(self) -> View:
        """The newest view; made once for each write, on the first reading behind it."""
        with self._state_lock:
            state = self._refresh()
            if self._view is None or self._view.sequence != state.sequence:
                self._view = state.view()
            return self._view

    def _refresh(self) -> State:
        """The state with what other processes have written since. While this one holds the lock, nobody else does."""
        state = self._state
        if state is not None and self._writer is not None:
            return state
        if state is None or state.stamp != stamp_of(self._folder):
            return self._reload()
        size = state.log_size()
        if size > state.log_end:
            try:
                state.read_log()
            except SiheError:
                return self._reload()  # another writer may have moved on; what is really corrupt fails again
        elif size < state.log_end:
            return self._reload()
        return state

    def _reload(self) -> State:
        self._view = self._state = None
        self._state = load_state(self._folder, verify=self._verify)
        return self._state

    def _commit(self, operations: list[Operation]) -> list[int]:
        with self.writing() as writer:
            return writer.commit(operations)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """The writer, with this collection's lock; forgotten when it comes back broken. Raises `WriterBusy`."""
        with self._write_lock:
            if self._writer is None:
                self._writer = self._open_writer()
            writer = self._writer
            try:
                yield writer
            finally:
                self._view = None
                if writer.is_broken:
                    self.close()

    def _open_writer(self) -> Writer:
        try:
            self._process_lock.acquire()
        except Timeout as error:
            raise WriterBusy(self.name) from error
        try:
            with self._state_lock:
                return Writer(self._refresh(), self._state_lock, **self._limits)
        except BaseException:
            self._process_lock.release()
            raise


def _as_filter(value: Filter | dict[str, Any] | None) -> Filter | None:
    return parse_filter(value) if isinstance(value, dict) else value
