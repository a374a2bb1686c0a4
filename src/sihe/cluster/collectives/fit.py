"""Alpha and beta of a link, from measured messages."""

from __future__ import annotations

from collections.abc import Sequence

from sihe.cluster.collectives.costs import Link
from sihe.core.errors import InvalidInput

_LEAST_BETA = 1e-15  # seconds a byte: noise may make larger messages look faster, and a bandwidth is positive


def fit_link(points: Sequence[tuple[float, float]]) -> Link:
    """The link behind (bytes, seconds) of one message each, of at least two sizes.

    Least squares on the relative error, so that the small messages, which alone show the latency, count as much as the
    large. Raises `InvalidInput`.
    """
    import numpy as np

    if len({size for size, _ in points}) < 2 or any(seconds <= 0 for _, seconds in points):
        raise InvalidInput(f"a fit needs messages of two sizes or more, each of positive time, got {points!r}")
    sizes = np.array([size for size, _ in points])
    seconds = np.array([second for _, second in points])
    system = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    solution, *_ = np.linalg.lstsq(system, np.ones_like(seconds), rcond=None)
    return Link(latency_s=max(float(solution[0]), 0.0), bandwidth=1 / max(float(solution[1]), _LEAST_BETA))
