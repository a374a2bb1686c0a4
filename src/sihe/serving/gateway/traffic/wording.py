"""What a record says of a request and its answer, whatever kind of model it was for. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sihe.serving.engine.types import GenerationRequest
from sihe.serving.exchange import Answer, Question, Written
from sihe.serving.gateway.traffic.outcome import Outcome

_NOTHING = Written.of("")


@dataclass(frozen=True, slots=True)
class Wording:
    """The parts of a record that depend on what was asked."""

    kind: str
    prompt: Written
    answer: Written
    temperature: float | None
    max_tokens: int | None


def size_of(request: GenerationRequest | Question, outcome: Outcome, answer: Answer | None) -> int:
    """About how many characters, or bytes of tensors, the two hold in memory."""
    if not isinstance(request, GenerationRequest):
        return request.size + (answer.size if answer is not None else 0)
    messages = request.messages or ()
    return len(request.prompt or ()) + sum(len(item.content or "") for item in messages) + len(outcome.text or "")


def wording_of(request: GenerationRequest | Question, outcome: Outcome, answer: Answer | None) -> Wording:
    """A request and its answer in words: of text its own, of tensors their JSON."""
    if isinstance(request, GenerationRequest):
        kind, prompt = _prompt(request)
        return Wording(
            kind, Written.of(prompt), Written.of(outcome.text or ""), request.temperature, request.max_tokens
        )
    return Wording(request.kind, request.written(), answer.written() if answer is not None else _NOTHING, None, None)


def _prompt(request: GenerationRequest) -> tuple[str, str]:
    """The kind of a request and its prompt as text: JSON of messages, or of token ids."""
    if request.messages is not None:
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        return "chat", json.dumps(messages, ensure_ascii=False)
    if isinstance(request.prompt, str):
        return "completion", request.prompt
    return "completion", json.dumps(list(request.prompt or ()))
