"""Rollouts and measurements in the records: two movers do not both win, and arms change with their rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sihe.core.clock import FakeClock
from sihe.core.errors import AlreadyExists, Busy, InvalidInput, NotFound, UserError
from sihe.core.ids import new_id
from sihe.core.records import Records
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.replicas.config import ReplicaConfig
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic.experiment import Experiment, Period, Split
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore
from sihe.serving.gateway.traffic.rollout import Plan, Rollout, RolloutState, Step
from sihe.serving.gateway.traffic.store import RolloutStore
from sihe.serving.gateway.traffic.types import Arm
from sihe.serving.tables import rollouts

PLAN = Plan(steps=(Step(0.1), Step(0.5)))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def deployed(records: Records, clock: FakeClock) -> DeploymentStore:
    store = DeploymentStore(records, clock)
    store.put("chat", "tiny", "live", EngineConfig(), replicas=ReplicaConfig(max_replicas=2))
    return store


def a_rollout(clock: FakeClock, arm: str = "canary") -> Rollout:
    settings, now = EngineConfig(max_batch_size=4), clock.now()
    return Rollout(new_id("roll"), "chat", arm, "tiny", 2, settings, PLAN, RolloutState.RUNNING, 0, "", now, now)


def test_a_rollout_moves_with_the_weight_of_its_arm(
    records: Records, clock: FakeClock, deployed: DeploymentStore
) -> None:
    store = RolloutStore(records, clock)
    begun = a_rollout(clock)
    store.begin(begun)
    assert store.of("chat") == begun
    assert deployed.get("chat").traffic.weights == {"stable": 0.9, "canary": 0.1}
    clock.advance(60)
    second = store.move(begun, step=1, reason="passed")
    assert deployed.get("chat").traffic.weights == {"stable": 0.5, "canary": 0.5}
    assert (store.of("chat"), second.changed_at) == (second, clock.now())
    with pytest.raises(Busy):
        store.move(begun, step=1)  # it has moved since it was seen like this
    back = store.move(second, state=RolloutState.ROLLED_BACK, reason="worse")
    assert deployed.get("chat").traffic.arms == ()
    assert deployed.get("chat").target == "tiny@live"
    with pytest.raises(NotFound):
        store.of("chat")
    assert store.history("chat") == [back]


def test_a_promoted_version_is_what_is_deployed(records: Records, clock: FakeClock, deployed: DeploymentStore) -> None:
    store = RolloutStore(records, clock)
    begun = a_rollout(clock)
    store.begin(begun)
    promoting = store.move(begun, state=RolloutState.PROMOTING)
    assert deployed.get("chat").traffic.weights["canary"] == 0.1  # until it is done
    store.promoted(promoting, selector="2")
    found = deployed.get("chat")
    assert (found.target, found.settings, found.traffic.arms) == ("tiny@2", EngineConfig(max_batch_size=4), ())
    assert found.replicas == ReplicaConfig(max_replicas=2)
    with pytest.raises(Busy):
        store.promoted(promoting, selector="2")


@pytest.mark.parametrize("unread", [{"settings": {"speed": 3}}, {"plan": {"speed": 3}}])
def test_a_rollout_that_cannot_be_read_is_rolled_back_all_the_same(
    records: Records, clock: FakeClock, deployed: DeploymentStore, unread: dict[str, object]
) -> None:
    store = RolloutStore(records, clock)
    with pytest.raises(NotFound):
        store.roll_back("chat", reason="by hand")
    first = a_rollout(clock)
    store.begin(first)
    store.roll_back("chat", reason="by hand")
    (past,) = store.history("chat")
    assert (past.id, past.state, past.reason) == (first.id, RolloutState.ROLLED_BACK, "by hand")
    store.begin(a_rollout(clock))
    with records.transaction() as connection:
        is_active = rollouts.c.state == RolloutState.RUNNING.value
        connection.execute(rollouts.update().where(is_active).values(**unread))
    for look in (store.of, store.history):
        with pytest.raises(UserError, match="speed"):
            look("chat")
    store.roll_back("chat", reason="by hand")
    assert deployed.get("chat").traffic.arms == ()
    assert (store.find("chat"), store.history("chat")) == (None, [past])


def test_what_is_being_promoted_is_not_rolled_back(
    records: Records, clock: FakeClock, deployed: DeploymentStore
) -> None:
    store = RolloutStore(records, clock)
    begun = a_rollout(clock)
    store.begin(begun)
    promoting = store.move(begun, state=RolloutState.PROMOTING)
    with pytest.raises(InvalidInput, match="being promoted"):
        store.roll_back("chat", reason="by hand")
    assert store.of("chat") == promoting
    assert [arm.name for arm in deployed.get("chat").traffic.arms] == ["canary"]


def test_one_rollout_at_a_time(records: Records, clock: FakeClock, deployed: DeploymentStore) -> None:
    store = RolloutStore(records, clock)
    store.begin(a_rollout(clock))
    for arm in ("canary", "other"):
        with pytest.raises(AlreadyExists):
            store.begin(a_rollout(clock, arm))
    assert [arm.name for arm in deployed.get("chat").traffic.arms] == ["canary"]  # nothing half done
    with pytest.raises(NotFound):
        store.begin(replace(a_rollout(clock), deployment="absent"))


def test_what_is_removed_leaves_nothing_for_the_next_of_its_name(
    records: Records, clock: FakeClock, deployed: DeploymentStore
) -> None:
    store, experiments = RolloutStore(records, clock), ExperimentStore(records, clock)
    store.begin(a_rollout(clock))
    split = Split({"stable": 1.0}, {"stable": 1})
    assert experiments.begin("chat", Period(1, split, clock.now()), newest=None)
    assert experiments.save(Experiment("chat", 1, split, clock.now()), "srv_1.0", is_new=True)
    deployed.report(deployed.reported("chat"), process="srv_1")
    deployed.remove("chat")
    assert store.active() == {}
    assert (experiments.latest("chat"), experiments.heard("chat", 1, {})) == (None, {})
    deployed.put("chat", "tiny", "live", EngineConfig())
    assert deployed.get("chat").traffic.arms == ()
    assert deployed.reported("chat").reported_at is None


def test_arms_stay_when_a_deployment_is_deployed_anew(deployed: DeploymentStore) -> None:
    deployed.change_traffic("chat", lambda policy: policy.with_arm(Arm("b", "tiny", "2", 0.3)))
    deployed.put("chat", "tiny", "3", EngineConfig())
    assert deployed.get("chat").traffic.weights == {"stable": 0.7, "b": 0.3}
    with pytest.raises(NotFound):
        deployed.change_traffic("absent", lambda policy: policy)
