"""What a bag of words forgets: terms that stand side by side in the question and in the text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

BOOST = 0.5
"""Measured with benchmarks/rag/retrieval_quality.py: 0.1 to 0.5 all help on Cranfield and SQuAD."""


def pair_share(asked: Sequence[str], held: Sequence[str], weight: Callable[[str], float]) -> float:
    """Share, by the lesser weight of the two, of the question's neighbouring terms that are neighbours in the text.

    The order counts. 0 for a question of one term. O(len(asked) + len(held)).
    """
    pairs = {(a, b) for a, b in pairwise(asked) if a != b}
    whole = sum(min(weight(a), weight(b)) for a, b in pairs)
    if not whole:
        return 0.0
    neighbours = set(pairwise(held))
    return sum(min(weight(a), weight(b)) for a, b in pairs if (a, b) in neighbours) / whole
