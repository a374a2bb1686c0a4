"""More of OpenAI's protocol by its own client: choices, constraints, tools, echo, and clients that dawdle."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict

from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.serving import bodies, generation_api
from sihe.serving.api import install_errors, router
from sihe.serving.chunks import Answer
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.gateway.gateway import Gateway
from support.http_server import serving
from support.tiny_models import tiny_config, tiny_model, tiny_tokenizer

PROMPT = "the quick brown fox"
CHAT: list[Any] = [{"role": "user", "content": "fox"}]
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | length }}{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content }}{{ message.tool_calls | default([]) | length }}<|end|>{% endfor %}<|assistant|>"
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "one of two",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rom"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time_in")
]
# a model of random weights would write white space wherever a constraint allows it
NO_SPACE = {str(id): -50 for id in range(300) if not tiny_tokenizer().decode([id]).strip()}


class Server(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    url: str
    gateway: Gateway


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    folder = tiny_model(tmp_path_factory.mktemp("models") / "m", config=tiny_config(max_positions=1024, eos=False))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    with Workspace(settings.load({"home": str(home)}, environ={}, directory=home)) as workspace:
        workspace.tracking.register_model("tiny", folder)
        with Gateway(workspace, poll_interval_s=0.05, registry=CollectorRegistry()) as gateway:
            gateway.deploy("tiny", "tiny", settings=EngineConfig(max_batch_size=8, token_budget=64))
            gateway.wait_ready("tiny", timeout_s=30)
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            with serving(app) as url:
                yield Server(url=url, gateway=gateway)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_choices_are_numbered_and_share_their_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, n=4, max_tokens=12, seed=7, temperature=1.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48
    assert answer.usage.prompt_tokens == len(tiny_tokenizer().encode(PROMPT).ids)
    again = client.completions.create(model="tiny", prompt=PROMPT, n=4, max_tokens=12, seed=7, temperature=1.5)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    alone = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=7, temperature=1.5)
    assert alone.choices[0].text == answer.choices[0].text


def test_a_list_of_prompts_is_answered_in_its_order(client: openai.OpenAI) -> None:
    prompts = ["fox", "pack my box", "dozen jugs"]
    alone = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in prompts
    ]
    for given in (prompts, [tiny_tokenizer().encode(prompt).ids for prompt in prompts]):
        answer = client.completions.create(model="tiny", prompt=given, n=2, max_tokens=6, temperature=0)  # type: ignore[arg-type]
        assert [choice.text for choice in answer.choices] == [alone[0]] * 2 + [alone[1]] * 2 + [alone[2]] * 2
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(len(tiny_tokenizer().encode(prompt).ids) for prompt in prompts)


def test_a_stream_of_choices_joins_to_the_same(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": CHAT, "n": 3, "max_tokens": 15, "seed": 3}
    whole = client.chat.completions.create(**fields)
    texts, roles, reasons = ["", "", ""], [0, 0, 0], ["", "", ""]
    usage = None
    for chunk in client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert (roles, reasons) == ([1, 1, 1], ["length"] * 3)
    assert usage is not None
    assert usage.completion_tokens == 45


def test_the_best_of_several_are_the_likeliest(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 11, "temperature": 1.2}
    every = client.completions.create(**fields, n=6, logprobs=0)

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    best = sorted(every.choices, key=mean, reverse=True)[:2]
    answer = client.completions.create(**fields, n=2, best_of=6)
    assert [choice.text for choice in answer.choices] == [choice.text for choice in best]
    assert [choice.logprobs for choice in answer.choices] == [None, None]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48


def test_one_version_answers_all_choices(server: Server, client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=["a", "b"], n=3, max_tokens=4, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-sihe-model-version"] == raw.parse().system_fingerprint == "tiny@1"
    other = client.completions.with_raw_response.create(
        model="tiny", prompt="a", max_tokens=1, extra_headers={"x-request-id": "two words"}
    )
    assert other.headers["x-request-id"].startswith("req_")
    refused = httpx.post(f"{server.url}/v1/completions", content=b"{", headers={"x-request-id": "mine-2"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine-2")


# ---- echo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_scores_the_prompt(client: openai.OpenAI, stream: bool) -> None:
    """As evaluation harnesses ask: the whole text back, with the probability of each of its tokens."""
    ids = tiny_tokenizer().encode(PROMPT).ids
    fields: dict[str, Any] = {"model": "tiny", "prompt": [ids, ids[:3]], "echo": True, "logprobs": 1, "max_tokens": 1}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True) if chunk.choices]
        first = [chunk for chunk in chunks if chunk.index == 0]
        tokens = [token for chunk in first for token in chunk.logprobs.tokens]
        offsets = [at for chunk in first for at in chunk.logprobs.text_offset]
        assert len(tokens) == len(ids) + 1
        assert offsets == [sum(map(len, tokens[:at])) for at in range(len(tokens))]
        return
    answer = client.completions.create(**fields, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert answer.choices[0].text.startswith(PROMPT)
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens or ()) == len(ids) + 1
    second = answer.choices[1].logprobs
    assert second is not None
    assert (second.token_logprobs or [])[1:3] == pytest.approx(logprobs.token_logprobs[1:3], abs=1e-5)
    none = client.completions.create(model="tiny", prompt=PROMPT, echo=True, max_tokens=0)
    assert (none.choices[0].text, none.choices[0].finish_reason) == (PROMPT, "length")


# ---- constraints -----------------------------------------------------------------------------------------------------


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["city", "river"]
    near: list[Literal["sea", "hill"]]


def test_the_clients_own_models_are_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=CHAT, response_format=Place, logit_bias=NO_SPACE, max_tokens=700, seed=5
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_other_constraints(client: openai.OpenAI) -> None:
    def text(**fields: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=300, logit_bias=NO_SPACE, seed=1, extra_body=fields
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""

    assert text(guided_choice=["fox", "dog"]) in ("fox", "dog")
    assert text(structured_outputs={"regex": "[ab]{3}"}).strip("ab") == ""
    assert text(guided_grammar='start: "x" | "(" start ")"').strip("()") == "x"
    assert text(guided_json={"enum": [17, "you"]}) in ("17", '"you"')


@pytest.mark.parametrize(
    ("format", "code", "named"),
    [
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}},
            "invalid_constraint",
            "response_format",
        ),
        ({"type": "json_schema"}, None, "response_format"),
        ({"type": "xml"}, "unsupported_parameter", "response_format"),
    ],
)
def test_impossible_formats(client: openai.OpenAI, format: Any, code: str | None, named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=CHAT, response_format=format)
    assert (caught.value.code, caught.value.param) == (code, named)


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_required_tools_are_called_and_stream_to_the_same(client: openai.OpenAI, seed: int) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": CHAT,
        "tools": TOOLS,
        "tool_choice": "required",
        "logit_bias": NO_SPACE,
        "max_tokens": 900,
        "seed": seed,
    }
    whole = client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls
    for call in whole.message.tool_calls:
        assert call.type == "function"
        assert call.function.name in ("weather", "time_in")
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rom")
    assert len({call.id for call in whole.message.tool_calls}) == len(whole.message.tool_calls)
    with client.chat.completions.stream(**fields) as stream:
        joined = stream.get_final_completion().choices[0]
    assert [call.function.arguments for call in joined.message.tool_calls or ()] == [
        call.function.arguments for call in whole.message.tool_calls if call.type == "function"
    ]
    assert joined.finish_reason == "tool_calls"


def test_a_named_tool_and_the_turns_that_follow(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "time_in"}}
    fields: dict[str, Any] = {"model": "tiny", "tools": TOOLS, "logit_bias": NO_SPACE, "seed": 1}
    first = (
        client.chat.completions.create(messages=CHAT, tool_choice=named, max_tokens=400, **fields).choices[0].message
    )
    assert first.tool_calls is not None
    (call,) = first.tool_calls
    assert call.type == "function"
    assert call.function.name == "time_in"
    turns: list[Any] = [*CHAT, first, {"role": "tool", "tool_call_id": call.id, "content": "noon"}]
    second = client.chat.completions.create(messages=turns, max_tokens=5, **fields)
    assert second.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None, "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, None, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "absent"}}}, None, None),
        ({"tool_choice": "required"}, None, None),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_parameter",
            "messages",
        ),
        ({"messages": []}, None, None),
        ({"chat_template_kwargs": {"messages": []}}, None, None),
        ({"continue_final_message": True, "add_generation_prompt": True}, None, "continue_final_message"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}],
                "tool_choice": "required",
            },
            "invalid_constraint",
            "tools",
        ),
    ],
)
def test_bad_chats_are_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], code: str | None, named: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=CHAT, extra_body=fields)
    assert (caught.value.code, caught.value.param) == (code, named)


# ---- clients that dawdle ---------------------------------------------------------------------------------------------


def test_a_slow_body_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.2)
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = connection.recv(4096)
        while b"}}" not in answer:
            answer += connection.recv(4096)
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert b"request_timeout" in answer


def test_a_client_that_does_not_read_is_let_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is closed, and meanwhile others are answered."""
    monkeypatch.setattr(generation_api, "SEND_TIMEOUT_S", 0.3)
    let_go = threading.Event()
    warning = generation_api._log.warning

    def heard(event: str, **fields: Any) -> None:
        warning(event, **fields)
        if event == "reader_gone":
            let_go.set()

    monkeypatch.setattr(generation_api._log, "warning", heard)
    event = Answer.event  # chunks so large that the buffers of the two sides are full soon
    monkeypatch.setattr(Answer, "event", lambda *given: event(*given) + b": " + b"x" * 300_000 + b"\n\n")
    address = urlsplit(server.url)
    body = {"model": "tiny", "prompt": "fox", "max_tokens": 1000, "n": 2, "stream": True}
    data = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((str(address.hostname), int(address.port or 0)))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        connection.recv(100)
        request = GenerationRequest(prompt="fox", max_tokens=3, temperature=0)
        assert server.gateway.generate("tiny", request).result(30).usage.completion_tokens == 3
        assert let_go.wait(60)
    deadline = time.monotonic() + 30
    while any(replica.in_flight for replica in server.gateway.status("tiny").replicas):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_texts_and_tokens(server: Server) -> None:
    with httpx.Client(base_url=server.url) as http:
        found = http.post("/tokenize", json={"model": "tiny", "prompt": PROMPT, "return_token_strs": True}).json()
        ids = tiny_tokenizer().encode(PROMPT).ids
        assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 1024)
        assert "".join(found["token_strs"]) == PROMPT
        assert http.post("/detokenize", json={"model": "tiny", "tokens": ids}).json() == {"prompt": PROMPT}
        chat = http.post("/tokenize", json={"model": "tiny", "messages": CHAT, "tools": TOOLS}).json()
        text = http.post("/detokenize", json={"model": "tiny", "tokens": chat["tokens"]}).json()["prompt"]
        assert text == "<tool_call>2<|user|>fox0<|end|><|assistant|>"
        for body, status in (
            ({"model": "tiny"}, 400),
            ({"model": "absent", "prompt": "x"}, 404),
            ({"model": "tiny", "messages": []}, 400),
        ):
            refused = http.post("/tokenize", json=body)
            assert refused.status_code == status
            assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        assert http.post("/detokenize", json={"model": "tiny", "tokens": [10**9]}).status_code == 400
