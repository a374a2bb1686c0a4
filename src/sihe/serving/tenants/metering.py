"""What a generation has cost, heard from its streams: whoever reads them, and however they end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from sihe.serving.engine.stream import GenerationStream, Heard
from sihe.serving.engine.types import GenerationEvent, GenerationRequest, Usage
from sihe.serving.errors import DeadlineExceeded
from sihe.serving.tenants import estimate
from sihe.serving.tenants.access import Access, Admission
from sihe.serving.tenants.types import Caller
from sihe.serving.tenants.usage import Outcome, Tally

_WORST: tuple[Outcome, ...] = ("completed", "aborted", "failed")


def start(
    access: Access,
    caller: Caller,
    deployment: str,
    requests: Sequence[GenerationRequest],
    begin: Callable[[GenerationRequest], Sequence[GenerationStream]],
    *,
    answers: int = 1,
    judge: Callable[[], None] | None = None,
) -> tuple[Admission, list[GenerationStream]]:
    """Lets requests in together, and begins each in its caller's name; `begin` gives the streams of its `answers`.

    `judge` comes between the two, and raises where nothing may begin. The admission is finished when the last stream
    has ended. Raises as `Access.admit` and what `judge` and `begin` raise; what had begun is closed then.
    """
    guess = estimate.of_generation(requests, answers=answers)
    admission = access.admit(
        caller,
        deployment,
        prompt_tokens=guess.prompt,
        completion_tokens=guess.completion,
        is_guess=guess.is_guess,
    )
    groups: list[Sequence[GenerationStream]] = []
    try:
        if judge is not None:
            judge()
        for request in requests:
            groups.append(begin(admission.apply(request)))
    except BaseException:
        for stream in (stream for group in groups for stream in group):
            stream.close()
        admission.finish(None, "failed")
        raise
    Metering(admission, groups)
    return admission, [stream for group in groups for stream in group]


class Metering:
    """Finishes an admission when the last of its streams has ended. The streams of a group share one prompt."""

    def __init__(self, admission: Admission, groups: Sequence[Sequence[GenerationStream]]) -> None:
        self._admission = admission
        self._lock = threading.Lock()
        self._open = {(group, number) for group, streams in enumerate(groups) for number in range(len(streams))}
        self._usage: dict[tuple[int, int], Usage] = {}
        self._outcome: Outcome = "completed"
        if not self._open:
            admission.finish(None, "completed")
        for group, streams in enumerate(groups):
            for number, stream in enumerate(streams):
                stream.watch(partial(self._hear, (group, number)))

    def _hear(self, place: tuple[int, int], heard: Heard) -> None:
        if isinstance(heard, GenerationEvent):
            self._usage[place] = heard.usage
            if heard.finish_reason is not None:
                self._end(place, "completed")
        else:
            # Who set itself a limit has left when it passes: else short ones would have prompts read for nothing.
            has_left = heard is None or (isinstance(heard, DeadlineExceeded) and heard.is_own)
            self._end(place, "aborted" if has_left else "failed")

    def _end(self, place: tuple[int, int], outcome: Outcome) -> None:
        with self._lock:
            self._open.discard(place)
            self._outcome = max(self._outcome, outcome, key=_WORST.index)
            is_last = not self._open
        if is_last:
            self._admission.finish(self._tally() if self._usage else None, self._outcome)

    def _tally(self) -> Tally:
        """The sum; a prompt that several answers share counts once, and as cached what all of them found cached."""
        prompts: dict[int, list[Usage]] = {}
        for (group, _), usage in self._usage.items():
            prompts.setdefault(group, []).append(usage)
        return Tally(
            requests=1,
            failed=int(self._outcome == "failed"),
            prompt_tokens=sum(max(usage.prompt_tokens for usage in group) for group in prompts.values()),
            cached_tokens=sum(min(usage.cached_tokens for usage in group) for group in prompts.values()),
            completion_tokens=sum(usage.completion_tokens for usage in self._usage.values()),
        )
