"""Whoever watches a stream hears what its reader gets, whenever it began to listen."""

from __future__ import annotations

import pytest

from sihe.serving.engine.stream import GenerationStream, Heard
from sihe.serving.engine.types import GenerationEvent, Usage
from sihe.serving.errors import GenerationFailed

FIRST = GenerationEvent("a", (1,), Usage(3, 1))
LAST = GenerationEvent("b", (2,), Usage(3, 2), "stop")


def new_stream() -> GenerationStream:
    return GenerationStream(1, "tiny@1", abort=lambda _: None)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_listener_hears_every_event_once(late: int) -> None:
    stream, heard = new_stream(), list[Heard]()
    for place, event in enumerate((FIRST, LAST)):
        if place == late:
            stream.watch(heard.append)
        stream.deliver(event)
    if late == 2:
        stream.watch(heard.append)
    assert heard == [FIRST, LAST]
    assert stream.result(1).text == "ab"  # the reader misses nothing of it


@pytest.mark.parametrize("late", [False, True])
def test_a_listener_hears_the_error_that_ends_a_stream(late: bool) -> None:
    stream, heard, error = new_stream(), list[Heard](), GenerationFailed("broken")
    if late:
        stream.fail(error)
        stream.watch(heard.append)
    else:
        stream.watch(heard.append)
        stream.fail(error)
    stream.close()
    assert heard == [error]


def test_every_listener_hears_everything() -> None:
    stream, heard = new_stream(), (list[Heard](), list[Heard]())
    stream.watch(heard[0].append)
    stream.deliver(FIRST)
    stream.watch(heard[1].append)
    stream.deliver(LAST)
    assert heard == ([FIRST, LAST], [FIRST, LAST])


@pytest.mark.parametrize("late", [False, True])
def test_a_listener_hears_that_the_reader_left(late: bool) -> None:
    stream, heard = new_stream(), list[Heard]()
    if not late:
        stream.watch(heard.append)
    stream.deliver(FIRST)
    stream.close()
    if late:
        stream.watch(heard.append)
    stream.deliver(LAST)
    assert heard == ([None] if late else [FIRST, None])
