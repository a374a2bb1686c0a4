"""The last words of a rank: a small file through which its error reaches the launcher as the error that it was.

The space of the file is reserved before the rank starts, so that it can still say that the disk is full.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sihe.core.errors import SiheError
from sihe.core.files import disk_errors

_SIZE = 16_384  # bytes reserved for a report: a message and the end of a traceback
_MAX_MESSAGE = 2_000  # characters
_MAX_TRACEBACK = 4_000  # characters, of up to three bytes each


@dataclass(frozen=True)
class Report:
    """What a rank said when it failed."""

    kind: str
    module: str
    message: str
    fields: dict[str, Any]
    at_ns: int

    @property
    def summary(self) -> str:
        """`RuntimeError: the first line of the message`."""
        return f"{self.kind}: {self.message.splitlines()[0] if self.message else ''}"

    def error(self) -> SiheError | None:
        """The error as it was raised in the rank, when it is one of ours; `None` for any other."""
        if not self.module.startswith("sihe."):
            return None
        found = getattr(importlib.import_module(self.module), self.kind, None)
        if not (isinstance(found, type) and issubclass(found, SiheError)):
            return None
        # Its constructor builds a message from fields; here the message is known, so it is not called.
        error = found.__new__(found)
        error.args = (self.message,)
        error.__dict__.update(self.fields)
        return error


def reserve(path: Path) -> None:
    """Takes the disk space of a report at `path`. Raises `NoSpace`."""
    with disk_errors(path), path.open("wb") as file:
        file.write(b"\0" * _SIZE)


def write(path: Path, error: BaseException) -> None:
    """Overwrites the reserved file with a report of `error`."""
    trace = "".join(traceback.format_exception(error))
    report = {
        "kind": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error)[:_MAX_MESSAGE],
        "fields": {key: value for key, value in vars(error).items() if _is_plain(value)},
        "at_ns": time.time_ns(),
        "traceback": trace[-_MAX_TRACEBACK:],
    }
    data = json.dumps(report, ensure_ascii=False).encode()
    if len(data) > _SIZE:
        data = json.dumps({**report, "traceback": "", "fields": {}}).encode()[:_SIZE]
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read(path: Path) -> Report | None:
    """The report at `path`; `None` when the rank wrote none (it was killed)."""
    try:
        data = json.loads(path.read_bytes().rstrip(b"\0"))
        return Report(data["kind"], data["module"], data["message"], data["fields"], data["at_ns"])
    except (OSError, ValueError, KeyError):
        return None


def _is_plain(value: object) -> bool:
    return value is None or (isinstance(value, str | int | float | bool) and len(str(value)) < _MAX_MESSAGE)
