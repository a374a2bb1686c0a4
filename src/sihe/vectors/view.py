"""What a reader sees: the collection as it was after one write, however many follow while it reads.

Shapes: N rows of a part, D dim, K hits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sihe.vectors.filter import Filter, matches
from sihe.vectors.part import Rows
from sihe.vectors.payload import decode
from sihe.vectors.types import Hit, Metric, Page, Point, PointId, Vector, id_order

_BLOCK = 2048  # rows a step of the l2 scan: the differences of 2048 x 384 floats stay in a 4 MB cache
_GATHER_BELOW = 0.25  # share of wanted rows under which copying them costs less than scoring all


@dataclass(frozen=True)
class Slab:
    """The rows of one part that a view counts, with the arrays as they were when it was made."""

    vectors: npt.NDArray[np.float32]
    norms: npt.NDArray[np.float32]
    died: npt.NDArray[np.int64]
    sequence: int
    ids: Sequence[PointId]
    payload: Callable[[int], bytes]

    @cached_property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Which rows the view sees. Whenever it is computed it is the same: later writes end rows at later numbers."""
        return self.died > self.sequence

    def rows(self, condition: Filter | None) -> Rows:
        """Numbers of the rows that are alive and satisfy `condition`, ascending."""
        rows = np.flatnonzero(self.alive)
        if condition is None:
            return rows
        keep = [matches(condition, decode(self.payload(row))) for row in rows.tolist()]
        return rows[np.asarray(keep, dtype=bool)]

    def point(self, row: int) -> Point:
        """The point in a row, copied."""
        return Point(self.ids[row], np.array(self.vectors[row]), decode(self.payload(row)))


@dataclass(frozen=True)
class View:
    """The live rows after write number `sequence`; reading needs no lock."""

    metric: Metric
    sequence: int
    slabs: tuple[Slab, ...]

    def search(self, query_D: Vector, k: int, condition: Filter | None) -> list[Hit]:
        """The `k` best live points by exact comparison, ties by id. O(N x D)."""
        found: list[tuple[float, tuple[bool, int | str], Slab, int]] = []
        for slab in self.slabs:
            rows = slab.rows(condition)
            if not len(rows):
                continue
            closeness = _closeness(self.metric, slab, rows, query_D)
            for index in _best(closeness, k).tolist():
                row = int(rows[index])
                found.append((-float(closeness[index]), id_order(slab.ids[row]), slab, row))
        found.sort(key=lambda item: item[:2])
        sign = 1.0 if self.metric == "l2" else -1.0
        return [Hit(slab.ids[row], sign * distance, decode(slab.payload(row))) for distance, _, slab, row in found[:k]]

    def count(self, condition: Filter | None) -> int:
        """How many live points satisfy `condition`."""
        if condition is None:
            return sum(int(np.count_nonzero(slab.alive)) for slab in self.slabs)
        return sum(len(slab.rows(condition)) for slab in self.slabs)

    def scroll(self, limit: int, after: PointId | None, condition: Filter | None) -> Page:
        """Up to `limit` points in the order of ids, beginning behind `after`."""
        start = 0 if after is None else bisect_right(self._order, id_order(after), key=lambda item: item[0])
        points: list[Point] = []
        for _, slab, row in self._order[start:]:
            if condition is not None and not matches(condition, decode(slab.payload(row))):
                continue
            if len(points) == limit:
                return Page(points, points[-1].id)
            points.append(slab.point(row))
        return Page(points, None)

    @cached_property
    def _order(self) -> list[tuple[tuple[bool, int | str], Slab, int]]:
        rows = ((id_order(slab.ids[row]), slab, row) for slab in self.slabs for row in slab.rows(None).tolist())
        return sorted(rows, key=lambda item: item[0])


def _closeness(metric: Metric, slab: Slab, rows: Rows, query_D: Vector) -> npt.NDArray[np.float32]:
    """For each of `rows` a number that grows with the likeness to the query."""
    if len(rows) < _GATHER_BELOW * len(slab.alive):
        vectors_ND, norms_N = slab.vectors[rows], slab.norms[rows]
        chosen: Rows | slice = slice(None)
    else:
        vectors_ND, norms_N, chosen = slab.vectors, slab.norms, rows
    if metric == "l2":
        # Differences first: |x|² - 2xq + |q|² would lose the digits of close neighbours that lie far from zero.
        squares_N = np.empty(len(vectors_ND), dtype=np.float32)
        for start in range(0, len(vectors_ND), _BLOCK):
            apart = vectors_ND[start : start + _BLOCK] - query_D
            squares_N[start : start + _BLOCK] = np.einsum("nd,nd->n", apart, apart)
        result: npt.NDArray[np.float32] = -np.sqrt(squares_N[chosen])
    elif metric == "dot":
        result = (vectors_ND @ query_D)[chosen]
    else:
        length = np.sqrt(np.dot(query_D.astype(np.float64), query_D))
        direction_D = (query_D / length).astype(np.float32)
        result = (vectors_ND @ direction_D / norms_N)[chosen]
    return result


def _best(closeness: npt.NDArray[np.float32], k: int) -> Rows:
    """Indices of the `k` highest values, and of all that tie with the last of them."""
    if len(closeness) <= k:
        return np.arange(len(closeness))
    last = np.partition(closeness, len(closeness) - k)[len(closeness) - k]
    return np.flatnonzero(closeness >= last)
