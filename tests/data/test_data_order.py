"""The sample order is a bijection in every epoch, another one each time, and depends on nothing but seed and number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.core.errors import InvalidInput
from sihe.data.loading import SampleOrder


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_every_epoch_visits_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    seen = SampleOrder(num_samples, seed).samples(epoch * num_samples, num_samples)
    assert np.array_equal(np.sort(seen), np.arange(num_samples))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(0, 99), st.integers(0, 2000), st.lists(st.integers(0, 300), max_size=6))
def test_pieces_join_into_the_same_order(num_samples: int, seed: int, first: int, counts: list[int]) -> None:
    order = SampleOrder(num_samples, seed)
    whole = order.samples(first, sum(counts))
    pieces, at = [np.empty(0, np.int64)], first
    for count in counts:
        pieces.append(SampleOrder(num_samples, seed).samples(at, count))
        at += count
    assert np.array_equal(np.concatenate(pieces), whole)


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(1000, 7)
    first, second = order.samples(0, 1000), order.samples(1000, 1000)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, SampleOrder(1000, 8).samples(0, 1000))
    assert not np.array_equal(first, np.arange(1000))


def test_the_order_looks_random() -> None:
    """Neighbours are no more related than under a true shuffle: the rank correlation is within 5 sigma of zero, and
    each sample's position over many seeds is uniform (chi-squared over 10 bins, 9 degrees: 99.9999 % lies under 45)."""
    n = 10_007
    order = SampleOrder(n, 3).samples(0, n)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    firsts = np.array([SampleOrder(1000, seed).samples(0, 1)[0] for seed in range(2000)])
    counts = np.bincount(firsts // 100, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 45


def test_a_trillion_samples_cost_nothing() -> None:
    order = SampleOrder(10**12, 1)
    found = order.samples(3 * 10**12 + 5, 64)
    assert len(np.unique(found)) == 64
    assert found.max() < 10**12


@pytest.mark.parametrize(("num_samples", "seed"), [(0, 1), (-3, 1), (5, -1)])
def test_nonsense_is_refused(num_samples: int, seed: int) -> None:
    with pytest.raises(InvalidInput):
        SampleOrder(num_samples, seed)
