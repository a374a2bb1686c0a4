"""OpenAI's answers: whole ones as values, streamed ones as bytes whose constant parts are built once a stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import orjson

from sihe.serving.engine.types import FinishReason, Generation, GenerationEvent, TokenLogprob, Usage

DONE = b"data: [DONE]\n\n"
Kind = Literal["text_completion", "chat.completion"]


def usage_body(usage: Usage) -> dict[str, int]:
    """`usage` of an answer."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


class Answer:
    """One answer of `served_by`, in the form of its endpoint."""

    def __init__(self, kind: Kind, id: str, created: int, model: str, served_by: str) -> None:
        self._kind = kind
        self._is_chat = kind == "chat.completion"
        self._offset = 0  # characters of the tokens listed so far
        self._head: dict[str, Any] = {"id": id, "created": created, "model": model, "system_fingerprint": served_by}
        # {"id":…,"choices":[{"index":0,"delta":{"content":  TEXT  },"finish_reason":null}]}
        shared = orjson.dumps({**self._head, "object": self._chunk_object})[:-1]
        opening = b'"delta":{"content":' if self._is_chat else b'"text":'
        self._before = b"data: " + shared + b',"choices":[{"index":0,' + opening
        self._after = (b"}" if self._is_chat else b"") + b',"logprobs":null,"finish_reason":null}]}\n\n'

    def whole(self, generation: Generation) -> bytes:
        """The body of an answer that is not streamed."""
        if self._is_chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": generation.text, "refusal": None}}
        else:
            choice = {"text": generation.text}
        choice |= {
            "index": 0,
            "finish_reason": generation.finish_reason,
            "logprobs": self._logprobs(generation.logprobs),
        }
        body = {**self._head, "object": self._kind, "choices": [choice], "usage": usage_body(generation.usage)}
        return orjson.dumps(body)

    def first(self) -> bytes:
        """The chunk that opens a chat stream by naming the role; nothing for a completion."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._is_chat else b""

    def event(self, event: GenerationEvent) -> bytes:
        """The chunks of one event; empty when it shows nothing."""
        if event.finish_reason is None and not event.logprobs:
            return self._before + orjson.dumps(event.text) + self._after if event.text else b""
        delta: dict[str, Any] = {"content": event.text} if event.text or event.logprobs else {}
        choice = {"delta": delta} if self._is_chat else {"text": event.text}
        return self._chunk({**choice, "logprobs": self._logprobs(event.logprobs)}, event.finish_reason)

    def usage(self, usage: Usage) -> bytes:
        """The chunk that closes a stream whose client asked for usage."""
        body = {**self._head, "object": self._chunk_object, "choices": [], "usage": usage_body(usage)}
        return b"data: " + orjson.dumps(body) + b"\n\n"

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _chunk(self, choice: dict[str, Any], reason: FinishReason | None) -> bytes:
        body = {
            **self._head,
            "object": self._chunk_object,
            "choices": [{"index": 0, "logprobs": None, "finish_reason": reason, **choice}],
        }
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _logprobs(self, items: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not items:
            return None
        if self._is_chat:
            return {
                "content": [
                    {
                        **_entry(item),
                        "top_logprobs": [_entry(other) for other in item.top],
                    }
                    for item in items
                ],
                "refusal": None,
            }
        tokens = [item.text for item in items]
        ends = list(accumulate((len(token) for token in tokens), initial=self._offset))
        self._offset = ends[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [_by_text(item.top) for item in items],
            "text_offset": ends[:-1],
        }


def _by_text(top: Sequence[TokenLogprob]) -> dict[str, float | None] | None:
    """Tokens by their text, as completions want it; one whose text another has already goes by its id.

    Tokens that are parts of a character all read as the replacement character. None where there is nothing, as for the
    first token of a prompt.
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
