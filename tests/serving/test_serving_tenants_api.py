"""Keys, rights, limits and usage over HTTP: a real server, and the unmodified `openai` client."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor

from sihe.core import settings
from sihe.core.clock import FakeClock
from sihe.core.telemetry import configure_logs
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.runner import Feed, ModelRunner
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EngineClosed
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.ports import GuardContext, Refusal
from sihe.serving.tenants import Access, Limits, Right, Tenant, TenantStore
from sihe.serving.tenants.brakes import FAILURES
from support.debian import wait_until
from support.http_server import serving

PROMPT = [5] * 10
SHORT = "short-key"


@dataclass(frozen=True)
class Door:
    """A server over the house's gateway with keys, a clock and counters of its own."""

    url: str
    access: Access
    store: TenantStore
    clock: FakeClock
    registry: CollectorRegistry
    http: httpx.Client
    sent: list[httpx.Request]  # what `http` has sent

    def key(self, tenant: str = "acme", *rights: Right, models: Sequence[str] | None = None, **limits: int) -> str:
        """A new key, known to the server at once."""
        _, secret = self.store.create_key(
            "k",
            tenant=tenant,
            rights=frozenset(rights or {Right.INFER}),
            deployments=None if models is None else frozenset(models),
            limits=Limits(**limits),
        )
        self.access.forget()
        return secret.text

    def client(self, key: str, max_retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=max_retries, http_client=self.http)

    def get(self, path: str, key: str) -> httpx.Response:
        return self.http.get(f"{self.url}{path}", headers={"authorization": f"Bearer {key}"})

    def metrics(self) -> str:
        return generate_latest(self.registry).decode()


@pytest.fixture
def door(gateway: Gateway, tmp_path: Path) -> Iterator[Door]:
    clock, registry = FakeClock(), CollectorRegistry()
    flags = {"home": str(tmp_path / "home"), "server.api_keys": SHORT}
    with Workspace(settings.load(flags, environ={}, directory=tmp_path), clock=clock) as workspace:
        access = Access(workspace, registry=registry)
        app = FastAPI()
        app.include_router(router(gateway, access))
        install_errors(app)
        sent: list[httpx.Request] = []
        with serving(app) as url, httpx.Client(event_hooks={"request": [sent.append]}, timeout=60) as http:
            yield Door(url, access, access.keys, clock, registry, http, sent)
        access.close()


def complete(client: openai.OpenAI, max_tokens: int = 4, **fields: object) -> dict[str, str]:
    """The headers of one good answer."""
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=max_tokens, temperature=0, **fields  # type: ignore[arg-type]
    )  # fmt: skip
    assert raw.parse().usage is not None
    return dict(raw.headers)


# ---- keys and rights -----------------------------------------------------------------------------------------------


def test_without_a_key_or_with_a_wrong_one(door: Door) -> None:
    for key in ("wrong", door.key()[:-1] + "~", "sihe_", "x" * 500):
        with pytest.raises(openai.AuthenticationError) as caught:
            complete(door.client(key))
        assert (caught.value.code, caught.value.status_code) == ("invalid_api_key", 401)
        assert key not in str(caught.value)
    assert door.http.get(f"{door.url}/v1/models").status_code == 401
    assert door.http.get(f"{door.url}/api/deployments").status_code == 401
    complete(door.client(SHORT))
    complete(door.client(door.key()))


