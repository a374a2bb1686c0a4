"""What every kind of replica engine promises: in this process, behind OpenAI's protocol, in an actor of Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sihe.core import settings
from sihe.core.errors import ConfigError, InvalidInput, TransientError, Unreachable
from sihe.core.tracking import ModelVersion
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.ports import RequestStats, StepStats
from sihe.serving.engine.stream import GenerationStream, Wake
from sihe.serving.engine.types import ChatMessage, GenerationEvent, GenerationRequest
from sihe.serving.errors import EngineClosed, ReplicaLost
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.replicas.config import OpenAiBackend, RayBackend
from sihe.serving.gateway.replicas.openai.engine import OpenAiEngine
from sihe.serving.gateway.replicas.openai.host import load as load_behind
from sihe.serving.gateway.replicas.ports import ReplicaEngine
from support.ray_cluster import RayNodes, ray_nodes

SETTINGS = EngineConfig(max_batch_size=4, token_budget=32, kv_cache_bytes=2_000_000, threads=1)
ASK = GenerationRequest(prompt="the lazy dog", max_tokens=12, temperature=0)
LONG = replace(ASK, max_tokens=100)


@dataclass
class Observer:
    """Keeps what an engine tells."""

    requests: list[RequestStats] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def on_step(self, stats: StepStats) -> None:
        assert stats.kv_capacity_tokens > 0

    def on_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)

    def on_close(self) -> None:
        self.closed.set()


Opened = Callable[[Observer], ReplicaEngine]


@pytest.fixture(params=["local", "openai", pytest.param("ray", marks=pytest.mark.ray)])
def opened(request: pytest.FixtureRequest, model_folder: Path, tmp_path: Path) -> Iterator[Opened]:
    """Opens an engine of the kind; closed at the end."""
    with ExitStack() as stack:
        open_one = _KINDS[request.param](request, model_folder, tmp_path, stack)

        def open_and_close(observer: Observer) -> ReplicaEngine:
            engine = open_one(observer)
            stack.callback(engine.close, drain=False)
            return engine

        yield open_and_close


def _local(_: pytest.FixtureRequest, folder: Path, _tmp: Path, _stack: ExitStack) -> Opened:
    return lambda observer: Engine.load(folder, SETTINGS, name="tiny@1", observer=observer)


def _openai(request: pytest.FixtureRequest, _folder: Path, _tmp: Path, _stack: ExitStack) -> Opened:
    url = request.getfixturevalue("server_url")
    return lambda observer: OpenAiEngine(f"{url}/v1", "tiny", "tiny@1", observer)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(1) as running:
        yield running


def _ray(request: pytest.FixtureRequest, folder: Path, tmp: Path, stack: ExitStack) -> Opened:
    from sihe.serving.gateway.replicas.ray.host import load

    nodes: RayNodes = request.getfixturevalue("nodes")
    flags = {"home": str(tmp), "cluster.ray_address": nodes.address}
    workspace = stack.enter_context(Workspace(settings.load(flags, environ={}, directory=tmp)))
    version = workspace.tracking.register_model("tiny", folder)
    return lambda observer: load(workspace, version, SETTINGS, RayBackend(), observer)


_KINDS = {"local": _local, "openai": _openai, "ray": _ray}


def expected(folder: Path, request: GenerationRequest) -> str:
    with Engine.load(folder, SETTINGS) as engine:
        return engine.submit(request).result(30).text


def test_it_answers_as_the_engine_does(opened: Opened, model_folder: Path) -> None:
    observer = Observer()
    engine = opened(observer)
    engine.warm()
    chat = GenerationRequest(messages=(ChatMessage("user", "fox"),), max_tokens=8, temperature=0, logprobs=2)
    asked = [ASK, LONG, chat, replace(ASK, prompt=(5, 6, 7))]
    streams = [engine.submit(request) for request in asked]
    answers = [stream.result(60) for stream in streams]
    assert [answer.text for answer in answers] == [expected(model_folder, request) for request in asked]
    assert [answer.usage.completion_tokens for answer in answers] == [12, 100, 8, 12]
    assert {answer.finish_reason for answer in answers} == {"length"}
    with Engine.load(model_folder, SETTINGS) as local:
        ours = local.submit(chat).result(30).logprobs
    theirs = answers[2].logprobs
    assert [item.piece for item in theirs] == [item.piece for item in ours]
    assert [item.logprob for item in theirs] == pytest.approx([item.logprob for item in ours], abs=1e-4)
    assert [[top.text for top in item.top] for item in theirs] == [[top.text for top in item.top] for item in ours]
    assert {stream.served_by for stream in streams} == {"tiny@1"}


def test_relays_aborts_and_refusals(opened: Opened, model_folder: Path) -> None:
    engine = opened(Observer())
    heard: list[GenerationEvent | BaseException] = []
    done: list[str] = []
    ended = threading.Event()

    def relay(said: GenerationEvent | BaseException) -> Wake | None:
        heard.append(said)
        if isinstance(said, BaseException) or said.finish_reason is not None:
            ended.set()
        return None

    engine.submit(ASK, on_done=lambda: done.append("first"), relay=relay)
    assert ended.wait(60)
    events = [said for said in heard if isinstance(said, GenerationEvent)]
    assert len(events) == len(heard)
    assert "".join(event.text for event in events) == expected(model_folder, ASK)

    left = threading.Event()
    stream = engine.submit(LONG, on_done=left.set)
    assert stream.next_event(60) is not None
    stream.close()
    assert left.wait(60), "an abort frees the place"
    with pytest.raises(InvalidInput, match="128"):
        engine.submit(replace(ASK, prompt=tuple(range(5, 205)))).result(60)
    assert engine.submit(ASK).result(60).text == expected(model_folder, ASK)
    engine.close()
    assert done == ["first"], "once"
    assert engine.num_sequences == 0


def test_a_close_finishes_what_has_begun_and_takes_nothing_more(opened: Opened, model_folder: Path) -> None:
    observer = Observer()
    engine = opened(observer)
    stream = engine.submit(LONG)
    assert stream.next_event(60) is not None
    engine.close()
    rest = list(stream)
    assert rest[-1].finish_reason == "length"
    assert rest[-1].usage.completion_tokens == 100
    assert not engine.is_alive
    assert observer.closed.wait(30)
    assert [stats.completion_tokens for stats in observer.requests] == [100]
    with pytest.raises((EngineClosed, ReplicaLost)):
        engine.submit(ASK)
    engine.close()


def test_a_close_without_patience_ends_streams_with_an_error(opened: Opened) -> None:
    engine = opened(Observer())
    streams: list[GenerationStream] = []
    over: list[threading.Event] = []
    room = threading.Semaphore(64)

    def ask_on() -> None:
        """Keeps the engine busy, so that it is never done with everything when it is closed."""
        with contextlib.suppress(EngineClosed, ReplicaLost):
            while room.acquire(timeout=60):
                one = threading.Event()
                streams.append(engine.submit(LONG, on_done=lambda one=one: (one.set(), room.release())))  # type: ignore[misc]
                over.append(one)

    def failure_of(stream: GenerationStream) -> TransientError | None:
        try:
            while stream.next_event(30) is not None:
                continue
        except TransientError as error:
            return error
        return None

    asking = threading.Thread(target=ask_on)
    asking.start()
    assert engine.submit(ASK).next_event(60) is not None
    engine.close(drain=False)
    asking.join(60)
    assert not asking.is_alive()
    assert all(one.is_set() for one in over)
    failures = [error for error in map(failure_of, streams) if error is not None]
    assert failures
    assert all("tiny@1" in str(error) for error in failures)


# ---- behind a server ------------------------------------------------------------------------------------------------


def test_an_abort_before_the_first_step_frees_the_place() -> None:
    observer, done, gate = Observer(), threading.Event(), threading.Event()
    engine = OpenAiEngine("http://127.0.0.1:1/v1", "tiny", "tiny@1", observer)
    engine._loop.call_soon_threadsafe(gate.wait)  # what follows comes to the loop in one turn
    stream = engine.submit(ASK, on_done=done.set)
    stream.close()
    gate.set()
    assert done.wait(30)
    assert engine.num_sequences == 0
    assert [stats.outcome for stats in observer.requests] == ["aborted"]
    engine.close()


# ---- a server that is started here ----------------------------------------------------------------------------------


def version() -> ModelVersion:
    return ModelVersion("tiny", 1, "", None, datetime(2026, 1, 1, tzinfo=UTC), (), {})


def test_a_server_that_is_not_there(gateway: Gateway) -> None:
    backend = OpenAiBackend(url="http://127.0.0.1:1/v1", model="tiny")
    with pytest.raises(Unreachable, match="127"):
        load_behind(gateway.workspace, version(), EngineConfig(), backend, Observer())


def test_engine_settings_are_refused_and_a_command_that_ends_says_what_it_said(gateway: Gateway) -> None:
    says = "import sys; print('no such device'); sys.exit(3)"
    backend = OpenAiBackend(command=f'{sys.executable} -c "{says}" {{port}}')
    with pytest.raises(ConfigError, match=r"exit code 3.*no such device"):
        load_behind(
            gateway.workspace, gateway.workspace.tracking.resolve("tiny@1"), EngineConfig(), backend, Observer()
        )
    with pytest.raises(ConfigError, match=r"backend\.command"):
        load_behind(gateway.workspace, version(), SETTINGS, backend, Observer())
    for command in ("/absent/server {port}", "/bin/ec\0ho {port}"):
        wrong = OpenAiBackend(command=command)
        found = gateway.workspace.tracking.resolve("tiny@1")
        with pytest.raises(ConfigError, match="cannot be run"):
            load_behind(gateway.workspace, found, EngineConfig(), wrong, Observer())


@pytest.mark.slow
def test_a_server_is_started_used_killed_and_ended(gateway: Gateway, model_folder: Path) -> None:
    command = f"{sys.executable} -m support.openai_server {{model}} {{port}} tiny-1"
    observer = Observer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        found = gateway.workspace.tracking.resolve("tiny@1")
        engine = load_behind(gateway.workspace, found, EngineConfig(), OpenAiBackend(command=command), observer)
    engine._model = "tiny-1"
    try:
        engine.warm()
        assert engine.submit(ASK).result(60).text == expected(model_folder, ASK)
        stream = engine.submit(LONG)
        assert stream.next_event(60) is not None
        server = engine._release.__self__  # type: ignore[attr-defined]
        os.killpg(server._process.pid, signal.SIGKILL)
        assert observer.closed.wait(30), "its end is noticed without a request"
        with pytest.raises(ReplicaLost):
            engine.submit(ASK)
        assert not engine.is_alive
    finally:
        engine.close(drain=False)
