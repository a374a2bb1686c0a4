"""Two processes serve one deployment of one workspace: each shows what both have, and both measure one experiment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sklearn.linear_model import LinearRegression

from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.traffic.experiment import ExperimentReport
from sihe.serving.gateway.traffic.rollout import Gates, Plan, RolloutState, Step
from sihe.serving.gateway.types import DeploymentState, DeploymentStatus
from sihe.serving.predictive.backends.sklearn import SklearnBackend
from sihe.serving.predictive.registration import register, save_sklearn
from support.http_server import serving

POISON = -77.0
QUICK = Gates(max_latency_ratio=None, max_ttft_ratio=None)


@dataclass(frozen=True)
class Process:
    """A gateway that looks only when it is told to, behind a server."""

    gateway: Gateway
    client: httpx.Client

    def ask(self, session: str, value: float = 4.0) -> str:
        """The arm that answers."""
        body = {"inputs": [{"name": "input", "shape": [1, 1], "datatype": "FP64", "data": [value]}]}
        headers = {"x-sihe-session": session}
        response = self.client.post("/v2/models/line/infer", json=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.headers["x-sihe-arm"]

    def look(self, *, reports: bool = False) -> None:
        if reports:
            self.gateway._next_report_s = 0.0  # five seconds have passed
        self.gateway.notify()

    def until(self, holds: Callable[[DeploymentStatus], bool]) -> None:
        """Looks until something holds of what this process serves itself."""
        for _ in range(1000):
            self.look()
            if any(holds(status) for status in self.gateway.served()):
                self.look(reports=True)
                return
            threading.Event().wait(0.01)
        raise AssertionError("it did not come to hold")

    def has(self, *versions: int) -> None:
        """Looks until the arms answer with these versions."""
        self.until(lambda status: tuple(arm.version for arm in status.arms) == versions)

    @property
    def report(self) -> ExperimentReport:
        return self.gateway.traffic.experiment("line")

    @property
    def counts(self) -> dict[str, int]:
        return {arm.arm: arm.requests for arm in self.report.arms}


@dataclass(frozen=True)
class Two:
    first: Process
    second: Process
    elsewhere: Gateway

    def look(self) -> None:
        """Both store what they have, and then both see it."""
        for process in (self.first, self.second, self.first):
            process.look(reports=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    root = tmp_path_factory.mktemp("home")
    with Workspace(settings.load({"home": str(root)}, environ={}, directory=root)) as workspace:
        rows = np.random.default_rng(0).normal(size=(20, 1))
        for factor in (1, 2):
            folder = root / f"line-{factor}"
            save_sklearn(LinearRegression().fit(rows, factor * rows.sum(1)), folder, example=rows[:2])
            register(workspace.tracking, "line", folder)
        yield workspace


@pytest.fixture
def two(home: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    home.tracking.set_alias("line", "live", 1)
    elsewhere = Gateway(home)
    elsewhere.deploy("line", "line@live")
    with ExitStack() as stack:
        processes = []
        for _ in range(2):
            workspace = stack.enter_context(Workspace(home.settings))
            gateway = Gateway(workspace, poll_interval_s=600, registry=CollectorRegistry())
            stack.enter_context(gateway)
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            url = stack.enter_context(serving(app))
            processes.append(Process(gateway, stack.enter_context(httpx.Client(base_url=url, timeout=30))))
        for process in processes:
            process.gateway.wait_ready("line", timeout_s=60)
            process.look(reports=True)
        made = Two(processes[0], processes[1], elsewhere)
        made.look()
        yield made
        monkeypatch.undo()
    elsewhere.remove("line")


def test_each_shows_what_both_have(two: Two) -> None:
    for gateway in (two.first.gateway, two.second.gateway, two.elsewhere):
        found = gateway.status("line")
        assert (found.state, found.version, found.error) == (DeploymentState.READY, 1, None)
        assert (found.processes, len(found.replicas)) == (2, 2)
        assert gateway.list() == [gateway.status("line")]
    assert [status.processes for status in two.first.gateway.served()] == [1], "its own"
    two.elsewhere.move_alias("line", "live", 2)
    two.first.until(lambda status: status.version == 2)
    found = two.elsewhere.status("line")
    assert (found.version, {one.version for one in found.replicas} >= {1, 2}) == (1, True), "some callers get version 1"
    two.second.until(lambda status: status.version == 2)
    assert two.elsewhere.status("line").version == 2


def test_both_measure_one_experiment_whose_periods_begin_once(two: Two) -> None:
    two.elsewhere.traffic.set_arm("line", "b", "line@2", 0.5)
    for process in (two.first, two.second):
        process.has(1, 2)
    two.look()
    before = two.first.report.period
    assert two.second.report.period == before
    arms = [two.first.ask(f"s{number}") for number in range(20)]
    arms += [two.second.ask(f"s{number}") for number in range(10, 30)]
    assert arms[10:20] == arms[20:30], "a sender has its arm in both"
    two.look()
    expected = {"stable": arms.count("stable"), "b": arms.count("b")}
    assert two.first.counts == two.second.counts == expected
    assert two.elsewhere.traffic.experiment("line") == two.first.report
    assert two.first.report.mismatch_p_once == two.second.report.mismatch_p_once
    two.first.ask("own")
    assert sum(two.first.counts.values()) == 41, "what it answers itself is there at once"
    two.elsewhere.traffic.set_arm("line", "b", "line@2", 0.3)
    two.second.look()
    assert (two.first.report.period, two.second.report.period) == (before, before + 1)
    two.first.look()
    two.look()
    assert [process.report.period for process in (two.first, two.second)] == [before + 1] * 2
    assert two.first.counts == {"stable": 0, "b": 0}


def test_what_a_process_has_measured_stays_when_it_goes(two: Two) -> None:
    for number in range(5):
        two.first.ask(f"s{number}")
        two.second.ask(f"s{number}")
    two.second.gateway.close()
    found = two.elsewhere.status("line")
    assert (found.processes, len(found.replicas)) == (1, 1)
    two.first.look(reports=True)
    assert two.first.counts == {"stable": 10}
    two.second.gateway.start()  # as another process would
    two.second.gateway.wait_ready("line", timeout_s=60)
    two.second.look()
    assert two.second.counts == {"stable": 10}
    two.second.ask("again")
    two.look()
    assert two.first.counts == two.second.counts == {"stable": 11}
    two.first.gateway.close()
    assert two.elsewhere.status("line").processes == 1
    two.second.gateway.close()
    assert two.elsewhere.status("line").state is DeploymentState.UNSERVED
    assert {arm.arm: arm.requests for arm in two.elsewhere.traffic.experiment("line").arms} == {"stable": 11}


def test_a_canary_goes_back_by_what_another_process_has_seen(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SklearnBackend.run

    def breaks(self: SklearnBackend, inputs: Any, outputs: frozenset[str]) -> Any:
        made = run(self, inputs, outputs)
        if np.any(inputs["input"] == POISON) and np.allclose(made["prediction"], 2 * inputs["input"][:, 0]):
            raise RuntimeError("it fails on some inputs")
        return made

    monkeypatch.setattr(SklearnBackend, "run", breaks)
    two.elsewhere.rollouts.start("line", "line@2", Plan(steps=(Step(0.5, 1000, 0),), gates=QUICK))
    for process in (two.first, two.second):
        process.has(1, 2)
    two.look()
    for number in range(40):
        assert two.second.ask(f"s{number}", POISON) == "stable", "the stable version answers for the one that fails"
    two.second.gateway._save(two.second.gateway._live["line"])  # and it does not look itself
    (rollout, *_) = two.elsewhere.rollouts.history("line")
    assert rollout.state is RolloutState.RUNNING
    two.first.look()
    (rollout, *_) = two.elsewhere.rollouts.history("line")
    assert (rollout.state, "requests failed" in rollout.reason) == (RolloutState.ROLLED_BACK, True)
    assert two.first.ask("s0", POISON) == "stable"
    two.look()
    assert two.second.gateway.status("line").arms == ()


def test_a_canary_goes_on_by_the_requests_of_both(two: Two) -> None:
    two.elsewhere.rollouts.start("line", "line@2", Plan(steps=(Step(0.5, 30, 0),), gates=QUICK))
    for process in (two.first, two.second):
        process.has(1, 2)
    two.look()
    states = []
    for process in (two.first, two.second):
        for number in range(45):  # about half of them by the canary
            process.ask(f"s{number}")
        process.look(reports=True)
        states.append(two.elsewhere.rollouts.history("line")[0].state)
    assert states == [RolloutState.RUNNING, RolloutState.PROMOTED]
    for process in (two.first, two.second):
        process.until(lambda status: status.version == 2 and not status.arms)
    two.look()
    assert two.first.report.period == two.second.report.period
    assert two.elsewhere.status("line").version == 2
