"""Which source each sample of a mixture comes from: exact shares over any stretch, at random access.

Drawing sources at random would give shares that are right on average and wrong by thousands of samples; a rule that
depends on what was drawn before could not be asked for sample 10^9. So the weights become whole numbers with a common
denominator P, one period of P samples is laid out once, and it repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from sihe.core.errors import ConfigError

_LONGEST_PERIOD = 1 << 14  # weights are kept to 1/16384, and a period is laid out in some ten milliseconds


class Proportions:
    """The source of the samples number 0, 1, 2 … for `weights`, of any sum, such as (0.7, 0.2, 0.1) or (3, 1).

    Weights whose decimals have a common denominator up to 16,384 are exact; others are rounded to that, no positive one
    to 0. `shares` are what is kept. After any number n of samples, the count of source i is within 1 of n * shares[i].
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not any(weights):
            raise ConfigError(
                f"weights are numbers that are not negative, and not all 0, got {list(weights)!r}", key="weights"
            )
        self._counts = _whole_counts(tuple(weights))
        self._period = sum(self._counts)
        self._sources, self._before = _layout(self._counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each source's share of the samples; they sum to 1."""
        return tuple(count / self._period for count in self._counts)

    def sources(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the sources of the samples `first` … `first + count - 1`."""
        return self._sources[np.arange(first, first + count) % self._period]

    def counts(self, samples: int) -> np.ndarray:
        """int64 [sources]: how many of the first `samples` come from each. Complexity: constant."""
        periods, rest = divmod(samples, self._period)
        return periods * np.array(self._counts, np.int64) + self._before[rest]


def _whole_counts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Whole numbers in the proportion of `weights`, without a common factor."""
    fractions = [Fraction(str(weight)) for weight in weights]
    total = sum(fractions, Fraction(0))
    shares = [fraction / total for fraction in fractions]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= _LONGEST_PERIOD:
        return tuple(int(share * period) for share in shares)
    # The largest remainders get what rounding down leaves over (Hamilton's method).
    counts = [max(int(share * _LONGEST_PERIOD), 1 if share else 0) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * _LONGEST_PERIOD)
    for index in by_remainder[: max(_LONGEST_PERIOD - sum(counts), 0)]:
        counts[index] += 1
    common = math.gcd(*counts)
    return tuple(count // common for count in counts)


@lru_cache(maxsize=64)
def _layout(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period: the sources [P], and how often each came before each place [P + 1, sources].

    Tijdeman's rule for "the chairman assignment problem" (Discrete Mathematics 32, 1980, theorem 1): among the sources
    that have fallen behind by 1 / (2k - 2) or more of a sample, the one that must come soonest. No count is then ever
    further than 1 - 1 / (2k - 2) from its due. All numbers here are multiples of 1 / (P * slack), so they are whole.
    """
    present = [index for index, count in enumerate(counts) if count]
    period, slack = sum(counts), max(2 * len(present) - 2, 1)
    behind = dict.fromkeys(present, 0)  # (due - count) * period * slack
    sources = np.empty(period, np.int64)
    for place in range(period):
        for index in present:
            behind[index] += counts[index] * slack
        waiting = [index for index in present if behind[index] >= period]
        chosen = min(waiting, key=lambda i: (Fraction(period * (slack - 1) - behind[i], counts[i]), i))
        behind[chosen] -= period * slack
        sources[place] = chosen
    before = np.zeros((period + 1, len(counts)), np.int64)
    np.cumsum(sources[:, None] == np.arange(len(counts)), axis=0, out=before[1:])
    sources.flags.writeable = before.flags.writeable = False
    return sources, before
