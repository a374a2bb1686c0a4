"""What tenants are charged with over HTTP, and a guard over what they ask."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import pytest
from fastapi import FastAPI
from torch import Tensor

from sihe.serving.api import install_errors, router
from sihe.serving.engine.runner import Feed, ModelRunner
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EngineClosed
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.ports import GuardContext, Refusal
from sihe.serving.tenants import Right, Tenant
from support.debian import wait_until
from support.http_server import serving
from support.tenant_door import PROMPT, Door, complete, opened_door


@pytest.fixture
def door(gateway: Gateway, tmp_path: Path) -> Iterator[Door]:
    with opened_door(gateway, tmp_path) as opened:
        yield opened


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
