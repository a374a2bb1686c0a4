"""Prefetching: the stream's order and errors, bounded reading ahead, an honest account of waiting."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sihe.core.errors import CorruptData, InvalidInput
from sihe.data.loading import BatchStream, Prefetcher
from support.token_sets import counting


class Numbers:
    """Counts up in steps of 10 samples; `before` runs in the reading thread, with the number to come."""

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self.next_sample = 0
        self._before = before

    def __next__(self) -> int:
        self._before(self.next_sample)
        self.next_sample += 10
        return self.next_sample - 10


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert prefetch_threads() == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_and_only_consumed_ones_count(depth: int) -> None:
    with Prefetcher(Numbers(), depth=depth) as batches:
        assert batches.next_sample == 0
        for number in range(0, 500, 10):
            assert next(batches) == number
            assert batches.next_sample == number + 10


def test_a_run_goes_on_from_what_was_consumed(tmp_path: Path) -> None:
    dataset = counting(tmp_path / "s", 0, 1000)

    def stream(start: int = 0) -> BatchStream:
        return BatchStream(dataset, split="train", sequence_length=9, global_batch=4, seed=1, start_sample=start)

    whole = stream()
    expected = [next(whole) for _ in range(12)]
    with Prefetcher(stream(), depth=4) as first:
        seen = [next(first) for _ in range(5)]
        resumed = first.next_sample
    with Prefetcher(stream(resumed), depth=2) as second:
        seen += [next(second) for _ in range(7)]
    assert np.array_equal(seen, expected)


def test_no_more_than_depth_batches_are_read_ahead() -> None:
    read: list[int] = []
    full = threading.Event()

    def before(number: int) -> None:
        read.append(number)
        if len(read) == 4:
            full.set()

    with Prefetcher(Numbers(before), depth=3) as batches:
        next(batches)
        assert full.wait(10)
        for _ in range(100):  # the thread has every chance to go too far
            threading.Event().wait(0)
        assert len(read) <= 4


def test_an_error_arrives_where_its_batch_would_have_and_stays() -> None:
    error = CorruptData("shard", "bad")

    def before(number: int) -> None:
        if number == 20:
            raise error

    with Prefetcher(Numbers(before), depth=5) as batches:
        assert [next(batches), next(batches)] == [0, 10]
        for _ in range(2):
            with pytest.raises(CorruptData) as caught:
                next(batches)
            assert caught.value is error
        assert batches.next_sample == 20


def test_a_stream_that_ends_ends() -> None:
    def before(number: int) -> None:
        if number == 30:
            raise StopIteration

    with Prefetcher(Numbers(before), depth=2) as batches:
        assert list(batches) == [0, 10, 20]


def test_closing_wakes_a_thread_that_waits_for_room() -> None:
    batches = Prefetcher(Numbers(), depth=1)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(InvalidInput, match="closed"):
        next(batches)


def test_closing_wakes_who_waits_for_a_batch() -> None:
    may_read, is_reading = threading.Event(), threading.Event()

    def before(_: int) -> None:
        is_reading.set()
        may_read.wait(10)

    batches = Prefetcher(Numbers(before), depth=1)
    failures: list[BaseException] = []

    def consume() -> None:
        try:
            next(batches)
        except InvalidInput as error:
            failures.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert is_reading.wait(10)
    closer = threading.Thread(target=batches.close)
    closer.start()
    consumer.join(10)
    assert not consumer.is_alive()
    may_read.set()
    closer.join(10)
    assert len(failures) <= 1  # none, when the consumer had not begun to wait


def test_batches_are_not_kept() -> None:
    class Batch:
        pass

    class Source:
        next_sample = 0

        def __next__(self) -> Batch:
            return Batch()

    with Prefetcher(Source(), depth=2) as batches:
        reference = weakref.ref(next(batches))
        next(batches)
        gc.collect()
        assert reference() is None


def test_waiting_is_counted() -> None:
    """A clock that only reading moves, by 3 s, and the consumer's own work, by 1 s."""
    now = [0.0]

    def before(_: int) -> None:
        now[0] += 3.0

    batches = Prefetcher(Numbers(before), depth=0, clock=lambda: now[0])
    assert batches.report.stall_share == 0.0
    for _ in range(4):
        next(batches)
        now[0] += 1.0
    report = batches.report
    assert (report.batches, report.stall_s, report.total_s) == (4, 12.0, 15.0)
    assert report.stall_share == 0.8
    batches.close()


def test_a_depth_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="depth"):
        Prefetcher(Numbers(), depth=-1)
