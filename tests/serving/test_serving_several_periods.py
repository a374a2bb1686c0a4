"""Which period each of several processes measures for: one for all that serve the same, whoever sees a change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.core.clock import FakeClock
from sihe.core.errors import NoSpace
from sihe.core.ids import new_id
from sihe.core.records import Records
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic.experiment import Period, Split
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore
from sihe.serving.gateway.traffic.membership import Membership
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.periods import Begin, Complete, Join, Wait, choose
from sihe.serving.tables import measurements

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DONE = Outcome("finished", "stop", None, 5, 10, 0.05, 0.2)
HALF = {"stable": 0.5, "b": 0.5}


def period(number: int, **versions: int | None) -> Period:
    return Period(number, Split({arm: 1 / len(versions) for arm in versions}, versions), NOW)


OLD, NEW = period(4, stable=1, b=2), period(5, stable=1, b=3)
FRESH = period(5, stable=1, b=None)


@pytest.mark.parametrize(
    ("split", "periods", "own", "may_complete", "step"),
    [
        (NEW.split, [NEW, OLD], 4, False, Join(NEW)),  # another process has seen it first
        (OLD.split, [NEW, OLD], 4, False, Join(OLD)),  # this one lags: its own period still fits
        (OLD.split, [period(6, stable=1, b=2), NEW, OLD], 4, False, Join(period(6, stable=1, b=2))),  # there and back
        (period(0, stable=2, b=2).split, [NEW, OLD], 4, False, Begin(6)),  # a change that nobody has seen before
        (NEW.split, [], None, False, Begin(1)),  # the first process of all
        (NEW.split, [], 7, False, Begin(8)),  # the deployment was removed and made anew
        (period(0, stable=None, b=None).split, [NEW], None, False, Wait()),  # it has just started
        (period(0, stable=1, b=None).split, [NEW], None, False, Wait()),  # one arm is loaded
        (period(0, stable=1, b=None).split, [NEW, FRESH], 5, False, Join(FRESH)),  # nobody was in FRESH alone
        (FRESH.split, [NEW], 5, False, Wait()),  # its period went on without it
        (NEW.split, [FRESH, OLD], 5, True, Complete()),
        (NEW.split, [FRESH, OLD], 5, False, Begin(6)),  # others were measured already
        (NEW.split, [FRESH, OLD], 4, True, Begin(6)),  # not its own
        (NEW.split, [FRESH, OLD], None, False, Begin(6)),
    ],
)
def test_the_rule(split: Split, periods: list[Period], own: int | None, may_complete: bool, step: object) -> None:
    assert choose(split, periods, own=own, may_complete=may_complete) == step


# ---- processes on real records ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    opened = Records(f"sqlite:///{tmp_path_factory.mktemp('records') / 'records.db'}")
    opened.migrate()
    yield opened
    opened.close()


@dataclass
class Street:
    """One deployment of its own in the records, and the processes that serve it."""

    records: Records
    name: str = field(default_factory=lambda: new_id("dep"))
    clock: FakeClock = field(default_factory=FakeClock)

    def __post_init__(self) -> None:
        self.store = ExperimentStore(self.records, self.clock)
        DeploymentStore(self.records, self.clock).put(self.name, "tiny", "", EngineConfig())

    def process(self, weights: dict[str, float] = HALF) -> Membership:
        return Membership(self.name, new_id("srv"), weights, store=self.store, clock=self.clock)

    @property
    def numbers(self) -> list[int]:
        return [period.number for period in self.store.periods(self.name)]


@pytest.fixture
def street(shared: Records) -> Street:
    return Street(shared)


def ask(member: Membership, number: int, arm: str) -> None:
    experiment = member.experiment
    cluster = experiment.begin(f"r{number}", arm, f"user-{number}")
    experiment.record(arm, DONE, cluster, f"user-{number}")


def requests(member: Membership) -> dict[str, int]:
    return {arm.arm: arm.requests for arm in member.report().arms}


def test_two_processes_measure_one_period_and_begin_the_next_one_once(street: Street) -> None:
    first, second = street.process(), street.process()
    for member in (first, second):
        member.follow(HALF, {"stable": 1, "b": 2})
    assert street.numbers == [1]
    for number, (member, arm) in enumerate([(first, "stable"), (first, "b"), (second, "b")]):
        ask(member, number, arm)
    for member in (first, second):
        member.save()
    for member in (first, second):
        member.follow(HALF, {"stable": 1, "b": 2})
        assert requests(member) == {"stable": 1, "b": 2}
    found = street.store.latest(street.name)
    assert found is not None
    assert found.report() == first.report() == second.report()
    changed = {"stable": 0.8, "b": 0.2}
    first.follow(changed, {"stable": 1, "b": 2})
    ask(first, 10, "b")
    ask(second, 11, "b")  # it has not seen the change yet: this was dealt by the old weights
    assert (first.report().period, second.report().period) == (2, 1)
    second.follow(HALF, {"stable": 1, "b": 2})
    assert (second.report().period, requests(second)) == (1, {"stable": 1, "b": 3})
    second.follow(changed, {"stable": 1, "b": 2})
    first.save()
    second.follow(changed, {"stable": 1, "b": 2})
    assert street.numbers == [2, 1]
    assert (second.report().period, requests(second)) == (2, {"stable": 0, "b": 1})


def test_a_process_that_starts_waits_until_it_serves_what_is_compared(street: Street) -> None:
    first = street.process()
    first.follow(HALF, {"stable": 1, "b": 2})
    ask(first, 1, "b")
    first.save()
    late = street.process()
    for serving in ({}, {"stable": 1}):
        late.follow(HALF, serving)
        ask(late, 2, "stable")  # while the requests of the other arm cannot be served here
        late.save()
        assert (late.report().period, requests(late)) == (1, {"stable": 0, "b": 1}), "it shows what the others measure"
    late.follow(HALF, {"stable": 1, "b": 2})
    assert requests(late) == {"stable": 0, "b": 1}
    ask(late, 3, "stable")
    late.save()
    first.follow(HALF, {"stable": 1, "b": 2})
    assert requests(first) == {"stable": 1, "b": 1}
    late.follow(HALF, {"stable": 1, "b": None})
    assert late.report().period == 1, "a version that is not there now is not changed"
    assert street.numbers == [1]


def test_a_canary_that_is_ready_in_one_process_first_is_compared_with_that_process_alone(street: Street) -> None:
    first, second = street.process(), street.process()
    for member in (first, second):
        member.follow(HALF, {"stable": 1, "b": None})
        ask(member, 1, "stable")
    first.follow(HALF, {"stable": 1, "b": 2})
    assert (first.report().period, second.report().period) == (2, 1), "others were measured without it"
    ask(first, 2, "b")
    for _ in range(3):
        second.follow(HALF, {"stable": 1, "b": None})
        ask(second, 3, "stable")
    assert street.numbers == [2, 1]
    first.save()
    second.follow(HALF, {"stable": 1, "b": 2})
    assert requests(second) == {"stable": 0, "b": 1}


def test_a_period_that_goes_on_with_a_version_is_left_by_who_has_it_not(street: Street) -> None:
    first, second = street.process(), street.process()
    for member in (first, second):
        member.follow(HALF, {"stable": 1, "b": None})
    ask(first, 1, "b")  # it is ready, half a second before that is seen
    street.clock.advance(5)
    first.follow(HALF, {"stable": 1, "b": 2})
    assert (street.numbers, requests(first)) == ([1], {"stable": 0, "b": 1})
    assert first.report().started_at == street.clock.now()
    first.save()
    ask(second, 2, "stable")
    second.follow(HALF, {"stable": 1, "b": None})
    ask(second, 3, "stable")
    second.save()
    assert requests(second) == {"stable": 0, "b": 1}, "what this one answers could not be compared"
    assert second.experiment.feedback("r3", {"helpful": 1.0}) == "stable", "and is heard all the same"
    second.follow(HALF, {"stable": 1, "b": 2})
    ask(second, 4, "b")
    second.save()
    first.follow(HALF, {"stable": 1, "b": 2})
    assert (street.numbers, requests(first)) == ([1], {"stable": 0, "b": 2})
    assert first.report().arms[1].version == 2


def test_a_process_that_comes_back_to_its_period_leaves_what_it_had_stored_there(street: Street) -> None:
    first, second = street.process(), street.process()
    for member in (first, second):
        member.follow(HALF, {"stable": 1, "b": 2})
    ask(second, 1, "b")
    second.save()
    three = {"stable": 0.4, "b": 0.4, "c": 0.2}
    first.follow(three, {"stable": 1, "b": 2, "c": 5})
    second.follow(three, {"stable": 1, "b": 2})
    ask(second, 2, "b")  # beside an arm that cannot be reached here
    second.save()
    second.follow(HALF, {"stable": 1, "b": 2})  # the arm is gone again, which the first has not seen yet
    ask(second, 3, "b")
    second.save()
    assert (second.report().period, requests(second)) == (1, {"stable": 0, "b": 2})
    first.follow(HALF, {"stable": 1, "b": 2})
    second.follow(HALF, {"stable": 1, "b": 2})
    assert (street.numbers, second.report().period) == ([3, 2, 1], 3)


def test_a_restart_goes_on_and_counts_nothing_twice(street: Street) -> None:
    for number in range(3):
        member = street.process()
        member.follow(HALF, {"stable": 1, "b": 2})
        ask(member, number, "b")
        member.save()
        member.save()
        assert requests(member) == {"stable": 0, "b": number + 1}
    assert street.numbers == [1]


def test_a_process_taken_for_gone_begins_again_and_nothing_is_counted_twice(street: Street) -> None:
    member = street.process()
    member.follow(HALF, {"stable": 1, "b": 2})
    ask(member, 1, "b")
    member.save()
    with street.records.transaction() as connection:  # as if its row had become one with others
        row = measurements.c.deployment == street.name
        connection.execute(measurements.update().where(row).values(writer="together"))
    ask(member, 2, "b")
    member.save()
    for _ in range(2):
        member.follow(HALF, {"stable": 1, "b": 2})
        assert requests(member) == {"stable": 0, "b": 1}
    ask(member, 3, "stable")
    member.save()
    assert requests(member) == {"stable": 1, "b": 1}
    found = street.store.latest(street.name)
    assert found is not None
    assert {arm.arm: arm.requests for arm in found.report().arms} == {"stable": 1, "b": 1}


def test_records_that_fail_are_tried_again_and_periods_are_not_mixed(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = street.process()
    member.follow(HALF, {"stable": 1, "b": 2})
    ask(member, 1, "b")

    def full(*_: object, **__: object) -> None:
        raise NoSpace("the records")

    for name in ("begin", "save"):
        monkeypatch.setattr(ExperimentStore, name, full)
    for _ in range(2):
        member.follow(HALF, {"stable": 1, "b": 3})
        ask(member, 2, "b")
        member.save()
    assert requests(member) == {"stable": 0, "b": 2}, "of the new version, as this process alone has measured it"
    monkeypatch.undo()
    member.follow(HALF, {"stable": 1, "b": 3})
    member.save()
    found = street.store.latest(street.name)
    assert found is not None
    assert (found.period, requests(member)) == (2, {"stable": 0, "b": 2})
    assert found.report() == member.report()


# ---- any order of events ---------------------------------------------------------------------------------------------

HISTORY = (
    ({"stable": 1.0}, {"stable": 1}),
    ({"stable": 0.9, "canary": 0.1}, {"stable": 1, "canary": 2}),
    ({"stable": 0.5, "canary": 0.5}, {"stable": 1, "canary": 2}),
    ({"stable": 1.0}, {"stable": 2}),
    ({"stable": 0.5, "b": 0.5}, {"stable": 2, "b": 1}),
    ({"stable": 0.5, "b": 0.5}, {"stable": 2, "b": 3}),
    ({"stable": 1.0}, {"stable": 2}),
    ({"stable": 1.0}, {"stable": 3}),
    ({"stable": 1.0}, {"stable": 2}),
)


@dataclass
class Server:
    """A process that sees weights and loads versions when it comes to it."""

    street: Street
    weights_at: int = 0
    versions_at: int = 0
    serving: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.member = self.street.process(HISTORY[self.weights_at][0])
        self.last = 0

    def look(self) -> None:
        weights = HISTORY[self.weights_at][0]
        self.member.follow(weights, {arm: self.serving.get(arm) for arm in weights})
        self.check()

    def check(self) -> None:
        """What is measured in a period of the records is of exactly these weights and versions."""
        if not self.member._is_member:
            return
        found = {one.number: one.split for one in self.street.store.periods(self.street.name)}
        split = self.member.experiment.split
        weights = HISTORY[self.weights_at][0]
        assert split == found[self.member.experiment.period]
        assert split.weights == weights
        assert all(split.versions[arm] == self.serving[arm] for arm in weights if arm in self.serving)
        assert self.member.experiment.period >= self.last, "nobody goes back"
        self.last = self.member.experiment.period

    def hears(self) -> None:
        self.weights_at = min(self.weights_at + 1, len(HISTORY) - 1)

    def loads(self) -> None:
        self.versions_at = min(self.versions_at + 1, len(HISTORY) - 1)
        self.serving = {**self.serving, **HISTORY[self.versions_at][1]}

    def asks(self) -> None:
        ask(self.member, 1, "stable")
        self.member.save()

    def restarts(self) -> None:
        self.serving = {}
        self.member, self.last = self.street.process(HISTORY[self.weights_at][0]), 0


ACTS: tuple[Callable[[Server], None], ...] = (
    Server.look,
    Server.look,
    Server.hears,
    Server.loads,
    Server.asks,
    Server.restarts,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(ACTS)), max_size=40), st.permutations([0, 1, 2]))
def test_processes_end_in_one_period_and_stay_there(
    shared: Records, acts: list[tuple[int, Callable[[Server], None]]], order: list[int]
) -> None:
    street = Street(shared)
    servers = [Server(street, serving=dict(HISTORY[0][1])) for _ in range(3)]
    for place, act in acts:
        act(servers[place])
        servers[place].look()
    for place in order:  # everybody has seen everything
        servers[place].weights_at = servers[place].versions_at = len(HISTORY) - 1
        servers[place].serving = {**servers[place].serving, **HISTORY[-1][1]}
    for _ in range(2):
        for place in order:
            servers[place].look()
    numbers = street.numbers
    for _ in range(3):
        for server in servers:
            server.look()
            assert server.member._is_member
            assert server.member.experiment.period == numbers[0]
    assert street.numbers == numbers, "nothing changes any more"
    assert len(numbers) <= 20
