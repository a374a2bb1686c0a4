"""What goes into the engine and what comes out. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sihe.core.errors import InvalidInput
from sihe.serving.engine.tools import Tool, ToolCall, ToolCallDelta, ToolChoice, check_choice, join_deltas
from sihe.serving.errors import InvalidRequest

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
ConstraintKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "tools"]

MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs
MAX_PRIORITY = 1_000_000
MAX_LOGIT_BIAS = 1024
# OpenAI's bounds (platform.openai.com/docs/api-reference/chat/create), which vLLM has, too (vllm/sampling_params.py).
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0  # of presence and frequency, either way
MAX_BIAS = 100.0  # of a logit, either way; vLLM cuts off there
# vLLM takes any number above 0. By a hundred, either way, what it acts on is chosen always or never.
REPETITION_PENALTIES = (0.01, 100.0)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation: an assistant's may hold `tool_calls`, a tool's names the call that it answers."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like: any JSON object, a JSON schema, a regular expression, a Lark grammar, one of
    several strings (`choice`, a JSON list), or calls of tools (a Lark grammar that the engine writes). `source` is its
    text."""

    kind: ConstraintKind
    source: str


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate, checked when made.

    Exactly one of `prompt` (text, or token ids taken as they are) and `messages` (rendered by the model's chat
    template, which also gets `tools` and `template_options`) is given. `continue_last` lets the answer go on inside the
    last message instead of opening a turn.

    `max_tokens=None` goes on to the end of the context; below `min_tokens` the answer does not end by itself.
    `temperature=0` is greedy; `top_k=0`, `top_p=1` and `min_p=0` restrict nothing. With a `seed` the same request gives
    the same tokens, alone or in any batch. `logit_bias` adds to the logits of token ids; `repetition_penalty` (prompt
    and answer), `presence_penalty` and `frequency_penalty` (answer) act on tokens that were there before. Text stops
    before the first of the `stop` strings, and at a token of `stop_token_ids`. `logprobs=n` reports each chosen token
    and the n most likely beside it. `echo` puts the prompt before the answer, with its log-probabilities if those are
    asked for; only then may `max_tokens` be 0. `constraint` is obeyed by every token.

    `priority` (lower is sooner), `tenant`, `cache_salt` (requests share cached prefixes only under one salt) and
    `adapter` are the scheduler's, the cache's and the model's.
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
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    echo: bool = False
    constraint: Constraint | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    forced_tool: str | None = None
    parallel_tool_calls: bool = True
    template_options: Mapping[str, object] = field(default_factory=dict)
    continue_last: bool = False
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidInput("a request has either a prompt or messages: give exactly one of the two")
        if self.prompt is not None and len(self.prompt) == 0:
            raise InvalidInput("the prompt is empty: give at least one token")
        if self.messages is not None and len(self.messages) == 0:
            raise InvalidInput("messages is empty: give at least one")
        self._check_length()
        self._check_sampling()
        check_choice(self.tools, self.tool_choice, self.forced_tool)
        if self.tools and self.messages is None:
            raise InvalidInput("tools belong to a conversation: send messages, not a prompt")
        if self.constraint is not None and self.forces_tool:
            raise InvalidInput("an answer cannot both be a tool call and obey a constraint: leave one of the two out")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were there before count."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether each token of the prompt must be computed, with its logits: none may come from a cached prefix."""
        return self.echo and self.logprobs is not None

    @property
    def uses_tools(self) -> bool:
        """Whether the answer may hold tool calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forces_tool(self) -> bool:
        """Whether the answer must be a tool call."""
        return bool(self.tools) and self.tool_choice == "required"

    def _check_length(self) -> None:
        least = 0 if self.echo else 1
        _check(self.max_tokens is None or self.max_tokens >= least, "max_tokens", self.max_tokens, f"at least {least}")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", self.stop, f"at most {MAX_STOP_STRINGS} strings")
        _check(all(self.stop), "stop", self.stop, "made of strings that are not empty")
        _check(
            len(self.stop_token_ids) <= MAX_STOP_TOKENS,
            "stop_token_ids",
            f"{len(self.stop_token_ids)} ids",
            f"at most {MAX_STOP_TOKENS} ids",
        )

    def _check_sampling(self) -> None:
        _check_range("temperature", self.temperature, 0, MAX_TEMPERATURE, "0 (greedy) to {high:g}")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check_range("min_p", self.min_p, 0, 1)
        _check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer")
        _check_range("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_range("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_range("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTIES)
        _check(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"{len(self.logit_bias)} tokens",
            f"at most {MAX_LOGIT_BIAS} tokens",
        )
        for token, bias in self.logit_bias:
            _check(token >= 0, "logit_bias", token, "keyed by token ids")
            _check_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"0 to {MAX_LOGPROBS}",
        )
        _check(abs(self.priority) <= MAX_PRIORITY, "priority", self.priority, f"{-MAX_PRIORITY} to {MAX_PRIORITY}")


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidRequest(name, f"{name} must be {expected}, got {value!r:.200}")


def _check_range(name: str, value: float, low: float, high: float, expected: str = "{low:g} to {high:g}") -> None:
    _check(low <= value <= high, name, value, expected.format(low=low, high=high))  # NaN is in no range


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request has cost so far. `cached_tokens` of the prompt were read before, and not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes, and the natural log of its probability by the model: before temperature, penalties and all
    else that chooses. `top` has the likeliest ones of its place, best first. The first token of a prompt has none."""

    token_id: int
    logprob: float | None
    piece: bytes = b""
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The token as text; a part of a character reads as the replacement character."""
        return self.piece.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class GenerationEvent:
    """What one step, or several that nobody had read yet, added to an answer.

    `text` may be empty while bytes of a character or the beginning of a stop string are held back. The last event, and
    no other, has a `finish_reason`. With `echo` the first one begins with the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


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
        tool_calls=join_deltas([delta for event in events for delta in event.tool_calls]),
    )
