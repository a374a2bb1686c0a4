"""Files that appear whole or not at all, and disk errors that say what to do.

A reader never sees half of a file or folder written through this module, whenever the writer is killed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sihe.core.errors import AlreadyExists, Busy, NoSpace

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns "disk full" from the operating system, or from a library that only wraps its text, into `NoSpace`."""
    try:
        yield
    except NoSpace:
        raise
    except Exception as error:
        if (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error):
            raise NoSpace(path) from error
        raise


def _fsync(path: Path) -> None:
    """Makes the content of a file, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically and durably. Raises `NoSpace`; the former content then stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _fsync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; on a clean exit it becomes `path` in one durable rename.

    `path` must not exist yet (`AlreadyExists`): a folder cannot be replaced in one step, so what changes gets a new
    name each time. Leftovers of a writer that died (`.<name>.tmp-*`) are removed by the next writer of the same path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), exclusive(path.parent / f".{path.name}.lock"):
        if path.exists():
            raise AlreadyExists("folder", str(path))
        for leftover in path.parent.glob(f".{path.name}.tmp-*"):
            shutil.rmtree(leftover)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-"))
        try:
            yield staging
            for entry in (staging, *staging.rglob("*")):
                _fsync(entry)
            staging.replace(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _fsync(path.parent)


@contextmanager
def exclusive(path: Path, *, timeout_s: float = 60.0) -> Iterator[None]:
    """Holds the lock file `path` across processes; freed by the system when the holder dies. Raises `Busy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=timeout_s):
            yield
    except Timeout as error:
        raise Busy(f"another process has held {path} for {timeout_s:.0f} s: wait for it or stop it") from error


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of the file at `path`, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
