"""The writes that a log frame holds, as values and as bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from sihe.vectors.types import PointId

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Upsert:
    """Points to write; `vectors` is float32 [len(ids), dim], `payloads` are encoded."""

    ids: list[PointId]
    vectors: npt.NDArray[np.float32]
    payloads: list[bytes]


@dataclass(frozen=True, slots=True)
class Delete:
    """Points to remove; ids that do not exist are ignored."""

    ids: list[PointId]


Operation: TypeAlias = Upsert | Delete


def encode(operations: Iterable[Operation]) -> bytes:
    """One log body: for each write the length of its head, the head as JSON, vectors, payloads."""
    pieces: list[bytes] = []
    for operation in operations:
        if isinstance(operation, Upsert):
            head = orjson.dumps({"upsert": operation.ids, "sizes": list(map(len, operation.payloads))})
            pieces += [_LENGTH.pack(len(head)), head, operation.vectors.astype("<f4").tobytes(), *operation.payloads]
        else:
            head = orjson.dumps({"delete": operation.ids})
            pieces += [_LENGTH.pack(len(head)), head]
    return b"".join(pieces)


def decode(body: bytes, dim: int) -> Iterator[Operation]:
    """The writes in a body that `encode` made for vectors of dimension `dim`."""
    offset = 0
    while offset < len(body):
        (length,) = _LENGTH.unpack_from(body, offset)
        offset += _LENGTH.size
        head = orjson.loads(body[offset : offset + length])
        offset += length
        if "delete" in head:
            yield Delete(head["delete"])
            continue
        ids = head["upsert"]
        vectors = np.frombuffer(body, dtype="<f4", count=len(ids) * dim, offset=offset).reshape(len(ids), dim)
        offset += vectors.nbytes
        payloads = []
        for size in head["sizes"]:
            payloads.append(body[offset : offset + size])
            offset += size
        yield Upsert(ids, vectors, payloads)
