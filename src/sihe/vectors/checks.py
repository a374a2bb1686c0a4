"""The checks that let a value into a collection. Pure; each error names the item and says what was expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sihe.core.errors import InvalidInput
from sihe.vectors.errors import InvalidVector
from sihe.vectors.types import METRICS, Metric, PointId, Vector

MAX_DIM = 65_536
_MAX_LENGTH = 1e18  # products of two lengths stay below 3.4e38, the largest float32
_MIN_DIRECTION = 1e-18  # shorter vectors have too few bits left for a direction


def check_ids(ids: Sequence[PointId], *, unique: bool = False) -> list[PointId]:
    """`ids` as a list when each can name a point, and no two name the same one where `unique`."""
    if isinstance(ids, str | bytes):
        raise InvalidInput(f"expected a list of ids, got the single text {ids!r}: write [{ids!r}]")
    checked = [int(value) if isinstance(value, np.integer) else value for value in ids]
    for index, value in enumerate(checked):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise InvalidInput(f"ids[{index}]: expected a whole number or a text, got {value!r}")
        if isinstance(value, int):
            valid = 0 <= value < 2**64
        else:
            valid = value.isprintable() and 1 <= len(value.encode()) <= 512
        if not valid:
            raise InvalidInput(
                f"ids[{index}]: expected a number from 0 to 2^64 - 1 or 1 to 512 bytes of printable text, got {value!r}"
            )
    if unique and len(set(checked)) < len(checked):
        double = Counter(checked).most_common(1)[0][0]
        raise InvalidInput(f"the id {double!r} comes twice in one batch: which of the two should stay?")
    return checked


def check_vectors(vectors: npt.ArrayLike, rows: int, dim: int, metric: Metric) -> npt.NDArray[np.float32]:
    """`vectors` as a float32 array [rows, dim] of its own, when the collection can hold them."""
    array = _as_float32(vectors, f"{rows} vectors of dimension {dim}")
    if rows == 0 and array.size == 0:
        return np.empty((0, dim), dtype=np.float32)
    if array.shape != (rows, dim):
        raise InvalidVector(f"expected {rows} vectors of dimension {dim}, got an array of shape {array.shape}")
    _check_lengths(array, metric, "vectors[{row}]")
    return array


def check_query(vector: npt.ArrayLike, dim: int, metric: Metric) -> Vector:
    """`vector` as float32 [dim] when it can be searched for."""
    array = _as_float32(vector, f"a vector of dimension {dim}")
    if array.shape != (dim,):
        raise InvalidVector(f"expected a vector of dimension {dim}, got an array of shape {array.shape}")
    _check_lengths(array[None], metric, "the vector")
    return array


def check_k(k: int, name: str = "k") -> int:
    """`k` when it is a positive whole number."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InvalidInput(f"{name}: expected a whole number from 1 on, got {k!r}")
    return int(k)


def check_dim(dim: int) -> int:
    """`dim` when a collection can have it."""
    if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= MAX_DIM:
        raise InvalidInput(f"dim: expected a whole number from 1 to {MAX_DIM}, got {dim!r}")
    return dim


def check_metric(metric: str) -> Metric:
    """`metric` when there is such a one."""
    for known in METRICS:
        if metric == known:
            return known
    raise InvalidInput(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")


def _as_float32(values: npt.ArrayLike, expected: str) -> npt.NDArray[np.float32]:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"values of type {array.dtype}")
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            return np.array(array, dtype=np.float32, order="C")
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidVector(f"expected {expected}, got {error}") from error


def _check_lengths(array: npt.NDArray[np.float32], metric: Metric, where: str) -> None:
    lengths = np.sqrt(np.einsum("nd,nd->n", array, array, dtype=np.float64))
    wrong = np.flatnonzero(~(lengths <= _MAX_LENGTH))
    if len(wrong):
        place = where.format(row=wrong[0])
        raise InvalidVector(f"{place}: expected finite numbers and a length of at most {_MAX_LENGTH:g}")
    if metric == "cosine" and len(wrong := np.flatnonzero(lengths < _MIN_DIRECTION)):
        place = where.format(row=wrong[0])
        raise InvalidVector(f"{place}: the zero vector has no direction: cosine similarity needs a length above zero")
