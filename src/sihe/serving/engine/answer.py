"""An answer in the making: how its next token is to be chosen, and what a token adds to it.

Everything that a request asks of its answer meets here: penalties, bias, constraint, stops, tools. It is told tokens in
their order and has no part in how they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sihe.serving.engine.detokenizer import StopFilter
from sihe.serving.engine.grammar import Grammar
from sihe.serving.engine.history import TokenHistory
from sihe.serving.engine.sampler import Draw, Scored
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.tool_calls import MARKERS, Parsed, ToolCallParser, enforce
from sihe.serving.engine.tools import ToolCallDelta
from sihe.serving.engine.types import FinishReason, GenerationRequest, TokenLogprob
from sihe.serving.errors import BadConstraint, InvalidRequest


@dataclass(frozen=True, slots=True)
class Said:
    """What one token adds."""

    text: str
    calls: tuple[ToolCallDelta, ...] = ()
    reason: FinishReason | None = None


class Answer:
    """The answer to `request`, of at most `max_tokens`. Made on the caller's thread, where a constraint is compiled.

    Raises `BadConstraint` when made. One that turns out too complex later is kept as `failure`: the engine ends the
    request with it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: Sequence[int],
        tokenizer: ModelTokenizer,
        *,
        max_tokens: int,
        seed: int,
        vocab_size: int,
    ) -> None:
        _check_ids(request, vocab_size)
        self.request = request
        self.max_tokens = max_tokens
        self.failure: BadConstraint | None = None
        self._tokenizer = tokenizer
        self._seed = seed
        self._count = 0
        own = tokenizer.stop_ids if request.messages is None else tokenizer.chat_stop_ids
        self._stop_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else own)
        self._ends = tuple(sorted(self._stop_ids | own))  # not to come before min_tokens
        self._stop = StopFilter(request.stop)
        self._history = _history(request, prompt)
        self._parser = _parser(request, tokenizer)
        shown = MARKERS[tokenizer.templates.tool_format] if self._parser is not None else ()
        self._decoder = tokenizer.decoder(shown)
        self._grammar = _grammar(request, tokenizer, vocab_size)
        changes = request.temperature > 0 or request.min_tokens > 0 or self._history or self._grammar
        self._always = None if changes else self._draw(0)  # the likeliest token is chosen alike at every position

    @property
    def count(self) -> int:
        """Tokens so far."""
        return self._count

    def draws(self, drafted: Sequence[int] = ()) -> tuple[Draw, ...]:
        """How the next token is chosen; and, with `drafted`, for each of them the one after it if it should come."""
        if self._always is not None:
            return (self._always,) * (len(drafted) + 1)
        masks = None
        if self._grammar is not None:
            try:
                masks = self._grammar.masks(drafted)
            except BadConstraint as error:
                self.failure = error
        return tuple(self._draw(at, drafted, None if masks is None else masks[at]) for at in range(len(drafted) + 1))

    def _draw(self, at: int, drafted: Sequence[int] = (), mask: NDArray[np.int32] | None = None) -> Draw:
        """How the token after the first `at` of `drafted` is chosen."""
        request, position = self.request, self._count + at
        return Draw(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=self._seed,
            position=position,
            logprobs=request.logprobs,
            min_p=request.min_p,
            history=self._history,
            drafted=tuple(drafted[:at]) if self._history is not None else (),
            bias=request.logit_bias,
            banned=self._ends if position < request.min_tokens else (),
            mask=mask,
        )

    def read(self, token: int) -> Said:
        """What `token`, the next one, adds, and whether the answer ends with it."""
        self._count += 1
        if self._history is not None:
            self._history.push(token)
        if self._grammar is not None:
            try:
                self._grammar.accept(token)
            except BadConstraint as error:
                self.failure = error
        text, reason = self._text(token)
        parsed = Parsed(text) if self._parser is None else self._parse(self._parser, text, reason)
        if self._parser is not None and self._parser.has_calls:
            if reason is None and self._parser.is_finished:
                reason = "stop"
            reason = "tool_calls" if reason == "stop" else reason
        return Said(parsed.text, parsed.calls, reason)

    def echo(self, prompt: Sequence[int], scored: Sequence[Scored]) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The prompt as the beginning of the answer's text; its tokens with their log-probabilities, if `scored`."""
        request = self.request
        if not request.echo:
            return "", ()
        text = request.prompt if isinstance(request.prompt, str) else self._tokenizer.decode(prompt)
        if request.logprobs is None:
            return text, ()
        first = self._tokenizer.spell(prompt[0], None)
        return text, (first, *(self._tokenizer.spell(item.token, item.logprob, item.top) for item in scored))

    def _text(self, token: int) -> tuple[str, FinishReason | None]:
        reason: FinishReason | None = None
        text = ""
        if token in self._stop_ids or (self._grammar is not None and token in self._grammar.ends):
            reason = "stop"
        else:
            text = self._stop.push(self._decoder.push(token))
            if self._stop.is_stopped or (self._grammar is not None and self._grammar.is_complete):
                reason = "stop"
            elif self._count >= self.max_tokens:
                reason = "length"
        if reason is not None and not self._stop.is_stopped:
            text += self._stop.push(self._decoder.flush()) + self._stop.flush()
            if self._stop.is_stopped:
                reason = "stop"
        return text, reason

    def _parse(self, parser: ToolCallParser, text: str, reason: FinishReason | None) -> Parsed:
        parsed = parser.push(text)
        if reason is None:
            return parsed
        rest = parser.flush()
        return Parsed(parsed.text + rest.text, parsed.calls + rest.calls)


def _check_ids(request: GenerationRequest, vocab_size: int) -> None:
    for name, ids in (("logit_bias", (id for id, _ in request.logit_bias)), ("stop_token_ids", request.stop_token_ids)):
        for id in ids:
            if not 0 <= id < vocab_size:
                raise InvalidRequest(name, f"{name}: the model's token ids go from 0 to {vocab_size - 1}, got {id}")


def _history(request: GenerationRequest, prompt: Sequence[int]) -> TokenHistory | None:
    if not request.has_penalties:
        return None
    return TokenHistory(
        prompt,
        repetition=request.repetition_penalty,
        presence=request.presence_penalty,
        frequency=request.frequency_penalty,
    )


def _parser(request: GenerationRequest, tokenizer: ModelTokenizer) -> ToolCallParser | None:
    if not request.uses_tools or request.constraint is not None:
        return None
    names = [tool.name for tool in request.tools]
    parallel = request.parallel_tool_calls and request.forced_tool is None
    return ToolCallParser(tokenizer.templates.tool_format, names, parallel=parallel)


def _grammar(request: GenerationRequest, tokenizer: ModelTokenizer, vocab_size: int) -> Grammar | None:
    constraint = request.constraint
    if request.forces_tool:
        constraint = enforce(tokenizer.templates.tool_format, request, tokenizer.special_id)
    return None if constraint is None else tokenizer.grammars(vocab_size).start(constraint)
