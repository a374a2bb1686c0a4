"""A client's own limit on its request, over HTTP: while it waits, in the middle of its stream, and written wrongly; and
its deployment's, for models that do not generate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from sklearn.linear_model import LinearRegression

from sihe.serving.engine.encoder.engine import EncoderEngine
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import ReplicaLost
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.replicas.config import ReplicaConfig
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.registration import register, save_sklearn
from sihe.serving.protocol import error_body
from support.tiny_encoders import tiny_reranker

HEADER = "x-sihe-timeout-ms"
BODY = {"model": "tiny", "prompt": "the lazy dog", "max_tokens": 60, "temperature": 0}


@pytest.fixture
def stuck(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The engine of the one replica, which takes no step for as long as the test runs."""
    (replica,) = gateway.route("tiny").replicas()
    engine = replica.held()
    assert isinstance(engine, Engine)
    monkeypatch.setattr(engine, "_step", lambda: None)
    yield engine
    monkeypatch.undo()


def until_free(engine: Engine) -> None:
    """Returns when no request is left in the engine and all its blocks are free, or only known."""
    for _ in range(3000):
        if engine.num_sequences == 0:
            break
        threading.Event().wait(0.01)
    assert engine.num_sequences == 0
    assert engine._pool.num_used == 0


def test_a_request_that_waits_is_given_up_when_its_time_has_passed(server_url: str, stuck: Engine) -> None:
    with (
        openai.OpenAI(base_url=f"{server_url}/v1", api_key="x", default_headers={HEADER: "80"}) as client,
        pytest.raises(openai.InternalServerError) as caught,  # and the client does not try again
    ):
        client.completions.create(**BODY)  # type: ignore[call-overload]
    error = caught.value
    assert (error.status_code, error.code, error.type) == (504, "timeout", "server_error")
    assert "within 0.08 s" in error.message or "within 0.07" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    until_free(stuck)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_ends_with_an_event_that_says_so_and_its_blocks_are_free(
    server_url: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (replica,) = gateway.route("tiny").replicas()
    engine = replica.held()
    assert isinstance(engine, Engine)
    step, steps = engine._step, [0]

    def few() -> None:
        steps[0] += 1
        if steps[0] <= 4:
            step()

    monkeypatch.setattr(engine, "_step", few)
    body = {**BODY, "stream": True}
    if path != "completions":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    with httpx.stream("POST", f"{server_url}/v1/{path}", json=body, headers={HEADER: "400"}, timeout=30) as response:
        assert response.status_code == 200
        events = [line for line in response.iter_lines() if line]
    monkeypatch.undo()
    assert len(events) > 1, "it had begun"
    assert '"code":"timeout"' in events[-1]
    assert "the whole answer" in events[-1]
    until_free(engine)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/rerank", "/v2/models/tiny/infer"])
@pytest.mark.parametrize("given", ["0", "-1", "1e3", "nan", "", "ten", "99999999999", "86400001", "１０", "0.0", "1."])
def test_a_limit_that_is_none_is_refused_by_name(server_url: str, gateway: Gateway, given: str, path: str) -> None:
    headers = [(HEADER.encode(), given.encode())]
    answer = httpx.post(f"{server_url}{path}", json=BODY, headers=headers, timeout=30)
    assert answer.status_code == 400
    assert HEADER in (answer.json()["error"] if "/v2/" in path else answer.json()["error"]["param"])


def test_a_limit_that_is_kept_changes_nothing(server_url: str, gateway: Gateway) -> None:
    plain = httpx.post(f"{server_url}/v1/completions", json=BODY, timeout=30).json()
    limited = httpx.post(f"{server_url}/v1/completions", json=BODY, headers={HEADER: "60000"}, timeout=30).json()
    assert limited["choices"] == plain["choices"]


def test_an_arm_is_not_to_blame_for_a_limit_that_no_arm_can_keep(gateway: Gateway, stuck: Engine) -> None:
    before = gateway.traffic.experiment("tiny").arms[0]
    stream = gateway.generate("tiny", GenerationRequest(prompt=(5, 6), max_tokens=4), timeout_s=0.05)
    with pytest.raises(TimeoutError):
        stream.result(30)
    after = gateway.traffic.experiment("tiny").arms[0]
    assert (after.left, after.errors, after.requests) == (before.left + 1, before.errors, before.requests)


# ---- models that do not generate -------------------------------------------------------------------------------------

ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/embeddings": ("embed", {"model": "embed", "input": ["the lazy dog", "a fox"]}),
    "/v1/rerank": ("rerank", {"model": "rerank", "query": "dog", "documents": ["the lazy dog", "a fox"]}),
    "/v2/models/line/infer": (
        "line",
        {"inputs": [{"name": "input", "shape": [1, 1], "datatype": "FP64", "data": [3.0]}]},
    ),
}


