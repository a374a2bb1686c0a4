"""The values of the vector database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Metric = Literal["cosine", "dot", "l2"]
METRICS: tuple[Metric, ...] = get_args(Metric)

PointId: TypeAlias = int | str
"""An integer from 0 to 2^64 - 1, or a text of 1 to 512 bytes. `1` and `"1"` are two different points."""

Payload: TypeAlias = Mapping[str, Any]
"""A JSON object."""

Vector: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Point:
    """One stored point. `vector` is what was written, not normalised."""

    id: PointId
    vector: Vector = field(compare=False)
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search, best first. For `cosine` and `dot` a higher score is better; for `l2` it is the distance,
    and lower is better."""

    id: PointId
    score: float
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a collection in the order of ids. `next` goes into the following call's `after`; None at the end."""

    points: list[Point]
    next: PointId | None


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection is and holds."""

    name: str
    dim: int
    metric: Metric
    count: int
    segments: int
    log_bytes: int


def id_order(value: PointId) -> tuple[bool, int | str]:
    """Sort key of ids: numbers by value, then texts by code point."""
    return (isinstance(value, str), value)
