"""OpenAI's requests as values, and errors in OpenAI's form. Knows the protocol and no web framework.

Fields that clients send and that change nothing here (`user`, `metadata`, `store`, …) are accepted. Fields that would
change the answer and are not supported are refused by name: an answer that ignores half of a request is a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sihe.core.errors import (
    Busy,
    Forbidden,
    InternalError,
    InvalidInput,
    NotFound,
    SiheError,
    TransientError,
    Unauthorized,
)
from sihe.core.http import status_of
from sihe.serving.engine.types import ChatMessage, GenerationRequest
from sihe.serving.errors import ContextTooLong, InputTooLong, QuotaExceeded, RateLimited, UnsupportedParameter

# Parameters that are not supported, with the values that mean "not used".
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
_HINTS = {"n": "send one request for each answer", "best_of": "send one request for each answer"}
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions

Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self) -> dict[str, Any]:
        """What both endpoints share, and the refusal of what neither supports."""
        for name, neutral in _NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value not in neutral:
                raise UnsupportedParameter(name, value, hint=_HINTS.get(name, "leave it out"))
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        return {
            **{name: value for name, value in given.items() if value is not None},
            "stop": tuple(stop),
            "ignore_eos": bool(self.ignore_eos),
        }


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None

    def to_generation(self) -> GenerationRequest:
        """The same for the engine. Raises `InvalidInput`."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise UnsupportedParameter("prompt", f"a list of {len(prompt)}", hint="send one request for each")
            prompt = prompt[0]
        return GenerationRequest(
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            max_tokens=_DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            **self._sampling(),
        )


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1)
    content: str | list[_Part] | None = None

    def to_chat(self) -> ChatMessage:
        parts = self.content if isinstance(self.content, list) else []
        for part in parts:
            if part.type != "text":
                raise UnsupportedParameter("messages", part.type, hint="messages carry text only")
        text = self.content if isinstance(self.content, str) else "".join(part.text or "" for part in parts)
        return ChatMessage(self.role, text)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None

    def to_generation(self) -> GenerationRequest:
        """The same for the engine. Raises `InvalidInput`."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs: true")
        return GenerationRequest(
            messages=tuple(message.to_chat() for message in self.messages),
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self._sampling(),
        )


def parse(kind: type[Body], data: bytes) -> Body:
    """A request from the bytes of its body. Raises `InvalidInput` that names the field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidInput(f"the body is not valid JSON: {first['msg']}") from error
        where = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
        raise InvalidRequest(where or "body", f"{where or 'the body'}: {first['msg'].lower()}") from error


class InvalidRequest(InvalidInput):
    """A field of a request has the wrong form; `parameter` names it."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


def _is_branch(part: int | str) -> bool:
    """Whether a part of pydantic's location names a branch of a union, not a field."""
    return isinstance(part, str) and (part in ("str", "int") or part.startswith("list["))


def error_body(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers of an error, in the form that OpenAI's clients read."""
    status, kind, code = _classify(error)
    headers: dict[str, str] = {}
    if isinstance(error, TransientError):
        # Rounded up: who comes back a little too early is refused again.
        headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after_s", 1.0))))
    headers |= getattr(error, "headers", {})
    message = str(error) if isinstance(error, SiheError) else "internal error: see the server's log"
    parameter = getattr(error, "parameter", "model" if code == "model_not_found" else None)
    return status, {"error": {"message": message, "type": kind, "param": parameter, "code": code}}, headers


def _classify(error: Exception) -> tuple[int, str, str | None]:
    if isinstance(error, ContextTooLong | InputTooLong):
        return 400, "invalid_request_error", "context_length_exceeded"
    if isinstance(error, Unauthorized):
        return 401, "invalid_request_error", "invalid_api_key"
    if isinstance(error, Forbidden):
        return 403, "invalid_request_error", "insufficient_permissions"
    if isinstance(error, UnsupportedParameter):
        return 400, "invalid_request_error", "unsupported_parameter"
    if isinstance(error, NotFound) and error.kind == "deployment":
        return 404, "invalid_request_error", "model_not_found"
    if isinstance(error, QuotaExceeded):
        return 429, "insufficient_quota", "insufficient_quota"
    if isinstance(error, RateLimited):
        return 429, error.counts, "rate_limit_exceeded"
    if isinstance(error, Busy):
        return 429, "rate_limit_error", "rate_limit_exceeded"
    if isinstance(error, TransientError):
        return 503, "server_error", "not_ready"
    if isinstance(error, InternalError) or not isinstance(error, SiheError):
        return 500, "server_error", None
    return status_of(error), "invalid_request_error", None
