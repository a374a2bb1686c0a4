"""What is kept of a metric while requests pass: sums and counts of fixed size, never the values.

A metric's values of one user resemble each other, and sticky traffic keeps a user on one arm: to treat such requests as
independent makes chance look like a difference. So values are also summed by cluster (the sticky key's hash), and the
variance of the mean is the larger of the two estimates: from single values, and between clusters.
(The delta method for ratio metrics: Deng, Knoblich and Lu, "Applying the Delta Method in Metric Analytics", KDD 2018,
arXiv:1803.06336, section 3.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

CLUSTERS = 64
_LEAST_PER_CLUSTER = 4  # below it, the spread between clusters is itself too noisy to be an estimate
_GROWTH = 1.05  # of a bucket's bounds: quantiles within 2.5 %
_LOG_GROWTH = math.log(_GROWTH)
_LEAST_VALUE = 1e-6  # smaller ones share a bucket


class Moments:
    """Count, mean and variance of one metric (Welford's update), and its sums by cluster."""

    __slots__ = ("_counts", "_totals", "count", "mean", "squares")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0  # sum of squared distances from the mean
        self._counts = [0] * CLUSTERS
        self._totals = [0.0] * CLUSTERS

    def add(self, value: float, cluster: int) -> None:
        """Takes one value in; `cluster` says whose it is."""
        self.count += 1
        distance = value - self.mean
        self.mean += distance / self.count
        self.squares += distance * (value - self.mean)
        place = cluster % CLUSTERS
        self._counts[place] += 1
        self._totals[place] += value

    def absorb(self, other: Moments) -> None:
        """Takes in all values that `other` has seen: what one that had seen both would hold, but for the last digits.

        (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", Stanford
        STAN-CS-79-773, 1979.)
        """
        if other.count == 0:
            return
        if self.count == 0:  # exactly the other's, so that nothing changes by being stored and read
            self.mean, self.squares = other.mean, other.squares
        else:
            distance, both = other.mean - self.mean, self.count + other.count
            self.mean += distance * other.count / both
            self.squares += other.squares + distance**2 * self.count * other.count / both
        self.count += other.count
        for place in range(CLUSTERS):
            self._counts[place] += other._counts[place]
            self._totals[place] += other._totals[place]

    @property
    def total(self) -> float:
        """The sum of all values."""
        return self.mean * self.count

    @property
    def variance(self) -> float:
        """Of single values, unbiased; 0 for fewer than two."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0

    @property
    def variance_of_mean(self) -> float:
        """How uncertain the mean is, with regard to clusters."""
        if self.count == 0:
            return math.inf
        single = self.variance / self.count
        used = sum(1 for count in self._counts if count)
        if used < 2 or self.count < _LEAST_PER_CLUSTER * CLUSTERS:
            return single
        apart = sum(
            (total - self.mean * count) ** 2 for count, total in zip(self._counts, self._totals, strict=True) if count
        )
        return max(single, used / (used - 1) * apart / self.count**2)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, from which `from_mapping` makes the same again."""
        clusters = {
            str(place): [count, total]
            for place, (count, total) in enumerate(zip(self._counts, self._totals, strict=True))
            if count
        }
        return {"count": self.count, "mean": self.mean, "squares": self.squares, "clusters": clusters}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Moments:
        """The moments that `to_mapping` wrote."""
        made = cls()
        made.count, made.mean, made.squares = int(values["count"]), float(values["mean"]), float(values["squares"])
        for place, (count, total) in values["clusters"].items():
            made._counts[int(place)], made._totals[int(place)] = int(count), float(total)
        return made


class Histogram:
    """Counts of positive values in buckets whose bounds grow by 5 %: quantiles with a bounded relative error.

    (DDSketch with logarithmic buckets: Masson, Rim and Lee, PVLDB 12(12), 2019, arXiv:1908.10693.)
    """

    __slots__ = ("_counts", "count")

    def __init__(self) -> None:
        self.count = 0
        self._counts: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Takes one value in."""
        place = math.ceil(math.log(max(value, _LEAST_VALUE)) / _LOG_GROWTH)
        self._counts[place] = self._counts.get(place, 0) + 1
        self.count += 1

    def absorb(self, other: Histogram) -> None:
        """Takes in all values that `other` has seen. Exact."""
        for place, count in other._counts.items():
            self._counts[place] = self._counts.get(place, 0) + count
        self.count += other.count

    def quantile(self, share: float) -> float | None:
        """The value that `share` (0 to 1) of the values do not exceed; None where there are no values."""
        if self.count == 0:
            return None
        rank = max(1, math.ceil(share * self.count))
        passed = 0
        for place in sorted(self._counts):
            passed += self._counts[place]
            if passed >= rank:
                return math.exp((place - 0.5) * _LOG_GROWTH)
        raise AssertionError("the buckets hold what was counted")

    def above(self, bound: float) -> int:
        """How many values exceed `bound`; those in the bound's own bucket do not count."""
        limit = math.ceil(math.log(max(bound, _LEAST_VALUE)) / _LOG_GROWTH)
        return sum(count for place, count in self._counts.items() if place > limit)

    def to_mapping(self) -> dict[str, int]:
        """Plain values, from which `from_mapping` makes the same again."""
        return {str(place): count for place, count in self._counts.items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Histogram:
        """The histogram that `to_mapping` wrote."""
        made = cls()
        made._counts = {int(place): int(count) for place, count in values.items()}
        made.count = sum(made._counts.values())
        return made
