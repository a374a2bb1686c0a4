"""Copies stand back for callers, and nothing of theirs reaches a caller's path: a queue, a thread, and real streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from sihe.core.clock import FakeClock
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationEvent, GenerationRequest, Usage
from sihe.serving.errors import GenerationFailed, QueueFull
from sihe.serving.gateway.traffic.handover import Handover
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.shadow import Comparison, ShadowRunner
from sihe.serving.gateway.traffic.types import Shadow

REQUEST = GenerationRequest(prompt="the", max_tokens=3, tenant="acme")
DONE = Outcome("finished", "stop", None, 3, 3, 0.1, 0.2, "abc", (1, 2, 3))


class Side:
    """A shadow's version whose streams the test drives."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.streams: list[GenerationStream] = []
        self.fates: list[str] = []
        self.found: list[Comparison] = []
        self.changed = threading.Condition()
        self.is_ready = True
        self.refuses = False
        self._ids = count()

    def start(self, request: GenerationRequest) -> GenerationStream:
        if self.refuses:
            raise QueueFull(1, retry_after_s=1.0)
        stream = GenerationStream(next(self._ids), "tiny@2", abort=lambda _: None)
        with self.changed:
            self.requests.append(request)
            self.streams.append(stream)
            self.changed.notify_all()
        return stream

    def note(self, kind: list[object], value: object) -> None:
        with self.changed:
            kind.append(value)
            self.changed.notify_all()

    def until(self, holds: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(holds, 30)

    def say(self, place: int, text: str, tokens: tuple[int, ...]) -> None:
        self.streams[place].deliver(GenerationEvent(text, tokens, Usage(3, len(tokens)), "stop"))


@pytest.fixture
def side() -> Side:
    return Side()


@pytest.fixture
def presence() -> Presence:
    return Presence()


@pytest.fixture
def runner(side: Side, presence: Presence) -> Iterator[Callable[..., ShadowRunner]]:
    made: list[ShadowRunner] = []

    def make(**fields: object) -> ShadowRunner:
        runner = ShadowRunner(
            "chat",
            Shadow("tiny", "2", 1.0, **fields),  # type: ignore[arg-type]
            start=side.start,
            is_ready=lambda: side.is_ready,
            presence=presence,
            clock=FakeClock(),
            on_comparison=lambda found: side.note(side.found, found),  # type: ignore[arg-type]
            on_fate=lambda fate: side.note(side.fates, fate),  # type: ignore[arg-type]
        )
        made.append(runner)
        return runner

    yield make
    for one in made:
        one.close()


def test_a_copy_runs_last_and_at_nobodys_cost_and_is_compared(side: Side, runner: Callable[..., ShadowRunner]) -> None:
    made = runner()
    for _ in range(2):
        made.offer("r", REQUEST, DONE)
    side.until(lambda: len(side.streams) == 1)
    side.say(0, "abc", (1, 2, 3))
    side.until(lambda: len(side.streams) == 2)
    side.say(1, "abX", (1, 2, 9))
    side.until(lambda: len(side.found) == 2)
    assert [(found.is_same, found.agreement) for found in side.found] == [(True, 1.0), (False, 2 / 3)]
    assert {(request.tenant, request.priority > 0) for request in side.requests} == {("", True)}
    report = made.report()
    assert (report.copies, report.compared, report.same) == (2, 2, 1)
    assert report.mean_agreement == pytest.approx(5 / 6)


def test_copies_beyond_the_queue_are_dropped(side: Side, runner: Callable[..., ShadowRunner]) -> None:
    made = runner(max_waiting=2)
    made.offer("first", REQUEST, DONE)
    side.until(lambda: len(side.streams) == 1)  # it runs, so the queue is empty
    for number in range(5):
        made.offer(f"r{number}", REQUEST, DONE)
    assert side.fates == ["dropped"] * 3


def test_copies_wait_while_a_caller_does_and_make_room_for_the_next(
    side: Side, presence: Presence, runner: Callable[..., ShadowRunner]
) -> None:
    made = runner()
    presence.enter()
    made.offer("r", REQUEST, DONE)
    assert side.streams == []  # the caller of another request still waits
    presence.leave()
    side.until(lambda: len(side.streams) == 1)
    presence.enter()  # and the copy makes room
    side.until(lambda: side.fates == ["yielded"])
    presence.leave()
    made.offer("again", REQUEST, DONE)
    side.until(lambda: len(side.streams) == 2)
    side.say(1, "abc", (1, 2, 3))
    side.until(lambda: len(side.found) == 1)


def test_with_processors_of_its_own_it_waits_for_nobody(
    side: Side, presence: Presence, runner: Callable[..., ShadowRunner]
) -> None:
    made = runner(only_idle=False)
    presence.enter()
    made.offer("r", REQUEST, DONE)
    side.until(lambda: len(side.streams) == 1)
    presence.enter()
    side.say(0, "abc", (1, 2, 3))
    side.until(lambda: len(side.found) == 1)


@pytest.mark.parametrize(("trouble", "fate"), [("refuses", "failed"), ("unready", "dropped"), ("fails", "failed")])
def test_trouble_is_counted_and_the_next_copy_runs(
    side: Side, runner: Callable[..., ShadowRunner], trouble: str, fate: str
) -> None:
    made = runner()
    side.refuses, side.is_ready = trouble == "refuses", trouble != "unready"
    made.offer("r", REQUEST, DONE)
    if trouble == "fails":
        side.until(lambda: len(side.streams) == 1)
        side.streams[0].fail(GenerationFailed("not finite"))
    side.until(lambda: side.fates == [fate])
    side.refuses, side.is_ready = False, True
    made.offer("again", REQUEST, DONE)
    side.until(lambda: bool(side.streams) and side.requests[-1].prompt == "the")
    side.until(lambda: len(side.streams) == (2 if trouble == "fails" else 1))
    side.say(-1, "abc", (1, 2, 3))
    side.until(lambda: len(side.found) == 1)


def test_an_end_gives_up_what_runs_and_what_waits(side: Side, runner: Callable[..., ShadowRunner]) -> None:
    made = runner()
    for _ in range(3):
        made.offer("r", REQUEST, DONE)
    side.until(lambda: len(side.streams) == 1)
    made.close()
    made.offer("late", REQUEST, DONE)
    assert side.fates == ["yielded", "dropped"]


# ---- an answer that changes its arm ----------------------------------------------------------------------------------


def two_streams() -> tuple[GenerationStream, GenerationStream, list[int]]:
    aborted: list[int] = []
    first = GenerationStream(1, "tiny@2", abort=aborted.append)
    second = GenerationStream(2, "tiny@1", abort=aborted.append)
    first.arm, second.arm = "canary", "stable"
    return first, second, aborted


def test_a_failure_before_the_first_token_is_answered_by_another() -> None:
    first, second, _ = two_streams()
    handover = Handover(first, lambda: second)
    first.watch(handover.hear)
    first.fail(GenerationFailed("not finite"))
    second.deliver(GenerationEvent("ab", (1, 2), Usage(3, 2), "stop"))
    answer = handover.answer
    assert answer.result(30).text == "ab"
    assert (answer.served_by, answer.arm) == ("tiny@1", "stable")


def test_a_failure_after_the_first_token_is_the_answers_end() -> None:
    first, second, _ = two_streams()
    handover = Handover(first, lambda: second)
    first.watch(handover.hear)
    first.deliver(GenerationEvent("a", (1,), Usage(3, 1)))
    first.fail(GenerationFailed("not finite"))
    with pytest.raises(GenerationFailed):
        handover.answer.result(30)
    assert (handover.answer.served_by, handover.answer.arm) == ("tiny@2", "canary")


def test_where_both_fail_the_reader_hears_the_second_error() -> None:
    first, _, _ = two_streams()

    def refuse() -> GenerationStream:
        raise QueueFull(3, retry_after_s=1.0)

    handover = Handover(first, refuse)
    first.watch(handover.hear)
    first.fail(GenerationFailed("not finite"))
    with pytest.raises(QueueFull):
        handover.answer.result(30)


@pytest.mark.parametrize("after", [False, True])
def test_a_reader_that_leaves_aborts_whichever_runs(after: bool) -> None:
    first, second, aborted = two_streams()
    started = threading.Event()

    def otherwise() -> GenerationStream:
        started.set()
        return second

    handover = Handover(first, otherwise)
    first.watch(handover.hear)
    if after:
        first.fail(GenerationFailed("not finite"))
        assert started.wait(30)
        second.deliver(GenerationEvent("a", (1,), Usage(3, 1)))
        assert handover.answer.next_event(30) is not None
    handover.answer.close()
    assert aborted == ([2] if after else [1])
