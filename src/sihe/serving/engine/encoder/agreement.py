"""How far two versions of an encoder answer alike: the angle between vectors, the order of scores. Pure."""

from __future__ import annotations

import numpy as np

from sihe.serving.engine.encoder.types import Floats

SAME_COSINE = 0.9999  # what bfloat16 makes of float32 lies closer; another training does not
NEAR_SCORE = 1e-4  # of scores in 0..1: below it two documents are as good as each other


def cosines(a: Floats, b: Floats) -> Floats | None:
    """The cosine of each row with the other's, 1 where both are zero and 0 where one is; None for other shapes."""
    if a.shape != b.shape:
        return None
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths, others = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    products = lengths * others
    found = np.divide((x * y).sum(axis=1), products, out=np.zeros(len(x)), where=products > 0)
    found[(lengths == 0) & (others == 0)] = 1.0
    return np.clip(found, -1.0, 1.0).astype(np.float32)


def same_order(a: Floats, b: Floats) -> float:
    """The share of pairs of documents that both scores put in the same order, or both hold equal; 1 without a pair.

    It is what Kendall's rank correlation counts (Kendall 1938, A new measure of rank correlation, Biometrika 30), as a
    share. `a` and `b` are one score a document.
    """
    if a.shape != b.shape:
        return 0.0
    pairs = len(a) * (len(a) - 1) // 2
    if pairs == 0:
        return 1.0
    concordant = sum(
        int(np.count_nonzero(_orders(a[place] - a[place + 1 :]) == _orders(b[place] - b[place + 1 :])))
        for place in range(len(a) - 1)
    )
    return concordant / pairs


def _orders(differences: Floats) -> Floats:
    return np.where(np.abs(differences) <= NEAR_SCORE, 0.0, np.sign(differences)).astype(np.float32)
