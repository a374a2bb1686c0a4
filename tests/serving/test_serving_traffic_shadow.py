"""Copies stand back for callers, and nothing of theirs reaches a caller's path: a queue, a thread, and real streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count

import pytest

from sihe.core.clock import FakeClock
from sihe.core.errors import InvalidInput
from sihe.core.tracking import ModelVersion
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationEvent, GenerationRequest, Usage
from sihe.serving.errors import EngineClosed, GenerationFailed, QueueFull, StreamClosed
from sihe.serving.exchange import Agreement, Answer, Written
from sihe.serving.gateway.replicas.config import LocalBackend
from sihe.serving.gateway.replicas.lease import Lease
from sihe.serving.gateway.replicas.replica import Replica
from sihe.serving.gateway.traffic.copies import CopiedGeneration, CopiedQuestion, ShadowRoute
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

    def generate(self, request: GenerationRequest) -> GenerationStream:
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


@contextmanager
def runners(
    side: Side, presence: Presence, route: ShadowRoute | Side, clock: FakeClock, model: str
) -> Iterator[Callable[..., ShadowRunner]]:
    """What makes shadow runners that copy to `model` on `route`, and tell `side`; they are closed in the end."""
    made: list[ShadowRunner] = []

    def make(**fields: object) -> ShadowRunner:
        runner = ShadowRunner(
            "chat",
            Shadow(model, "2", 1.0, **fields),  # type: ignore[arg-type]
            route=route,  # type: ignore[arg-type]  # as much of one as its copies want
            presence=presence,
            clock=clock,
            on_comparison=lambda found: side.note(side.found, found),  # type: ignore[arg-type]
            on_fate=lambda fate: side.note(side.fates, fate),  # type: ignore[arg-type]
        )
        made.append(runner)
        return runner

    yield make
    for one in made:
        one.close()


@pytest.fixture
def runner(side: Side, presence: Presence) -> Iterator[Callable[..., ShadowRunner]]:
    with runners(side, presence, side, FakeClock(), "tiny") as make:
        yield make


def test_a_copy_runs_last_and_at_nobodys_cost_and_is_compared(side: Side, runner: Callable[..., ShadowRunner]) -> None:
    made = runner()
    for _ in range(2):
        made.offer("r", CopiedGeneration(REQUEST, DONE))
    side.until(lambda: len(side.streams) == 1)
    side.say(0, "abc", (1, 2, 3))
    side.until(lambda: len(side.streams) == 2)
    side.say(1, "abX", (1, 2, 9))
    side.until(lambda: len(side.found) == 2)
    assert [(one.found.agreement.is_same, one.found.agreement.share) for one in side.found] == [
        (True, 1.0),
        (False, 2 / 3),
    ]
    assert {(request.tenant, request.priority > 0) for request in side.requests} == {("", True)}
    report = made.report()
    assert (report.copies, report.compared, report.same) == (2, 2, 1)
    assert report.mean_agreement == pytest.approx(5 / 6)


def test_copies_beyond_the_queue_are_dropped(side: Side, runner: Callable[..., ShadowRunner]) -> None:
    made = runner(max_waiting=2)
    made.offer("first", CopiedGeneration(REQUEST, DONE))
    side.until(lambda: len(side.streams) == 1)  # it runs, so the queue is empty
    for number in range(5):
        made.offer(f"r{number}", CopiedGeneration(REQUEST, DONE))
    assert side.fates == ["dropped"] * 3


def test_copies_wait_while_a_caller_does_and_make_room_for_the_next(
    side: Side, presence: Presence, runner: Callable[..., ShadowRunner]
) -> None:
    made = runner()
    presence.enter()
    made.offer("r", CopiedGeneration(REQUEST, DONE))
    assert side.streams == []  # the caller of another request still waits
    presence.leave()
    side.until(lambda: len(side.streams) == 1)
    presence.enter()  # and the copy makes room
    side.until(lambda: side.fates == ["yielded"])
    presence.leave()
    made.offer("again", CopiedGeneration(REQUEST, DONE))
    side.until(lambda: len(side.streams) == 2)
    side.say(1, "abc", (1, 2, 3))
    side.until(lambda: len(side.found) == 1)


def test_with_processors_of_its_own_it_waits_for_nobody(
    side: Side, presence: Presence, runner: Callable[..., ShadowRunner]
) -> None:
    made = runner(only_idle=False)
    presence.enter()
    made.offer("r", CopiedGeneration(REQUEST, DONE))
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
    made.offer("r", CopiedGeneration(REQUEST, DONE))
    if trouble == "fails":
        side.until(lambda: len(side.streams) == 1)
        side.streams[0].fail(GenerationFailed("not finite"))
    side.until(lambda: side.fates == [fate])
    side.refuses, side.is_ready = False, True
    made.offer("again", CopiedGeneration(REQUEST, DONE))
    side.until(lambda: bool(side.streams) and side.requests[-1].prompt == "the")
    side.until(lambda: len(side.streams) == (2 if trouble == "fails" else 1))
    side.say(-1, "abc", (1, 2, 3))
    side.until(lambda: len(side.found) == 1)


def test_an_end_gives_up_what_runs_and_what_waits(side: Side, runner: Callable[..., ShadowRunner]) -> None:
    made = runner()
    for _ in range(3):
        made.offer("r", CopiedGeneration(REQUEST, DONE))
    side.until(lambda: len(side.streams) == 1)
    made.close()
    made.offer("late", CopiedGeneration(REQUEST, DONE))
    assert side.fates == ["yielded", "dropped"]


# ---- models that do not generate -------------------------------------------------------------------------------------


class Model:
    """The least that a replica holds."""

    capability = "predict"
    is_alive = True
    num_sequences = 0

    def warm(self) -> None:
        """It is warm."""

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Nothing is held."""


