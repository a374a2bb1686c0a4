"""What falls between two looks: places that become free while a request is put back, readers that leave meanwhile."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from sihe.core.clock import SystemClock
from sihe.core.tracking import ModelVersion
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationEvent, GenerationRequest, Usage
from sihe.serving.errors import DeadlineExceeded, EngineDead, NotReady
from sihe.serving.gateway.replicas import dispatcher as dispatching
from sihe.serving.gateway.replicas.answer import RoutedStream
from sihe.serving.gateway.replicas.config import LocalBackend, ReplicaConfig
from sihe.serving.gateway.replicas.dispatcher import Dispatcher
from sihe.serving.gateway.replicas.replica import Replica
from sihe.serving.gateway.replicas.types import ReplicaState

ASK = GenerationRequest(prompt=(5, 6, 7), max_tokens=3, temperature=0)
VERSION = ModelVersion("tiny", 1, "", None, datetime(2026, 1, 1, tzinfo=UTC), (), {})


@pytest.fixture
def replica(engine: Engine) -> Replica:
    made = Replica(VERSION, EngineConfig(), LocalBackend(), lambda: None, id=1)
    made.load(lambda *_: engine)
    made.warm()
    made.open()
    return made


@pytest.fixture
def desk() -> Iterator[Dispatcher]:
    """Without replicas, of which one is always on its way."""
    made = dispatcher(ReplicaConfig(wait_s=60))
    yield made
    made.close()


def test_who_has_less_time_than_there_is_to_wait_waits_no_longer(desk: Dispatcher) -> None:
    for until_s in (0.0, time.monotonic() + 0.02):
        with pytest.raises(NotReady, match="on their way"):
            desk.obtain(until_s=until_s)
    assert desk.num_waiting == 0


def dispatcher(config: ReplicaConfig) -> Dispatcher:
    return Dispatcher("tiny", config, clock=SystemClock(), why_none=lambda: None, on_change=lambda: None)


def meanwhile(desk: Dispatcher, monkeypatch: pytest.MonkeyPatch, what: Callable[[RoutedStream], None]) -> None:
    """Lets `what` happen just after the next attempt to send a request has found no replica."""
    sent = desk._sent

    def wrapped(answer: RoutedStream, *, elsewhere: bool = False) -> bool:
        found = sent(answer, elsewhere=elsewhere)
        if not found:
            monkeypatch.setattr(desk, "_sent", sent)
            what(answer)
        return found

    monkeypatch.setattr(desk, "_sent", wrapped)


def stream_of(desk: Dispatcher) -> RoutedStream:
    return RoutedStream(1, ASK, desk, now_s=0.0, max_attempts=3)


def waiting(desk: Dispatcher) -> RoutedStream:
    """A request in the queue."""
    answer = stream_of(desk)
    desk._waiting.append(answer)
    return answer


def test_a_replica_that_comes_while_a_lost_request_is_put_back_gets_it(
    desk: Dispatcher, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(desk, monkeypatch, lambda _: desk.open_to([replica]))
    answer = stream_of(desk)
    desk._again(answer, EngineDead("gone"))
    assert answer.result(30).usage.completion_tokens == 3


def test_a_place_that_becomes_free_while_a_waiting_request_is_put_back_is_taken(
    desk: Dispatcher, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = waiting(desk)
    meanwhile(desk, monkeypatch, lambda _: desk.open_to([replica]))
    desk._replicas = (replica,)  # there, and it takes nothing at the first look
    monkeypatch.setattr(desk, "_next", _nothing_once(desk))
    desk._serve_waiting()
    assert answer.result(30).usage.completion_tokens == 3


def _nothing_once(desk: Dispatcher) -> Callable[..., Replica | None]:
    calls, find = [0], desk._next

    def found(*args: object, **fields: object) -> Replica | None:
        calls[0] += 1
        return None if calls[0] == 1 else find(*args, **fields)  # type: ignore[arg-type]

    return found


@pytest.mark.parametrize("how", ["late", "closed"])
def test_what_should_have_ended_while_it_was_out_of_the_queue_ends_when_it_is_put_back(
    desk: Dispatcher, replica: Replica, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    answer = waiting(desk)

    def happens(waiting: RoutedStream) -> None:
        if how == "late":
            waiting.waits_until_s = 0.0
            desk._give_up(waiting)  # does not find it in the queue
        else:
            desk.stop()

    meanwhile(desk, monkeypatch, happens)
    desk._replicas = (replica,)
    monkeypatch.setattr(desk, "_next", lambda *_, **__: None)
    desk._serve_waiting()
    assert desk.num_waiting == 0
    with pytest.raises(NotReady, match="removed" if how == "closed" else "within 60 s"):
        answer.result(30)


def test_who_leaves_while_it_is_out_of_the_queue_takes_no_place_in_it(
    desk: Dispatcher, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(desk)
    meanwhile(desk, monkeypatch, lambda answer: answer.close())
    desk._replicas = (replica,)
    monkeypatch.setattr(desk, "_next", lambda *_, **__: None)
    desk._serve_waiting()
    assert desk.num_waiting == 0


def test_a_replica_that_reads_a_prompt_nobody_waits_for_is_told_so(desk: Dispatcher, replica: Replica) -> None:
    aborted: list[int] = []
    answer = stream_of(desk)
    answer.close()
    attempt = answer.attempt(replica)
    answer.accepted(attempt, GenerationStream(7, "tiny@1", abort=aborted.append))
    assert aborted == [7]
    other = stream_of(desk)
    first = other.attempt(replica)
    other.accepted(first, GenerationStream(8, "tiny@1", abort=aborted.append))
    first.relay(GenerationEvent("a", (5,), Usage(3, 1), None))
    late = other.attempt(replica)
    other.accepted(late, GenerationStream(9, "tiny@1", abort=aborted.append))
    assert aborted == [7, 9], "the copy that was begun after the first token"


def test_a_request_is_not_kept_until_a_deadline_that_matters_no_more(replica: Replica) -> None:
    desk = dispatcher(ReplicaConfig(timeout_s=3600))
    desk.open_to([replica])
    request = GenerationRequest(prompt=(5, 6, 8), max_tokens=3, temperature=0)
    answer = desk.generate(request)
    assert answer.result(30).usage.completion_tokens == 3
    held = weakref.ref(answer)
    left = desk.generate(request)
    left.close()
    refused = weakref.ref(left)
    del answer, left
    _settle(replica)
    gc.collect()
    assert (held(), refused()) == (None, None)
    desk.close()


def _settle(replica: Replica) -> None:
    """Returns when the engine has let go of what it had."""
    replica.held().close()


def test_the_shorter_of_two_limits_holds_and_says_whose_it_is(desk: Dispatcher) -> None:
    with pytest.raises(DeadlineExceeded) as own:
        desk.generate(ASK, timeout_s=0.01).result(30)
    assert own.value.is_own
    with pytest.raises(DeadlineExceeded):
        desk.generate(ASK, timeout_s=0.0)
    bounded = dispatcher(ReplicaConfig(timeout_s=0.01))
    with pytest.raises(DeadlineExceeded) as general:
        bounded.generate(ASK, timeout_s=3600).result(30)
    assert not general.value.is_own
    bounded.close()


def test_deadlines_hold_while_a_route_drains(desk: Dispatcher, replica: Replica) -> None:
    stream = desk.generate(ASK, timeout_s=3600)
    alarm = stream._alarms[0]
    desk.stop()
    assert alarm.call is None, "what waits ends at once, and its alarm with it"
    running = dispatcher(ReplicaConfig(timeout_s=3600))
    running.open_to([replica])
    answer = stream_of(running)
    running._limit(answer, 0.05)
    running.stop()
    with pytest.raises(DeadlineExceeded):
        answer.result(30)
    running.close()


def test_who_waits_with_a_thread_leaves_threads_for_other_deployments(
    desk: Dispatcher, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = threading.BoundedSemaphore(1)
    monkeypatch.setattr(dispatching, "_PLACES", places)
    other, waits = dispatcher(ReplicaConfig(wait_s=60)), threading.Event()
    desk._on_change = waits.set
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(desk.obtain)
        assert waits.wait(30)
        with pytest.raises(NotReady, match="on their way"):
            other.obtain()
        desk.open_to([replica])
        assert found.result(30) is replica
    assert places.acquire(blocking=False), "it was given back"
    replica.retire(drain=False)


def test_a_replica_may_be_retired_by_two(replica: Replica) -> None:
    replica.retire(drain=False)
    replica.retire(drain=False)
    assert replica.state is ReplicaState.GONE