@pytest.fixture(scope="module")
def registered(house: Any, embedder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An embedder, a reranker and a predictive model in the registry."""
    tracking, folder = house.workspace.tracking, tmp_path_factory.mktemp("others")
    tracking.register_model("vectors", embedder_folder)
    tracking.register_model("scores", tiny_reranker(folder / "reranker"))
    rows = np.arange(6.0)[:, None]
    save_sklearn(LinearRegression().fit(rows, rows), folder / "line", example=rows[:2])
    register(tracking, "line", folder / "line")


@pytest.fixture
def served(registered: None, gateway: Gateway) -> Gateway:
    for name, target in (("embed", "vectors"), ("rerank", "scores"), ("line", "line")):
        gateway.deploy(name, target)
        gateway.wait_ready(name, timeout_s=60)
    return gateway


def fate(gateway: Gateway, name: str) -> tuple[int, int, int]:
    (arm,) = gateway.traffic.experiment(name).arms
    return arm.requests, arm.errors, arm.left


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank"])
def test_texts_whose_time_has_passed_leave_the_queue(
    served: Gateway, server_url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    name, body = ASKS[path]
    (replica,) = served.route(name).replicas()
    encoder = replica.held()
    assert isinstance(encoder, EncoderEngine)
    monkeypatch.setattr(encoder, "_step", lambda: None)
    answer = httpx.post(f"{server_url}{path}", json=body, headers={HEADER: "80"}, timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], answer.headers["x-should-retry"]) == (504, "timeout", "false")
    assert "the whole answer was not there within 0.08 s" in error["message"]
    for _ in range(3000):
        if encoder.num_sequences == 0:
            break
        threading.Event().wait(0.01)
    assert (encoder.num_sequences, len(encoder._queue)) == (0, 0)
    assert fate(served, name) == (0, 0, 1)
    monkeypatch.undo()
    assert httpx.post(f"{server_url}{path}", json=body, headers={HEADER: "60000"}, timeout=30).status_code == 200
    assert replica.in_flight == 0


@pytest.mark.parametrize("path", list(ASKS))
def test_a_request_that_comes_too_late_is_not_begun(
    served: Gateway, server_url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    name, body = ASKS[path]
    begun: list[str] = []
    for kind in (EncoderEngine, Predictor):
        monkeypatch.setattr(kind, "submit", lambda self, *_, **__: begun.append(self.name))
    answer = httpx.post(f"{server_url}{path}", json=body, headers={HEADER: "0.001"}, timeout=30)
    assert (answer.status_code, begun) == (504, [])
    assert "was not there within" in answer.text
    assert fate(served, name) == (0, 0, 1), "no arm is to blame"


@pytest.mark.parametrize("path", list(ASKS))
def test_a_deployments_limit_holds_in_the_middle_of_computing_and_is_charged_to_the_arm(
    served: Gateway, server_url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    name, body = ASKS[path]
    target = served.status(name).target
    served.deploy(name, target, replicas=ReplicaConfig(timeout_s=0.08))
    (replica,) = served.route(name).replicas()
    computing, goes_on = threading.Event(), threading.Event()
    for kind in (EncoderEngine, Predictor):
        compute = kind._compute

        def held_up(self: Any, members: Any, compute: Any = compute) -> None:
            computing.set()
            assert goes_on.wait(30)
            compute(self, members)

        monkeypatch.setattr(kind, "_compute", held_up)
    try:
        answer = httpx.post(f"{server_url}{path}", json=body, headers={HEADER: "60000"}, timeout=30)
        assert computing.is_set()
    finally:
        goes_on.set()
    assert answer.status_code == 504
    assert "the whole answer was not there within 0.08 s: retry later" in answer.text
    assert "x-should-retry" not in answer.headers, "the caller did not set it"
    assert fate(served, name) == (1, 1, 0)
    served.deploy(name, target, replicas=ReplicaConfig())
    assert httpx.post(f"{server_url}{path}", json=body, timeout=30).status_code == 200
    assert replica.in_flight == 0
    assert served.route(name).replicas() == (replica,), "a limit is no reason to load it again"


@pytest.mark.parametrize("path", list(ASKS))
def test_the_shorter_of_the_two_limits_holds(
    served: Gateway, server_url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    name, body = ASKS[path]
    served.deploy(name, served.status(name).target, replicas=ReplicaConfig(timeout_s=600.0))
    for kind in (EncoderEngine, Predictor):
        monkeypatch.setattr(kind, "submit", lambda *_, **__: pytest.fail("it came too late"))
    answer = httpx.post(f"{server_url}{path}", json=body, headers={HEADER: "0.001"}, timeout=30)
    assert (answer.status_code, fate(served, name)) == (504, (0, 0, 1))
    assert "allow more time" in answer.text


# ---- a replica that is lost ------------------------------------------------------------------------------------------


def test_a_stream_whose_replica_is_lost_says_what_happened(
    server_url: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    (replica,) = gateway.route("tiny").replicas()
    engine = replica.held()
    assert isinstance(engine, Engine)
    step, steps = engine._step, [0]

    def breaks() -> None:
        steps[0] += 1
        if steps[0] > 4:
            raise MemoryError("the machine")
        step()

    monkeypatch.setattr(engine, "_step", breaks)
    with httpx.stream("POST", f"{server_url}/v1/completions", json={**BODY, "stream": True}, timeout=30) as response:
        events = [line for line in response.iter_lines() if line]
    assert len(events) > 1
    assert '"code":"replica_lost"' in events[-1]
    assert "[DONE]" not in events[-1]


def test_the_same_before_the_first_token_may_be_sent_again() -> None:
    status, body, headers = error_body(ReplicaLost("the replica was lost with its node"))
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "replica_lost", "1")
