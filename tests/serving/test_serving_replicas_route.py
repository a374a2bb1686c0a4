"""A route over real engines: what requests see when replicas die, are late, full, asleep, or give way to others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sihe.core.clock import SystemClock
from sihe.core.errors import InvalidInput
from sihe.core.tracking import ModelVersion
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.ports import EngineObserver
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import DeadlineExceeded, EngineDead, NoMemory, NoRoom, NotReady, QueueFull, ReplicaLost
from sihe.serving.gateway.replicas.config import Backend, LocalBackend, ReplicaConfig, ScalingConfig
from sihe.serving.gateway.route import Route, _failure, _Wish
from sihe.serving.gateway.types import Deployment, DeploymentState

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = EngineConfig(max_batch_size=4, token_budget=32, kv_cache_bytes=2_000_000, threads=1)
SLEEPY = ScalingConfig(idle_s=0.0, down_after_s=0.0, up_after_s=0.0, up_cooldown_s=0.0)
ASK = GenerationRequest(prompt=(5, 6, 7), max_tokens=3, temperature=0)
LONG = GenerationRequest(prompt=(5, 6, 7), max_tokens=110, temperature=0)


class House:
    """Routes over versions 1 and 2, with memory for `room` engines."""

    def __init__(self, folders: dict[int, Path]) -> None:
        self.folders = folders
        self.room = 99
        self.engines: list[Engine] = []
        self.loaded: list[int] = []
        self._routes: list[Route] = []

    def route(self, replicas: ReplicaConfig, *, settings: EngineConfig = SETTINGS, version: int = 1) -> Route:
        route = Route(self.wish(replicas, settings), self._load, clock=SystemClock())
        self._routes.append(route)
        route.aim(self.wish(replicas, settings), self.version(version))
        route.wait_settled(30)
        return route

    def wish(self, replicas: ReplicaConfig, settings: EngineConfig = SETTINGS) -> Deployment:
        return Deployment("tiny", "tiny", "live", settings, NOW, NOW, replicas=replicas)

    def version(self, number: int) -> ModelVersion:
        return ModelVersion("tiny", number, "", None, NOW, (), {})

    def close(self) -> None:
        for route in self._routes:
            route.close(drain=False)

    def _load(
        self, version: ModelVersion, settings: EngineConfig, backend: Backend, observer: EngineObserver
    ) -> Engine:
        alive = [engine for engine in self.engines if engine.is_alive]
        if len(alive) >= self.room:
            raise NoMemory("the model", needed_bytes=2, available_bytes=1, hint="wait")
        folder = self.folders[version.version]
        engine = Engine.load(folder, settings, name=f"tiny@{version.version}", observer=observer)
        self.engines.append(engine)
        self.loaded.append(version.version)
        return engine


@pytest.fixture
def house(model_folder: Path, other_folder: Path) -> Iterator[House]:
    house = House({1: model_folder, 2: other_folder})
    yield house
    house.close()


class Held:
    """An engine whose next step waits, or breaks, when the test says so."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go, self._at_step, self._broken = threading.Event(), threading.Event(), False
        plan: Callable[..., object] = engine._scheduler.plan

        def held(*args: object) -> object:
            self._at_step.set()
            assert self._go.wait(30)
            if self._broken:
                raise MemoryError("gone")
            return plan(*args)

        monkeypatch.setattr(engine._scheduler, "plan", held)

    def wait(self) -> None:
        assert self._at_step.wait(30)

    def go_on(self) -> None:
        self._go.set()

    def break_down(self) -> None:
        self._broken = True
        self._go.set()


def until(route: Route, holds: Callable[[], bool]) -> None:
    with route._changed:
        assert route._changed.wait_for(holds, timeout=30), route.status()


