"""Segments: immutable folders of rows, published whole, checked by SHA-256, read through memory maps.

segment.json       rows, dim, first and last sequence number, size and SHA-256 of each file below
vectors.npy        float32 [rows, dim]; norms.npy float32 [rows]
ids.json           the id of each row
deleted.json       ids that this segment removes from older segments
payloads.bin       encoded payloads one after another; payloads.npy int64 [rows + 1] says where each begins
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from sihe.core.errors import CorruptData
from sihe.core.files import disk_errors, new_directory, sha256_of
from sihe.vectors.part import ALIVE, Part
from sihe.vectors.types import PointId

_FILES = ("vectors.npy", "norms.npy", "ids.json", "deleted.json", "payloads.bin", "payloads.npy")
_HINT = "restore the collection's folder from a copy; nothing in it was changed"


class Segment:
    """The rows of one segment folder. `died` lives in memory: it follows from the segments and log behind this one."""

    def __init__(self, path: Path, dim: int, *, verify: bool = True) -> None:
        self.path = path
        description = _describe(path)
        if verify:
            _verify(path, description["files"])
        try:
            mode: Literal["r"] | None = "r" if description["rows"] else None  # an empty file cannot be mapped
            self.vectors: npt.NDArray[np.float32] = np.load(path / "vectors.npy", mmap_mode=mode, allow_pickle=False)
            self.norms: npt.NDArray[np.float32] = np.load(path / "norms.npy", allow_pickle=False)
            self._offsets = np.load(path / "payloads.npy", allow_pickle=False)
            self.ids: list[PointId] = orjson.loads((path / "ids.json").read_bytes())
            self.deleted: list[PointId] = orjson.loads((path / "deleted.json").read_bytes())
            self._payloads = _map(path / "payloads.bin")
        except (ValueError, EOFError) as error:
            raise CorruptData(path, str(error), hint=_HINT) from error
        rows = description["rows"]
        if self.vectors.shape != (rows, dim) or len(self.ids) != rows or len(self._offsets) != rows + 1:
            raise CorruptData(path, f"it should hold {rows} rows of dimension {dim}", hint=_HINT)
        self.died = np.full(rows, ALIVE, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def payload(self, row: int) -> bytes:
        """The encoded payload of a row."""
        return self._payloads[self._offsets[row] : self._offsets[row + 1]]


def write_segment(
    path: Path, sources: Sequence[tuple[Part, npt.NDArray[np.int64]]], deleted: Iterable[PointId]
) -> None:
    """Publishes the given rows of the given parts as the segment folder `path`. Raises `NoSpace`; then it is not there.

    Vectors are copied block by block, so that the memory needed does not grow with the segment.
    """
    rows = sum(len(chosen) for _, chosen in sources)
    dim = sources[0][0].vectors.shape[1]
    with new_directory(path) as staging, disk_errors(path):
        _write_array(staging / "vectors.npy", (rows, dim), ((part.vectors, chosen) for part, chosen in sources))
        _write_array(staging / "norms.npy", (rows,), ((part.norms, chosen) for part, chosen in sources))
        ids = [part.ids[row] for part, chosen in sources for row in chosen.tolist()]
        (staging / "ids.json").write_bytes(orjson.dumps(ids))
        (staging / "deleted.json").write_bytes(orjson.dumps(list(deleted)))
        offsets = np.zeros(rows + 1, dtype=np.int64)
        with (staging / "payloads.bin").open("wb") as file:
            payloads = (part.payload(row) for part, chosen in sources for row in chosen.tolist())
            for index, payload in enumerate(payloads):
                file.write(payload)
                offsets[index + 1] = offsets[index] + len(payload)
        np.save(staging / "payloads.npy", offsets, allow_pickle=False)
        files = {
            name: {"bytes": (staging / name).stat().st_size, "sha256": sha256_of(staging / name)} for name in _FILES
        }
        (staging / "segment.json").write_text(json.dumps({"format": 1, "rows": rows, "dim": dim, "files": files}))


def _write_array(
    path: Path,
    shape: tuple[int, ...],
    sources: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]],
    block: int = 4096,
) -> None:
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for values, chosen in sources:
            for start in range(0, len(chosen), block):
                file.write(np.ascontiguousarray(values[chosen[start : start + block]], dtype="<f4").data)


def _describe(path: Path) -> dict[str, Any]:
    try:
        description = json.loads((path / "segment.json").read_text(encoding="utf-8"))
        if description["format"] != 1 or set(description["files"]) != set(_FILES) or description["rows"] < 0:
            raise ValueError("segment.json does not describe a segment of this version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptData(path, f"segment.json: {error}", hint=_HINT) from error
    return dict(description)


def _verify(path: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CorruptData(file, "the file is missing", hint=_HINT)
        if file.stat().st_size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            raise CorruptData(file, "its checksum is wrong", hint=_HINT)


def _map(path: Path) -> bytes | mmap.mmap:
    """The file as a memory map; an empty file cannot be mapped and is just empty."""
    if path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
