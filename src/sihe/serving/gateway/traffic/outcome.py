"""What became of one request, as far as arms are compared by it; and the listener that finds it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sihe.core.clock import Clock
from sihe.serving.engine.stream import Heard
from sihe.serving.engine.types import GenerationEvent, Usage
from sihe.serving.errors import DeadlineExceeded

Ending = Literal["finished", "failed", "left"]
"""`left`: its reader closed it, or its own time limit has passed, which says nothing about the arm."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request that has ended. Times are from its arrival at the gateway; `text` is kept where it was asked for."""

    ending: Ending
    finish_reason: str | None
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    latency_s: float
    text: str | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None without a second."""
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.completion_tokens - 1)


class Observation:
    """Hears one stream and, at its end, tells `on_end` the outcome, once, on the thread that ends it."""

    def __init__(self, clock: Clock, started_s: float, on_end: Callable[[Outcome], None], *, keeps_text: bool) -> None:
        self._clock = clock
        self._started_s = started_s
        self._on_end = on_end
        self._keeps_text = keeps_text
        self._events: list[GenerationEvent] = []
        self._usage = Usage(0, 0)
        self._ttft_s: float | None = None
        self._ended = False

    def __call__(self, heard: Heard) -> None:
        """Takes in what the stream says."""
        if self._ended:
            return
        if isinstance(heard, GenerationEvent):
            self._usage = heard.usage
            if self._ttft_s is None:
                self._ttft_s = self._clock.monotonic_s() - self._started_s
            if self._keeps_text:
                self._events.append(heard)
            if heard.finish_reason is None:
                return
            self._end("finished", heard.finish_reason, None)
        elif heard is None or (isinstance(heard, DeadlineExceeded) and heard.is_own):
            self._end("left", None, None)  # whoever sets itself a limit that no arm can keep proves nothing by it
        else:
            self._end("failed", None, f"{type(heard).__name__}: {heard}")

    def _end(self, ending: Ending, reason: str | None, error: str | None) -> None:
        self._ended = True
        events, self._events = self._events, []
        self._on_end(
            Outcome(
                ending,
                reason,
                error,
                self._usage.prompt_tokens,
                self._usage.completion_tokens,
                self._ttft_s,
                self._clock.monotonic_s() - self._started_s,
                "".join(event.text for event in events) if self._keeps_text else None,
                tuple(token for event in events for token in event.token_ids),
            )
        )
