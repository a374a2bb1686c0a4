"""`state.json`: the file that makes a folder a checkpoint. It is written last, and vouches for all others.

It holds what is no tensor: where the run stands, what it computes, the sum of every file, and a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sihe.core.errors import CorruptData
from sihe.core.files import write_file
from sihe.training.checkpoint.shards import FileSum

NAME = "state.json"
_FORMAT = "sihe-checkpoint"
_FORMAT_VERSION = 2


@dataclass(frozen=True)
class Manifest:
    """What `state.json` says, in plain values that JSON gives back as they were."""

    step: int
    next_sample: int
    identity: Mapping[str, Any]
    """What the run computes."""
    files: Mapping[str, FileSum]
    state: Mapping[str, Any] = field(default_factory=dict)
    """What else the run needs to go on, the same on every rank."""
    extras: Sequence[Any] = ()
    """What each rank kept for itself, by rank."""

    def write(self, folder: Path) -> None:
        """Puts it into `folder`, durably, with the names of all files there. Raises `NoSpace`."""
        body = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(self)}
        write_file(folder / NAME, json.dumps({**body, "digest": _digest(body)}, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of `folder`. Raises `CorruptData`."""
        path = folder / NAME
        try:
            body = json.loads(path.read_bytes())
            digest = body.pop("digest")
            kind, version = body.pop("format"), body.pop("format_version")
        except FileNotFoundError as error:
            raise CorruptData(path, f"{NAME} is missing") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CorruptData(path, f"{NAME} is not what was written") from error
        if digest != _digest({"format": kind, "format_version": version, **body}) or kind != _FORMAT:
            raise CorruptData(path, f"{NAME} does not match its digest")
        if version != _FORMAT_VERSION:
            raise CorruptData(path, f"its format version is {version!r}, this Sihe reads {_FORMAT_VERSION}")
        files = {name: FileSum(**values) for name, values in body.pop("files").items()}
        return cls(files=files, **body)

    def check_files(self, folder: Path, *, share: int = 0, shares: int = 1) -> None:
        """Checks every `shares`-th file, from the one at place `share`. Raises `CorruptData`."""
        for name in sorted(self.files)[share::shares]:
            self.files[name].check(folder / name)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
