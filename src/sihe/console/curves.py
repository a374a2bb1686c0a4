"""The curves of a run: what a page draws first, and what changed since.

A curve is thinned to what a screen can show, keeping the extremes, so that a spike of the loss never disappears.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sihe.core.tracking import MetricPoint, Run, Tracking

MOST_POINTS = 1500
_QUIET_LOOKS = 8
# What the charts of a training run show first; every other metric follows by name.
FIRST = ("loss", "tokens_per_s", "learning_rate", "lr", "gradient_norm", "grad_norm")

Series = Mapping[str, tuple[list[int], list[float | None]]]


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metric names as pages show them."""
    return sorted(metrics, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def thin(points: Sequence[MetricPoint], most: int = MOST_POINTS) -> list[MetricPoint]:
    """At most `most` of the points: of each stretch its lowest and its highest, and always the first and the last."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(len(points) / max(1, (most - 2) // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indexes = range(start, min(start + stretch, len(points)))
        kept.add(min(indexes, key=lambda index: points[index].value))
        kept.add(max(indexes, key=lambda index: points[index].value))
    return [points[index] for index in sorted(kept)][:most]


@dataclass
class RunCurves:
    """Follows one run; every reader has its own."""

    tracking: Tracking
    run_id: str
    _seen: dict[str, frozenset[tuple[int, float]]] = field(default_factory=dict)
    _last: Mapping[str, float] = field(default_factory=dict)
    _quiet: int = 0

    def changes(self, run: Run) -> Series:
        """The points that this reader has not had yet. Costs one small look when the run logged nothing new."""
        changed: dict[str, tuple[list[int], list[float | None]]] = {}
        # The last values stand for the newest step: a run that repeats steps after a recovery changes none of them.
        quiet = run.status == "RUNNING" and run.metrics == self._last
        self._quiet = self._quiet + 1 if quiet else 0
        if self._quiet % _QUIET_LOOKS:
            return changed
        for metric in run.metrics:
            points = self.tracking.history(self.run_id, metric)
            seen = self._seen.get(metric, frozenset())
            fresh = thin([point for point in points if (point.step, point.at.timestamp()) not in seen])
            self._seen[metric] = frozenset((point.step, point.at.timestamp()) for point in points)
            if fresh:
                changed[metric] = ([point.step for point in fresh], [_finite(point.value) for point in fresh])
        self._last = dict(run.metrics)
        return changed


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows neither NaN nor infinity