class Way:
    """A shadow's route with one replica."""

    is_ready = True

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.lost: list[BaseException] = []
        version = ModelVersion("m", 1, "", None, datetime(2026, 1, 1, tzinfo=UTC), (), {})
        self.replica = Replica(version, EngineConfig(), LocalBackend(), lambda: None, id=1)
        self.replica.load(lambda *_: Model())
        self.replica.warm()
        self.replica.open()

    def generate(self, request: GenerationRequest) -> GenerationStream:
        raise AssertionError("it does not generate")

    def lease(self, *, block: bool) -> Lease:
        assert not block
        return Lease(self.replica, 1.0, self.clock, lambda _, error: self.lost.append(error))


class Number:
    """An answer."""

    prompt_tokens, size = 0, 8

    def __init__(self, value: int) -> None:
        self.value = value

    def agreement(self, other: Answer) -> Agreement:
        same = isinstance(other, Number) and other.value == self.value
        return Agreement(float(same), same, "outputs")

    def written(self) -> Written:
        return Written.of(str(self.value))


class Asked:
    """A question whose answer the test gives."""

    kind, tenant = "infer", "acme"

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.future: Future[Number] = Future()
        self.begun = threading.Event()
        self.refusal: Exception | None = None

    def begin(self, served: object) -> Asked:
        assert isinstance(served, Model)
        self.begun.set()
        if self.refusal is not None:
            raise self.refusal
        return self

    def result(self) -> Number:
        try:
            return self.future.result(30)
        except CancelledError:
            raise StreamClosed("given up") from None

    def close(self) -> None:
        self.future.cancel()

    def written(self) -> Written:
        return Written.of("?")

    def copied(self, value: int = 1) -> CopiedQuestion:
        return CopiedQuestion(self, Number(value), replace(DONE, latency_s=0.5))


@pytest.fixture
def way() -> Way:
    return Way()


@pytest.fixture
def asking(way: Way, side: Side, presence: Presence) -> Iterator[Callable[..., ShadowRunner]]:
    with runners(side, presence, way, way.clock, "m") as make:
        yield make


def test_a_question_is_asked_again_and_the_answers_are_compared(
    way: Way, side: Side, asking: Callable[..., ShadowRunner]
) -> None:
    made = asking()
    for caller, shadow in ((1, 1), (1, 2)):
        asked = Asked()
        made.offer("r", asked.copied(caller))
        assert asked.begun.wait(30)
        assert way.replica.in_flight == 1
        way.clock.advance(0.25)
        asked.future.set_result(Number(shadow))
        side.until(lambda caller=caller, shadow=shadow: len(side.found) == caller + shadow - 1)
        assert way.replica.in_flight == 0
    report = made.report()
    assert (report.compared, report.same, report.mean_agreement, report.measure) == (2, 1, 0.5, "outputs")
    assert (report.mean_latency_s, report.mean_latency_ratio) == (0.25, 0.5)
    assert [one.found.served_by for one in side.found] == ["m@1", "m@1"]


def test_whatever_becomes_of_a_question_its_replica_is_free_again(
    way: Way, side: Side, presence: Presence, asking: Callable[..., ShadowRunner]
) -> None:
    made = asking()
    refused = Asked()
    refused.refusal = InvalidInput("two features")
    broken, lost, left = Asked(), Asked(), Asked()
    for fates, asked in enumerate((refused, broken, lost, left), 1):
        made.offer("r", asked.copied())
        assert asked.begun.wait(30)
        if asked is broken:
            asked.future.set_exception(ArithmeticError("no number"))
        elif asked is lost:
            asked.future.set_exception(EngineClosed("gone"))
        elif asked is left:
            presence.enter()  # a caller comes
        side.until(lambda fates=fates: len(side.fates) == fates)
        assert way.replica.in_flight == 0
    assert side.fates == ["failed", "failed", "failed", "yielded"]
    assert [type(error) for error in way.lost] == [EngineClosed]


def test_what_runs_at_the_end_is_given_up(way: Way, side: Side, asking: Callable[..., ShadowRunner]) -> None:
    made, asked = asking(), Asked()
    made.offer("r", asked.copied())
    assert asked.begun.wait(30)
    made.close()
    assert (side.fates, way.replica.in_flight) == (["yielded"], 0)


def test_large_copies_are_dropped_before_they_fill_the_memory(
    way: Way, side: Side, presence: Presence, asking: Callable[..., ShadowRunner]
) -> None:
    made = asking()
    presence.enter()  # so that they wait
    for size in (40 * 2**20, 30 * 2**20, 20 * 2**20):
        made.offer(f"r{size}", Asked(size).copied())
    assert side.fates == ["dropped"]
    made.close()


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
