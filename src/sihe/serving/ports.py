"""What others may put into serving's path: a guard over what is asked and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sihe.serving.engine.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class GuardContext:
    """Whose request it is, and what it asks."""

    tenant: str
    deployment: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a guard lets something not pass. `message` is shown to the client; `category` is one word for logs."""

    category: str
    message: str


class ContentGuard(Protocol):
    """Judges prompts before they are computed and answers before they are sent.

    It is called on threads of the pool, for many requests at once; it may take its time, and makes its own request
    wait with it. A guard that raises lets nothing pass.

    An answer is judged in windows: as soon as `window_chars` more have been generated, and at its end. Each time the
    guard sees what was held back before it, too, which is always the last `overlap_chars`: what is no longer than that
    is seen whole before any part of it is sent.
    """

    @property
    def window_chars(self) -> int:
        """How much new text a judgement waits for, at least 1."""
        ...

    @property
    def overlap_chars(self) -> int:
        """How much text is held back until more was seen, 0 or more."""
        ...

    def judge_prompt(self, request: GenerationRequest, context: GuardContext) -> Refusal | None:
        """Why this request may not be computed, or None."""
        ...

    def judge_answer(self, text: str, context: GuardContext, *, is_end: bool) -> Refusal | None:
        """Why this stretch of an answer may not be sent, or None. `is_end`: the answer ends with it."""
        ...
