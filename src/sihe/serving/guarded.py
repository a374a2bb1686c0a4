"""A guard in the path of a generation: the prompt is judged before it is computed, the answer in windows.

What a window holds is decided without I/O (`Window`); `guarded` lets a stream pass through it and gives a stream again,
so that nobody behind it knows the difference. A refused answer ends with `content_filter`, as OpenAI's do, and its
generation is aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.concurrency import run_in_threadpool

from sihe.core.telemetry import logger
from sihe.serving.engine.stream import GenerationStream, Wake, wake_readers
from sihe.serving.engine.types import GenerationEvent, GenerationRequest
from sihe.serving.errors import ContentRefused, GuardFailed
from sihe.serving.ports import ContentGuard, GuardContext, Refusal

_log = logger("serving")
_pumps: set[asyncio.Task[None]] = set()  # an event loop holds its tasks weakly: they live here until they end


class Window:
    """Holds the events of an answer back until they may be judged, and after that until they may go."""

    def __init__(self, window_chars: int, overlap_chars: int) -> None:
        if window_chars < 1 or overlap_chars < 0:
            raise ValueError(f"a window has 1 character or more and an overlap 0, got {window_chars}, {overlap_chars}")
        self._window = window_chars
        self._overlap = overlap_chars
        self._held: list[GenerationEvent] = []
        self._unjudged = 0  # characters that came since the last judgement

    def add(self, event: GenerationEvent) -> bool:
        """Takes an event in; whether it is time for a judgement."""
        self._held.append(event)
        self._unjudged += len(_text(event))
        return self._unjudged >= self._window or event.finish_reason is not None

    @property
    def text(self) -> str:
        """What is to be judged: all that is held back."""
        return "".join(_text(event) for event in self._held)

    def passed(self) -> list[GenerationEvent]:
        """The held text was found good: the events that may go. The last stretch stays, unless the answer has ended."""
        self._unjudged = 0
        if self._held and self._held[-1].finish_reason is not None:
            going, self._held = self._held, []
            return going
        kept = count = 0
        for event in reversed(self._held):
            if kept >= self._overlap:
                break
            kept += len(_text(event))
            count += 1
        going, self._held = self._held[: len(self._held) - count], self._held[len(self._held) - count :]
        return going


def judge_prompts(guard: ContentGuard, requests: Sequence[GenerationRequest], context: GuardContext) -> None:
    """Raises `ContentRefused` for a prompt that may not be computed, and `GuardFailed`. Not for an event loop."""
    for request in requests:
        try:
            refusal = guard.judge_prompt(request, context)
        except Exception as error:
            raise GuardFailed(f"the guard failed on the prompt: {type(error).__name__}") from error
        if refusal is not None:
            _say(refusal, context, "prompt")
            raise ContentRefused(refusal.message, parameter="prompt" if request.messages is None else "messages")


def guarded(stream: GenerationStream, guard: ContentGuard | None, context: GuardContext) -> GenerationStream:
    """The stream as the guard lets it pass. For a running event loop; closing either stream ends both."""
    if guard is None:
        return stream
    outer = GenerationStream(stream.id, stream.served_by, abort=lambda _: stream.close())
    outer.arm = stream.arm
    pump = asyncio.get_running_loop().create_task(_pump(stream, outer, guard, context))
    _pumps.add(pump)
    pump.add_done_callback(_pumps.discard)
    return outer


async def _pump(inner: GenerationStream, outer: GenerationStream, guard: ContentGuard, context: GuardContext) -> None:
    window = Window(guard.window_chars, guard.overlap_chars)
    try:
        async for event in inner:
            outer.served_by = inner.served_by
            if not window.add(event):
                continue
            refusal = await _judge(guard, window.text, context, is_end=event.finish_reason is not None)
            if refusal is not None:
                _say(refusal, context, "answer")
                _pass_on(outer, [GenerationEvent("", (), event.usage, "content_filter")])
                return
            _pass_on(outer, window.passed())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the reader's to hear
        _wake(outer.fail(error))
    finally:
        inner.close()
        outer.close()  # it has ended, unless the inner one was closed by somebody else


async def _judge(guard: ContentGuard, text: str, context: GuardContext, *, is_end: bool) -> Refusal | None:
    try:
        return await run_in_threadpool(guard.judge_answer, text, context, is_end=is_end)
    except Exception as error:
        raise GuardFailed(f"the guard failed on the answer: {type(error).__name__}") from error


def _pass_on(stream: GenerationStream, events: Sequence[GenerationEvent]) -> None:
    for event in events:
        _wake(stream.deliver(event))


def _wake(wake: Wake | None) -> None:
    if wake is not None:
        wake_readers([wake])


def _say(refusal: Refusal, context: GuardContext, what: str) -> None:
    _log.info("content_refused", what=what, category=refusal.category, tenant=context.tenant)


def _text(event: GenerationEvent) -> str:
    """What a reader would get to read of an event."""
    if not event.tool_calls:
        return event.text
    return event.text + "".join((delta.name or "") + delta.arguments for delta in event.tool_calls)
