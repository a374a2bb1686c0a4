"""What the engine tells whoever watches it. It works without anyone watching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Outcome = Literal["stop", "length", "tool_calls", "content_filter", "aborted", "failed"]


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine, and how full it is afterwards.

    Of the cache's tokens, `kv_used_tokens` belong to sequences, and `kv_cached_tokens` only wait to be found again.
    """

    duration_s: float
    decode_tokens: int
    prefill_tokens: int
    running: int
    waiting: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    kv_cached_tokens: int = 0
    hit_tokens: int = 0  # of sequences that joined in this step, found in the cache
    preempted: int = 0  # sequences that gave their blocks back
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafts


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One request that has ended. Times are None where the request did not come so far."""

    outcome: Outcome
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the cache
    queue_s: float | None  # from submission to a place in the batch
    ttft_s: float | None  # from submission to the first token
    tpot_s: float | None  # mean time of each token after the first


class EngineObserver(Protocol):
    """Called on the engine's thread: must return at once and not raise."""

    def on_step(self, stats: StepStats) -> None:
        """A step was computed."""
        ...

    def on_request(self, stats: RequestStats) -> None:
        """A request has ended."""
        ...

    def on_close(self) -> None:
        """The engine has ended."""
        ...


class NoObserver:
    """Nobody watches."""

    def on_step(self, stats: StepStats) -> None:
        """Ignored."""

    def on_request(self, stats: RequestStats) -> None:
        """Ignored."""

    def on_close(self) -> None:
        """Ignored."""
