"""The way of one request to a model that does not generate: through the arms of its deployment, and their replicas.

It is started with a function that does the work on what a replica holds, or only begins it there; whoever does so says
how it has ended, and is told whether to start it again. Where an arm cannot serve, or fails, the stable version
answers, as for generating models; and here also where it refuses a request, as another version may want other inputs.
The arm is charged with what it failed, and with what it refused and the stable version then took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from sihe.core.clock import Clock
from sihe.core.errors import Busy, TimedOut, UserError
from sihe.core.telemetry import logger
from sihe.serving.deadlines import Deadline, earliest
from sihe.serving.errors import DeadlineExceeded, NotReady
from sihe.serving.exchange import Answer, Question
from sihe.serving.gateway.replicas.answer import LOST
from sihe.serving.gateway.replicas.lease import Lease
from sihe.serving.gateway.replicas.ports import Served
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.traffic.experiment import Experiment
from sihe.serving.gateway.traffic.outcome import Ending, Outcome
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.types import STABLE

T = TypeVar("T")
Hear = Callable[[str, str, Question, Outcome, Answer | None], None]
"""Hears of a request that has ended: on which arm, by which version, what was asked, and what became of it."""


class Arms(Protocol):
    """What a turn needs of its deployment (`LiveDeployment`)."""

    @property
    def name(self) -> str:
        """The deployment's."""
        ...

    @property
    def stable(self) -> Route:
        """The route of what is deployed."""
        ...

    @property
    def routes(self) -> Mapping[str, Route]:
        """The routes by arm."""
        ...

    @property
    def presence(self) -> Presence:
        """How many callers' requests are in hand."""
        ...

    def note_outcome(self, arm: str, outcome: Outcome) -> None:
        """What became of a request on its arm."""
        ...

    def note_rerouted(self, arm: str) -> None:
        """The stable arm answers for `arm`."""
        ...


@dataclass(frozen=True, slots=True)
class Aside:
    """The same arms for work that is no request to their models, such as asking what they take: nothing of it is
    measured, and nobody stands back for it."""

    arms: Arms
    presence: Presence = field(default_factory=Presence)

    @property
    def name(self) -> str:
        """The deployment's."""
        return self.arms.name

    @property
    def stable(self) -> Route:
        """The route of what is deployed."""
        return self.arms.stable

    @property
    def routes(self) -> Mapping[str, Route]:
        """The routes by arm."""
        return self.arms.routes

    def note_outcome(self, arm: str, outcome: Outcome) -> None:
        """It is not measured."""

    def note_rerouted(self, arm: str) -> None:
        """It is not measured."""


