"""What stands beside a deployment's requests: its shadow, and the log of requests. Nothing here holds a caller up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sihe.core.clock import Clock
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.exchange import Answer, Question
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.traffic.assignment import draw
from sihe.serving.gateway.traffic.copies import Copied, CopiedGeneration, CopiedQuestion
from sihe.serving.gateway.traffic.metrics import TrafficMetrics
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.request_log import LogEntry, RequestLog
from sihe.serving.gateway.traffic.shadow import Comparison, Fate, ShadowReport, ShadowRunner
from sihe.serving.gateway.traffic.types import SHADOW, Sender, TrafficPolicy

_FAILED = Outcome("failed", None, None, 0, 0, None, 0.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """Which of the bystanders want to know of one request. It follows from its id alone."""

    is_logged: bool = False
    is_copied: bool = False

    def __bool__(self) -> bool:
        return self.is_logged or self.is_copied


class Bystanders:
    """Those of one deployment. `follow` and `close` are called by one thread, everything else by any.

    `note_outcome` hears how the shadow fares, as it does of the arms.
    """

    def __init__(
        self,
        name: str,
        policy: TrafficPolicy,
        *,
        log: RequestLog,
        metrics: TrafficMetrics,
        presence: Presence,
        clock: Clock,
        note_outcome: Callable[[str, Outcome], None],
    ) -> None:
        self._name = name
        self._policy = policy
        self._log = log
        self._metrics = metrics
        self._presence = presence
        self._clock = clock
        self._note_outcome = note_outcome
        self._shadow: ShadowRunner | None = None

    def sample(self, request_id: str) -> Sample:
        """Who wants to know of a request that has come."""
        shadow = self._shadow
        return Sample(
            draw(request_id, salt="log") < self._policy.logs.share,
            shadow is not None and draw(request_id, salt="shadow", name=self._name) < shadow.shadow.share,
        )

    def hear(
        self,
        sample: Sample,
        sender: Sender,
        arm: str,
        served_by: str,
        request: GenerationRequest | Question,
        outcome: Outcome,
        answer: Answer | None = None,
    ) -> None:
        """A request of the sample has ended. Returns at once."""
        if sample.is_logged:
            self._write(sender, arm, served_by, request, outcome, answer)
        shadow = self._shadow
        if sample.is_copied and shadow is not None and outcome.ending == "finished":
            copied: Copied | None = None
            if isinstance(request, GenerationRequest):
                copied = CopiedGeneration(request, outcome)
            elif answer is not None:
                copied = CopiedQuestion(request, answer, outcome)
            if copied is not None:
                shadow.offer(sender.request_id, copied)

    def follow(self, policy: TrafficPolicy, route: Route | None) -> None:
        """Takes a policy; `route` is the shadow's, None without one."""
        self._policy = policy
        wanted, current = policy.shadow, self._shadow
        if current is not None and current.shadow == wanted:
            return
        if current is not None:
            self._shadow = None
            current.close()
        if wanted is None or route is None:
            return
        self._shadow = ShadowRunner(
            self._name,
            wanted,
            route=route,
            presence=self._presence,
            clock=self._clock,
            on_comparison=self._note_comparison,
            on_fate=self._note_fate,
        )

    def report(self) -> ShadowReport | None:
        """What the shadow's copies have shown; None without a shadow."""
        shadow = self._shadow
        return shadow.report() if shadow is not None else None

    def close(self) -> None:
        """Ends the shadow's copies. The log is everybody's."""
        shadow = self._shadow
        if shadow is not None:
            shadow.close()

    # ---- the shadow's thread ----------------------------------------------------------------------------------------

    def _note_comparison(self, compared: Comparison) -> None:
        found = compared.found
        self._note_outcome(SHADOW, found.outcome)
        if self._policy.logs.share > 0:
            sender, request = Sender(compared.request_id), compared.copied.request
            self._write(sender, SHADOW, found.served_by, request, found.outcome, found.answer, found.agreement.share)

    def _note_fate(self, fate: Fate) -> None:
        self._metrics.copies.labels(self._name, fate).inc()
        if fate == "failed":
            self._note_outcome(SHADOW, _FAILED)

    def _write(
        self,
        sender: Sender,
        arm: str,
        served_by: str,
        request: GenerationRequest | Question,
        outcome: Outcome,
        answer: Answer | None,
        agreement: float | None = None,
    ) -> None:
        entry = LogEntry(
            self._clock.now(),
            sender.request_id,
            self._name,
            arm,
            served_by,
            sender.session,
            request,
            outcome,
            self._policy.logs.text,
            agreement,
            answer,
        )
        self._log.offer(entry)
