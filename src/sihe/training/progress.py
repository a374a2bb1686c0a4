"""The log of a run: one JSON line an event, appended by rank 0 and followed by the supervisor.

A line is written in one call. A rank that is killed can leave half of a line at the end; the next attempt ends it with
a line break, and readers skip what is not a whole event.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sihe.core.files import disk_errors
from sihe.training.types import (
    AttemptReady,
    CheckpointSaved,
    CheckpointSkipped,
    RankMemory,
    StepDone,
    StepRejected,
    StepsSkipped,
    WorkerEvent,
)

_KINDS: dict[str, type[WorkerEvent]] = {
    "ready": AttemptReady,
    "step": StepDone,
    "memory": RankMemory,
    "checkpoint": CheckpointSaved,
    "skipped": CheckpointSkipped,
    "rejected": StepRejected,
    "samples-skipped": StepsSkipped,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class EventWriter:
    """Appends events to the file at `path`; one writer at a time. Raises `NoSpace`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            self._append(b"\n")

    def write(self, event: WorkerEvent) -> None:
        """Appends `event`."""
        self._append(json.dumps({"event": _NAMES[type(event)], **asdict(event)}).encode() + b"\n")

    def close(self) -> None:
        """Frees the file."""
        os.close(self._descriptor)

    def _append(self, line: bytes) -> None:
        with disk_errors(self._path):
            while line:  # a nearly full disk takes a part, and refuses the rest with an error
                line = line[os.write(self._descriptor, line) :]


class EventReader:
    """Reads the events at `path` as they come; each call goes on where the last one ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[WorkerEvent]:
        """The whole events that were appended since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            event = _parse(line)
            if event is not None:
                yield event


def _parse(line: bytes) -> WorkerEvent | None:
    try:
        values = json.loads(line)
        return _KINDS[values.pop("event")](**values)
    except (ValueError, KeyError, TypeError, AttributeError):  # half of a line, from a rank that was killed
        return None
