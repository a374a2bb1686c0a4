"""Heartbeats: how far each rank is, in a small file that ranks and launcher map into memory.

A rank writes from the thread that trains, never from a helper thread: that would go on while the training hangs. The
launcher looks for change and never compares clocks. The space is taken before the ranks start, so that a full disk
stops no heart. One writer for each record; the fields are eight bytes each and `beats` is written last.

    header      magic, and whether the launcher wants the ranks to leave at the next checkpoint
    record r    beats, step, phase, the last step whose compute time is known, that time in seconds
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from sihe.core.errors import CorruptData
from sihe.core.files import disk_errors

HEARTBEATS_FILE = "SIHE_HEARTBEATS_FILE"
"""The environment variable through which a rank learns where the file is."""
_MAGIC = b"sihebeat"
_HEADER, _RECORD = 64, 64  # bytes: a cache line each, so that ranks do not slow each other down
_LEAVE = 8  # offset in the header
_BEATS, _STEP, _PHASE, _COMPUTED, _COMPUTE_S = 0, 8, 16, 24, 32  # offsets in a record


class Phase(IntEnum):
    """What a rank is doing, as far as patience goes."""

    STARTING = 0
    STEPPING = 1
    SLOW = 2
    """Loading or saving a checkpoint, exporting: minutes without a step are right."""


@dataclass(frozen=True)
class Pulse:
    """One rank's record as the launcher read it. It is alive when `beats` grows."""

    beats: int = 0
    step: int = 0
    phase: Phase = Phase.STARTING
    computed_step: int = 0
    compute_s: float = 0.0


class Heartbeat:
    """The record of rank `rank` in the file at `path`, to be written by the thread that works.

    Without a path nobody watches, and the record lies in memory of its own.
    """

    def __init__(self, path: Path | None = None, rank: int = 0) -> None:
        self._offset = _HEADER + rank * _RECORD
        self._map = _mapped(path, least=self._offset + _RECORD) if path else mmap.mmap(-1, self._offset + _RECORD)
        self._beats = 0
        self._step = 0

    @classmethod
    def from_environment(cls) -> Heartbeat:
        """The heartbeat that the launcher of this process watches, if it does."""
        path = os.environ.get(HEARTBEATS_FILE)
        return cls(Path(path), int(os.environ["RANK"])) if path else cls()

    def beat(self, step: int | None = None) -> None:
        """Says that the training moves: at step `step` (from 1), or on in the step of the last beat."""
        self._step = self._step if step is None else step
        self._write(Phase.STEPPING)

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Asks for patience during something that takes long and cannot beat in between."""
        self._write(Phase.SLOW)
        try:
            yield
        finally:
            self._write(Phase.STEPPING)

    def computed(self, step: int, seconds: float) -> None:
        """Reports how long step `step` took this rank, without waiting for others."""
        struct.pack_into("=d", self._map, self._offset + _COMPUTE_S, seconds)
        struct.pack_into("=q", self._map, self._offset + _COMPUTED, step)

    @property
    def is_leave_wanted(self) -> bool:
        """Whether the launcher wants to start the ranks anew, in another number, from the next checkpoint."""
        return bool(struct.unpack_from("=q", self._map, _LEAVE)[0])

    def _write(self, phase: Phase) -> None:
        self._beats += 1
        struct.pack_into("=q", self._map, self._offset + _PHASE, phase)
        struct.pack_into("=q", self._map, self._offset + _STEP, self._step)
        struct.pack_into("=q", self._map, self._offset + _BEATS, self._beats)


class HeartbeatBoard:
    """The launcher's side: creates the file for `world_size` ranks and reads all records. Raises `NoSpace`."""

    def __init__(self, path: Path, world_size: int) -> None:
        self._world_size = world_size
        size = _HEADER + world_size * _RECORD
        with disk_errors(path), path.open("xb") as file:
            file.write(_MAGIC.ljust(size, b"\0"))
        self._map = _mapped(path, least=size)

    def read(self) -> tuple[Pulse, ...]:
        """The records, by rank."""
        return tuple(self._pulse(_HEADER + rank * _RECORD) for rank in range(self._world_size))

    def want_leave(self, wanted: bool) -> None:
        """Asks the ranks to leave after the next checkpoint, or takes that back."""
        struct.pack_into("=q", self._map, _LEAVE, int(wanted))

    def close(self) -> None:
        """Frees the memory; the file stays with the logs."""
        self._map.close()

    def _pulse(self, offset: int) -> Pulse:
        beats, step, phase, computed, compute_s = struct.unpack_from("=qqqqd", self._map, offset)
        return Pulse(beats, step, Phase(phase), computed, compute_s)


def _mapped(path: Path, *, least: int) -> mmap.mmap:
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    if len(mapped) < least or mapped[: len(_MAGIC)] != _MAGIC:
        raise CorruptData(path, f"it is not a heartbeat file with at least {least} bytes")
    return mapped
