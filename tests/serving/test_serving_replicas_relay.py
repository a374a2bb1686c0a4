"""A stream whose events go elsewhere."""

from __future__ import annotations

import threading

import pytest

from sihe.serving.engine.engine import Engine
from sihe.serving.engine.stream import Wake
from sihe.serving.engine.types import GenerationEvent, GenerationRequest
from sihe.serving.errors import EngineClosed


def test_a_relay_hears_what_a_reader_would_have_read(engine: Engine) -> None:
    request = GenerationRequest(prompt="the lazy dog", max_tokens=12, temperature=0)
    expected = engine.submit(request).result(30)
    heard: list[GenerationEvent | BaseException] = []
    ended = threading.Event()

    def relay(said: GenerationEvent | BaseException) -> Wake | None:
        heard.append(said)
        return None

    stream = engine.submit(request, on_done=ended.set, relay=relay)
    assert ended.wait(30)
    engine.close()  # the last event follows on_done on the same thread
    events = [said for said in heard if isinstance(said, GenerationEvent)]
    assert len(events) == len(heard) == 12
    assert "".join(event.text for event in events) == expected.text
    assert events[-1].finish_reason == "length"
    assert stream.next_event(0) is None, "nothing is kept for a reader"


def test_a_relay_hears_the_error_that_ends_it(engine: Engine) -> None:
    heard: list[GenerationEvent | BaseException] = []
    begun, go = threading.Event(), threading.Event()

    def relay(said: GenerationEvent | BaseException) -> Wake | None:
        heard.append(said)
        begun.set()
        assert go.wait(30)
        return None

    engine.submit(GenerationRequest(prompt=(5, 6), max_tokens=100, temperature=0), relay=relay)
    assert begun.wait(30)
    closer = threading.Thread(target=engine.close, kwargs={"drain": False})
    closer.start()
    while engine.is_alive:
        continue
    go.set()
    closer.join(30)
    assert [type(said) for said in heard[:-1]] == [GenerationEvent] * (len(heard) - 1)
    assert isinstance(heard[-1], EngineClosed)


def test_warming_answers_a_request_and_a_broken_model_fails_it(engine: Engine) -> None:
    engine.warm()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.warm()
