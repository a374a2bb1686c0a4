"""Deployments in the records: what one process says is shown by others, also where a newer version has written it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sihe.core.clock import FakeClock
from sihe.core.errors import ConfigError, NotFound, UserError
from sihe.core.records import Records
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.store import DeploymentStore
from sihe.serving.gateway.traffic.shadow import ShadowReport
from sihe.serving.gateway.traffic.types import Shadow
from sihe.serving.gateway.types import DeploymentState
from sihe.serving.tables import deployments, reports

READY: dict[str, Any] = {"state": "READY", "version": 1, "wanted": 1, "error": None, "replicas": []}
REPLICA = {"version": 1, "state": "READY", "in_flight": 0}


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    opened = Records(f"sqlite:///{tmp_path / 'records.db'}")
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(records: Records, clock: FakeClock) -> DeploymentStore:
    """Two deployments: of `chat` another process has just reported that it is ready."""
    made = DeploymentStore(records, clock)
    made.put("a-good-one", "tiny", "", EngineConfig())
    made.put("chat", "tiny", "live", EngineConfig())
    said(records, clock, READY)
    return made


def said(records: Records, clock: FakeClock, status: dict[str, Any], process: str = "srv_1") -> None:
    """Another process has just reported this of `chat`."""
    key = {"deployment": "chat", "process": process}
    with records.transaction() as connection:
        connection.execute(reports.delete().where(reports.c.process == process))
        connection.execute(reports.insert().values(**key, status=status, reported_at=clock.now()))


def write(records: Records, **values: object) -> None:
    with records.transaction() as connection:
        connection.execute(deployments.update().where(deployments.c.name == "chat").values(**values))


def test_a_report_is_shown_while_it_is_fresh(store: DeploymentStore, clock: FakeClock) -> None:
    said = store.reported("chat")
    assert (said.state, said.version, said.error, said.target) == (DeploymentState.READY, 1, None, "tiny@live")
    assert store.all_reported() == [store.reported("a-good-one"), said]
    clock.advance(60)
    assert (store.reported("chat").state, store.reported("chat").version) == (DeploymentState.UNSERVED, None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"settings": {"speed": 3}}, "'speed'"),
        ({"replicas": {"planets": 3}}, "'planets'"),
    ],
)
@pytest.mark.parametrize("is_known", [True, False])
def test_a_wish_that_cannot_be_read_is_shown_with_its_error_and_repaired_by_another(
    store: DeploymentStore, records: Records, values: dict[str, object], said: str, is_known: bool
) -> None:
    write(records, **values)
    if not is_known:
        store.withdraw("srv_1")
    found = store.reported("chat")
    assert found.state is (DeploymentState.READY if is_known else DeploymentState.UNSERVED)
    assert (found.version, found.target) == (1 if is_known else None, "tiny@live")
    assert said in str(found.error)
    assert [one.error for one in store.all_reported()] == [None, found.error]
    with pytest.raises(ConfigError):
        store.get("chat")
    store.put("chat", "tiny", "live", EngineConfig())
    assert store.reported("chat").error is None


@pytest.mark.parametrize(
    ("traffic", "said"),
    [
        ({"logs": {"moons": 3}}, "'moons'"),
        ({"arms": [{"name": "b", "moons": 3}]}, "'moons'"),
        ({"arms": 3}, "not iterable"),
        ({"arms": [3]}, "cannot be read"),
        ({"sticky": "moon"}, "'moon'"),
    ],
)
def test_arms_that_cannot_be_read_stop_only_their_deployment_which_can_be_removed(
    store: DeploymentStore, records: Records, traffic: dict[str, object], said: str
) -> None:
    write(records, traffic=traffic)
    faults: dict[str, Exception] = {}
    assert [found.name for found in store.all(faults.__setitem__)] == ["a-good-one"]
    assert said in str(faults["chat"])
    assert store.reported("chat").error == str(faults["chat"])
    with pytest.raises(UserError):
        store.change_traffic("chat", lambda policy: policy)
    store.remove("chat")
    assert [found.name for found in store.all()] == ["a-good-one"]


@pytest.mark.parametrize(
    "status",
    [
        {**READY, "state": "ORBITING"},
        {**READY, "replicas": [{**REPLICA, "state": "ORBITING"}]},
        {**READY, "replicas": [{"version": 1}]},
        {**READY, "arms": [{"planet": 3}]},
        {"state": "READY"},
    ],
)
def test_a_report_that_cannot_be_read_says_nothing_of_what_serves(
    store: DeploymentStore, records: Records, clock: FakeClock, status: dict[str, object]
) -> None:
    said(records, clock, status)
    found = store.reported("chat")
    assert (found.state, found.version, found.replicas) == (DeploymentState.UNSERVED, None, ())
    assert "report cannot be read" in str(found.error)


def test_a_reported_error_comes_before_that_of_reading(
    store: DeploymentStore, records: Records, clock: FakeClock
) -> None:
    said(records, clock, {**READY, "error": "no memory"})
    write(records, settings={"speed": 3})
    assert store.reported("chat").error == "no memory"


def test_what_a_shadow_has_shown_is_that_of_the_present_one(store: DeploymentStore, records: Records) -> None:
    status = store.reported("chat")
    shown = ShadowReport(5, 3, 1, 0, 1, 2, 0.75, 1.5, "tokens", 0.02, target="tiny@2")
    store.report(status, shown, process="srv_1")
    assert store.shadow("chat") is None, "none is wanted"
    store.change_traffic("chat", lambda policy: replace(policy, shadow=Shadow("tiny", "2", 0.5)))
    assert store.shadow("chat") == shown
    store.report(status, process="srv_1")  # the process that serves now has not begun with it
    assert store.shadow("chat") is None
    store.report(status, shown, process="srv_1")
    store.change_traffic("chat", lambda policy: replace(policy, shadow=Shadow("tiny", "3", 0.5)))
    assert store.shadow("chat") is None, "it is about another version"
    with pytest.raises(NotFound):
        store.shadow("absent")


@pytest.mark.parametrize("shown", [{"planet": 3}, {"copies": 1}])
def test_what_a_newer_version_says_of_a_shadow_is_nothing_here(
    store: DeploymentStore, records: Records, clock: FakeClock, shown: dict[str, object]
) -> None:
    store.change_traffic("chat", lambda policy: replace(policy, shadow=Shadow("tiny", "2", 0.5)))
    said(records, clock, {**READY, "shadow": shown})
    assert store.shadow("chat") is None
    assert store.reported("chat").state is DeploymentState.READY


def test_adapters_are_found_without_the_rest(store: DeploymentStore, records: Records) -> None:
    store.add_adapter("chat", "fr", "adapters/chat/1")
    write(records, settings={"speed": 3})
    assert store.adapters("chat") == {"fr": "adapters/chat/1"}
    assert store.adapters("a-good-one") == store.adapters("absent") == {}
