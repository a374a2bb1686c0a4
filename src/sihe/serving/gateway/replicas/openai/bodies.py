"""A request as OpenAI's protocol says it, and what a server's chunks say. Pure.

Fields that the protocol does not have (`top_k`, `min_p`, `ignore_eos`, …) go by vLLM's names for them
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#extra-parameters), and only where the request
uses them: a server that does not know them refuses, which is better than an answer to another request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sihe.core.errors import InternalError, InvalidInput
from sihe.serving.engine.tools import ToolCallDelta
from sihe.serving.engine.types import ChatMessage, FinishReason, GenerationRequest, TokenLogprob
from sihe.serving.errors import QueueFull, ReplicaLost

_UNKNOWN = -1  # the id of a token that the protocol gives as text only
_EXTRAS: Mapping[str, object] = {
    "top_k": 0,
    "min_p": 0.0,
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "priority": 0,
}


def path_of(request: GenerationRequest) -> str:
    """The endpoint for a request, below `/v1`."""
    return "/completions" if request.messages is None else "/chat/completions"


def body_of(request: GenerationRequest, model: str) -> dict[str, Any]:
    """The body of a request to the server's `model`, streamed. Raises `InvalidInput` for what cannot be said."""
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "max_tokens": request.max_tokens,
        "stop": list(request.stop) or None,
    }
    body |= {name: getattr(request, name) for name, neutral in _EXTRAS.items() if getattr(request, name) != neutral}
    if request.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias}
    if request.stop_token_ids:
        body["stop_token_ids"] = list(request.stop_token_ids)
    if request.adapter:
        raise InvalidInput("adapter: a replica behind OpenAI's protocol serves adapters as models of their own")
    body |= _constraint(request)
    return body | (_completion(request) if request.messages is None else _chat(request))


def _completion(request: GenerationRequest) -> dict[str, Any]:
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt or ())
    return {"prompt": prompt, "logprobs": request.logprobs, **({"echo": True} if request.echo else {})}


def _chat(request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [_message(message) for message in request.messages or ()]}
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs}
    if request.tools:
        body["tools"] = [dict(tool.definition) for tool in request.tools]
        forced = request.forced_tool
        body["tool_choice"] = (
            request.tool_choice if forced is None else {"type": "function", "function": {"name": forced}}
        )
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.template_options:
        body["chat_template_kwargs"] = dict(request.template_options)
    if request.continue_last:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _message(message: ChatMessage) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        said["name"] = message.name
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return said


def _constraint(request: GenerationRequest) -> dict[str, Any]:
    constraint = request.constraint
    if constraint is None:
        return {}
    if constraint.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if constraint.kind == "json_schema":
        schema = {"name": "answer", "schema": json.loads(constraint.source)}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    source = json.loads(constraint.source) if constraint.kind == "choice" else constraint.source
    return {"structured_outputs": {constraint.kind: source}}


# ---- answers --------------------------------------------------------------------------------------------------------


def choice_of(chunk: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one choice of a chunk; empty for a chunk of usage."""
    choices = chunk.get("choices") or [{}]
    first = choices[0]
    return first if isinstance(first, Mapping) else {}


def text_of(choice: Mapping[str, Any]) -> str:
    """The text that a chunk adds."""
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, Mapping) else choice.get("text")
    return text if isinstance(text, str) else ""


def tool_calls_of(choice: Mapping[str, Any]) -> tuple[ToolCallDelta, ...]:
    """The pieces of tool calls that a chunk adds."""
    delta = choice.get("delta")
    pieces = (delta.get("tool_calls") if isinstance(delta, Mapping) else None) or []
    return tuple(
        ToolCallDelta(
            int(piece.get("index", 0)),
            (piece.get("function") or {}).get("arguments") or "",
            piece.get("id"),
            (piece.get("function") or {}).get("name"),
        )
        for piece in pieces
    )


def finish_of(choice: Mapping[str, Any]) -> FinishReason | None:
    """Why the answer ends with this chunk, if it does."""
    reason = choice.get("finish_reason")
    if reason is None:
        return None
    return "length" if reason == "length" else "tool_calls" if reason == "tool_calls" else "stop"


def logprobs_of(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """The log-probabilities of a chunk, in either endpoint's form."""
    given = choice.get("logprobs")
    if not isinstance(given, Mapping):
        return ()
    if "content" in given:
        return tuple(_entry(item) for item in given["content"] or ())
    tops: Sequence[Any] = given.get("top_logprobs") or [None] * len(given.get("tokens") or ())
    return tuple(
        TokenLogprob(
            _UNKNOWN,
            logprob,
            token.encode(),
            tuple(TokenLogprob(_UNKNOWN, value, other.encode()) for other, value in (top or {}).items()),
        )
        for token, logprob, top in zip(given.get("tokens") or (), given.get("token_logprobs") or (), tops, strict=False)
    )


def _entry(item: Mapping[str, Any]) -> TokenLogprob:
    given = item.get("bytes")
    piece = bytes(given) if given is not None else str(item["token"]).encode()
    return TokenLogprob(
        _UNKNOWN, item.get("logprob"), piece, tuple(_entry(other) for other in item.get("top_logprobs") or ())
    )


def error_of(status: int, data: bytes, retry_after: str | None, *, name: str, waiting: int) -> Exception:
    """The error that a server's answer means: the request's own, a full queue, or the replica's."""
    try:
        said = json.loads(data)
        message = str((said.get("error") or said).get("message", said))
    except (ValueError, AttributeError):
        message = data[:200].decode("utf-8", "replace")
    if status == 429:
        wait_s = float(retry_after) if retry_after and retry_after.replace(".", "", 1).isdigit() else 1.0
        return QueueFull(waiting, retry_after_s=wait_s)
    if status in (400, 413, 422):
        return InvalidInput(message)
    if status in (502, 503, 504):
        return ReplicaLost(f"the server of {name} answers {status}: {message}")
    return InternalError(f"the server of {name} answers {status}: {message}")
