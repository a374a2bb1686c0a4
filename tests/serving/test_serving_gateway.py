"""Deployments: they follow their reference, swap under load, and survive every bad version."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import pytest
from prometheus_client import CollectorRegistry
from torch import Tensor

from sihe.core import settings
from sihe.core.clock import FakeClock
from sihe.core.errors import Busy, CorruptData, NotFound, Unreachable
from sihe.core.tracking import ModelVersion, Tracking
from sihe.core.workspace import Workspace
from sihe.serving.engine.compute.step import Feed
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import NoMemory, NotReady
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.types import DeploymentState, ReplicaState
from support.tiny_models import tiny_config, tiny_model

SETTINGS = EngineConfig(max_batch_size=8, token_budget=32)
PROMPT = "the lazy dog"
STREAMS, MOVES, TOKENS = 8, 20, 40


def answer_of(folder: Path) -> str:
    """What the model of `folder` says to the prompt, greedily."""
    with Engine.load(folder, SETTINGS) as engine:
        return engine.submit(GenerationRequest(prompt=PROMPT, max_tokens=TOKENS, temperature=0)).result(30).text


def test_twenty_swaps_under_eight_streams(
    server_url: str, gateway: Gateway, model_folder: Path, other_folder: Path
) -> None:
    expected = {"tiny@1": answer_of(model_folder), "tiny@2": answer_of(other_folder)}
    assert len(set(expected.values())) == 2
    swapped = threading.Event()
    answers: list[tuple[str, set[str | None], str]] = []
    failures: list[Exception] = []

    def stream_until_swapped() -> None:
        with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
            while not swapped.is_set():
                try:
                    raw = client.completions.with_raw_response.create(
                        model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
                    )
                    chunks = list(raw.parse())
                    text = "".join(chunk.choices[0].text for chunk in chunks)
                    named = {chunk.system_fingerprint for chunk in chunks}
                    answers.append((raw.headers["x-sihe-model-version"], named, text))
                except Exception as error:
                    failures.append(error)

    readers = [threading.Thread(target=stream_until_swapped) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    for move in range(MOVES):
        version = 2 - move % 2
        gateway.move_alias("tiny", "live", version)
        assert gateway.wait_ready("tiny", timeout_s=60).version == version
    swapped.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(answers) >= MOVES
    for header, named, text in answers:
        assert named == {header}
        assert text == expected[header]
    assert {header for header, _, _ in answers} == {"tiny@1", "tiny@2"}


def test_a_stream_ends_on_the_version_it_began_with(gateway: Gateway, model_folder: Path) -> None:
    stream = gateway.generate("tiny", GenerationRequest(prompt=PROMPT, max_tokens=TOKENS, temperature=0))
    gateway.move_alias("tiny", "live", 2)
    gateway.wait_ready("tiny", timeout_s=30)
    later = gateway.generate("tiny", GenerationRequest(prompt=PROMPT, max_tokens=1))
    assert (stream.served_by, later.served_by) == ("tiny@1", "tiny@2")
    assert stream.result(30).text == answer_of(model_folder)


def test_another_process_moves_the_alias_and_the_poll_sees_it(gateway: Gateway) -> None:
    route = gateway.route("tiny")
    with Workspace(gateway.workspace.settings) as other:
        other.tracking.set_alias("tiny", "live", 2)
    with route._changed:
        assert route._changed.wait_for(lambda: gateway.served()[0].version == 2, timeout=30)


@pytest.fixture
def broken_version(gateway: Gateway, tmp_path: Path) -> ModelVersion:
    folder = tiny_model(tmp_path / "broken", seed=3)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return gateway.workspace.tracking.register_model("tiny", folder)


def test_a_broken_version_leaves_the_old_one_serving(gateway: Gateway, broken_version: ModelVersion) -> None:
    gateway.move_alias("tiny", "live", broken_version.version)
    with pytest.raises(CorruptData):
        gateway.wait_ready("tiny", timeout_s=30)
    status = gateway.status("tiny")
    assert (status.state, status.version, status.wanted) == (DeploymentState.READY, 1, broken_version.version)
    assert "model.safetensors" in str(status.error)
    assert [(replica.version, replica.state) for replica in status.replicas] == [(1, ReplicaState.READY)]
    assert gateway.generate("tiny", GenerationRequest(prompt=PROMPT, max_tokens=1)).served_by == "tiny@1"
    gateway.move_alias("tiny", "live", 2)
    healed = gateway.wait_ready("tiny", timeout_s=30)
    assert (healed.version, healed.error) == (2, None)


def test_a_deployment_that_never_loaded_says_why(gateway: Gateway, broken_version: ModelVersion) -> None:
    gateway.deploy("bad", f"tiny@{broken_version.version}")
    with pytest.raises(CorruptData):
        gateway.wait_ready("bad", timeout_s=30)
    assert gateway.status("bad").state is DeploymentState.FAILED
    with pytest.raises(NotReady, match="corrupt"):
        gateway.generate("bad", GenerationRequest(prompt=PROMPT))


def test_moves_while_a_version_loads_coalesce(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go = threading.Event(), threading.Event()
    loaded: list[int] = []
    load = Engine.load.__func__  # type: ignore[attr-defined]

    def held_load(cls: type[Engine], folder: Path, *args: object, **fields: object) -> Engine:
        loaded.append(int(str(fields["name"]).partition("@")[2]))
        loading.set()
        assert go.wait(30)
        return load(cls, folder, *args, **fields)  # type: ignore[no-any-return]

    monkeypatch.setattr(Engine, "load", classmethod(held_load))
    gateway.move_alias("tiny", "live", 2)
    assert loading.wait(30)
    for version in (1, 2, 1, 2, 1):
        gateway.move_alias("tiny", "live", version)
    go.set()
    assert gateway.wait_ready("tiny", timeout_s=30).version == 1
    with gateway.route("tiny")._changed:
        gateway.route("tiny")._changed.wait_for(lambda: len(gateway.status("tiny").replicas) == 1, timeout=30)
    assert loaded == [2]  # the last wish was what served all along: nothing else was loaded
    assert gateway.generate("tiny", GenerationRequest(prompt=PROMPT, max_tokens=1)).served_by == "tiny@1"


def test_old_versions_with_open_streams_do_not_pile_up(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, go = ModelRunner.forward, threading.Event()

    def held_step(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        if any(len(item.tokens) > 1 for item in feeds):  # only the streams below have prompts of several tokens
            assert go.wait(30)
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", held_step)
    request = GenerationRequest(prompt=(5, 6, 7), max_tokens=2)
    streams = [gateway.generate("tiny", request)]
    for version in (2, 1):
        gateway.move_alias("tiny", "live", version)
        gateway.wait_ready("tiny", timeout_s=30)
        streams.append(gateway.generate("tiny", request))
    gateway.move_alias("tiny", "live", 2)
    with pytest.raises(Busy):
        gateway.wait_ready("tiny", timeout_s=0.2)
    states = [replica.state for replica in gateway.status("tiny").replicas]
    assert states == [ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.DRAINING]
    go.set()
    assert gateway.wait_ready("tiny", timeout_s=30).version == 2
    assert [stream.result(30).usage.completion_tokens for stream in streams] == [2, 2, 2]
    assert [stream.served_by for stream in streams] == ["tiny@1", "tiny@2", "tiny@1"]


def test_a_registry_that_does_not_answer_stops_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: Tracking, reference: str) -> ModelVersion:
        raise Unreachable("http://registry", "refused")

    monkeypatch.setattr(Tracking, "resolve", unreachable)
    gateway.notify()
    status = gateway.status("tiny")
    assert (status.state, status.version) == (DeploymentState.READY, 1)
    assert "http://registry" in str(status.error)
    assert gateway.generate("tiny", GenerationRequest(prompt=PROMPT, max_tokens=1)).served_by == "tiny@1"
    monkeypatch.undo()
    gateway.notify()
    assert gateway.status("tiny").error is None


def test_an_engine_that_dies_is_replaced(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    (replica,) = gateway.route("tiny").replicas()
    engine = replica.held()
    assert isinstance(engine, Engine)

    def broken() -> None:
        raise MemoryError("gone")

    monkeypatch.setattr(engine._scheduler, "plan", broken)
    answer = gateway.generate("tiny", GenerationRequest(prompt=PROMPT, max_tokens=2)).result(30)
    assert answer.usage.completion_tokens == 2, "no token was out yet: another engine answers"
    gateway.wait_ready("tiny", timeout_s=30)
    assert gateway.route("tiny").replicas()[-1].held() is not engine


def test_what_does_not_fit_now_is_tried_again(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Engine.load.__func__  # type: ignore[attr-defined]
    refusals = iter([True, False])

    def tight_load(cls: type[Engine], *args: object, **fields: object) -> Engine:
        if next(refusals):
            raise NoMemory("the model", needed_bytes=2, available_bytes=1, hint="wait")
        return load(cls, *args, **fields)  # type: ignore[no-any-return]

    monkeypatch.setattr(Engine, "load", classmethod(tight_load))
    gateway.move_alias("tiny", "live", 2)
    route = gateway.route("tiny")
    with route._changed:
        assert route._changed.wait_for(lambda: route.status().version == 2, timeout=30)
    assert next(refusals, None) is None  # refused once, and tried again


def test_remove_and_unknown_names(gateway: Gateway) -> None:
    gateway.deploy("extra", "tiny@2")
    gateway.wait_ready("extra", timeout_s=30)
    stream = gateway.generate("extra", GenerationRequest(prompt=PROMPT, max_tokens=30))
    gateway.remove("extra")
    assert stream.result(30).usage.completion_tokens == 30  # what had begun is finished
    for call in (lambda: gateway.remove("extra"), lambda: gateway.status("extra")):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(NotFound, match="deployed are: tiny"):
        gateway.generate("extra", GenerationRequest(prompt=PROMPT))
    with pytest.raises(NotFound):
        gateway.deploy("extra", "absent@live")
    with pytest.raises(NotFound):
        gateway.deploy("extra", "tiny@absent")


def test_gauges_of_a_version_that_is_gone_are_gone(gateway: Gateway, registry: CollectorRegistry) -> None:
    gateway.deploy("brief", "tiny@2")
    gateway.wait_ready("brief", timeout_s=30)
    labels = {"deployment": "brief", "version": "2"}
    assert registry.get_sample_value("sihe_serving_running", labels) == 0
    gateway.remove("brief")
    for closing in gateway._closing:
        closing.thread.join(30)

    assert registry.get_sample_value("sihe_serving_running", labels) is None


def test_a_process_that_does_not_serve_reads_reports(tmp_path: Path) -> None:
    clock = FakeClock()
    resolved = settings.load({"home": str(tmp_path)}, environ={}, directory=tmp_path)
    with Workspace(resolved, clock=clock) as workspace:
        workspace.tracking.register_model("tiny", tiny_model(tmp_path / "model", config=tiny_config()))
        editor = Gateway(workspace)
        assert editor.deploy("tiny", "tiny@1").state is DeploymentState.UNSERVED
        created = editor.deploy("tiny", "tiny@1").updated_at
        clock.advance(3)
        assert editor.deploy("tiny", "tiny@1").updated_at == created, "the same wish changes nothing"
        assert editor.deploy("tiny", "tiny", settings=SETTINGS).target == "tiny"
        with pytest.raises(NotReady, match="does not serve"):
            editor.generate("tiny", GenerationRequest(prompt=PROMPT))
        server = Gateway(workspace, registry=CollectorRegistry())
        with server:
            server.wait_ready("tiny", timeout_s=30)
            server.notify()
            seen = editor.list()[0]
            assert (seen.state, seen.version, seen.reported_at) == (DeploymentState.READY, 1, clock.now())
            stored = DeploymentStore(workspace.records, clock).get("tiny")
            assert stored.settings == SETTINGS
        clock.advance(60)
        assert editor.status("tiny").state is DeploymentState.UNSERVED


@pytest.fixture(autouse=True)
def _undo_before_the_gateway_is_reset(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.undo()
