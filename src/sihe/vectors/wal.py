"""The write-ahead log: what it has acknowledged survives the death of the process and of the machine.

A log is a row of frames, each written with one `write` and one `fsync`, and a frame holds a whole group of writes: so
only the last frame can be incomplete, and only when nobody was told that it succeeded.

    frame = b"SIHE" | body length u32 | sequence u64 | CRC-32 of body u32 | CRC-32 of these 20 bytes u32 | body

An incomplete last frame is what a crash leaves and is cut off: it ends early, or it contains disk sectors that were
never written (all zero). Any other disagreement with a checksum means that stored bytes changed: `CorruptData`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sihe.core.errors import CorruptData, InternalError, TooLarge
from sihe.core.files import disk_errors

_HEADER = struct.Struct("<4sIQII")
_CHECKED = struct.Struct("<4sIQI")  # the part of the header that its own checksum covers
_MAGIC = b"SIHE"
_SECTOR = 512  # the smallest unit that a disk writes whole
MAX_BODY = 1 << 30


class Frame(NamedTuple):
    """One durable group of writes; `end` is the offset behind it."""

    sequence: int
    body: bytes
    end: int


def encode_frame(sequence: int, body: bytes) -> bytes:
    """The bytes of one frame. Raises `TooLarge` over 1 GiB."""
    if len(body) > MAX_BODY:
        raise TooLarge(
            f"one write holds at most {MAX_BODY} bytes, got {len(body)}: split it",
            limit=MAX_BODY,
            actual=len(body),
            unit="bytes",
        )
    checked = _CHECKED.pack(_MAGIC, len(body), sequence, zlib.crc32(body))
    return checked + struct.pack("<I", zlib.crc32(checked)) + body


def read_frames(data: bytes, path: Path, *, start: int = 0, sequence: int) -> Iterator[Frame]:
    """The whole frames of `data` from offset `start` on; the first follows `sequence`, and they count up by one.

    Ends silently at an incomplete last frame. Raises `CorruptData` naming `path` when stored bytes have changed.
    """
    while start < len(data):
        header_end = start + _HEADER.size
        if header_end > len(data):
            return
        magic, length, found, body_crc, header_crc = _HEADER.unpack_from(data, start)
        if zlib.crc32(data[start : header_end - 4]) != header_crc or magic != _MAGIC:
            if _never_written(data, start, len(data)):
                return
            raise _corrupt(path, f"the header at byte {start} has a wrong checksum")
        end = header_end + length
        if end > len(data):
            return
        body = data[header_end:end]
        if zlib.crc32(body) != body_crc:
            if end == len(data) and _never_written(data, start, end):
                return
            raise _corrupt(path, f"the record at byte {start} has a wrong checksum")
        if found != sequence + 1:
            raise _corrupt(path, f"the record at byte {start} has number {found}, expected {sequence + 1}")
        yield Frame(found, body, end)
        start, sequence = end, found


def _never_written(data: bytes, start: int, end: int) -> bool:
    """Whether a whole disk sector between the two offsets, or all of the rest of a sector from `start` on, is zero."""
    first = start
    while first < end:
        last = min(end, (first // _SECTOR + 1) * _SECTOR)
        if not data[first:last].strip(b"\0"):
            return True
        first = last
    return False


def _corrupt(path: Path, reason: str) -> CorruptData:
    return CorruptData(
        path,
        reason,
        hint="check the disk and restore the collection's folder from a copy; nothing in it was changed",
    )


class LogWriter:
    """Appends frames to the log at `path`, whose content up to `end` is whole; what follows it is cut off.

    After an `append` that failed, the log is as it was before. If even that could not be brought about, `is_broken` is
    true and every later `append` raises `InternalError` until the log is read again from disk.
    """

    def __init__(self, path: Path, end: int, sequence: int) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.end = end
        self.sequence = sequence
        self.is_broken = False
        try:
            if os.fstat(self._file).st_size != end:
                os.ftruncate(self._file, end)
                os.fsync(self._file)
            if end == 0:
                _sync_folder(path.parent)  # the name of a new log must be as durable as its content
        except OSError:
            os.close(self._file)
            raise

    def append(self, body: bytes) -> None:
        """Makes `body` durable as the next frame. Raises `NoSpace`; then nothing of it is left."""
        if self.is_broken:
            raise InternalError(f"{self._path} could not be repaired after a failed write: close and open it again")
        frame = memoryview(encode_frame(self.sequence + 1, body))
        with disk_errors(self._path):
            try:
                written = 0
                while written < len(frame):
                    written += os.pwrite(self._file, frame[written:], self.end + written)
                os.fsync(self._file)
            except OSError:
                self._undo()
                raise
        self.end += len(frame)
        self.sequence += 1

    def close(self) -> None:
        """Gives the file back."""
        os.close(self._file)

    def _undo(self) -> None:
        try:
            os.ftruncate(self._file, self.end)
            os.fsync(self._file)
        except OSError:
            self.is_broken = True


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
