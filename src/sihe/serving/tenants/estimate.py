"""How many tokens a request may cost, told before it is tokenised: what a limit takes first and corrects at the end.

A token of usual text has about four bytes of UTF-8 (OpenAI's limiter counts so too:
https://platform.openai.com/docs/guides/rate-limits). An answer without `max_tokens` ends by itself; taking the whole
context for it would refuse nearly everything, so a usual answer's length is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sihe.serving.engine.types import GenerationRequest

BYTES_PER_TOKEN = 4
USUAL_ANSWER_TOKENS = 1024
_MESSAGE_TOKENS = 4  # the marks of a turn in a usual chat template


class Estimate(NamedTuple):
    """Tokens of prompts and answers; `is_guess` where nothing bounds an answer but its own end."""

    prompt: int
    completion: int
    is_guess: bool


def of_generation(requests: Sequence[GenerationRequest], *, answers: int = 1) -> Estimate:
    """Tokens of the prompts, and of `answers` answers to each."""
    longest = [USUAL_ANSWER_TOKENS if request.max_tokens is None else request.max_tokens for request in requests]
    return Estimate(
        prompt=sum(_of_prompt(request) for request in requests),
        completion=answers * sum(longest),
        is_guess=any(request.max_tokens is None for request in requests),
    )


def of_text(text: str) -> int:
    """Tokens of a text, at least one."""
    return max(1, -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN))


def _of_prompt(request: GenerationRequest) -> int:
    if request.messages is not None:
        return sum(_MESSAGE_TOKENS + of_text(message.content) for message in request.messages)
    if isinstance(request.prompt, str):
        return of_text(request.prompt)
    return len(request.prompt or ())
