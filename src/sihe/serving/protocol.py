"""OpenAI's requests as values, and errors in OpenAI's form. Knows the protocol and no web framework.

Fields that clients send and that change nothing here (`user`, `metadata`, `store`, …) are accepted. Fields that would
change the answer and are not supported are refused by name: an answer that ignores half of a request is a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from sihe.core.errors import (
    Busy,
    Forbidden,
    InternalError,
    InvalidInput,
    NotFound,
    SiheError,
    TimedOut,
    TransientError,
    Unauthorized,
)
from sihe.core.http import status_of
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import (
    BadConstraint,
    ContentRefused,
    ContextTooLong,
    EngineClosed,
    EngineDead,
    InputTooLong,
    InvalidRequest,
    QuotaExceeded,
    RateLimited,
    ReplicaLost,
    SlowBody,
    UnsupportedParameter,
)
from sihe.serving.protocol_fields import Message, StructuredOutputs, constraint_of, tools_of

# Parameters that are not supported, with the values that mean "not used".
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "use_beam_search": (None, False),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "truncate_prompt_tokens": (None,),
    "documents": (None, []),
}
_ONLY_CHAT: Mapping[str, tuple[object, ...]] = {"tools": (None, []), "tool_choice": (None, "none", "auto")}
_ONLY_COMPLETIONS: Mapping[str, tuple[object, ...]] = {"echo": (None, False), "best_of": (None, 1)}
_HINTS = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "echo": "use /v1/completions",
    "best_of": "use /v1/completions",
    "tools": "use /v1/chat/completions",
    "tool_choice": "use /v1/chat/completions",
}
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions
MAX_CHOICES = 128  # OpenAI's limit for n
MAX_ANSWERS = 1024  # prompts of a request times answers to each

Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    priority: int | None = None

    @property
    def deployment(self) -> str:
        """What `model` names, without the adapter behind a colon."""
        return self.model.partition(":")[0]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_choices(self) -> int:
        """Answers to each prompt. Raises `InvalidRequest`."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= MAX_CHOICES:
            raise InvalidRequest("n", f"n must be 1 to {MAX_CHOICES}, got {count}")
        return count

    def _refuse(self, elsewhere: Mapping[str, tuple[object, ...]]) -> None:
        """Refuses by name what is not supported, here or at all."""
        extra = self.model_extra or {}
        for name, neutral in (*_NEUTRAL.items(), *elsewhere.items()):
            if extra.get(name) not in neutral:
                raise UnsupportedParameter(name, extra[name], hint=_HINTS.get(name, "leave it out"))

    def _sampling(self) -> dict[str, Any]:
        """What both endpoints share."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        names = (
            *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "priority"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        )
        given = {name: getattr(self, name) for name in names}
        if given["top_k"] == -1:  # vLLM's way to say "all"
            given["top_k"] = 0
        guided = {
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
            "guided_grammar": self.guided_grammar,
        }
        return {
            **{name: value for name, value in given.items() if value is not None},
            "adapter": self.model.partition(":")[2],
            "stop": tuple(stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logit_bias": tuple((self.logit_bias or {}).items()),
            "ignore_eos": bool(self.ignore_eos),
            "constraint": constraint_of(self.response_format, self.structured_outputs, guided),
        }


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None

    @property
    def num_candidates(self) -> int:
        """Answers that are generated to each prompt, of which the likeliest are given. Raises `InvalidRequest`."""
        wanted = self.num_choices
        count = wanted if self.best_of is None else self.best_of
        if not wanted <= count <= MAX_CHOICES:
            raise InvalidRequest("best_of", f"best_of must be n ({wanted}) to {MAX_CHOICES}, got {count}")
        if count > wanted and self.stream:
            raise InvalidRequest("best_of", "best_of cannot be streamed: which answers are best is known at their end")
        return count

    def to_generations(self) -> list[GenerationRequest]:
        """The same for the engine, one for each prompt. Raises `InvalidInput`."""
        self._refuse(_ONLY_CHAT)
        prompts = self._prompts()
        count = len(prompts) * self.num_candidates
        if count > MAX_ANSWERS:
            raise InvalidRequest("prompt", f"a request has at most {MAX_ANSWERS} answers, and this one wants {count}")
        fields = self._sampling()
        logprobs = 0 if self.logprobs is None and self.num_candidates > self.num_choices else self.logprobs
        return [
            GenerationRequest(
                prompt=prompt,
                max_tokens=_DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
                logprobs=logprobs,
                echo=bool(self.echo),
                **fields,
            )
            for prompt in prompts
        ]

    def _prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt", "the prompt is empty: give at least one token")
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [item if isinstance(item, str) else tuple(item) for item in self.prompt]


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def num_candidates(self) -> int:
        """Answers that are generated."""
        return self.num_choices

    def to_generations(self) -> list[GenerationRequest]:
        """The same for the engine: one. Raises `InvalidInput`."""
        self._refuse(_ONLY_COMPLETIONS)
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs: true")
        tools, choice, forced = tools_of(self.tools, self.tool_choice)
        return [
            GenerationRequest(
                messages=tuple(message.to_chat() for message in self.messages),
                max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                tools=tools,
                tool_choice=choice,
                forced_tool=forced,
                parallel_tool_calls=self.parallel_tool_calls is not False,
                template_options=self.chat_template_kwargs or {},
                continue_last=self._continues(),
                **self._sampling(),
            )
        ]

    def _continues(self) -> bool:
        continues = bool(self.continue_final_message)
        opens = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        if opens == continues:
            raise InvalidRequest(
                "continue_final_message",
                "an answer either goes on inside the last message or opens a turn: "
                "exactly one of continue_final_message and add_generation_prompt is true",
            )
        return continues


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


def _is_branch(part: int | str) -> bool:
    """Whether a part of pydantic's location names a branch of a union, not a field."""
    return isinstance(part, str) and (part in ("str", "int", "[key]") or part.startswith(("list[", "dict[")))


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
    if isinstance(error, BadConstraint):
        parameter = "tools" if error.kind == "tools" else "response_format"
    return status, {"error": {"message": message, "type": kind, "param": parameter, "code": code}}, headers


