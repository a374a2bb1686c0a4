"""The manifest: the one file that says which segments and which log are the collection. Replacing it is the commit."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from sihe.core.errors import CorruptData, NotFound
from sihe.core.files import write_file
from sihe.vectors.types import METRICS, Metric

FILE_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a collection consists of. `sequence` is the last write in the segments: the log continues from there."""

    name: str
    dim: int
    metric: Metric
    segments: tuple[str, ...] = ()
    log: str = "log-00000000"
    sequence: int = 0
    next_number: int = 1

    def write(self, folder: Path) -> None:
        """Replaces the manifest of `folder` atomically and durably."""
        values = {"format": _FORMAT, **asdict(self)}
        write_file(folder / FILE_NAME, json.dumps({**values, "crc": _crc(values)}, indent=1).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a collection's folder. Raises `NotFound` or `CorruptData`."""
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_bytes())
        stated = values.pop("crc")
        if stated != _crc(values) or values.pop("format") != _FORMAT or values["metric"] not in METRICS:
            raise ValueError("its checksum or format is wrong")
        return Manifest(**{**values, "segments": tuple(values["segments"])})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound("collection", folder.name, hint="see what there is with  sihe vectors list") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(path, str(error), hint="restore the collection's folder from a copy") from error


def _crc(values: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
