"""How many ranks may run now, as somebody writes it into a file: `echo 2 > workers`."""

from __future__ import annotations

from pathlib import Path

from sihe.cluster.ports import Capacity
from sihe.cluster.types import ProcessJob
from sihe.core.telemetry import logger

_log = logger(__name__)


class FileCapacity:
    """The whole number in the file at `path`; no limit (`None`) while there is no file.

    While the file holds something else, the last good value stays: a typing error must not end a long job.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slots: int | None = None
        self._refused: str | None = None

    def __call__(self) -> int | None:
        """How many ranks may run now."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            self._slots = None
            return None
        if text.isascii() and text.isdigit():
            self._slots = int(text)
        elif text != self._refused:
            self._refused = text
            _log.warning("capacity_not_a_number", path=str(self._path), text=text[:100], kept=self._slots)
        return self._slots


def job_capacity(job: ProcessJob) -> Capacity:
    """What the job's `capacity_file` says; no limit for a job without one."""
    return FileCapacity(job.capacity_file) if job.capacity_file else _no_limit


def _no_limit() -> None:
    """Nobody limits how many ranks run."""
