"""Which texts go into the next batch, as a pure policy: each once, within the budget, small requests soon."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.serving.engine.encoder.batches import FairQueue, Place


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from("ab")), min_size=1, max_size=8
    ),
    st.integers(1, 60),
    st.sets(st.integers(0, 7)),
)
def test_every_text_is_taken_once_within_the_budget(
    requests: list[tuple[list[int], str]], budget: int, removed: set[int]
) -> None:
    queue = FairQueue()
    for id, (lengths, tenant) in enumerate(requests):
        queue.add(id, lengths, tenant)
    for id in removed:
        queue.remove(id)
    seen: list[Place] = []
    while batch := queue.take(budget):
        lengths = [requests[place.request][0][place.index] for place in batch]
        assert sum(lengths) <= budget or len(batch) == 1
        seen += batch
    kept = [(id, lengths) for id, (lengths, _) in enumerate(requests) if id not in removed]
    assert sorted((place.request, place.index) for place in seen) == [
        (id, index) for id, lengths in kept for index in range(len(lengths))
    ]
    assert (queue.num_tokens, len(queue)) == (0, 0)


def test_a_small_request_does_not_wait_for_a_big_one() -> None:
    queue = FairQueue()
    queue.add(0, [10] * 1000)
    queue.take(100)
    queue.add(1, [10, 10])
    assert queue.take(100).count(Place(1, 0)) == 1
    queue.add(2, [10] * 1000)
    queue.add(3, [10] * 1000)
    queue.add(4, [10] * 6, "other")
    tenants = ["other" if place.request == 4 else "" for place in queue.take(80)]
    assert tenants.count("other") == 4, "a tenant's share does not fall with the requests of another"
