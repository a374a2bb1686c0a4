"""One request's turn, and its lease of a replica: what is charged to whom, and what shows nothing of a replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from sihe.core.clock import FakeClock
from sihe.core.errors import Busy, InvalidInput, TimedOut
from sihe.core.tracking import ModelVersion
from sihe.serving.deadlines import Deadline, earliest
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.encoder.exchange import Encoding, EncodingAnswer
from sihe.serving.engine.encoder.types import EmbeddingRequest, Encoded
from sihe.serving.errors import DeadlineExceeded, EngineClosed, Expired, NotReady, QueueFull
from sihe.serving.exchange import Answer, Question
from sihe.serving.gateway.replicas.config import LocalBackend
from sihe.serving.gateway.replicas.lease import Lease
from sihe.serving.gateway.replicas.replica import Replica
from sihe.serving.gateway.traffic.experiment import Experiment, Split
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.types import STABLE
from sihe.serving.gateway.turn import Aside, Hear, Turn

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MOVED = (STABLE, "m@1", "finished", None, True)


class Model:
    """The least that a replica holds."""

    capability = "predict"
    is_alive = True
    num_sequences = 0

    def warm(self) -> None:
        """It is warm."""

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Nothing is held."""


def replica(id: int) -> Replica:
    version = ModelVersion("m", id, "", None, NOW, (), {})
    made = Replica(version, EngineConfig(), LocalBackend(), lambda: None, id=id)
    made.load(lambda *_: Model())
    made.warm()
    made.open()
    return made


@dataclass
class Way:
    """Replicas that are leased in their order; none is on its way."""

    replicas: list[Replica]
    clock: FakeClock
    lost: list[int] = field(default_factory=list)
    waits_until_s: list[float | None] = field(default_factory=list)
    max_attempts: int = 3
    is_ready: bool = True

    def lease(
        self,
        *,
        weight: float = 1.0,
        avoid: frozenset[int] = frozenset(),
        block: bool = True,
        until_s: float | None = None,
    ) -> Lease:
        self.waits_until_s.append(until_s)
        for one in self.replicas:
            if one.id not in avoid:
                return Lease(one, weight, self.clock, lambda lost, _: self.lost.append(lost.id))
        raise NotReady("m", "no other one")