def serving(route: Route) -> list[int]:
    """The versions of the replicas that get requests."""
    return [replica.version.version for replica in route.replicas() if replica.is_serving]


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_a_dead_replica_costs_no_request_that_had_not_begun(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    route = house.route(ReplicaConfig(min_replicas=2, max_replicas=2))
    first, second = house.engines
    expected = second.submit(ASK).result(30)
    held = Held(first, monkeypatch)
    streams = [route.generate(ASK) for _ in range(8)]
    held.wait()
    held.break_down()
    assert [stream.result(30).token_ids for stream in streams] == [expected.token_ids] * 8
    until(route, lambda: len(house.loaded) == 3 and len(serving(route)) == 2)


def test_an_answer_that_had_begun_ends_with_the_error(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    route = house.route(ReplicaConfig())
    stream = route.generate(LONG)
    assert stream.next_event(30) is not None
    Held(house.engines[0], monkeypatch).break_down()
    with pytest.raises(EngineDead, match="gone"):
        while stream.next_event(30) is not None:
            continue
    assert route.generate(ASK).result(30).usage.completion_tokens == 3, "the next one waits for the new engine"


def test_a_request_that_kills_engines_is_given_up(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def fragile(cls: type[Engine], *args: object, **fields: object) -> Engine:
        engine: Engine = load(cls, *args, **fields)
        plan = engine._scheduler.plan

        def breaks(*args: object) -> object:
            if any(sequence.prompt[0] == 9 for sequence in engine._sequences.values()):
                raise MemoryError("a query of death")
            return plan(*args)

        monkeypatch.setattr(engine._scheduler, "plan", breaks)
        return engine

    monkeypatch.setattr(Engine, "load", classmethod(fragile))
    route = house.route(ReplicaConfig(max_attempts=2))
    with pytest.raises(EngineDead, match="query of death"):
        route.generate(GenerationRequest(prompt=(9, 9), max_tokens=3)).result(30)
    assert route.generate(ASK).result(30).usage.completion_tokens == 3
    assert len(house.loaded) == 3


def test_a_client_that_leaves_while_it_waits_is_forgotten(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    route = house.route(ReplicaConfig(wait_s=30))
    held = Held(house.engines[0], monkeypatch)
    stream = route.generate(ASK)
    held.wait()
    house.room = 0
    held.break_down()
    until(route, lambda: route._requests.num_waiting == 1)
    stream.close()
    assert route._requests.num_waiting == 0
    house.room = 1


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_a_request_before_and_after_it_has_begun(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    route = house.route(ReplicaConfig(timeout_s=0.3))
    held = Held(house.engines[0], monkeypatch)
    with pytest.raises(DeadlineExceeded, match="first token"):
        route.generate(ASK).result(30)
    held.go_on()
    stream = route.generate(LONG, timeout_s=0.2)
    assert stream.next_event(30) is not None
    monkeypatch.setattr(house.engines[0], "_step", lambda: None)
    with pytest.raises(DeadlineExceeded, match="whole answer"):
        while stream.next_event(30) is not None:
            continue
    monkeypatch.undo()


def test_full_queues_are_said_at_once_and_everything_in_them_is_answered(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(SETTINGS, max_batch_size=1, max_waiting=1)
    route = house.route(ReplicaConfig(min_replicas=2, max_replicas=2), settings=small)
    held = [Held(engine, monkeypatch) for engine in house.engines]
    streams = []
    with pytest.raises(QueueFull) as caught:
        while len(streams) < 20:
            streams.append(route.generate(ASK))
    assert len(streams) == 4, "each has one in its batch and one that waits"
    assert caught.value.retry_after_s >= 1
    for one in held:
        one.go_on()
    assert {stream.result(30).usage.completion_tokens for stream in streams} == {3}


def test_what_is_wrong_with_a_request_is_said_by_the_first_replica(house: House) -> None:
    route = house.route(ReplicaConfig(min_replicas=2, max_replicas=2))
    for request in (GenerationRequest(prompt=(999,)), GenerationRequest(prompt=tuple(range(5, 200)))):
        with pytest.raises(InvalidInput):
            route.generate(request)
    assert [replica.in_flight for replica in route.replicas()] == [0, 0]


def test_a_late_request_is_sent_to_a_second_replica_within_the_budget(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = house.route(ReplicaConfig(min_replicas=2, max_replicas=2, hedge=0.05))
    for _ in range(40):
        route.generate(ASK).result(30)
    held = Held(house.engines[0], monkeypatch)
    streams = [route.generate(ASK)]
    while house.engines[0].num_sequences == 0:  # until one of them went to the one that hangs
        streams.append(route.generate(ASK))
    hung, paced = streams[-1], threading.Event()
    for _ in range(1000):  # on a busy machine others are late too, and use up what may be sent twice: it comes again
        if hung.is_over:
            break
        streams.append(route.generate(ASK))
        paced.wait(0.02)
    assert hung.result(30).usage.completion_tokens == 3
    held.go_on()
    for stream in streams[:-1]:
        assert stream is hung or stream.result(30).usage.completion_tokens == 3
    house.engines[0].close()  # returns when it has nothing to do any more: the copy that lost was aborted


# ---- elasticity -----------------------------------------------------------------------------------------------------


def test_to_zero_and_back(house: House) -> None:
    route = house.route(ReplicaConfig(min_replicas=0, max_replicas=1, scaling=SLEEPY))
    until(route, lambda: not route.replicas())
    status = route.status()
    assert (status.state, status.version, route.is_ready) == (DeploymentState.READY, 1, True)
    answers = [route.generate(ASK) for _ in range(5)]
    assert {answer.result(30).usage.completion_tokens for answer in answers} == {3}
    assert {answer.served_by for answer in answers} == {"tiny@1"}
    assert len(house.loaded) == 2


def test_models_that_do_not_generate_wake_too(house: House) -> None:
    route = house.route(ReplicaConfig(min_replicas=0, max_replicas=1, scaling=SLEEPY))
    until(route, lambda: not route.replicas())
    lease = route.lease()
    assert lease.held().name == "tiny@1"  # type: ignore[attr-defined]
    lease.end()
    assert len(house.loaded) == 2


def test_a_replica_that_cannot_be_freed_does_not_load_for_ever(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Engine.close

    def refuse(self: Engine) -> None:
        monkeypatch.setattr(Engine, "close", leak)
        raise ArithmeticError("the model is broken")

    def leak(self: Engine, **how: object) -> None:
        monkeypatch.setattr(Engine, "close", close)
        raise MemoryError("and cannot be closed")

    monkeypatch.setattr(Engine, "warm", refuse)
    with pytest.raises(ArithmeticError, match="broken"):
        house.route(ReplicaConfig())
    until(house._routes[0], lambda: not house._routes[0].replicas())
    house.engines[0].close(drain=False)


def test_who_waits_with_a_thread_waits_within_bounds(house: House) -> None:
    route = house.route(ReplicaConfig(min_replicas=0, max_replicas=1, scaling=SLEEPY, wait_s=0.2))
    until(route, lambda: not route.replicas())
    house.room = 0
    with pytest.raises(NotReady, match="on their way"):
        route.lease()
    assert route._requests.num_waiting == 0


def test_who_waits_with_a_thread_is_told_when_it_is_in_vain(house: House, tmp_path: Path) -> None:
    route = house.route(ReplicaConfig(min_replicas=0, max_replicas=1, scaling=SLEEPY))
    until(route, lambda: not route.replicas())
    house.folders[1] = tmp_path / "gone"
    with pytest.raises(NotReady, match="gone"):
        route.lease()


def test_who_waits_for_a_replica_waits_within_bounds(house: House) -> None:
    limits = ReplicaConfig(min_replicas=0, max_replicas=1, scaling=SLEEPY, wait_s=0.2, max_waiting=2)
    route = house.route(limits)
    until(route, lambda: not route.replicas())
    house.room = 0
    waiting = [route.generate(ASK) for _ in range(2)]
    with pytest.raises(QueueFull):
        route.generate(ASK)
    for stream in waiting:
        with pytest.raises(NotReady, match=r"within 0\.2 s"):
            stream.result(30)


def test_a_version_that_cannot_wake_says_why(house: House, tmp_path: Path) -> None:
    route = house.route(ReplicaConfig(min_replicas=0, max_replicas=1, scaling=SLEEPY))
    until(route, lambda: not route.replicas())
    house.folders[1] = tmp_path / "gone"
    with pytest.raises(NotReady, match="gone"):
        route.generate(ASK).result(30)
    assert route.status().state is DeploymentState.FAILED


def test_a_load_brings_more_replicas_up_to_the_most(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ScalingConfig(target_in_flight=1, up_after_s=0.0, up_cooldown_s=0.0, down_after_s=0.0)
    route = house.route(ReplicaConfig(min_replicas=1, max_replicas=2, scaling=quick))
    held = Held(house.engines[0], monkeypatch)
    streams = [route.generate(ASK) for _ in range(4)]
    until(route, lambda: len(serving(route)) == 2)
    held.go_on()
    for stream in streams:
        stream.result(30)
    until(route, lambda: len(route.replicas()) == 1)


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_a_close_with_no_time_left_does_not_wait_for_a_model_that_loads(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go = threading.Event(), threading.Event()
    load = house._load

    def held(*args: object) -> Engine:
        engine = load(*args)  # type: ignore[arg-type]
        loading.set()
        assert go.wait(30)
        return engine

    monkeypatch.setattr(house, "_load", held)
    route = Route(house.wish(ReplicaConfig()), house._load, clock=SystemClock())
    route.aim(house.wish(ReplicaConfig()), house.version(1))
    assert loading.wait(30)
    route.close(timeout_s=0.0)
    assert house.engines[0].is_alive
    go.set()
    for thread in house.engines[0]._life._threads:
        thread.join(30)
    assert not house.engines[0].is_alive, "it is freed when it is there"


# ---- replacement ----------------------------------------------------------------------------------------------------


def test_two_replicas_are_replaced_beside_each_other(house: House) -> None:
    both = ReplicaConfig(min_replicas=2, max_replicas=2)
    route = house.route(both)
    route.aim(house.wish(both), house.version(2))
    route.wait_settled(30)
    until(route, lambda: serving(route) == [2, 2])
    assert house.loaded == [1, 1, 2, 2]


def test_without_room_one_by_one_as_far_as_the_minimum_allows(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = ScalingConfig(target_in_flight=1, up_after_s=0.0)
    pair = ReplicaConfig(min_replicas=1, max_replicas=2, scaling=scaling)
    route = house.route(pair)
    held = Held(house.engines[0], monkeypatch)
    streams = [route.generate(LONG) for _ in range(4)]
    until(route, lambda: len(serving(route)) == 2)
    house.room = 2
    route.aim(house.wish(pair), house.version(2))
    held.go_on()
    until(route, lambda: serving(route) == [2, 2])
    assert {stream.result(30).usage.completion_tokens for stream in streams} == {110}
    assert house.loaded == [1, 1, 2, 2]


def test_without_room_at_the_minimum_it_is_refused_and_the_old_ones_serve(house: House) -> None:
    both = ReplicaConfig(min_replicas=2, max_replicas=2)
    route = house.route(both)
    house.room = 2
    route.aim(house.wish(both), house.version(2))
    with pytest.raises(NoMemory):
        route.wait_settled(30)
    status = route.status()
    assert (status.state, status.version, status.wanted) == (DeploymentState.READY, 1, 2)
    assert "needs" in str(status.error)
    assert route.generate(ASK).result(30).usage.completion_tokens == 3


def test_waiting_for_room_does_not_make_another_failure_wait_longer(house: House) -> None:
    wish = _Wish(house.version(1), SETTINGS, LocalBackend())
    failure, waits = None, []
    errors = [NoRoom("it", needed="1 CPU", there="none")] * 6 + [ReplicaLost("it died while it loaded")] * 3
    for error in errors:
        failure = _failure(wish, error, failure, 100.0)
        assert failure.retry_at_s is not None
        waits.append(failure.retry_at_s - 100.0)
    assert waits == [1, 2, 2, 2, 2, 2, 1, 2, 5]