class Turn:
    """One request. Not thread-safe: whoever hands it to another thread touches it no more until that is done.

    `arm` is where it is now. Its caller may set the time that it has: a `deadline`, beyond which it waits for no
    replica, and `has_own_limit` where that time stands in the request; `bound` is by when the deployment answers, which
    holds whatever its caller allows. After `start` exactly one of `finished`,
    `failed` and `left` is called, and `start` again where `failed` says so; `left` may be called at any time, also when
    it is over, and does nothing then.

    With `hear`, somebody beside the path wants to know of it: then the work says what its `question` is, as soon as it
    has read it, and `finished` what the answer.
    """

    def __init__(
        self,
        arms: Arms,
        experiment: Experiment,
        arm: str,
        key: str,
        *,
        name: str,
        weight: float,
        counts: bool,
        clock: Clock,
        bound: Deadline | None = None,
        hear: Hear | None = None,
    ) -> None:
        self.arm = arm
        self.bound = bound
        self.question: Question | None = None
        self.deadline: Deadline | None = None
        self.has_own_limit = False
        self._arms = arms
        self._experiment = experiment
        self._key = key
        self._name = name
        self._weight = weight
        self._counts = counts
        self._clock = clock
        self._hear = hear
        self._route: Route | None = None
        self._lease: Lease | None = None
        self._tried: set[int] = set()
        self._lost: BaseException | None = None
        self._cluster = 0
        self._began_s: float | None = None  # None: not begun, or over
        self._was_moved = False  # to the stable arm, for which it then does not count
        self._refusal: _Refusal | None = None  # of another arm, which the stable one may not share

    @property
    def is_heard(self) -> bool:
        """Whether anybody beside the path wants to know the answer."""
        return self._hear is not None

    @property
    def earliest(self) -> Deadline | None:
        """The first of the two deadlines, where there is one."""
        return earliest(self.deadline, self.bound)

    def start(self, work: Callable[[Served], T], *, block: bool = True) -> T:
        """What `work` gives for what a replica of the arm holds; on the stable arm where this one cannot.

        It may be done again, on another replica, and must be safe to repeat. With `block` the thread waits for a
        replica that is on its way. Raises `NotReady`, `DeadlineExceeded`, and what is wrong with the request; then it
        is over, unless it was `NotReady` without `block`.
        """
        self._begin()
        while True:
            try:
                self._lease = lease = self._obtained(block)
            except NotReady as error:
                if self._goes_on_after(error):
                    continue
                if not block:
                    raise
                told: Exception = error
                deadline = self.earliest
                if deadline is not None and deadline.has_passed:
                    told = deadline.exceeded(is_whole=True)
                self._end("failed", told)
                raise told from None
            try:
                return work(lease.held())
            except BaseException as error:
                if not self.failed(error):
                    if (shown := self.shown(error)) is error:
                        raise
                    raise shown from error

    def whole(self, work: Callable[[Served], T]) -> T:
        """What `work` gives where that is the answer: `start` and `finished`. Raises what `start` raises."""
        try:
            result = self.start(work)
            self.finished()
            return result
        finally:
            self.left()

    def finished(self, answer: Answer | None = None) -> None:
        """The answer is there."""
        if self._lease is not None:
            self._lease.end()
        self._end("finished", None, answer)

    def failed(self, error: BaseException) -> bool:
        """It ended with `error`; whether it is to be started again. If not it is over, and its caller gets `shown`."""
        if self._lease is not None:
            self._lease.end(error)
        if self._goes_on_after(error):
            return True
        self._end("failed", error)
        return False

    def left(self) -> None:
        """The caller is gone."""
        if self._lease is not None:
            self._lease.leave()
        self._end("left", None)

    def shown(self, error: BaseException) -> BaseException:
        """What the caller sees of an error: replicas that were lost are the deployment's trouble."""
        return NotReady(self._arms.name, str(error)) if isinstance(error, LOST) else error

    # -----------------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._began_s is None:
            self._began_s = self._clock.monotonic_s()
            self._cluster = self._experiment.begin(self._name, self.arm, self._key)
            self._arms.presence.enter()

    def _obtained(self, block: bool) -> Lease:
        deadline = self.earliest
        while True:
            self._route = route = self._arms.stable if self.arm == STABLE else self._arms.routes.get(self.arm)
            if route is None or not (self.arm == STABLE or route.is_ready):
                raise NotReady(self._arms.name, f"arm {self.arm!r} does not serve now")
            try:
                # Who is dealt another arm does not wait for it: the stable one is there.
                lease = route.lease(
                    weight=self._weight,
                    avoid=frozenset(self._tried),
                    block=block and self.arm == STABLE,
                    until_s=None if deadline is None else deadline.at_s,
                )
            except NotReady:
                if self.arm == STABLE and route is not self._arms.stable:
                    continue  # it was exchanged meanwhile
                raise
            self._tried.add(lease.replica_id)
            return lease

    def _goes_on_after(self, error: BaseException) -> bool:
        """Whether another replica, or the stable arm, is to answer instead."""
        if isinstance(error, LOST):
            self._lost = error
            if self._route is not None and len(self._tried) < self._route.max_attempts:
                return True
        if self.arm == STABLE or not isinstance(error, Exception) or isinstance(error, TimedOut):
            return False
        culprit = self._first_cause(error)
        if isinstance(culprit, UserError):
            self._refusal = _Refusal(self.arm, self._served_by(), culprit, self._spent_s())
        elif not isinstance(culprit, NotReady | Busy):
            logger("serving").warning("arm_failed", deployment=self._arms.name, arm=self.arm, error=repr(culprit))
            outcome = self._outcome("failed", culprit, self._spent_s())
            self._note(self.arm, self._served_by(), outcome, counts=self._counts)
        self._arms.note_rerouted(self.arm)
        self.arm, self._was_moved, self._tried, self._lost = STABLE, True, set(), None
        self._experiment.begin(self._name, self.arm, self._key)  # feedback is about the answer that came
        return True

    def _end(self, ending: Ending, error: BaseException | None, answer: Answer | None = None) -> None:
        if self._began_s is None:
            return
        spent_s, self._began_s = self._spent_s(), None
        self._arms.presence.leave()
        if ending == "finished" and self._refusal is not None:
            refusal = self._refusal
            outcome = self._outcome("failed", refusal.error, refusal.spent_s)
            self._note(refusal.arm, refusal.served_by, outcome, counts=self._counts)
        if error is not None:
            error = self._first_cause(error)
        if isinstance(error, TimedOut) and self._is_own_limit(error):
            ending = "left"  # whoever sets itself a limit that no arm can keep proves nothing by it
        if not isinstance(error, UserError | NotReady | Busy):  # what never ran, for reasons of its own or of load
            outcome = self._outcome(ending, error, spent_s)
            if answer is not None:
                outcome = replace(outcome, prompt_tokens=answer.prompt_tokens)
            counts = self._counts and not self._was_moved
            self._note(self.arm, self._served_by(), outcome, counts=counts, answer=answer)

    def _is_own_limit(self, error: TimedOut) -> bool:
        if isinstance(error, DeadlineExceeded):
            return error.is_own
        return self.has_own_limit or self.deadline is not None

    def _first_cause(self, error: BaseException) -> BaseException:
        """What an error comes of: where a replica was lost, and no other one took the request, that is the loss."""
        return self._lost if self._lost is not None and isinstance(error, NotReady | Busy) else error

    def _note(self, arm: str, served_by: str, outcome: Outcome, *, counts: bool, answer: Answer | None = None) -> None:
        try:
            if counts:
                self._experiment.record(arm, outcome, self._cluster, self._key)
            self._arms.note_outcome(arm, outcome)
            if self._hear is not None and self.question is not None:
                self._hear(arm, served_by, self.question, outcome, answer)
        except Exception as error:  # noqa: BLE001 - what is lost is a measurement
            logger("serving").error("measurement_lost", deployment=self._arms.name, error=repr(error))

    def _outcome(self, ending: Ending, error: BaseException | None, spent_s: float) -> Outcome:
        said = None if error is None else f"{type(error).__name__}: {error}"
        return Outcome(ending, None, said, 0, 0, None, spent_s)

    def _served_by(self) -> str:
        return "" if self._lease is None else self._lease.served_by

    def _spent_s(self) -> float:
        return 0.0 if self._began_s is None else self._clock.monotonic_s() - self._began_s


@dataclass(frozen=True, slots=True)
class _Refusal:
    arm: str
    served_by: str
    error: UserError
    spent_s: float
