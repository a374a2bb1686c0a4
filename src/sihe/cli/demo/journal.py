"""What the demo has done so far, on disk, so that a run that was killed goes on where it was.

Every stage may be repeated: the journal only saves the time of what is done. A finished walk starts anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sihe.core.files import write_file

Figures = dict[str, Any]


class Journal:
    """The stages of the current walk with their figures, in `<home>/demo/journal.json`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: dict[str, Any] = {"walk": 1, "finished": False, "stages": {}, "notes": {}}
        if path.is_file():
            self._state = self._read()
        if self._state["finished"]:
            self._state = {"walk": self._state["walk"] + 1, "finished": False, "stages": {}, "notes": {}}
            self._write()

    @property
    def walk(self) -> int:
        """The number of this walk, from 1."""
        number: int = self._state["walk"]
        return number

    def figures(self, stage: str) -> Figures | None:
        """What `stage` measured in this walk; `None` when it is not done."""
        done: Figures | None = self._state["stages"].get(stage)
        return done

    def stages(self) -> dict[str, Figures]:
        """Every stage that is done, in order."""
        return dict(self._state["stages"])

    def done(self, stage: str, figures: Figures) -> None:
        """Keeps a stage's figures."""
        self._state["stages"][stage] = figures
        self._write()

    def note(self, key: str) -> Any:
        """A value that a stage kept while it ran."""
        return self._state["notes"].get(key)

    def keep(self, key: str, value: Any) -> None:
        """Keeps a value of a stage that still runs."""
        self._state["notes"][key] = value
        self._write()

    def finish(self) -> None:
        """Ends this walk: the next call begins another."""
        self._state["finished"] = True
        self._write()

    def _read(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._path.read_bytes())
            return state | {"walk": int(state["walk"]), "stages": dict(state["stages"]), "notes": dict(state["notes"])}
        except (ValueError, KeyError, TypeError):
            # Written whole by `_write`, so somebody edited it: nothing depends on it but time.
            return {"walk": 1, "finished": False, "stages": {}, "notes": {}}

    def _write(self) -> None:
        write_file(self._path, json.dumps(self._state, indent=1, ensure_ascii=False).encode())