@dataclass
class House:
    """The arms of a deployment: two replicas of each."""

    clock: FakeClock
    routes: dict[str, Any]
    experiment: Experiment
    name: str = "m"
    presence: Presence = field(default_factory=Presence)
    noted: list[tuple[str, str]] = field(default_factory=list)
    rerouted: list[str] = field(default_factory=list)

    @property
    def stable(self) -> Any:
        return self.routes[STABLE]

    def note_outcome(self, arm: str, outcome: Outcome) -> None:
        self.noted.append((arm, outcome.ending))

    def note_rerouted(self, arm: str) -> None:
        self.rerouted.append(arm)

    def turn(self, arm: str, hear: Hear | None = None) -> Turn:
        return Turn(self, self.experiment, arm, "key", name="/r", weight=2.0, counts=True, clock=self.clock, hear=hear)

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Requests, errors, and those that left, by arm."""
        found = {arm: self.experiment.stats(arm) for arm in self.routes}
        return {arm: (stats.requests, stats.errors, stats.left) for arm, stats in found.items()}

    def is_free(self) -> bool:
        replicas = [one for route in self.routes.values() for one in route.replicas]
        return self.presence.is_idle and not any(one.in_flight for one in replicas)


@pytest.fixture
def house() -> House:
    clock = FakeClock()
    routes = {STABLE: Way([replica(1), replica(2)], clock), "b": Way([replica(3), replica(4)], clock)}
    return House(clock, routes, Experiment("m", 1, Split({STABLE: 0.5, "b": 0.5}, {STABLE: 1, "b": 2}), NOW))


def in_turn(*happens: Exception | None) -> Callable[[object], str]:
    """Work that raises, or does not, one after the other."""
    left = iter(happens)

    def work(_: object) -> str:
        if (error := next(left)) is not None:
            raise error
        return "begun"

    return work


# ---- turns ----------------------------------------------------------------------------------------------------------


def test_a_lost_replica_is_charged_to_the_stable_arm_also_where_no_other_one_comes(house: House) -> None:
    house.stable.replicas.pop()
    turn = house.turn(STABLE)
    with pytest.raises(NotReady, match="no other one"):
        turn.start(in_turn(EngineClosed("gone")))
    assert house.counts()[STABLE] == (1, 1, 0)
    assert house.stable.lost == [1]
    assert house.is_free()


def test_what_never_ran_is_charged_to_nobody(house: House) -> None:
    house.stable.replicas.clear()
    with pytest.raises(NotReady):
        house.turn(STABLE).start(in_turn(None))
    house.stable.replicas.append(replica(5))
    full = QueueFull(1, retry_after_s=1.0)
    with pytest.raises(QueueFull):
        house.turn("b").start(in_turn(full, full))
    assert house.counts() == {STABLE: (0, 0, 0), "b": (0, 0, 0)}
    assert house.is_free()


def test_an_arm_that_lost_a_replica_and_then_refused_is_charged_only_where_the_stable_one_takes_it(
    house: House,
) -> None:
    turn = house.turn("b")
    with pytest.raises(InvalidInput):
        turn.start(in_turn(EngineClosed("gone"), InvalidInput("no number"), InvalidInput("no number")))
    assert house.counts() == {STABLE: (0, 0, 0), "b": (0, 0, 0)}, "it was the caller's own mistake"
    turn = house.turn("b")
    assert turn.start(in_turn(InvalidInput("two features"), None)) == "begun"
    turn.finished()
    assert (turn.arm, house.counts()) == (STABLE, {STABLE: (0, 0, 0), "b": (1, 1, 0)})
    assert house.rerouted == ["b", "b"]
    assert house.is_free()


def test_a_request_waits_for_no_replica_beyond_its_own_limit_which_no_arm_is_to_blame_for(house: House) -> None:
    house.stable.replicas.clear()
    turn = house.turn(STABLE)
    turn.deadline = Deadline(0.5, at_s=0.0)  # long ago
    with pytest.raises(NotReady):
        turn.start(in_turn(None), block=False)
    with pytest.raises(DeadlineExceeded, match=r"the whole answer was not there within 0\.5 s") as caught:
        turn.start(in_turn(None))
    assert caught.value.is_own
    assert house.stable.waits_until_s == [0.0, 0.0]
    assert house.counts()[STABLE] == (0, 0, 1)
    assert house.is_free()


@pytest.mark.parametrize("own_at_s", [None, 5.0])
def test_a_deployments_limit_is_charged_to_the_arm_and_holds_whatever_the_caller_allows(
    house: House, own_at_s: float | None
) -> None:
    bound = Deadline(0.5, at_s=0.0, is_own=False)
    turn = Turn(house, house.experiment, "b", "key", name="/r", weight=1.0, counts=True, clock=house.clock, bound=bound)
    turn.deadline = None if own_at_s is None else Deadline(5.5, at_s=own_at_s)
    assert turn.start(in_turn(None)) == "begun"
    error = bound.exceeded(is_whole=True)
    assert not error.is_own
    assert not turn.failed(error), "no time is left for another arm"
    assert house.routes["b"].waits_until_s == [0.0]
    assert house.counts() == {STABLE: (0, 0, 0), "b": (1, 1, 0)}
    assert house.is_free()


def test_of_two_limits_that_pass_at_once_the_callers_own_counts() -> None:
    own, bound = Deadline(1.0, at_s=1.0), Deadline(1.0, at_s=1.0, is_own=False)
    assert earliest(own, bound) is own
    assert earliest(own, Deadline(0.9, at_s=0.9, is_own=False)) != own
    assert (earliest(None, bound), earliest(None, None)) == (bound, None)


def test_a_limit_that_has_not_passed_leaves_the_reason_why_there_is_no_replica(house: House) -> None:
    house.stable.replicas.clear()
    turn = house.turn(STABLE)
    turn.deadline = Deadline(0.5, at_s=float("inf"))
    with pytest.raises(NotReady, match="no other one"):
        turn.start(in_turn(None))
    assert house.counts()[STABLE] == (0, 0, 0)


def test_a_question_about_a_model_is_asked_again_elsewhere_and_measured_nowhere(house: House) -> None:
    unmeasured = Experiment("m", 0, Split({}, {}), NOW)
    turn = Turn(Aside(house), unmeasured, "b", "", name="", weight=1.0, counts=False, clock=house.clock)
    assert turn.whole(in_turn(EngineClosed("gone"), None)) == "begun"
    turn = Turn(Aside(house), unmeasured, "b", "", name="", weight=1.0, counts=False, clock=house.clock)
    with pytest.raises(InvalidInput):
        turn.whole(in_turn(InvalidInput("no tokenizer"), InvalidInput("no tokenizer")))
    assert house.routes["b"].lost == [3]
    assert (house.noted, house.rerouted, set(house.counts().values())) == ([], [], {(0, 0, 0)})
    assert house.is_free()


def test_a_turn_ends_once(house: House) -> None:
    turn = house.turn(STABLE)
    turn.start(in_turn(None))
    turn.finished()
    turn.left()
    turn.left()
    assert house.counts()[STABLE] == (1, 0, 0)
    assert house.is_free()


def test_a_measurement_that_cannot_be_taken_is_all_that_is_lost(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ArithmeticError("no place")

    monkeypatch.setattr(house.experiment, "record", refuse)
    turn = house.turn("b")
    assert turn.start(in_turn(ArithmeticError("broken"), None)) == "begun"
    turn.finished()
    assert turn.arm == STABLE
    assert house.is_free()


@dataclass
class Beside:
    """Who hears of a request: of its arm, version, ending and error, and whether its answer came along."""

    heard: list[tuple[str, str, str, str | None, bool]] = field(default_factory=list)

    def __call__(self, arm: str, served_by: str, question: Question, outcome: Outcome, answer: Answer | None) -> None:
        assert question is QUESTION
        assert (answer is ANSWER) == (outcome.prompt_tokens == 3)
        error = None if outcome.error is None else outcome.error.partition(":")[0]
        self.heard.append((arm, served_by, outcome.ending, error, answer is ANSWER))


QUESTION = Encoding(EmbeddingRequest(("a",)))
ANSWER = EncodingAnswer(Encoded(np.ones((1, 2), np.float32), 3, "m@1"), "embeddings")


@pytest.mark.parametrize(
    ("happens", "heard"),
    [
        ([None], [("b", "m@3", "finished", None, True)]),
        ([ArithmeticError(), None], [("b", "m@3", "failed", "ArithmeticError", False), MOVED]),
        ([InvalidInput("two"), None], [("b", "m@3", "failed", "InvalidInput", False), MOVED]),
        ([InvalidInput("two"), InvalidInput("two")], []),  # the caller's own mistake never ran
        ([EngineClosed("gone"), None], [("b", "m@4", "finished", None, True)]),
        ([ArithmeticError(), ArithmeticError()], [
            ("b", "m@3", "failed", "ArithmeticError", False), (STABLE, "m@1", "failed", "ArithmeticError", False),
        ]),
    ],
)  # fmt: skip
def test_whoever_stands_beside_hears_what_became_of_a_request_on_each_arm(
    house: House, happens: list[Exception | None], heard: list[tuple[str, str, str, str | None, bool]]
) -> None:
    beside = Beside()
    turn = house.turn("b", beside)
    work = in_turn(*happens)

    def begin(served: object) -> str:
        turn.question = QUESTION
        return work(served)

    if happens[-1] is None:
        turn.start(begin)
        turn.finished(ANSWER)
    else:
        with pytest.raises(type(happens[-1])):
            turn.start(begin)
    turn.left()
    assert beside.heard == heard


def test_a_caller_that_leaves_is_heard_of_and_one_whose_question_was_never_read_is_not(house: House) -> None:
    beside = Beside()
    turn = house.turn(STABLE, beside)
    turn.start(in_turn(None))
    turn.left()
    assert beside.heard == []
    turn = house.turn(STABLE, beside)
    turn.start(in_turn(None))
    turn.question = QUESTION
    turn.left()
    assert beside.heard == [(STABLE, "m@1", "left", None, False)]
    assert not house.turn(STABLE).is_heard


# ---- leases ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def probed(clock: FakeClock) -> Lease:
    """The one request that a replica gets which has failed five times."""
    held = replica(1)
    for _ in range(5):
        Lease(held, 1.0, clock, lambda *_: None).end(EngineClosed("gone"))
    assert not held.ledger.candidate(1, clock.monotonic_s()).is_allowed
    clock.advance(1.0)
    probe = Lease(held, 1.0, clock, lambda *_: None)
    assert not held.ledger.candidate(1, clock.monotonic_s()).is_allowed, "one at a time"
    return probe


def state(lease: Lease, clock: FakeClock) -> str:
    return lease._replica.ledger._breaker.state(clock.monotonic_s())


@pytest.mark.parametrize("error", [None, InvalidInput("no number"), ArithmeticError("of the model")])
def test_a_request_that_was_read_shows_that_a_replica_does_well(
    probed: Lease, clock: FakeClock, error: Exception | None
) -> None:
    probed.end(error)
    assert state(probed, clock) == "closed"


@pytest.mark.parametrize("error", [None, QueueFull(1, retry_after_s=1.0), Expired(1.0), TimedOut("late"), Busy("full")])
def test_what_came_too_late_or_left_shows_nothing_and_the_next_one_may_go(
    probed: Lease, clock: FakeClock, error: Exception | None
) -> None:
    probed.leave() if error is None else probed.end(error)
    assert state(probed, clock) == "half-open"
    assert probed._replica.ledger.candidate(1, clock.monotonic_s()).is_allowed
    assert probed._replica.in_flight == 0


def test_only_the_first_end_of_a_lease_counts(probed: Lease, clock: FakeClock) -> None:
    probed.leave()
    probed.end()
    probed.end(EngineClosed("gone"))
    assert state(probed, clock) == "half-open"
    assert probed._replica.in_flight == 0
