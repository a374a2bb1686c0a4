"""How far two versions answer alike: the share of equal outputs. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sihe.serving.predictive.datatypes import as_objects
from sihe.serving.predictive.types import Array, DataType

# How far an answer alone and one beside another row may lie apart: kernels sum in another order for another number of
# rows. Types of half the width have 8 to 11 bits. What lies no further apart is equal.
NEAR: Mapping[DataType, float] = {"FP64": 1e-4, "FP32": 1e-3, "FP16": 2e-2, "BF16": 2e-2}


def agreement(answer: Mapping[str, Array], other: Mapping[str, Array], datatypes: Mapping[str, DataType]) -> float:
    """The mean over the outputs of `equal_share`; one that only one of the two has agrees not at all.

    Each output weighs the same, so that a label is not lost among the probabilities of a thousand classes.
    `datatypes` are those of `answer`.
    """
    names = sorted(answer.keys() | other.keys())
    both = answer.keys() & other.keys()
    shares = [equal_share(answer[name], other[name], datatypes[name]) if name in both else 0.0 for name in names]
    return sum(shares) / len(shares) if shares else 1.0


def equal_share(a: Array, b: Array, datatype: DataType) -> float:
    """The share of elements of `a` that `b` has too, in its place; 0 where their shapes differ.

    Numbers of floating point are equal within `NEAR` of the larger one, or of a hundredth where both are smaller, and
    NaN equals NaN. Everything else, labels above all, is equal or not.
    """
    if a.shape != b.shape or _is_text(a) != _is_text(b):
        return 0.0
    if a.size == 0:
        return 1.0
    if _is_text(a):
        return float(np.mean(as_objects(a) == as_objects(b)))
    near = NEAR.get(datatype)
    if near is None:
        return float(np.mean(a == b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        is_near = np.abs(x - y) <= near * np.maximum(np.maximum(np.abs(x), np.abs(y)), 1e-2)
    is_infinite = np.isinf(x) | np.isinf(y)  # of which every number is within any part
    same = np.where(is_infinite, x == y, is_near | (np.isnan(x) & np.isnan(y)))
    return float(np.mean(same))


def _is_text(array: Array) -> bool:
    return array.dtype.kind in "OUS"
