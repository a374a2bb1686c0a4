"""A lifetime over real threads: what closing waits for, what it gives up, and what is said afterwards."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sihe.serving.errors import EngineClosed, EngineDead
from sihe.serving.lifetime import Lifetime


class Owner:
    """Threads that do what there is to do, until they are to end; `work` is done when `may_finish` is set."""

    def __init__(self, threads: int = 2) -> None:
        self.life = Lifetime("engine tiny@1")
        self.work = 1
        self.may_finish = False
        self.dies = False
        self.running = threads
        self.life.begin([threading.Thread(target=self.run, daemon=True) for _ in range(threads)])

    def run(self) -> None:
        try:
            while self.turn():
                pass
        except BaseException as death:
            self.life.died(death)
        with self.life.changed:
            self.running -= 1
            if self.running == 0:
                self.life.ended()

    def turn(self) -> bool:
        with self.life.changed:
            self.life.changed.wait_for(self.has_news)
            if self.dies:
                self.dies = False
                raise MemoryError("no memory")
            if self.life.is_abandoned:
                return False
            if self.may_finish:
                self.work = 0
            return self.work > 0 or not self.life.is_closing

    def has_news(self) -> bool:
        return self.dies or self.life.is_abandoned or (self.life.is_closing and (self.may_finish or not self.work))

    def tell(self, **values: bool) -> None:
        with self.life.changed:
            for name, value in values.items():
                setattr(self, name, value)
            self.life.changed.notify_all()


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.life.close(drain=False)
    assert made.running == 0


def test_it_is_open_until_it_is_closed(owner: Owner) -> None:
    owner.life.check_open()
    assert owner.life.is_open
    owner.life.close(drain=False)
    assert (owner.life.is_open, owner.work, owner.running) == (False, 1, 0)
    with pytest.raises(EngineClosed, match="engine tiny@1 is closing and takes no new requests"):
        owner.life.check_open()
    assert str(owner.life.ending()) == "engine tiny@1 was closed"


def test_patience_waits_for_what_has_begun(owner: Owner) -> None:
    with ThreadPoolExecutor(2) as closers:
        closes = [closers.submit(owner.life.close) for _ in range(2)]
        with owner.life.changed:
            owner.life.changed.wait_for(lambda: owner.life.is_closing)
        assert (owner.running, owner.life.is_abandoned) == (2, False)
        assert not any(close.done() for close in closes)
        owner.tell(may_finish=True)
        for close in closes:
            close.result(30)
    assert (owner.work, owner.running) == (0, 0)


@pytest.mark.parametrize("timeout_s", [0.0, 0.01])
def test_patience_that_ends_gives_up_what_is_left(owner: Owner, timeout_s: float) -> None:
    owner.life.close(timeout_s=timeout_s)
    assert (owner.work, owner.running, owner.life.is_abandoned) == (1, 0, True)


def test_a_patience_beyond_what_a_lock_can_wait_for_is_patience(owner: Owner) -> None:
    owner.tell(may_finish=True)
    owner.life.close(timeout_s=1e12)
    assert (owner.work, owner.running) == (0, 0)


def test_who_closes_at_once_ends_the_patience_of_the_other(owner: Owner) -> None:
    with ThreadPoolExecutor(1) as closers:
        patient = closers.submit(owner.life.close)
        with owner.life.changed:
            owner.life.changed.wait_for(lambda: owner.life.is_closing)
        owner.life.close(drain=False)
        patient.result(30)
    assert (owner.work, owner.running) == (1, 0)


def test_a_thread_that_dies_takes_the_others_along_and_says_why(owner: Owner) -> None:
    owner.tell(dies=True)
    owner.life.close()
    assert (owner.work, owner.running, owner.life.is_open) == (1, 0, False)
    with pytest.raises(EngineDead, match="engine tiny@1 has stopped: no memory") as caught:
        owner.life.check_open()
    assert isinstance(caught.value.__cause__, MemoryError)
    told = owner.life.ending()
    assert isinstance(told, EngineDead)
    assert isinstance(told.__cause__, MemoryError)


def test_a_thread_that_came_later_is_waited_for_too(owner: Owner) -> None:
    go, ended = threading.Event(), threading.Event()

    def later() -> None:
        assert go.wait(30)
        ended.set()

    with owner.life.changed:
        owner.life.add(threading.Thread(target=later, daemon=True))
    with ThreadPoolExecutor(1) as closers:
        close = closers.submit(owner.life.close, drain=False)
        with owner.life.changed:
            owner.life.changed.wait_for(lambda: owner.life.is_abandoned)
        assert not close.done()
        go.set()
        close.result(30)
    assert ended.is_set()


def test_nothing_keeps_its_owner_once_it_has_ended() -> None:
    gc.collect()
    gc.disable()  # what is freed is freed without its help
    try:
        owner = Owner()
        owner.life.close(drain=False)
        gone, life = weakref.ref(owner), weakref.ref(owner.life)
        del owner
        assert gone() is None
        assert life() is None, "the interpreter's end has nothing to close"
    finally:
        gc.enable()
