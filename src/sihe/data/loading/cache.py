"""Shards of remote data sets, kept on the local disk: fetched on first use, checked, shared by every process here.

A shard is kept under its SHA-256, so data sets that share one share its copy. Four habits keep the folder right
whatever is killed when:

- One process fetches a shard while the others wait for its lock; the bytes go into `<sha>.part` and are checked before
  one rename makes them `<sha>`. What a killed process left is removed by the next that fetches it or needs the room.
- Who reads a shard holds a shared lock (flock) on the file itself, which the system frees when the process dies. Only
  a file on which nobody holds one is removed, the one used longest ago first.
- Room is reserved under one lock: a `.part` has its full size from the beginning, so that two fetches cannot both take
  the last free bytes.
- A copy is compared with its digest again when the file was touched since, or once a day, because disks go bad.

The locks need a local disk; the folder must not lie on NFS.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np

from sihe.core.errors import Busy, ConfigError, CorruptData, TooLarge, TransientError
from sihe.core.files import disk_errors, exclusive, sha256_of, write_file
from sihe.core.telemetry import logger
from sihe.data.loading.remote import RemoteFolder

_ATTEMPTS = 2  # a transfer may go wrong once; twice the same is no accident
_PIECE = 1 << 23  # bytes read at once
_STAMP_LIFE_S = 24 * 3600.0
_FETCH_S = 3600.0  # how long a process waits for another one that fetches
_log = logger(__name__)


@dataclass(frozen=True)
class RemoteShard:
    """What is to be had, and how to know that it is right."""

    source: RemoteFolder
    name: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):  # it becomes a file's name
            raise CorruptData(self.url, f"its manifest gives {self.sha256!r} as a SHA-256")

    @property
    def url(self) -> str:
        """Where it lies."""
        return f"{self.source.url}/{self.name}"


class Lease:
    """A cached shard in use: it will not be removed until this is closed, or the process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._map: np.ndarray | None = None
        self.close = weakref.finalize(self, _give_up, descriptor)
        """Ends the use; so does forgetting the lease. May be called again."""

    def array(self, dtype: np.dtype[Any]) -> np.ndarray:
        """The shard's content, mapped into memory at the first call; what is mapped outlives the lease."""
        if self._map is None:
            self._map = np.frombuffer(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ), dtype)
        return self._map

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardCache:
    """A folder with at most `limit_bytes` of shards. Any number of processes of one machine may share it.

    `readers` of them read at the same time: each keeps at most its part of the room in use, so that none finds all of
    it taken. A part must hold the largest shard.
    """

    def __init__(self, folder: Path | str, *, limit_bytes: int, readers: int = 1) -> None:
        if limit_bytes < 1:
            raise ConfigError(f"limit_bytes is positive, got {limit_bytes!r}", key="limit_bytes")
        if readers < 1:
            raise ConfigError(f"readers is at least 1, got {readers!r}", key="readers")
        self.folder = Path(folder).absolute()
        self.limit_bytes = limit_bytes
        self._shards = self.folder / "shards"
        self._own_bytes = limit_bytes // readers
        self._held: OrderedDict[str, tuple[Lease, int]] = OrderedDict()
        self._holding = Lock()

    @property
    def size_bytes(self) -> int:
        """What shards and fetches in progress take now."""
        return sum(status.st_size for _, status in self._kept())

    def held(self, shard: RemoteShard) -> Lease:
        """The shard in use until this process needs the room for others; never to be closed by the caller.

        Raises what `lease` raises, and `TooLarge` for a shard that is larger than this process's part of the room.
        """
        with self._holding:
            if shard.sha256 in self._held:
                self._held.move_to_end(shard.sha256)
                return self._held[shard.sha256][0]
            if shard.size_bytes > self._own_bytes:
                raise TooLarge(
                    f"{shard.url} has {shard.size_bytes:,} bytes and each reader of the cache {self.folder} may use "
                    f"{self._own_bytes:,}: raise its limit",
                    limit=self._own_bytes,
                    actual=shard.size_bytes,
                    unit="bytes",
                )
            while sum(size for _, size in self._held.values()) + shard.size_bytes > self._own_bytes:
                _, (oldest, _) = self._held.popitem(last=False)
                oldest.close()
            self._held[shard.sha256] = (self.lease(shard), shard.size_bytes)
            return self._held[shard.sha256][0]

    def lease(self, shard: RemoteShard) -> Lease:
        """The shard's local copy, checked, and fetched first where there is none.

        Raises `CorruptData` when two fetches in a row brought other bytes, `NotFound` and `Unreachable` from the remote
        side, `TooLarge` when the room that is needed is taken by shards in use, `NoSpace`, and `Busy` when another
        process fetches the same shard for over an hour.
        """
        path = self._shards / shard.sha256
        self._shards.mkdir(parents=True, exist_ok=True)
        while True:
            with exclusive(path.with_suffix(".lock"), timeout_s=_FETCH_S):
                if not self._is_right(path, shard):
                    path.unlink(missing_ok=True)
                    self._fetch(path, shard)
            lease = _leased(path)
            if lease is not None:
                os.utime(_stamp(path))  # its time is when the shard was last asked for
                return lease
            # Another process needed the room in the moment between the two locks: once more.

    def _is_right(self, path: Path, shard: RemoteShard) -> bool:
        """Whether there is a copy with the bytes that were written; hashed where the stamp does not say so."""
        try:
            identity = _identity(path)
        except FileNotFoundError:
            return False
        if identity[0] != shard.size_bytes:
            _log.warning("cached_shard_damaged", shard=shard.url, reason="size")
            return False
        try:
            stamp = json.loads(_stamp(path).read_bytes())
            if stamp["file"] == identity and 0 <= time.time() - stamp["at"] < _STAMP_LIFE_S:
                return True
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent, or not ours: hash again
            _log.debug("cached_shard_without_stamp", shard=shard.url)
        if sha256_of(path) != shard.sha256:
            _log.warning("cached_shard_damaged", shard=shard.url, reason="digest")
            return False
        self._write_stamp(path)
        return True

    def _fetch(self, path: Path, shard: RemoteShard) -> None:
        part = path.with_suffix(".part")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._reserve(part, shard)
                with disk_errors(path):
                    digest = _transfer(shard, part)
                if digest == shard.sha256:
                    part.replace(path)
                    self._write_stamp(path)
                    return
                reason = f"its SHA-256 is {digest[:12]}… and {shard.sha256[:12]}… was written"
                if attempt == _ATTEMPTS:
                    raise CorruptData(shard.url, reason, hint="publish the data set again")
                _log.warning("fetch_again", shard=shard.url, reason=reason)
            except TransientError as error:
                if attempt == _ATTEMPTS:
                    raise
                _log.warning("fetch_again", shard=shard.url, reason=str(error))
            finally:
                part.unlink(missing_ok=True)

    def _reserve(self, part: Path, shard: RemoteShard) -> None:
        """Makes `part` as large as the shard, after removing what was used longest ago and is not in use."""
        with exclusive(self.folder / ".room.lock"):
            part.unlink(missing_ok=True)
            by_use = sorted(self._kept(), key=lambda each: _last_use(each[0], each[1].st_mtime))
            for path, _ in by_use:
                if self.size_bytes + shard.size_bytes <= self.limit_bytes:
                    break
                _remove_unused(path)
            taken = self.size_bytes
            if taken + shard.size_bytes > self.limit_bytes:
                raise TooLarge(
                    f"the cache {self.folder} holds at most {self.limit_bytes:,} bytes, {taken:,} of them are in use, "
                    f"and {shard.url} needs {shard.size_bytes:,}: raise its limit",
                    limit=self.limit_bytes,
                    actual=taken + shard.size_bytes,
                    unit="bytes",
                )
            with disk_errors(part), part.open("xb") as file:
                file.truncate(shard.size_bytes)

    def _write_stamp(self, path: Path) -> None:
        write_file(_stamp(path), json.dumps({"at": time.time(), "file": _identity(path)}).encode())

    def _kept(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._shards.glob("[!.]*"):
            if path.suffix in ("", ".part"):
                try:
                    found.append((path, path.stat()))
                except FileNotFoundError:  # finished, or removed, in this moment
                    continue
        return found


def _leased(path: Path) -> Lease | None:
    """The file with a shared lock on it; None if it is no longer there, or is being removed."""
    try:
        lease = Lease(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return None
    fcntl.flock(lease.descriptor, fcntl.LOCK_SH)
    return lease if os.fstat(lease.descriptor).st_nlink else None


def _give_up(descriptor: int) -> None:
    """Unlocks and closes; a mapping holds a duplicate of the descriptor, which alone would keep the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _remove_unused(path: Path) -> None:
    """Removes a shard that nobody reads, or what a killed fetch left; leaves what is in use."""
    try:
        if path.suffix == ".part":
            with exclusive(path.with_suffix(".lock"), timeout_s=0):
                path.unlink(missing_ok=True)
            return
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            _stamp(path).unlink(missing_ok=True)
    except (Busy, BlockingIOError, FileNotFoundError) as error:  # in use, or finished or removed in this moment
        _log.debug("cached_file_stays", file=str(path), reason=type(error).__name__)


def _transfer(shard: RemoteShard, part: Path) -> str:
    """Brings the bytes into `part`, durably; their SHA-256."""
    digest = hashlib.sha256()
    with part.open("r+b") as file:
        for piece in shard.source.pieces(shard.name, _PIECE):
            file.write(piece)
            digest.update(piece)
        file.truncate()  # fewer bytes came than the manifest says
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _stamp(path: Path) -> Path:
    return path.with_suffix(".checked")


def _last_use(path: Path, otherwise: float) -> float:
    try:
        return _stamp(path).stat().st_mtime
    except FileNotFoundError:
        return otherwise


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