def test_a_key_opens_what_its_rights_say(door: Door) -> None:
    infer, watch, deploy, admin = (door.key("acme", right) for right in Right)
    allowed = {
        "/v1/models": {infer, admin},
        "/api/deployments": {watch, deploy, admin},
        "/api/usage": {infer, watch, deploy, admin},
        "/api/keys": {admin},
        "/api/tenants": {admin},
    }
    for path, keys in allowed.items():
        for key in (infer, watch, deploy, admin):
            assert door.get(path, key).status_code == (200 if key in keys else 403), path
    body = {"name": "x", "target": "nothing@none"}
    for key, status in ((infer, 403), (watch, 403), (deploy, 404), (admin, 404)):
        answer = door.http.post(f"{door.url}/api/deployments", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status
    with pytest.raises(openai.PermissionDeniedError) as caught:
        complete(door.client(watch))
    assert caught.value.code == "insufficient_permissions"


def test_a_key_asks_only_the_models_that_it_is_made_for(door: Door) -> None:
    own, other = door.client(door.key(models=["tiny"])), door.client(door.key(models=["code"]))
    complete(own)
    assert [model.id for model in own.models.list()] == ["tiny"]
    assert [model.id for model in other.models.list()] == []
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve("tiny")
    said = []
    for model in ("tiny", "none"):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            other.completions.create(model=model, prompt=PROMPT)
        said.append(str(caught.value).replace(model, "…"))
    assert said[0] == said[1]  # whether it exists is not told


def test_keys_are_made_changed_and_rotated_over_http(door: Door) -> None:
    admin = {"authorization": f"Bearer {door.key('acme', Right.ADMIN)}"}

    def post(path: str, **body: object) -> httpx.Response:
        return door.http.post(f"{door.url}{path}", json=body, headers=admin)

    made = post("/api/keys", name="app", tenant="zeta", rights=["infer"], limits={"concurrency": 2})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    body = made.json()
    complete(door.client(body["key"]))
    listed = door.http.get(f"{door.url}/api/keys?tenant=zeta", headers=admin)
    assert [key["id"] for key in listed.json()] == [body["id"]]
    assert body["key"] not in listed.text
    assert "digest" not in listed.text
    new = post(f"/api/keys/{body['id']}/rotate", grace_s=60).json()
    complete(door.client(body["key"]))
    complete(door.client(new["key"]))
    assert post(f"/api/keys/{new['id']}", enabled=False, limits={"requests_per_min": 9}).json()["limits"] == {
        "requests_per_min": 9
    }
    with pytest.raises(openai.AuthenticationError):
        complete(door.client(new["key"]))
    assert post(f"/api/keys/{new['id']}").json()["disabled_at"]
    put = door.http.put(f"{door.url}/api/tenants/zeta", json={"priority": 3, "is_isolated": True}, headers=admin)
    assert put.json()["priority"] == 3
    assert door.store.tenant("zeta") == Tenant("zeta", priority=3, is_isolated=True)
    for path, bad, status in (
        ("/api/keys", {"name": "a b"}, 400),
        ("/api/keys", {"name": "k", "rights": ["everything"]}, 422),
        ("/api/keys", {"name": "k", "limits": {"speed": 1}}, 400),
        ("/api/keys", {"name": "k", "expires_at": "2030-01-01T00:00:00"}, 422),
        ("/api/keys/absent", {"enabled": True}, 404),
        ("/api/keys/absent/rotate", {"grace_s": -1}, 400),
    ):
        assert post(path, **bad).status_code == status, (path, bad)


def test_the_right_to_deploy_is_no_shell(door: Door, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    replicas = {"backend": {"kind": "openai", "command": f"touch {mark} {{port}}"}}
    body = {"name": "shell", "target": "tiny@1", "replicas": replicas}
    key = door.key("acme", Right.DEPLOY)
    answer = door.http.post(f"{door.url}/api/deployments", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 403
    assert "admin" in answer.text
    assert not mark.exists()


# ---- limits --------------------------------------------------------------------------------------------------------


def test_requests_a_minute(door: Door) -> None:
    client = door.client(door.key(requests_per_min=2))
    first = complete(client)
    assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert first["x-ratelimit-reset-requests"] == "30s"
    complete(client)
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client)
    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["x-ratelimit-remaining-requests"]) == ("30", "0")
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    door.clock.advance(int(headers["retry-after"]))
    complete(client)
    assert 'sihe_tenant_refused_total{reason="requests",tenant="acme"} 1.0' in door.metrics()


def test_tokens_are_taken_as_estimated_and_settled_as_used(door: Door) -> None:
    client = door.client(door.key(tokens_per_min=100))
    assert complete(client, 40)["x-ratelimit-remaining-tokens"] == "50"  # 10 + 40
    stop = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text[1:3]
    # 100 - 50 - 18 are left; of the 28 that this one might take, those behind the stop string come back
    headers = complete(client, 18, stop=[stop])
    assert headers["x-ratelimit-remaining-tokens"] == "4"
    tally = door.access.usage.read
    door.access.flush()
    used = sum(row.tally.tokens for row in tally())
    assert used < 50 + 18 + 28
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client, 90)
    assert caught.value.response.headers["x-ratelimit-remaining-tokens"] == str(100 - used)
    assert caught.value.type == "tokens"
    with pytest.raises(openai.APIStatusError, match="this request alone needs 101") as large:
        complete(client, 91)
    assert large.value.status_code == 413


