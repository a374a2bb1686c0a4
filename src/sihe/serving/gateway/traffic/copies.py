"""What a shadow is asked again, by kind of model: how a copy is started on the shadow's version, and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from sihe.core.clock import Clock
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import MAX_PRIORITY, GenerationRequest
from sihe.serving.errors import StreamClosed
from sihe.serving.exchange import Agreement, Answer, Question
from sihe.serving.gateway.replicas.lease import Lease
from sihe.serving.gateway.traffic.outcome import Observation, Outcome
from sihe.serving.gateway.traffic.wording import size_of


class ShadowRoute(Protocol):
    """The replicas of the shadow's version (a `Route`)."""

    @property
    def is_ready(self) -> bool:
        """Whether a replica would take a request."""
        ...

    def generate(self, request: GenerationRequest) -> GenerationStream:
        """Starts a request to a model that generates."""
        ...

    def lease(self, *, block: bool) -> Lease:
        """A replica, for a request to a model that does not."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """The shadow's answer; `answer` is that of a model that does not generate, others have it in the outcome."""

    served_by: str
    outcome: Outcome
    agreement: Agreement
    answer: Answer | None = None


class Running(Protocol):
    """A copy that the shadow's version is at."""

    def result(self) -> Found:
        """Blocks. Raises `StreamClosed` once closed, and why there is no answer."""
        ...

    def close(self) -> None:
        """Gives it up, as far as it has not been computed. From any thread, and at once."""
        ...

    def end(self) -> None:
        """It is over: whatever is left of it goes. On the thread that has started it."""
        ...


class Copied(Protocol):
    """A request that was answered, with what it was answered."""

    @property
    def request(self) -> GenerationRequest | Question:
        """What was asked."""
        ...

    @property
    def outcome(self) -> Outcome:
        """The caller's."""
        ...

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        ...

    def start(self, route: ShadowRoute, clock: Clock) -> Running:
        """Asks the shadow. Raises why that cannot answer."""
        ...


# ---- models that generate -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CopiedGeneration:
    """A prompt and what was written."""

    request: GenerationRequest
    outcome: Outcome

    @property
    def size(self) -> int:
        """Its characters, about."""
        return size_of(self.request, self.outcome, None)

    def start(self, route: ShadowRoute, clock: Clock) -> Running:
        """The same at the lowest priority, and of no tenant."""
        return _Generating(self, route, clock)


class _Generating:
    def __init__(self, copied: CopiedGeneration, route: ShadowRoute, clock: Clock) -> None:
        self._caller = copied.outcome
        self._outcomes: list[Outcome] = []
        started_s = clock.monotonic_s()
        self._stream = route.generate(replace(copied.request, priority=MAX_PRIORITY, tenant=""))
        self._stream.watch(Observation(clock, started_s, self._outcomes.append, keeps_text=True))

    def result(self) -> Found:
        self._stream.result()
        (outcome,) = self._outcomes
        share = share_of_tokens(self._caller, outcome)
        return Found(self._stream.served_by, outcome, Agreement(share, share == 1.0, "tokens"))

    def close(self) -> None:
        self._stream.close()

    def end(self) -> None:
        self._stream.close()


def share_of_tokens(a: Outcome, b: Outcome) -> float:
    """The share of the longer answer's tokens up to the first that differs; by characters where tokens are unknown."""
    left, right = (a.token_ids, b.token_ids) if a.token_ids and b.token_ids else (a.text or "", b.text or "")
    longer = max(len(left), len(right))
    if longer == 0:
        return 1.0
    same = next(
        (place for place, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right))
    )
    return same / longer


# ---- models that do not ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CopiedQuestion:
    """A question and what was answered."""

    request: Question
    answer: Answer
    outcome: Outcome

    @property
    def size(self) -> int:
        """About how many bytes the two hold."""
        return size_of(self.request, self.outcome, self.answer)

    def start(self, route: ShadowRoute, clock: Clock) -> Running:
        """The same on a replica of the shadow that is there now."""
        return _Answering(self, route, clock)


class _Answering:
    def __init__(self, copied: CopiedQuestion, route: ShadowRoute, clock: Clock) -> None:
        self._copied = copied
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._lease = route.lease(block=False)
        try:
            self._running = copied.request.begin(self._lease.held())
        except BaseException as error:
            self._lease.end(error)
            raise

    def result(self) -> Found:
        try:
            answer = self._running.result()
        except StreamClosed:
            self._lease.leave()
            raise
        except BaseException as error:
            self._lease.end(error)
            raise
        self._lease.end()
        spent_s = self._clock.monotonic_s() - self._started_s
        outcome = Outcome("finished", None, None, answer.prompt_tokens, 0, None, spent_s)
        agreement = self._copied.answer.agreement(answer)
        return Found(self._lease.served_by, outcome, agreement, answer)

    def close(self) -> None:
        self._running.close()

    def end(self) -> None:
        self._running.close()
        self._lease.leave()
