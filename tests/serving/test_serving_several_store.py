"""What several processes write about one deployment, on both databases: reports, periods, measurements; and how what
one process had written before there could be several is carried over."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import func, inspect, select, text

import sihe.core.records
from sihe.core.clock import FakeClock
from sihe.core.errors import NotFound
from sihe.core.records import Records
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.replicas.types import ReplicaState, ReplicaStatus
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic import experiment_store
from sihe.serving.gateway.traffic.experiment import Experiment, Period, Split
from sihe.serving.gateway.traffic.experiment_store import GONE_AFTER, MAX_WRITERS, ExperimentStore
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.types import ArmStatus, Shadow
from sihe.serving.gateway.types import DeploymentState, DeploymentStatus
from sihe.serving.tables import measurements, periods, reports

SPLIT = Split({"stable": 0.5, "b": 0.5}, {"stable": 1, "b": None})
DONE = Outcome("finished", "stop", None, 3, 4, 0.1, 0.2)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(records: Records, clock: FakeClock) -> DeploymentStore:
    made = DeploymentStore(records, clock)
    made.put("chat", "tiny", "live", EngineConfig())
    return made


@pytest.fixture
def experiments(records: Records, clock: FakeClock, store: DeploymentStore) -> ExperimentStore:
    return ExperimentStore(records, clock)


def status(store: DeploymentStore, state: DeploymentState, **more: Any) -> DeploymentStatus:
    return replace(store.reported("chat"), state=state, **{"processes": 1, "replicas": (), "error": None, **more})


def replica(version: int, state: ReplicaState = ReplicaState.READY) -> ReplicaStatus:
    return ReplicaStatus(version, state, 1)


def count(records: Records, table: Any) -> int:
    with records.snapshot() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_what_processes_say_is_shown_together(store: DeploymentStore, clock: FakeClock) -> None:
    assert (store.reported("chat").state, store.reported("chat").processes) == (DeploymentState.UNSERVED, 0)
    arms = (
        ArmStatus("stable", "tiny@live", 0.7, "READY", 1, 2, None),
        ArmStatus("b", "tiny@3", 0.3, "READY", 3, 1, None),
    )
    ready = status(store, DeploymentState.READY, version=1, wanted=2, replicas=(replica(1),), arms=arms)
    store.report(ready, process="srv_a")
    assert store.reported("chat") == replace(ready, reported_at=clock.now())
    clock.advance(1)
    loading = status(
        store,
        DeploymentState.PENDING,
        version=None,
        wanted=2,
        error="no memory",
        replicas=(replica(2, ReplicaState.LOADING),),
        arms=(replace(arms[0], state="PENDING", version=None, in_flight=0), replace(arms[1], version=4, error="slow")),
        rollout_note="it waits",
    )
    store.report(loading, process="srv_b")
    found = store.reported("chat")
    assert (found.state, found.version, found.wanted, found.processes) == (DeploymentState.READY, 1, 2, 2)
    assert found.error == "no memory (in 1 of 2 processes)"
    assert [one.state for one in found.replicas] == [ReplicaState.READY, ReplicaState.LOADING]
    assert (found.rollout_note, found.reported_at) == ("it waits", clock.now())
    assert [(one.name, one.state, one.version, one.in_flight) for one in found.arms] == [
        ("stable", "READY", 1, 2),
        ("b", "READY", 3, 2),
    ]
    assert found.arms[1].error == "slow (in 1 of 2 processes)"
    assert store.all_reported() == [found]
    store.report(replace(ready, version=2, error="no memory"), process="srv_a")  # one has swapped
    store.report(replace(ready, version=1, error="no memory"), process="srv_b")
    found = store.reported("chat")
    assert (found.version, found.wanted, found.error) == (1, 2, "no memory"), "some callers are answered by the old one"
    store.report(replace(ready, version=2), process="srv_b")
    assert store.reported("chat").version == 2
    store.report(replace(ready, state=DeploymentState.FAILED, version=1), process="srv_b")
    assert store.reported("chat").version == 2, "of those that are able to answer"


def test_the_process_that_asks_speaks_for_itself(store: DeploymentStore) -> None:
    said = status(store, DeploymentState.FAILED, error="broken")
    store.report(said, process="srv_a")
    store.report(said, process="srv_b")
    live = status(store, DeploymentState.READY, version=3, wanted=3, error=None)
    found = store.reported("chat", live, process="srv_a")
    assert (found.state, found.version, found.processes) == (DeploymentState.READY, 3, 2)
    assert found.error == "broken (in 1 of 2 processes)"
    assert store.all_reported({"chat": live}, process="srv_a") == [found]
    store.withdraw("srv_b")
    assert store.reported("chat", live, process="srv_a") == live


def test_old_reports_say_nothing_and_go(store: DeploymentStore, records: Records, clock: FakeClock) -> None:
    said = status(store, DeploymentState.READY, version=1)
    store.report(said, process="srv_a")
    clock.advance(19)
    store.report(said, process="srv_b")
    assert store.reported("chat").processes == 2
    clock.advance(2)
    assert store.reported("chat").processes == 1
    clock.advance(400)
    assert (store.reported("chat").state, store.reported("chat").processes) == (DeploymentState.UNSERVED, 0)
    assert store.reported("chat").reported_at == clock.now() - timedelta(seconds=402)
    store.report(said, process="srv_c")
    assert count(records, reports) == 1
    store.withdraw("srv_c")
    assert count(records, reports) == 0
    store.remove("chat")
    store.report(said, process="srv_c")
    assert count(records, reports) == 0, "what was removed stays removed"


def test_what_shadows_of_all_processes_have_shown(store: DeploymentStore) -> None:
    store.change_traffic("chat", lambda policy: replace(policy, shadow=Shadow("tiny", "2", 0.5)))
    said = status(store, DeploymentState.READY, version=1)
    first = ShadowReport(8, 6, 1, 0, 1, 4, 0.9, 1.5, "tokens", 0.2, "tiny@2")
    for process, shown in (
        ("srv_a", first),
        ("srv_b", ShadowReport(3, 2, 0, 1, 0, 2, 0.5, 0.5, "tokens", 0.4, "tiny@2")),
        ("srv_c", ShadowReport(1, 0, 0, 0, 1, 0, None, None, target="tiny@2")),
        ("srv_d", replace(first, target="tiny@1")),
    ):
        store.report(said, shown, process=process)
    found = store.shadow("chat")
    assert found is not None
    assert (found.copies, found.compared, found.failed, found.yielded, found.dropped, found.same) == (12, 8, 1, 1, 2, 6)
    means = (found.mean_agreement, found.mean_latency_ratio, found.mean_latency_s)
    assert means == pytest.approx((0.8, 1.25, 0.25))
    assert (found.measure, found.target) == ("tokens", "tiny@2")
    live = replace(first, copies=9)
    assert store.shadow("chat", live, process="srv_a") == replace(found, copies=13)


# ---- periods and measurements ----------------------------------------------------------------------------------------


def begun(experiments: ExperimentStore, clock: FakeClock, number: int = 1) -> Period:
    period = Period(number, SPLIT, clock.now())
    assert experiments.begin("chat", period, newest=number - 1 or None)
    return period


def measured(clock: FakeClock, *, period: int = 1, requests: int = 1, first: int = 0) -> Experiment:
    made = Experiment("chat", period, SPLIT, clock.now())
    for number in range(first, first + requests):
        made.record("b", DONE, number % 64, f"user-{number}")
    return made


def test_of_two_that_begin_a_period_one_does(experiments: ExperimentStore, clock: FakeClock, records: Records) -> None:
    first = begun(experiments, clock)
    assert experiments.periods("chat") == (first,)
    together, wins = threading.Barrier(4), []

    def begin(place: int) -> None:
        split = Split({"stable": 1.0}, {"stable": place})
        together.wait(30)
        if experiments.begin("chat", Period(2, split, clock.now()), newest=1):
            wins.append(split)

    threads = [threading.Thread(target=begin, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [period.split for period in experiments.periods("chat")] == [*wins, SPLIT]
    assert len(wins) == 1
    with pytest.raises(NotFound):
        experiments.begin("absent", first, newest=None)


def test_a_period_goes_on_only_from_what_was_seen(experiments: ExperimentStore, clock: FakeClock) -> None:
    first = begun(experiments, clock)
    known = replace(first, split=Split(SPLIT.weights, {"stable": 1, "b": 2}))
    assert not experiments.complete("chat", known, known.split), "it is another one by now"
    assert experiments.complete("chat", known, SPLIT)
    assert experiments.periods("chat") == (known,)
    second = begun(experiments, clock, 2)
    assert not experiments.complete("chat", known, known.split), "it is the newest no more"
    assert experiments.periods("chat") == (second, known)


def test_periods_are_bounded_and_take_their_measurements_along(
    experiments: ExperimentStore, clock: FakeClock, records: Records
) -> None:
    for number in range(1, 25):
        begun(experiments, clock, number)
        for writer in ("srv_a.0", "srv_b.0"):
            assert experiments.save(measured(clock, period=number), writer, is_new=True)
    assert [period.number for period in experiments.periods("chat")] == list(range(24, 4, -1))
    assert (count(records, periods), count(records, measurements)) == (20, 40)
    assert not experiments.save(measured(clock, period=3), "srv_c.0", is_new=True), "it is forgotten"
    assert not experiments.save(measured(clock, period=3), "srv_a.0", is_new=False)
    assert count(records, measurements) == 40
    latest = experiments.latest("chat")
    assert latest is not None
    assert (latest.period, latest.stats("b").requests) == (24, 2)
    assert experiments.latest("absent") is None


def test_what_is_known_is_not_read_again(experiments: ExperimentStore, clock: FakeClock) -> None:
    begun(experiments, clock)
    for writer in ("srv_a.0", "srv_b.0"):
        experiments.save(measured(clock), writer, is_new=True)
    heard = experiments.heard("chat", 1, {}, besides="srv_c.0")
    assert sorted(heard) == ["srv_a.0", "srv_b.0"]
    experiments.save(measured(clock, requests=5), "srv_b.0", is_new=False)
    again = experiments.heard("chat", 1, heard, besides="srv_c.0")
    assert again["srv_a.0"] is heard["srv_a.0"]
    assert again["srv_b.0"].tally.arm("b").requests == 5
    assert sorted(experiments.heard("chat", 1, again, besides="srv_a.0")) == ["srv_b.0"]


def test_what_a_newer_version_has_measured_is_left_out(
    experiments: ExperimentStore, clock: FakeClock, records: Records
) -> None:
    begun(experiments, clock)
    for writer in ("srv_a.0", "srv_b.0"):
        experiments.save(measured(clock), writer, is_new=True)
    for unread in ({"planets": 3}, {"arms": [], "least": {}}, {"arms": {"b": {"requests": 1}}, "least": {}}):
        with records.transaction() as connection:
            row = measurements.update().where(measurements.c.writer == "srv_a.0")
            connection.execute(row.values(statistics=unread))
        latest = experiments.latest("chat")
        assert latest is not None
        assert latest.stats("b").requests == 1


def test_rows_of_processes_that_are_gone_become_one(
    experiments: ExperimentStore, store: DeploymentStore, clock: FakeClock, records: Records
) -> None:
    begun(experiments, clock)
    experiments.save(measured(clock, requests=2), "srv_alive.0", is_new=True)
    for number in range(3 * MAX_WRITERS):  # a process that ends as soon as it has answered
        if number == MAX_WRITERS:
            clock.advance(GONE_AFTER.total_seconds() + 1)
            store.report(status(store, DeploymentState.READY), process="srv_alive")
        experiments.save(measured(clock, first=number), f"srv_{number:03}.0", is_new=True)
    rows = count(records, measurements)
    assert rows <= 3 * MAX_WRITERS - MAX_WRITERS + 3, "those that may come back are left"
    heard = experiments.heard("chat", 1, {})
    assert {"srv_alive.0", experiment_store._TOGETHER} <= set(heard)
    latest = experiments.latest("chat")
    assert latest is not None
    whole = latest.report().arms[1]
    assert whole.requests == 3 * MAX_WRITERS + 2
    clock.advance(GONE_AFTER.total_seconds() + 1)
    store.report(status(store, DeploymentState.READY), process="srv_alive")
    experiments.save(measured(clock), "srv_last.0", is_new=True)
    assert sorted(experiments.heard("chat", 1, heard)) == ["srv_alive.0", "srv_last.0", "together"]
    latest = experiments.latest("chat")
    assert latest is not None
    assert latest.report().arms[1].requests == 3 * MAX_WRITERS + 3
    assert not experiments.save(measured(clock), "srv_000.0", is_new=False), "it has been counted already"
    assert experiments.save(measured(clock, requests=3), "srv_alive.0", is_new=False)


def test_nothing_is_measured_of_what_was_removed(
    experiments: ExperimentStore, store: DeploymentStore, clock: FakeClock, records: Records
) -> None:
    begun(experiments, clock)
    experiments.save(measured(clock), "srv_a.0", is_new=True)
    store.remove("chat")
    assert experiments.save(measured(clock), "srv_a.0", is_new=False), "there is nothing to do"
    assert (count(records, periods), count(records, measurements)) == (0, 0)


# ---- what one process had written ------------------------------------------------------------------------------------


def test_what_one_process_had_written_is_carried_over(empty: Records, clock: FakeClock) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(sihe.core.records.__file__).parent / "migrations"))
    with empty.transaction() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0006")
    old = measured(clock, requests=3).to_mapping()
    for arm in old["arms"].values():
        arm["units"] = 3  # which were counted and not kept
        del arm["senders"]
    old["least"] = {"split": 0.25}
    ready = {"state": "READY", "version": 1, "wanted": 1, "error": None, "replicas": [], "shadow": None}
    moment = {"now": clock.now().replace(tzinfo=None) if empty.is_sqlite else clock.now()}
    deployment = "INSERT INTO sihe_deployments (name, model, selector, settings, created_at, updated_at, status, "
    deployment += (
        "reported_at, adapters) VALUES (:name, 'tiny', 'live', '{}', :now, :now, :status, :reported, :adapters)"
    )
    period = "INSERT INTO sihe_experiments (deployment, period, split, statistics, started_at, updated_at) "
    period += "VALUES ('chat', :period, :split, :statistics, :now, :now)"
    split = json.dumps({"weights": dict(SPLIT.weights), "versions": dict(SPLIT.versions)})
    with empty.transaction() as connection:
        for name, said in (("chat", ready), ("silent", None)):
            status, reported = (json.dumps(said), moment["now"]) if said else (None, None)
            values = {"name": name, "status": status, "reported": reported, "adapters": '{"fr": "adapters/1"}'}
            connection.execute(text(deployment), {**values, **moment})
        for number in (6, 7):
            values = {"period": number, "split": split, "statistics": json.dumps(old)}
            connection.execute(text(period), {**values, **moment})
    empty.migrate()
    empty.migrate()
    store, experiments = DeploymentStore(empty, clock), ExperimentStore(empty, clock)
    found = store.reported("chat")
    assert (found.state, found.version, found.reported_at) == (DeploymentState.READY, 1, clock.now())
    assert found.processes == 1
    silent = store.reported("silent")
    assert (silent.state, silent.reported_at) == (DeploymentState.UNSERVED, None)
    assert store.adapters("silent") == {"fr": "adapters/1"}
    assert store.get("chat").created_at == clock.now()
    assert [one.number for one in experiments.periods("chat")] == [7, 6]
    assert experiments.periods("chat")[0] == Period(7, SPLIT, clock.now())
    latest = experiments.latest("chat")
    assert latest is not None
    assert latest.report().arms[1].requests == 3
    assert latest.report().mismatch_p_always <= 0.25
    assert latest.stats("b").times["latency_s"].count == 3
    with empty.engine.connect() as connection:
        columns = {column["name"] for column in inspect(connection).get_columns("sihe_deployments")}
        assert not columns & {"status", "reported_at"}
        assert "sihe_experiments" not in inspect(connection).get_table_names()
    store.put("chat", "tiny", "live", EngineConfig())  # the table is as good as a new one
    store.report(found, process="srv_a")
    assert store.reported("chat").processes == 2