def test_a_limit_that_is_smaller_than_a_usual_answer_lets_open_ends_pass(door: Door) -> None:
    client = door.client(door.key(tokens_per_min=300, tokens_per_day=250))
    chat = [{"role": "user", "content": "pack my box"}]
    first = client.chat.completions.create(model="tiny", messages=chat)  # type: ignore[arg-type]
    assert first.usage is not None
    left = 250 - first.usage.total_tokens
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=chat, max_tokens=1)  # type: ignore[arg-type]
    assert int(raw.headers["x-ratelimit-remaining-tokens"]) > left  # what was guessed too much came back
    door.clock.advance(60)
    with pytest.raises(openai.RateLimitError, match="tokens a day"):
        complete(client, left)


def test_a_tenants_limit_holds_for_all_its_keys_together(door: Door) -> None:
    door.store.put_tenant(Tenant("acme", Limits(requests_per_min=2)))
    first, second, other = door.client(door.key()), door.client(door.key()), door.client(door.key("zeta"))
    complete(first)
    complete(second)
    for client in (first, second):
        with pytest.raises(openai.RateLimitError):
            complete(client)
    complete(other)


def test_a_quota_ends_with_its_day_and_clients_do_not_try_until_then(door: Door) -> None:
    client = door.client(door.key(tokens_per_day=30), max_retries=2)
    complete(client, 5)
    complete(client, 5)
    door.sent.clear()
    with pytest.raises(openai.RateLimitError) as caught:
        complete(client, 5)
    assert (caught.value.code, len(door.sent)) == ("insufficient_quota", 1)
    assert int(caught.value.response.headers["retry-after"]) == 24 * 3600
    door.clock.advance(24 * 3600)
    complete(client, 5)


