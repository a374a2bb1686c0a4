"""What goes into the engine and what comes out. Values only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sihe.core.errors import InvalidInput

FinishReason = Literal["stop", "length"]

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate, checked when made.

    Exactly one of `prompt` (text, or token ids taken as they are) and `messages` (rendered by the model's chat
    template) is given. `max_tokens=None` goes on to the end of the context. `temperature=0` is greedy; `top_k=0` and
    `top_p=1` restrict nothing. With a `seed` the same request gives the same tokens, alone or in any batch. Text stops
    before the first of the `stop` strings. `logprobs=n` reports each chosen token and the n most likely beside it.
    """

    prompt: str | tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidInput("a request has either a prompt or messages: give exactly one of the two")
        if self.prompt is not None and len(self.prompt) == 0:
            raise InvalidInput("the prompt is empty: give at least one token")
        if self.messages is not None and len(self.messages) == 0:
            raise InvalidInput("messages is empty: give at least one")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(
            math.isfinite(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            self.temperature,
            "0 (greedy) to 100",
        )
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer")
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", self.stop, f"at most {MAX_STOP_STRINGS} strings")
        _check(all(self.stop), "stop", self.stop, "made of strings that are not empty")
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"0 to {MAX_LOGPROBS}",
        )


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidInput(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request has cost so far."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log of a generated token's probability before temperature, and of the likeliest ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """What one step, or several that nobody had read yet, added to an answer.

    `text` may be empty while bytes of a character or the beginning of a stop string are held back. The last event, and
    no other, has a `finish_reason`.
    """

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


def join_events(events: list[GenerationEvent]) -> GenerationEvent:
    """Consecutive events as one."""
    if len(events) == 1:
        return events[0]
    return GenerationEvent(
        text="".join(event.text for event in events),
        token_ids=tuple(token for event in events for token in event.token_ids),
        usage=events[-1].usage,
        finish_reason=events[-1].finish_reason,
        logprobs=tuple(item for event in events for item in event.logprobs),
    )
