"""A shuffled order of any number of samples that needs no memory and no list of indices.

Training asks "which sample is number g since the beginning?"; the answer depends on the seed and on g alone. So every
rank computes its own part, any world size sees the same order, and a resumed run needs one integer to go on.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from sihe.core.errors import InvalidInput

_ROUNDS = 6  # four make a strong permutation (Luby & Rackoff 1988); two more because the halves are small here


class SampleOrder:
    """A pseudo-random permutation of `num_samples` samples for each epoch, by global position.

    A Feistel network on the pairs (left, right) in [0, a) × [0, b) with a·b just over `num_samples`: each round adds to
    one half a hash of the other, modulo that half's size, and is therefore invertible. A value that falls outside of
    the samples is put through again until it falls inside ("cycle walking"), which keeps the map a bijection.
    Source: Black & Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), methods 2 and 3.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise InvalidInput(f"an order needs at least one sample, got {num_samples!r}")
        if seed < 0:
            raise InvalidInput(f"a seed must not be negative, got {seed!r}")
        self.num_samples = num_samples
        self.seed = seed
        left = math.isqrt(num_samples - 1) + 1
        self._sizes = (np.uint64(left), np.uint64(-(-num_samples // left)))

    def samples(self, first: int, count: int) -> np.ndarray:
        """The samples (int64) at the global positions `first` … `first + count - 1`; an epoch is `num_samples` long."""
        if first < 0 or count < 0:
            raise InvalidInput(f"positions must not be negative, got first={first!r}, count={count!r}")
        pieces = []
        while count > 0:
            epoch, offset = divmod(first, self.num_samples)
            length = min(count, self.num_samples - offset)
            values = np.arange(offset, offset + length, dtype=np.uint64)
            pieces.append(self._permute(values, _round_keys(self.seed, epoch)))
            first, count = first + length, count - length
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        result = self._encipher(values, keys)
        outside = np.flatnonzero(result >= self.num_samples)
        while outside.size:
            result[outside] = self._encipher(result[outside], keys)
            outside = outside[result[outside] >= self.num_samples]
        return result

    def _encipher(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left_size, right_size = self._sizes
        left, right = np.divmod(values, right_size)
        for number in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ keys[number]) % left_size) % left_size
            right = (right + _mix(left ^ keys[number + 1]) % right_size) % right_size
        return left * right_size + right


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators")."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