def _classify(error: Exception) -> tuple[int, str, str | None]:
    if isinstance(error, ContextTooLong | InputTooLong):
        return 400, "invalid_request_error", "context_length_exceeded"
    if isinstance(error, Unauthorized):
        return 401, "invalid_request_error", "invalid_api_key"
    if isinstance(error, Forbidden):
        return 403, "invalid_request_error", "insufficient_permissions"
    if isinstance(error, ContentRefused):
        return 400, "invalid_request_error", "content_filter"
    if isinstance(error, UnsupportedParameter):
        return 400, "invalid_request_error", "unsupported_parameter"
    if isinstance(error, NotFound) and error.kind in ("deployment", "adapter"):
        return 404, "invalid_request_error", "model_not_found"
    if isinstance(error, BadConstraint):
        return 400, "invalid_request_error", "invalid_constraint"
    if isinstance(error, SlowBody):
        return 408, "invalid_request_error", "request_timeout"
    if isinstance(error, QuotaExceeded):
        return 429, "insufficient_quota", "insufficient_quota"
    if isinstance(error, RateLimited):
        return 429, error.counts, "rate_limit_exceeded"
    if isinstance(error, Busy):
        return 429, "rate_limit_error", "rate_limit_exceeded"
    if isinstance(error, TimedOut):
        return 504, "server_error", "timeout"
    if isinstance(error, ReplicaLost | EngineDead | EngineClosed):
        return 503, "server_error", "replica_lost"
    if isinstance(error, TransientError):
        return 503, "server_error", "not_ready"
    if isinstance(error, InternalError) or not isinstance(error, SiheError):
        return 500, "server_error", None
    return status_of(error), "invalid_request_error", None
