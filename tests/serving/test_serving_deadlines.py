"""A client's own limit on its request, over HTTP: while it waits, in the middle of its stream, and written wrongly."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import openai
import pytest

from sihe.serving.engine.engine import Engine
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import ReplicaLost
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.protocol import error_body

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


@pytest.mark.parametrize("given", ["0", "-1", "1e3", "nan", "", "ten", "99999999999", "86400001", "１０"])
def test_a_limit_that_is_none_is_refused_by_name(server_url: str, gateway: Gateway, given: str) -> None:
    headers = [(HEADER.encode(), given.encode())]
    answer = httpx.post(f"{server_url}/v1/completions", json=BODY, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, HEADER)


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
