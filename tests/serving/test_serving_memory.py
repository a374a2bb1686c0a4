"""Memory as the engine finds it."""

from __future__ import annotations

import gc
import weakref

from sihe.serving.engine.memory import collect_garbage_once


class Loop:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_is_looked_for_once() -> None:
    collect_garbage_once.cache_clear()
    gc.disable()
    try:
        first = weakref.ref(Loop())
        collect_garbage_once()
        assert first() is None
        second = weakref.ref(Loop())
        collect_garbage_once()
        assert second() is not None, "the second engine stops nobody"
    finally:
        gc.enable()
