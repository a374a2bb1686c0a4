"""What the engine tells whoever watches it. It works without anyone watching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Outcome = Literal["stop", "length", "tool_calls", "aborted", "failed"]


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine, and how full it is afterwards."""

    duration_s: float
    decode_tokens: int
    prefill_tokens: int
    running: int
    waiting: int
    kv_used_tokens: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One request that has ended. Times are None where the request did not come so far."""

    outcome: Outcome
    prompt_tokens: int
    completion_tokens: int
    queue_s: float | None  # from submission to a slot
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
