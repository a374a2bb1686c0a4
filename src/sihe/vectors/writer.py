"""The writing side of a collection: log, segments and manifest on disk, in the order that a crash cannot hurt."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from sihe.core.errors import NoSpace
from sihe.core.files import disk_errors
from sihe.core.telemetry import logger
from sihe.vectors.operations import Operation, encode
from sihe.vectors.part import Part
from sihe.vectors.segment import Segment, write_segment
from sihe.vectors.state import State
from sihe.vectors.wal import LogWriter

FLUSH_BYTES = 32 << 20
MAX_SEGMENTS = 8
_log = logger("vectors")


class Writer:
    """Writes the collection that `state` describes; whoever makes one holds the collection's lock.

    `reading` guards the state in memory and is held shortly. When a method leaves `is_broken` true, memory and disk may
    differ: throw the writer and the state away and read the disk again.
    """

    def __init__(
        self,
        state: State,
        reading: AbstractContextManager[object],
        *,
        flush_bytes: int = FLUSH_BYTES,
        max_segments: int = MAX_SEGMENTS,
    ) -> None:
        self._state = state
        self._reading = reading
        self._flush_bytes = flush_bytes
        self._max_segments = max_segments
        self.is_broken = False
        with disk_errors(state.folder):
            self._remove_leftovers()
            self._log = LogWriter(state.log_path, state.log_end, state.sequence)

    def commit(self, operations: Sequence[Operation]) -> list[int]:
        """Makes a group of writes durable, then visible; the result of each. Raises `NoSpace`; then none is stored."""
        state = self._state
        try:
            self._log.append(encode(operations))
        except BaseException:
            self.is_broken = self._log.is_broken
            raise
        self.is_broken = True  # until memory has caught up with the log
        with self._reading:
            results = [state.apply(operation, self._log.sequence) for operation in operations]
            state.log_end = self._log.end
        self.is_broken = False
        self._tidy()
        return results

    def flush(self) -> None:
        """Moves what only the log holds into a new segment."""
        if len(self._state.memory) or self._state.memory.deleted:
            self._rewrite(kept=self._state.segments, sources=[self._state.memory])

    def compact(self) -> None:
        """Rewrites everything as one segment without dead rows."""
        self._rewrite(kept=[], sources=[*self._state.segments, self._state.memory])

    def close(self) -> None:
        """Gives the log file back."""
        self._log.close()

    def _tidy(self) -> None:
        """Flushes and merges when it is time. The writes are durable already: a full disk only postpones this."""
        try:
            if self._state.memory.size_bytes >= self._flush_bytes:
                self.flush()
            if len(self._state.segments) > self._max_segments:
                self.compact()
        except NoSpace as error:
            _log.warning("flush_postponed", collection=self._state.manifest.name, reason=str(error))

    def _rewrite(self, *, kept: list[Segment], sources: Sequence[Part]) -> None:
        """Replaces memory, and the segments that are not kept, by one new segment and an empty log.

        Order: the segment, the log, then the manifest that names both, then the removal of what it names no more.
        """
        state, number = self._state, self._state.manifest.next_number
        chosen = [(part, state.live_rows(part)) for part in sources]
        deleted = [id for id in state.memory.deleted if id not in state.index] if kept else []
        written: Segment | None = None
        names = tuple(segment.path.name for segment in kept)
        with disk_errors(state.folder):
            if deleted or any(len(rows) for _, rows in chosen):
                path = state.folder / f"segment-{number:08d}"
                shutil.rmtree(path, ignore_errors=True)  # what a failed attempt at the same number left
                write_segment(path, chosen, deleted)
                written = Segment(path, state.manifest.dim, verify=False)
                names = (*names, path.name)
            log = LogWriter(state.folder / f"log-{number:08d}", 0, state.sequence)
            manifest = replace(
                state.manifest, segments=names, log=f"log-{number:08d}", sequence=state.sequence, next_number=number + 1
            )
            try:
                manifest.write(state.folder)
            except BaseException:
                log.close()
                self.is_broken = True  # the new manifest may or may not have become durable
                raise
        self._log.close()
        self._log = log
        with self._reading:
            state.adopt(manifest, list(kept), written)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes what the manifest does not name, half-written files included. Readers keep what they have mapped."""
        manifest = self._state.manifest
        named = {*manifest.segments, manifest.log}
        for entry in self._state.folder.iterdir():
            name = entry.name.lstrip(".")
            if not name.startswith(("segment-", "log-", "manifest.json.")) or entry.name in named:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
