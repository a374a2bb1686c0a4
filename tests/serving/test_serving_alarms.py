"""Calls at a later time: in order, forgotten with all that they hold, and none ends the others."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from sihe.serving.gateway.replicas.alarms import Alarms


@pytest.fixture
def alarms() -> Iterator[Alarms]:
    made = Alarms("alarms")
    yield made
    made.close()


def test_calls_come_in_the_order_of_their_times(alarms: Alarms) -> None:
    heard: list[str] = []
    done = threading.Event()
    alarms.after(0.02, done.set)
    alarms.after(0.01, lambda: heard.append("second"))
    alarms.after(0.0, lambda: heard.append("first"))
    assert done.wait(30)
    assert heard == ["first", "second"]


def test_what_is_cancelled_is_let_go_of_at_once_and_does_not_pile_up(alarms: Alarms) -> None:
    class Request:
        pass

    kept = alarms.after(3600, lambda: None)
    held = []
    for _ in range(10_000):
        request = Request()
        held.append(weakref.ref(request))
        alarms.after(3600, lambda request=request: request).cancel()  # type: ignore[misc]
    del request
    gc.collect()
    assert not any(reference() for reference in held)
    assert len(alarms) < 200
    assert kept.call is not None
    kept.cancel()
    kept.cancel()


def test_a_call_that_fails_ends_no_other(alarms: Alarms) -> None:
    done = threading.Event()
    alarms.after(0.0, lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    alarms.after(0.01, done.set)
    assert done.wait(30)


def test_nothing_comes_after_the_close(alarms: Alarms) -> None:
    heard: list[int] = []
    alarms.after(0.0, threading.Event().set)
    alarms.after(3600, lambda: heard.append(1))
    alarms.close()
    alarms.after(0.0, lambda: heard.append(2)).cancel()
    assert (len(alarms), heard) == (0, [])
