"""A collection in memory: its parts and where each id lives. Reads the disk, never writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from sihe.core.errors import CorruptData, NotFound
from sihe.vectors.manifest import FILE_NAME, Manifest, read_manifest
from sihe.vectors.operations import Operation, Upsert, decode
from sihe.vectors.part import ALIVE, MemoryPart, Part, Rows
from sihe.vectors.payload import decode as decode_payload
from sihe.vectors.segment import Segment
from sihe.vectors.types import Point, PointId
from sihe.vectors.view import Slab, View
from sihe.vectors.wal import read_frames

Stamp = tuple[int, int, int]


@dataclass
class State:
    """Segments, the rows that only the log holds, and the newest row of each id. Changed by one thread at a time."""

    folder: Path
    manifest: Manifest
    stamp: Stamp
    segments: list[Segment]
    memory: MemoryPart
    sequence: int
    log_end: int = 0
    index: dict[PointId, tuple[Segment | MemoryPart, int]] = field(default_factory=dict)

    @property
    def log_path(self) -> Path:
        """The log behind the segments."""
        return self.folder / self.manifest.log

    def apply(self, operation: Operation, sequence: int) -> int:
        """Carries out one write in memory: how many points are new (upsert), or are gone (delete)."""
        before = len(self.index)
        if isinstance(operation, Upsert):
            first = len(self.memory)
            self.memory.add(operation.ids, operation.vectors, operation.payloads)
            for row, id in enumerate(operation.ids, first):
                self._end(id, sequence)
                self.index[id] = (self.memory, row)
        else:
            for id in operation.ids:
                if id in self.index:
                    self._end(id, sequence)
                    del self.index[id]
                    self.memory.deleted.add(id)
        self.sequence = sequence
        return abs(len(self.index) - before)

    def log_size(self) -> int:
        """Bytes that the log has now; -1 when it is gone because the manifest names another."""
        try:
            return self.log_path.stat().st_size
        except FileNotFoundError:
            return -1

    def read_log(self) -> None:
        """Carries out the whole frames that the log has gained. Raises `CorruptData`."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(self.log_end)
                data = file.read()
        except FileNotFoundError as error:
            raise CorruptData(self.log_path, "the log is missing") from error
        start = self.log_end
        for frame in read_frames(data, self.log_path, sequence=self.sequence):
            for operation in decode(frame.body, self.manifest.dim):
                self.apply(operation, frame.sequence)
            self.log_end = start + frame.end

    def view(self) -> View:
        """What a reader sees now."""
        parts: list[Part] = [*self.segments, self.memory]
        slabs = []
        for part in parts:
            rows = len(part.ids)
            slabs.append(
                Slab(part.vectors[:rows], part.norms[:rows], part.died[:rows], self.sequence, part.ids, part.payload)
            )
        return View(self.manifest.metric, self.sequence, tuple(slabs))

    def point(self, id: PointId) -> Point | None:
        """The newest version of a point."""
        located = self.index.get(id)
        if located is None:
            return None
        part, row = located
        return Point(id, np.array(part.vectors[row]), decode_payload(part.payload(row)))

    def live_rows(self, part: Part) -> Rows:
        """The rows of a part that are not dead."""
        return np.flatnonzero(part.died[: len(part.ids)] == ALIVE)

    def replay_segment(self, segment: Segment) -> None:
        """Puts a segment behind the others while loading: its rows replace, and its deletions remove, older ones."""
        for id in segment.deleted:
            self._end(id, 0)
            self.index.pop(id, None)
        for row, id in enumerate(segment.ids):
            self._end(id, 0)
            self.index[id] = (segment, row)
        self.segments.append(segment)

    def adopt(self, manifest: Manifest, kept: list[Segment], written: Segment | None) -> None:
        """Goes over to a manifest whose new segment holds what memory (and the segments not `kept`) held.

        The rows left behind are not marked: views that were made before go on reading them.
        """
        self.segments = [*kept, written] if written is not None else kept
        if written is not None:
            self.index.update((id, (written, row)) for row, id in enumerate(written.ids))
        self.memory = MemoryPart(manifest.dim)
        self.manifest, self.stamp, self.log_end = manifest, stamp_of(self.folder), 0

    def _end(self, id: PointId, sequence: int) -> None:
        located = self.index.get(id)
        if located is not None:
            part, row = located
            part.died[row] = sequence


def load_state(folder: Path, *, verify: bool) -> State:
    """The collection in `folder` as it is on disk. Raises `NotFound` or `CorruptData`.

    A writer in another process may replace files meanwhile: what fails while the manifest changes is tried again.
    """
    while True:
        before = stamp_of(folder)
        try:
            return _load(folder, before, verify)
        except (CorruptData, FileNotFoundError) as error:
            if stamp_of(folder) != before:
                continue
            if isinstance(error, CorruptData):
                raise
            raise CorruptData(folder, str(error)) from error


def _load(folder: Path, stamp: Stamp, verify: bool) -> State:
    manifest = read_manifest(folder)
    state = State(folder, manifest, stamp, [], MemoryPart(manifest.dim), sequence=0)
    for name in manifest.segments:
        state.replay_segment(Segment(folder / name, manifest.dim, verify=verify))
    state.sequence = manifest.sequence
    try:
        state.read_log()
    except (ValueError, KeyError, orjson.JSONDecodeError) as error:
        if isinstance(error, CorruptData):
            raise
        raise CorruptData(state.log_path, f"a record cannot be read: {error}") from error
    return state


def stamp_of(folder: Path) -> Stamp:
    """Changes whenever the manifest is replaced. Raises `NotFound` for a collection that was dropped."""
    try:
        found = (folder / FILE_NAME).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound("collection", folder.name, hint="see what there is with  sihe vectors list") from error
    return (found.st_ino, found.st_mtime_ns, found.st_size)
