"""What goes wrong around a gateway that serves: records that fail, loads that hang, streams that do not end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from sihe.core.errors import ConfigError, NoSpace, NotFound
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.engine import Engine
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import EngineClosed
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.live import LiveDeployment
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.traffic.experiment_store import ExperimentStore
from sihe.serving.gateway.traffic.rollout import Gates, Plan, RolloutState, Step
from sihe.serving.gateway.traffic.types import Sender
from sihe.serving.gateway.types import DeploymentState
from sihe.serving.tables import deployments, rollouts

SETTINGS = EngineConfig(max_batch_size=4, token_budget=32, kv_cache_bytes=2_000_000)
ASK = GenerationRequest(prompt=(5, 6, 7), max_tokens=3, temperature=0)


@pytest.fixture
def own(gateway: Gateway) -> Iterator[Gateway]:
    """A gateway of the test's own on the same records, which looks only when it is told to."""
    with Workspace(gateway.workspace.settings) as opened:
        made = Gateway(opened, poll_interval_s=60, registry=CollectorRegistry())
        yield made
        made.close(drain=False)
        for status in made.list():
            if status.name != "tiny":
                made.remove(status.name)


def test_records_that_fail_for_one_deployment_leave_the_others_followed(
    own: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    periods = ExperimentStore.periods

    def fails(store: ExperimentStore, deployment: str) -> object:
        if deployment == "a-bad-one":
            raise NoSpace("the records")
        return periods(store, deployment)

    monkeypatch.setattr(ExperimentStore, "periods", fails)
    own.start()
    own.deploy("a-bad-one", "tiny@1", settings=SETTINGS)
    own.deploy("good", "tiny@1", settings=SETTINGS)
    own.wait_ready("good", timeout_s=30)
    assert own._watcher is not None
    assert own._watcher.is_alive()
    assert "route a-bad-one" not in {thread.name for thread in threading.enumerate()}
    monkeypatch.undo()
    own.notify()
    own.wait_ready("a-bad-one", timeout_s=30)


def test_feedback_is_taken_for_what_was_answered_before_the_watcher_has_seen_the_version(own: Gateway) -> None:
    own.start()
    own.deploy("good", "tiny@1", settings=SETTINGS)
    own.wait_ready("good", timeout_s=30)
    own.generate("good", ASK, Sender("early")).result(30)
    own.notify()
    assert own.traffic.feedback("good", "early", {"helpful": 1.0}) == "stable"
    (arm,) = own.traffic.experiment("good").arms
    assert (arm.version, arm.requests) == (1, 1)


def test_measurements_that_cannot_be_stored_hold_up_no_change_of_arms(
    own: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.deploy("good", "tiny@1", settings=SETTINGS)
    own.start()
    own.wait_ready("good", timeout_s=30)
    own.traffic.set_arm("good", "b", "tiny@2", 0.5)
    arm = own._live["good"].routes["b"]
    own.generate("good", ASK).result(30)

    def full(*_: object) -> None:
        raise NoSpace("the records")

    monkeypatch.setattr(ExperimentStore, "save", full)
    own.traffic.remove_arm("good", "b")
    assert set(own._live["good"].routes) == {"stable"}
    assert arm._closing, "what is wanted no more is freed"
    assert own.traffic.experiment("good").arms[0].requests == 0, "a new period has begun"


def test_what_fails_while_arms_are_followed_leaves_no_route_behind(
    own: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.deploy("good", "tiny@1", settings=SETTINGS)
    own.start()
    own.wait_ready("good", timeout_s=30)
    own.traffic.set_arm("good", "b", "tiny@2", 0.5)
    arm = own._live["good"].routes["b"]

    def broken(_: object) -> None:
        raise ArithmeticError("no measure")

    monkeypatch.setattr(LiveDeployment, "_sample", broken)
    own.traffic.remove_arm("good", "b")
    monkeypatch.undo()
    assert arm._closing, "what is wanted no more is freed"


ENDS = """
import sys
from pathlib import Path
from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.serving.engine.config import EngineConfig
from sihe.serving.gateway.gateway import Gateway

home = Path(sys.argv[1])
gateway = Gateway(Workspace(settings.load({"home": str(home)}, environ={}, directory=home)), poll_interval_s=0.02)
gateway.start()
gateway.deploy("good", "tiny@1", settings=EngineConfig(kv_cache_bytes=2_000_000, threads=1))
gateway.wait_ready("good", timeout_s=60)
print("and ends")
"""


def test_an_interpreter_that_ends_without_closing_it_loads_nothing_more(own: Gateway) -> None:
    command = [sys.executable, "-c", ENDS, str(own.workspace.home)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, "and ends" in ended.stdout) == (0, True), ended.stderr
    before, _, after = ended.stdout.partition("and ends")
    assert "version_loading" in before
    assert "version_loading" not in after + ended.stderr
    assert "Fatal" not in ended.stderr


def test_a_canary_that_raises_at_once_has_failed_and_goes_back(own: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    own.deploy("good", "tiny@1", settings=SETTINGS)
    own.start()
    own.wait_ready("good", timeout_s=30)
    tokens = Engine._tokens

    def breaks(engine: Engine, request: GenerationRequest) -> list[int]:
        if engine.name == "tiny@2" and request.prompt == ASK.prompt:
            raise RuntimeError("a tokenizer that does not work")
        return tokens(engine, request)

    monkeypatch.setattr(Engine, "_tokens", breaks)
    gates = Gates(max_latency_ratio=None, max_ttft_ratio=None)
    own.rollouts.start("good", "tiny@2", Plan(steps=(Step(0.9, 1000),), gates=gates))
    own._live["good"].routes["canary"].wait_settled(30)
    own.notify()
    served = {own.generate("good", ASK, Sender(f"r{number}")).result(30).token_ids for number in range(30)}
    own.notify()
    assert len(served) == 1
    last = own.rollouts.history("good")[0]
    assert (last.state, "requests failed" in last.reason) == (RolloutState.ROLLED_BACK, True)


def _endless(gateway: Gateway, name: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """A stream that has begun and never ends by itself."""
    (replica,) = gateway.route(name).replicas()
    stream = gateway.generate(name, GenerationRequest(prompt=(5, 6), max_tokens=100, temperature=0))
    assert stream.next_event(30) is not None
    monkeypatch.setattr(replica.held(), "_step", lambda: None)
    return stream


def test_a_deployment_that_was_removed_does_not_hold_up_the_end(own: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    own.deploy("leaving", "tiny@1", settings=SETTINGS)
    own.start()
    own.wait_ready("leaving", timeout_s=30)
    stream = _endless(own, "leaving", monkeypatch)
    own.remove("leaving")
    own.close(timeout_s=0.0)
    with pytest.raises(EngineClosed):
        while stream.next_event(30) is not None:  # type: ignore[attr-defined]
            continue


def test_all_arms_have_the_same_time_to_end(own: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    own.deploy("good", "tiny@1", settings=SETTINGS)
    own.start()
    own.wait_ready("good", timeout_s=30)
    for arm in ("b", "c"):
        own.traffic.set_arm("good", arm, "tiny@1", 0.3)
        own._live["good"].routes[arm].wait_settled(30)
    stable, together, close = own.route("good"), threading.Barrier(2), Route.close

    def closes(route: Route, *, drain: bool = True, timeout_s: float | None = None) -> None:
        if route is not stable:
            together.wait(30)  # breaks where one waits for the other
        close(route, drain=drain, timeout_s=timeout_s)

    monkeypatch.setattr(Route, "close", closes)
    own._live["good"].close(timeout_s=5)
    assert not together.broken
    assert stable.replicas() == ()


def test_nothing_is_loaded_by_who_waited_for_the_gateway_while_it_closed(own: Gateway) -> None:
    own.start()
    own.close(drain=False)
    own.deploy("late", "tiny@1", settings=SETTINGS)
    own._synchronise()  # as one that had looked whether this serves before it was closed
    assert own.served() == ()


def test_a_record_that_a_newer_version_wrote_stops_only_itself(
    own: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "newer"):
        own.deploy(name, "tiny@1", settings=SETTINGS)
    own.start()
    for name in ("good", "newer"):
        own.wait_ready(name, timeout_s=30)
    with own.workspace.records.transaction() as connection:
        row = deployments.c.name == "newer"
        connection.execute(deployments.update().where(row).values(settings={"speed": 3}))
    for _ in range(3):
        own.notify()
    assert own.generate("newer", ASK).result(30).usage.completion_tokens == 3, "what serves goes on"
    said = capsys.readouterr().out.count("deployment_unreadable")
    assert 1 <= said <= 2, "once, by this gateway and by that of the house"
    own.traffic.set_arm("good", "b", "tiny@2", 0.5)
    assert "b" in own._live["good"].routes, "the others are followed"
    shown = {status.name: status for status in own.list()}
    assert set(shown) >= {"tiny", "good", "newer"}
    assert (shown["good"].error, shown["newer"].state, shown["newer"].version) == (None, DeploymentState.READY, 1)
    assert "'speed'" in str(shown["newer"].error)
    assert "'speed'" in str(own.status("newer").error)
    own.remove("newer")
    assert [status.name for status in own.served() if status.name != "tiny"] == ["good"]


def test_a_rollout_that_cannot_be_read_stops_only_its_deployment(own: Gateway) -> None:
    for name in ("good", "newer"):
        own.deploy(name, "tiny@1", settings=SETTINGS)
    own.start()
    for name in ("good", "newer"):
        own.wait_ready(name, timeout_s=30)
    own.rollouts.start("newer", "tiny@2")
    with own.workspace.records.transaction() as connection:
        row = rollouts.c.deployment == "newer"
        connection.execute(rollouts.update().where(row).values(settings={"speed": 3}))
    own.traffic.set_arm("good", "b", "tiny@2", 0.5)
    assert "b" in own._live["good"].routes, "the others are followed"
    assert "'speed'" in str(own.status("newer").error)
    with pytest.raises(ConfigError, match="speed"):
        own.rollouts.pause("newer")
    with pytest.raises(NotFound):
        own.rollouts.pause("good")
    own.rollouts.roll_back("newer")
    assert set(own._live["newer"].routes) == {"stable"}, "it is followed again"
    (seen,) = [status for status in own.served() if status.name == "newer"]
    assert (seen.error, own.rollouts.history("newer")) == (None, [])