def test_what_is_running_counts_for_a_quota(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as (reached, go):
        key = door.key(tokens_per_month=61, concurrency=2)
        thread = threading.Thread(target=complete, args=(door.client(key), 40))
        thread.start()
        assert reached.wait(30)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(door.client(key), 10)
        assert caught.value.code == "insufficient_quota"
        go.set()
        thread.join()
        complete(door.client(key), 1)  # 50 are used: those that were only promised are free again


def test_only_so_many_at_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as (reached, go):
        key = door.key(concurrency=1)
        thread = threading.Thread(target=complete, args=(door.client(key),))
        thread.start()
        assert reached.wait(30)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(door.client(key))
        assert caught.value.type == "concurrency"
        go.set()
        thread.join()
        complete(door.client(key))


@contextlib.contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The model computes nothing until `go`; `reached` is set when it is first asked to."""
    reached, go, forward = threading.Event(), threading.Event(), ModelRunner.forward

    def held_forward(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        reached.set()
        assert go.wait(30)
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", held_forward)
    try:
        yield reached, go
    finally:
        go.set()


# ---- a guard -------------------------------------------------------------------------------------------------------


class Censor:
    """Lets no prompt with the token 13 pass, and no answer in which it finds its phrase."""

    window_chars, overlap_chars = 6, 4

    def __init__(self) -> None:
        self.phrase = ""

    def judge_prompt(self, request: GenerationRequest, context: GuardContext) -> Refusal | None:
        return Refusal("number", "thirteen is not talked about") if 13 in (request.prompt or ()) else None

    def judge_answer(self, text: str, context: GuardContext, *, is_end: bool) -> Refusal | None:
        return Refusal("phrase", "this neither") if self.phrase and self.phrase in text else None


def test_a_guard_refuses_in_openais_form(door: Door, gateway: Gateway) -> None:
    censor, app, key = Censor(), FastAPI(), door.key(tokens_per_day=1000)
    app.include_router(router(gateway, door.access, censor))
    install_errors(app)
    with serving(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=door.http)
        with pytest.raises(openai.BadRequestError, match="thirteen") as caught:
            client.completions.create(model="tiny", prompt=[5, 13], max_tokens=100)
        assert (caught.value.code, caught.value.param) == ("content_filter", "prompt")
        good = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0)
        censor.phrase = good.choices[0].text[14:18]
        allowed = good.choices[0].text[: good.choices[0].text.index(censor.phrase)]
        whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0).choices[0]
        assert whole.finish_reason == "content_filter"
        assert allowed.startswith(whole.text)
        chunks = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stream=True))
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "content_filter"
        assert allowed.startswith("".join(chunk.choices[0].text for chunk in chunks))
        chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "pack"}], n=2)
        assert len(chat.choices) == 2
    door.access.flush()
    (row,) = door.access.usage.read(by=("tenant",))
    assert row.tally.requests == 5
    assert row.tally.failed == 1  # the refused prompt, which cost nothing


# ---- usage ---------------------------------------------------------------------------------------------------------


def test_usage_is_what_answers_said(door: Door) -> None:
    own, other = door.key(), door.key("zeta")
    said = []
    for key in (own, own, other):
        usage = door.client(key).completions.create(model="tiny", prompt=PROMPT, max_tokens=6).usage
        assert usage is not None
        said.append((usage.prompt_tokens, usage.completion_tokens))
    chunks = door.client(own).completions.create(model="tiny", prompt=PROMPT, max_tokens=6, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    (row,) = door.get("/api/usage?by=tenant&by=deployment", own).json()
    assert (row["tenant"], row["deployment"], row["requests"], row["failed"]) == ("acme", "tiny", 3, 0)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (30, 18)
    assert said == [(10, 6)] * 3
    assert door.get("/api/usage?tenant=zeta", own).status_code == 403
    everybody = door.get("/api/usage?by=tenant", door.key("ops", Right.OBSERVE)).json()
    assert [(row["tenant"], row["requests"]) for row in everybody] == [("acme", 3), ("zeta", 1)]
    text = door.metrics()
    assert 'sihe_tenant_requests_total{outcome="completed",tenant="acme"} 3.0' in text
    assert 'sihe_tenant_tokens_total{kind="completion",tenant="zeta"} 6.0' in text


def test_a_client_that_leaves_is_charged_what_was_made_for_it(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    key = door.key(tokens_per_min=1000, concurrency=1)
    go, steps, forward = threading.Event(), iter(range(1000)), ModelRunner.forward

    def slow_forward(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        if next(steps) >= 3:
            assert go.wait(30)
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", slow_forward)
    stream = door.client(key).completions.create(model="tiny", prompt=PROMPT, max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: 'outcome="aborted",tenant="acme"} 1.0' in door.metrics(), "the end of the request")
    go.set()
    headers = complete(door.client(key), 1)  # its slot is free again
    door.access.flush()
    (row,) = door.access.usage.read(by=("tenant",))
    assert row.tally.requests == 2
    made = row.tally.completion_tokens - 1
    assert 1 <= made <= 4
    assert int(headers["x-ratelimit-remaining-tokens"]) == 1000 - (10 + made) - 11


def test_who_gives_up_by_a_limit_of_its_own_pays_for_its_prompt(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    key, go, forward = door.key(tokens_per_min=1000), threading.Event(), ModelRunner.forward

    def held(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        assert go.wait(30)
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", held)
    with pytest.raises(openai.InternalServerError):
        door.client(key).completions.create(
            model="tiny", prompt=PROMPT, max_tokens=100, extra_headers={"x-sihe-timeout-ms": "50"}
        )
    go.set()
    assert 'outcome="aborted",tenant="acme"} 1.0' in door.metrics()
    assert complete(door.client(key), 1)["x-ratelimit-remaining-tokens"] == str(1000 - 10 - 11)


def test_a_request_that_could_not_begin_costs_nothing(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    client = door.client(door.key(tokens_per_min=100, tokens_per_day=101, concurrency=1))

    def closed(self: Gateway, *_: object, **__: object) -> GenerationStream:
        raise EngineClosed("as it happens")

    with monkeypatch.context() as patch:
        patch.setattr(Gateway, "generate", closed)
        for _ in range(5):
            with pytest.raises(openai.InternalServerError):
                complete(client, 80)
    assert complete(client, 80)["x-ratelimit-remaining-tokens"] == "10"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="absent", prompt=[5], max_tokens=1)
    assert 'sihe_tenant_requests_total{outcome="failed",tenant="acme"} 6.0' in door.metrics()


def test_the_engine_hears_whose_request_it_is(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[GenerationRequest] = []
    generate = Gateway.generate

    def listening(
        self: Gateway, name: str, request: GenerationRequest, *rest: object, **named: object
    ) -> GenerationStream:
        heard.append(request)
        return generate(self, name, request, *rest, **named)  # type: ignore[arg-type] # whatever else a gateway takes

    monkeypatch.setattr(Gateway, "generate", listening)
    door.store.put_tenant(Tenant("acme", priority=7, is_isolated=True))
    complete(door.client(door.key("acme")))
    complete(door.client(door.key("zeta")))
    assert [(request.tenant, request.priority, request.cache_salt) for request in heard] == [
        ("acme", 7, "tenant:acme:"),
        ("zeta", 0, ""),
    ]


# ---- attacks -------------------------------------------------------------------------------------------------------


def test_who_guesses_too_often_must_wait_and_nobody_else_must(door: Door) -> None:
    good = door.key()
    for number in range(int(FAILURES.capacity)):
        with pytest.raises(openai.AuthenticationError):
            complete(door.client(f"guess-{number}"))
    for key in ("another", SHORT):  # the right one too: it could have been guessed
        with pytest.raises(openai.RateLimitError) as caught:
            complete(door.client(key))
        assert caught.value.response.headers["retry-after"] == "3"
    complete(door.client(good))
    door.clock.advance(3)
    complete(door.client(SHORT))
    assert door.http.get(f"{door.url}/v1/models").status_code == 401  # who shows no key guesses nothing


@pytest.mark.parametrize(
    "head",
    [
        b"Authorization: Bearer " + b"x" * 1_000_000,
        b"Authorization: Bearer " + b"x" * 5_000,
        b"Authorization: Bearer \xff\xfe\x00",
        b"Authorization: " + b"Bearer " * 500,
        b"Authorization: Bearer a\r\nAuthorization: Bearer b",
        b"Cookie: sihe_session=" + b"y" * 5_000,
        b"X: y\r\n" * 5_000 + b"X: y",
    ],
)
def test_strange_heads_harm_nobody(door: Door, head: bytes) -> None:
    address = urlsplit(door.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=30) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):  # it may hang up before everything was sent
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n")
            while piece := connection.recv(65536):
                answer += piece
    assert not answer or answer.split(b" ")[1] in (b"400", b"401", b"431")
    complete(door.client(door.key()))


def test_no_key_reaches_a_log_or_a_metric(
    door: Door, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    configure_logs("debug", "json")
    good, wrong = door.key(requests_per_min=1), door.key()[:-2] + "~~"
    complete(door.client(good))
    for key in (good, wrong):
        with pytest.raises(openai.APIStatusError):
            complete(door.client(key))
    door.http.post(f"{door.url}/v1/completions", content=b"{", headers={"authorization": f"Bearer {good}"})
    door.access.close()
    said = "".join(capsys.readouterr()) + "".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("sihe", "uvicorn", "redis"))
    )
    for secret in (good, wrong):
        assert secret not in said + door.metrics()
        assert secret.split("_", 2)[2] not in said + door.metrics()
