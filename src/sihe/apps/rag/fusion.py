"""Two rankings as one: min-max scaled scores, mixed. Pure.

Bruch, Gai and Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval" (arXiv 2210.11934): a convex combination
of scaled scores beats reciprocal rank fusion, which throws the distances between scores away.
"""

from __future__ import annotations

from collections.abc import Mapping


def scale(scores: Mapping[int, float]) -> dict[int, float]:
    """Scores moved to 0 .. 1; all 1 when they are equal."""
    if not scores:
        return {}
    low, high = min(scores.values()), max(scores.values())
    if high == low:
        return dict.fromkeys(scores, 1.0)
    return {key: (score - low) / (high - low) for key, score in scores.items()}


def fuse(first: Mapping[int, float], second: Mapping[int, float], weight: float = 0.5) -> dict[int, float]:
    """`weight` x first + (1 - weight) x second, each scaled; what one of them did not find counts 0 there."""
    a, b = scale(first), scale(second)
    return {key: weight * a.get(key, 0.0) + (1 - weight) * b.get(key, 0.0) for key in a.keys() | b.keys()}
