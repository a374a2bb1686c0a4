"""A request inside the engine: what it asks for, what it has said so far, and what its next token does to its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sihe.serving.engine.detokenizer import StopFilter, TextDecoder
from sihe.serving.engine.ports import Outcome, RequestStats
from sihe.serving.engine.sampler import Draw
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import FinishReason, GenerationRequest


@dataclass(slots=True)
class Sequence:
    """One answer in the making. Belongs to the engine's thread once it is queued."""

    request: GenerationRequest
    prompt: list[int]
    max_tokens: int
    seed: int
    stop_ids: frozenset[int]
    stream: GenerationStream
    decoder: TextDecoder
    stop: StopFilter
    on_done: Callable[[], None] | None
    submitted_s: float
    slot: int | None = None
    output: list[int] = field(default_factory=list)
    admitted_s: float | None = None
    first_token_s: float | None = None

    @property
    def held_slot(self) -> int:
        """The slot of a sequence that takes part in steps."""
        assert self.slot is not None, "only sequences with a slot are planned"
        return self.slot

    def draw(self) -> Draw:
        """How the next token is chosen."""
        request = self.request
        return Draw(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=self.seed,
            position=len(self.output),
            logprobs=request.logprobs,
        )

    def read(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that `token`, which `output` holds already, adds; and whether the answer ends with it."""
        reason: FinishReason | None = None
        text = ""
        if token in self.stop_ids and not self.request.ignore_eos:
            reason = "stop"
        else:
            text = self.stop.push(self.decoder.push(token))
            if self.stop.is_stopped:
                reason = "stop"
            elif len(self.output) >= self.max_tokens:
                reason = "length"
        if reason is not None and not self.stop.is_stopped:
            text += self.stop.push(self.decoder.flush()) + self.stop.flush()
            if self.stop.is_stopped:
                reason = "stop"
        return text, reason

    def stats(self, outcome: Outcome, now_s: float) -> RequestStats:
        """What the request has cost, when it ends at `now_s`."""
        begun_s, first_s, tokens = self.admitted_s, self.first_token_s, len(self.output)
        return RequestStats(
            outcome=outcome,
            prompt_tokens=len(self.prompt),
            completion_tokens=tokens,
            queue_s=None if begun_s is None else begun_s - self.submitted_s,
            ttft_s=None if first_s is None else first_s - self.submitted_s,
            tpot_s=None if first_s is None or tokens < 2 else (now_s - first_s) / (tokens - 1),
        )
