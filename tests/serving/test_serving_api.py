"""The HTTP protocol, spoken by the unmodified `openai` client to a real server."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor

from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.engine.compute.step import Feed
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.ports import RequestStats
from sihe.serving.engine.runner import ModelRunner
from sihe.serving.engine.types import ChatMessage, GenerationRequest
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.metrics import ReplicaMetrics
from support.http_server import serving
from support.tiny_models import tiny_tokenizer

PROMPT = "the quick brown fox"
CHAT = [{"role": "user", "content": "pack my box"}]


@pytest.fixture
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def greedy(gateway: Gateway, max_tokens: int, **fields: object) -> str:
    request = GenerationRequest(temperature=0, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
    return gateway.generate("tiny", request).result(30).text


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "sihe"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("absent")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_what_the_engine_says(client: openai.OpenAI, gateway: Gateway) -> None:
    raw = client.completions.with_raw_response.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    completion = raw.parse()
    choice = completion.choices[0]
    assert choice.text == greedy(gateway, 12, prompt=PROMPT)
    assert (choice.finish_reason, completion.system_fingerprint) == ("length", "tiny@1")
    assert raw.headers["x-sihe-model-version"] == "tiny@1"
    prompt_tokens = len(tiny_tokenizer().encode(PROMPT).ids)
    assert completion.usage is not None
    assert completion.usage.model_dump(exclude_none=True, exclude={"prompt_tokens_details"}) == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": prompt_tokens + 12,
    }


def test_a_chat_is_rendered_by_the_models_template(client: openai.OpenAI, gateway: Gateway) -> None:
    messages = (ChatMessage("user", "pack my box"),)
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=9, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == greedy(gateway, 9, messages=messages)
    parts = [{"role": "user", "content": [{"type": "text", "text": "pack my"}, {"type": "text", "text": " box"}]}]
    same = client.chat.completions.create(model="tiny", messages=parts, max_tokens=9, temperature=0)  # type: ignore[arg-type]
    assert same.choices[0].message.content == answer.choices[0].message.content


def test_streams_join_to_the_whole_answer(client: openai.OpenAI, gateway: Gateway) -> None:
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(gateway, 20, prompt=PROMPT)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert {chunk.system_fingerprint for chunk in chunks} == {"tiny@1"}
    assert len(chunks) > 1


def test_a_chat_stream_opens_with_the_role_and_closes_with_usage(client: openai.OpenAI, gateway: Gateway) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=CHAT,  # type: ignore[arg-type]
        max_tokens=15,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == greedy(gateway, 15, messages=(ChatMessage("user", "pack my box"),))
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 15


def test_seed_stop_and_logprobs(client: openai.OpenAI, gateway: Gateway) -> None:
    sampled = [
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, temperature=1.5, seed=seed)
        .choices[0]
        .text
        for seed in (5, 5, 6)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    whole = greedy(gateway, 20, prompt=PROMPT)
    stop = whole[6:8]
    cut = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT,  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    for item in content:
        assert item.logprob == max(top.logprob for top in item.top_logprobs)
    legacy = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2).choices[0]
    assert legacy.logprobs is not None
    assert [len(top) for top in legacy.logprobs.top_logprobs or []] == [2] * 4


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"n": 0}, None, "n"),
        ({"n": 129}, None, "n"),
        ({"n": 3, "best_of": 2}, None, "best_of"),
        ({"best_of": 2, "stream": True}, None, "best_of"),
        ({"prompt": ["a"] * 1025}, None, "prompt"),
        ({"prompt": []}, None, "prompt"),
        ({"prompt": ["a", 3]}, None, "prompt"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"presence_penalty": 3.0}, None, "presence_penalty"),
        ({"logit_bias": {"fox": 1}}, None, "logit_bias.fox"),
        ({"logit_bias": {"9999": 1}}, None, "logit_bias"),
        ({"extra_body": {"tools": [{"type": "function"}]}}, "unsupported_parameter", "tools"),
        ({"extra_body": {"min_p": 2}}, None, "min_p"),
        ({"extra_body": {"min_tokens": 20}}, None, "min_tokens"),
        ({"extra_body": {"prompt_logprobs": 2}}, "unsupported_parameter", "prompt_logprobs"),
        ({"extra_body": {"guided_regex": "(a"}}, "invalid_constraint", "response_format"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["a"]}}, None, "response_format"),
        ({"extra_body": {"guided_choice": "a"}}, None, "guided_choice"),
        ({"extra_body": {"structured_outputs": {"json": {}, "regex": "a"}}}, None, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"xml": {}}}}, None, "structured_outputs.xml"),
        ({"temperature": -1}, None, "temperature"),
        ({"top_p": 0}, None, "top_p"),
        ({"max_tokens": 0}, None, "max_tokens"),
        ({"max_tokens": "many"}, None, "max_tokens"),
        ({"prompt": ""}, None, None),
        ({"prompt": [1, 9999]}, None, None),
        ({"prompt": {"text": "x"}}, None, "prompt"),
        ({"stop": [""]}, None, "stop"),
    ],
)
def test_bad_fields_are_refused_by_name(
    client: openai.OpenAI, fields: dict[str, object], code: str | None, named: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, **fields})  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == (code, named)
    assert caught.value.type == "invalid_request_error"


def test_fields_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    extra = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "n": 1,
        "presence_penalty": 0,
        "tools": [],
        "echo": False,
        "best_of": 1,
    }
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, extra_body=extra)


def test_unknown_model_and_long_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="absent", prompt=PROMPT)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * 200)
    assert long.value.code == "context_length_exceeded"
    assert "128" in str(long.value)
    assert "200" in str(long.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 3, "prompt": "x"}', b"\xff\xfe", b'{"model":"tiny"}'])
def test_malformed_bodies(server_url: str, body: bytes) -> None:
    answer = httpx.post(f"{server_url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_huge_body_and_an_unknown_path(server_url: str) -> None:
    huge = (b" " * 2**20 for _ in range(20))
    with contextlib.suppress(httpx.WriteError):  # the server may answer and close before everything was sent
        assert httpx.post(f"{server_url}/v1/completions", content=huge).status_code == 413
    answer = httpx.get(f"{server_url}/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_client_that_leaves_aborts_its_generation(
    server_url: str, monkeypatch: pytest.MonkeyPatch, streams: bool, steps: int
) -> None:
    reached, aborted, go = threading.Event(), threading.Event(), threading.Event()
    outcomes: queue.Queue[str] = queue.Queue()
    forward, abort, on_request = ModelRunner.forward, Engine._abort, ReplicaMetrics.on_request
    left = iter([False] * steps + [True] * 1000)

    def held_step(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        if next(left):
            reached.set()
            assert go.wait(30)
        return forward(self, feeds)

    def heard_abort(self: Engine, id: int) -> None:
        abort(self, id)
        aborted.set()

    def heard_end(self: ReplicaMetrics, stats: RequestStats) -> None:
        on_request(self, stats)
        outcomes.put(stats.outcome)

    monkeypatch.setattr(ModelRunner, "forward", held_step)
    monkeypatch.setattr(Engine, "_abort", heard_abort)
    monkeypatch.setattr(ReplicaMetrics, "on_request", heard_end)
    address = urlsplit(server_url)
    body = json.dumps({"model": "tiny", "prompt": [5], "max_tokens": 120, "stream": streams}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        connection.sendall(head + body)
        assert reached.wait(30)
    assert aborted.wait(30)
    go.set()
    assert outcomes.get(timeout=30) == "aborted"


def test_overload_is_429_with_a_time_to_come_back(
    server_url: str, gateway: Gateway, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, go = threading.Event(), threading.Event()
    forward = ModelRunner.forward

    def held_step(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        held.set()
        assert go.wait(30)
        return forward(self, feeds)

    gateway.deploy("tiny", "tiny@live", settings=EngineConfig(max_batch_size=1, max_waiting=1))
    gateway.wait_ready("tiny", timeout_s=30)
    monkeypatch.setattr(ModelRunner, "forward", held_step)
    request = GenerationRequest(prompt=(5,), max_tokens=2, temperature=0)
    streams = [gateway.generate("tiny", request)]
    assert held.wait(30)  # it runs; the next one waits, and one more is too many
    streams.append(gateway.generate("tiny", request))
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt=[5], max_tokens=2)
    go.set()
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "rate_limit_exceeded"
    assert [stream.result(30).usage.completion_tokens for stream in streams] == [2, 2]


def test_an_error_in_the_middle_of_a_stream_reaches_the_client(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ModelRunner.forward
    fails = iter([False] * 3 + [True] * 1000)

    def failing_step(self: ModelRunner, feeds: Sequence[Feed]) -> Tensor:
        if next(fails):
            raise RuntimeError("the oven is cold")
        return forward(self, feeds)

    monkeypatch.setattr(ModelRunner, "forward", failing_step)
    stream = client.completions.create(model="tiny", prompt=[5], max_tokens=50, temperature=0, stream=True)
    with pytest.raises(openai.APIError, match="the oven is cold"):
        list(stream)
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt=[5], max_tokens=2)


def test_keys(workspace: Workspace) -> None:
    keyed = Workspace(settings.load({"home": str(workspace.home), "server.api_keys": "right,other"}, environ={}))
    with keyed, Gateway(keyed, registry=CollectorRegistry()) as gateway:
        app = FastAPI()
        app.include_router(router(gateway))
        install_errors(app)
        with serving(app) as url:
            for key in ("wrong", "righ", "clé"):
                answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert httpx.get(f"{url}/api/deployments").status_code == 401
            with openai.OpenAI(base_url=f"{url}/v1", api_key="other") as client:
                assert list(client.models.list()) == []


def test_deployments_over_http(server_url: str, gateway: Gateway) -> None:
    with httpx.Client(base_url=server_url) as http:
        made = http.post("/api/deployments", json={"name": "second", "target": "tiny@2"})
        assert made.status_code == 201
        gateway.wait_ready("second", timeout_s=30)
        listed = {item["name"]: item for item in http.get("/api/deployments").json()}
        assert (listed["second"]["state"], listed["second"]["version"], listed["tiny"]["version"]) == ("READY", 2, 1)
        assert http.post("/api/deployments", json={"name": "x", "target": "absent@1"}).status_code == 404
        assert http.post("/api/deployments", json={"name": "../x", "target": "tiny@1"}).status_code == 400
        bad = http.post("/api/deployments", json={"name": "x", "target": "tiny@1", "settings": {"speed": 3}})
        assert bad.status_code == 400
        assert "speed" in bad.json()["error"]["message"]
        assert http.post("/api/models/tiny/aliases/live", json={"version": 2}).json()["version"] == 2
        gateway.wait_ready("tiny", timeout_s=30)
        assert http.get("/api/deployments/tiny").json()["version"] == 2
        assert http.post("/api/models/tiny/aliases/live", json={"version": 9}).status_code == 404
        assert http.delete("/api/deployments/second").status_code == 204
        assert http.delete("/api/deployments/second").status_code == 404


def test_metrics(client: openai.OpenAI, registry: CollectorRegistry) -> None:
    def counts() -> list[float]:
        names = ("requests_total", "ttft_seconds_count", "tpot_seconds_count", "queue_seconds_count")
        outcome = {"requests_total": {"outcome": "length"}}
        return [
            registry.get_sample_value(f"sihe_serving_{name}", {"deployment": "tiny", **outcome.get(name, {})}) or 0
            for name in names
        ]

    before = counts()
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, temperature=0)
    assert counts() == [count + 1 for count in before]
    text = generate_latest(registry).decode()
    assert 'sihe_serving_kv_used_ratio{deployment="tiny",version="1"}' in text
