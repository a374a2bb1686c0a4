"""The labs on layouts of the KV cache and on hot swaps: counts against arithmetic, attention against torch, and real
swaps of a small model. Nothing depends on speed."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sihe.apps.coach.labs import hot_swap, kv_layouts
from sihe.apps.coach.labs.hot_swap_load import Load
from sihe.apps.coach.labs.hot_swap_ranks import swap
from sihe.apps.coach.labs.hot_swap_tally import Asked, Order, tally
from sihe.apps.coach.labs.kv_layouts_memory import admitted, lengths_of, prefixed, reserved
from sihe.apps.coach.labs.kv_layouts_ranks import Cache
from sihe.apps.coach.labs.registry import lab
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationEvent, Usage
from sihe.serving.errors import EngineClosed

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=20)

# ---- kv.layouts ------------------------------------------------------------------------------------------------------


@given(lengths=LENGTHS)
def test_slabs_waste_up_to_the_longest_and_pages_up_to_a_page(lengths: list[int]) -> None:
    found = reserved(lengths, 512)
    assert found.used == sum(lengths)
    assert found.slabs == 512 * len(lengths)
    assert found.pages == sum(-(-length // 16) * 16 for length in lengths)
    assert 0 <= found.page_waste < 15 / 16 + 1e-9
    assert found.slab_waste == pytest.approx(1 - sum(lengths) / (512 * len(lengths)))


@given(lengths=LENGTHS, num_blocks=st.integers(1, 200))
def test_a_pool_admits_those_that_come_until_one_does_not_fit(lengths: list[int], num_blocks: int) -> None:
    count = admitted(iter(lengths), num_blocks)
    taken = [-(-length // 16) for length in lengths]
    assert sum(taken[:count]) <= num_blocks
    assert count == len(lengths) or sum(taken[: count + 1]) > num_blocks


@given(prefix=st.integers(0, 100), tails=st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_a_prefix_is_shared_by_whole_pages(prefix: int, tails: list[int]) -> None:
    found = prefixed(prefix, tails)
    assert found.copied == sum(-(-(prefix + tail) // 16) for tail in tails)
    assert found.shared == found.copied - (len(tails) - 1) * (prefix // 16)


def test_lengths_have_their_mean_and_their_bound_and_come_again() -> None:
    lengths = list(islice(lengths_of(512, 4096), 4000))
    assert sum(lengths) / 4000 == pytest.approx(512, rel=0.05)
    assert max(lengths) <= 4096
    assert min(lengths) >= 1
    assert lengths == list(islice(lengths_of(512, 4096), 4000))


@pytest.mark.parametrize("item_bytes", [2, 4])
@torch.inference_mode()
def test_every_layout_attends_to_the_same(item_bytes: int) -> None:
    cache = Cache(256, 3, item_bytes)
    try:
        for length, batch, shared in ((1, 3, 0), (16, 1, 0), (63, 3, 40), (200, 3, 0), (200, 3, 199)):
            outs = {layout: cache.step(layout, batch, length, shared=shared)() for layout in kv_layouts.LAYOUTS}
            assert torch.equal(outs["pages"], outs["gathered"])
            torch.testing.assert_close(outs["pages"], outs["torch"], rtol=1e-4, atol=1e-4)
            assert length == 1 or not torch.allclose(outs["slab"], outs["pages"], atol=1e-2), "other blocks, other keys"
    finally:
        cache.close()


@torch.inference_mode()
def test_a_slab_is_read_as_its_pages_are_by_torch() -> None:
    cache = Cache(64, 2, 4)
    try:
        slab = cache.step("slab", 2, 50)()
        cache._order = torch.arange(8)  # pages that happen to lie one behind the other
        torch.testing.assert_close(slab, cache.step("torch", 2, 50)(), rtol=1e-4, atol=1e-4)
        assert torch.equal(slab, cache.step("pages", 2, 50)())
    finally:
        cache.close()


def test_sequences_that_share_pages_read_the_first_ones() -> None:
    cache = Cache(256, 3, 4)
    try:
        own, shared = cache.table(3, 200, is_slab=False), cache.table(3, 200, is_slab=False, shared=40)
    finally:
        cache.close()
    assert len(own.unique()) == own.numel() == 3 * 13
    assert len(shared.unique()) == shared.numel() - 2 * 2
    assert shared[1, :2].tolist() == own[0, :2].tolist()


def test_bytes_read_are_the_formulas_and_prefixes_fit_in_every_length() -> None:
    assert kv_layouts.read_bytes(8, 2048, 2) == 2 * 8 * 4 * 64 * 2 * 8 * 2048
    parameters = {parameter.key: parameter for parameter in lab("kv.layouts").parameters}
    assert parameters["prefix"].high < min(parameters["tokens"].choices)
    assert all(kv_layouts.sequence_lengths(int(tokens))[0] >= 128 for tokens in parameters["tokens"].choices)


# ---- serve.hot_swap --------------------------------------------------------------------------------------------------


def asked(sent_s: float, pieces: list[float], version: str, *, tokens: list[int], error: str = "") -> Asked:
    return Asked(sent_s, [(at_s, 1) for at_s in pieces], {version} if pieces else set(), tokens, not error, error)


def test_requests_are_counted_by_how_they_ended() -> None:
    alone = {"a": [1, 2], "b": [3, 4]}
    mixed = Asked(2.5, [(2.6, 1), (2.7, 1)], {"a", "b"}, [1, 4], True)
    found = tally(
        [
            asked(0.0, [0.1, 0.2], "a", tokens=[1, 2]),
            asked(0.9, [0.95], "a", tokens=[1], error="EngineClosed"),
            asked(1.2, [], "", tokens=[], error="EngineClosed"),
            asked(1.5, [2.0, 2.1], "b", tokens=[3, 4]),
            mixed,
        ],
        [Order("b", 1.0, 1.8)],
        alone,
    )
    assert (found.sent, found.completed, found.cut, found.refused) == (5, 3, 1, 1)
    assert (found.most_versions, found.wrong) == (2, 1)
    assert (found.first_s, found.away_s) == (pytest.approx(1.0), pytest.approx(0.8))
    assert found.met_wait_s == pytest.approx(0.5), "of those sent between the order and the first token: 1.5 to 2.0"
    assert found.calm_wait_s == pytest.approx(0.1)
    assert sum(rate for _, rate in found.rate) * 0.2 == pytest.approx(5), "from 0.6 s before the order: all but two"


def test_an_order_whose_version_never_spoke_ends_with_its_call() -> None:
    found = tally([asked(0.0, [0.1], "a", tokens=[1])], [Order("b", 1.0, 1.8)], {"a": [1], "b": [2]})
    assert found.first_s == pytest.approx(0.8)


def test_who_is_refused_is_counted_and_a_bug_is_raised() -> None:
    """The load hears the errors of the service, and no others."""
    answers = 0

    def refuse_every_other() -> GenerationStream:
        nonlocal answers
        answers += 1
        if answers % 2:
            raise EngineClosed("gone")
        stream = GenerationStream(answers, "a", abort=lambda _: None)
        stream.deliver(GenerationEvent("", (7,), Usage(1, 1), "length"))
        return stream

    with Load(refuse_every_other, 500) as load:
        load.wait_for_answer("a")
        load.wait_for_answer()
    assert {(one.error, one.is_whole) for one in load.asked} == {("EngineClosed", False), ("", True)}
    assert all(one.tokens == [7] for one in load.asked if one.is_whole)

    def bug() -> GenerationStream:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught, Load(bug, 500) as load:
        load.wait_for_answer()
    assert caught.group_contains(ZeroDivisionError)


def test_swaps_beside_lose_nothing_and_stopping_loses_those_who_are_there() -> None:
    found = swap(0, 1, swaps=2, rate_per_s=40, layers=2, width=128, tokens=100, calm_s=0, between_s=0)
    beside, drained, stopped = (found["ways"][way] for way in hot_swap.WAYS)
    assert (beside["completed"], hot_swap.failed(beside)) == (beside["sent"], 0)
    for way in (beside, drained, stopped):
        assert way["sent"] == way["completed"] + hot_swap.failed(way)
        assert (way["most_versions"], way["wrong"]) == (1, 0)
    assert drained["cut"] == 0
    assert stopped["cut"] >= 1, "each order comes just after an answer has begun"
    assert found["one_bytes"] > 0
