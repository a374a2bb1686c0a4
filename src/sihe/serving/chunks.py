"""OpenAI's answers: whole ones as values, streamed ones as bytes whose constant parts are built once a stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal

import orjson

from sihe.serving.engine.tools import ToolCall, ToolCallDelta
from sihe.serving.engine.types import FinishReason, Generation, GenerationEvent, TokenLogprob, Usage

DONE = b"data: [DONE]\n\n"
Kind = Literal["text_completion", "chat.completion"]


def usage_body(usage: Usage) -> dict[str, Any]:
    """`usage` of an answer."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def total(usages: Iterable[Sequence[Usage]]) -> Usage:
    """What a request with several answers cost; those of one inner sequence share their prompt, which counts once."""
    groups = [group for group in usages if group]
    return Usage(
        prompt_tokens=sum(max(usage.prompt_tokens for usage in group) for group in groups),
        completion_tokens=sum(usage.completion_tokens for group in groups for usage in group),
        cached_tokens=sum(min(usage.cached_tokens for usage in group) for group in groups),
    )


class Answer:
    """One answer of `served_by`, in the form of its endpoint, with its choices by their index."""

    def __init__(self, kind: Kind, id: str, created: int, model: str, served_by: str) -> None:
        self._kind = kind
        self._is_chat = kind == "chat.completion"
        self._offsets: dict[int, int] = {}  # characters of the tokens listed so far, of each choice
        self._head: dict[str, Any] = {"id": id, "created": created, "model": model, "system_fingerprint": served_by}
        # {"id":…,"choices":[{"index":  INDEX  ,"delta":{"content":  TEXT  },"finish_reason":null}]}
        shared = orjson.dumps({**self._head, "object": self._chunk_object})[:-1]
        self._before = b"data: " + shared + b',"choices":[{"index":'
        self._middle = b',"delta":{"content":' if self._is_chat else b',"text":'
        self._after = (b"}" if self._is_chat else b"") + b',"logprobs":null,"finish_reason":null}]}\n\n'

    def whole(self, generations: Sequence[Generation], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        return orjson.dumps({**self._head, "object": self._kind, "choices": choices, "usage": usage_body(usage)})

    def first(self, index: int = 0) -> bytes:
        """The chunk that opens a chat's choice by naming the role; nothing for a completion."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None) if self._is_chat else b""

    def event(self, event: GenerationEvent, index: int = 0) -> bytes:
        """The chunks of one event; empty when it shows nothing."""
        if event.finish_reason is None and not event.logprobs and not event.tool_calls:
            if not event.text:
                return b""
            return self._before + b"%d" % index + self._middle + orjson.dumps(event.text) + self._after
        if not self._is_chat:
            choice: dict[str, Any] = {"text": event.text}
        else:
            delta: dict[str, Any] = {"content": event.text} if event.text or event.logprobs else {}
            if event.tool_calls:
                delta["tool_calls"] = [_call_delta(call) for call in event.tool_calls]
            choice = {"delta": delta}
        return self._chunk(index, {**choice, "logprobs": self._logprobs(event.logprobs, index)}, event.finish_reason)

    def usage(self, usage: Usage) -> bytes:
        """The chunk that closes a stream whose client asked for usage."""
        body = {**self._head, "object": self._chunk_object, "choices": [], "usage": usage_body(usage)}
        return b"data: " + orjson.dumps(body) + b"\n\n"

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _choice(self, index: int, generation: Generation) -> dict[str, Any]:
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": generation.text, "refusal": None}
            if generation.tool_calls:
                message["content"] = generation.text or None
                message["tool_calls"] = [_call(call) for call in generation.tool_calls]
            choice: dict[str, Any] = {"message": message}
        else:
            choice = {"text": generation.text}
        return choice | {
            "index": index,
            "finish_reason": generation.finish_reason,
            "logprobs": self._logprobs(generation.logprobs, index),
        }

    def _chunk(self, index: int, choice: dict[str, Any], reason: FinishReason | None) -> bytes:
        body = {
            **self._head,
            "object": self._chunk_object,
            "choices": [{"index": index, "logprobs": None, "finish_reason": reason, **choice}],
        }
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _logprobs(self, items: Sequence[TokenLogprob], index: int) -> dict[str, Any] | None:
        if not items:
            return None
        if self._is_chat:
            return {
                "content": [{**_entry(item), "top_logprobs": [_entry(other) for other in item.top]} for item in items],
                "refusal": None,
            }
        tokens = [item.text for item in items]
        ends = list(accumulate((len(token) for token in tokens), initial=self._offsets.get(index, 0)))
        self._offsets[index] = ends[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [None if item.logprob is None else _by_text(item.top) for item in items],
            "text_offset": ends[:-1],
        }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(delta: ToolCallDelta) -> dict[str, Any]:
    function = {"arguments": delta.arguments}
    if delta.id is None:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}


def _by_text(top: Sequence[TokenLogprob]) -> dict[str, float | None]:
    """Tokens by their text, as completions want it; one whose text another has already goes by its id.

    Tokens that are parts of a character all read as the replacement character.
    """
    named: dict[str, float | None] = {}
    for item in top:
        text = item.text
        named[f"token_id:{item.token_id}" if text in named else text] = item.logprob
    return named


def _entry(item: TokenLogprob) -> dict[str, Any]:
    return {"token": item.text, "logprob": item.logprob, "bytes": list(item.piece)}


def error_chunk(body: dict[str, Any]) -> bytes:
    """An error that comes after a stream has begun."""
    return b"data: " + orjson.dumps(body) + b"\n\n"
