"""Versions of scikit-learn models beside each other: arms, canaries that arrive and canaries that go back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.serving.api import install_errors, router
from sihe.serving.errors import EngineClosed
from sihe.serving.gateway.gateway import Gateway
from sihe.serving.gateway.route import Route
from sihe.serving.gateway.traffic.rollout import Gates, Plan, RolloutState, Step
from sihe.serving.predictive.backends.sklearn import SklearnBackend
from sihe.serving.predictive.predictor import Predictor
from sihe.serving.predictive.registration import register, save_sklearn
from support.http_server import serving

POISON = -77.0  # a number on which the broken version fails
QUICK = Gates(max_latency_ratio=None, max_ttft_ratio=None)  # what times are worth on a busy machine is not tested here


def line(factor: float, features: int = 1) -> Any:
    """A model that multiplies the sum of its features."""
    rows = np.random.default_rng(0).normal(size=(20, features))
    return make_pipeline(StandardScaler(), LinearRegression()).fit(rows, factor * rows.sum(1))


@dataclass(frozen=True)
class House:
    """`line`: version 1 multiplies by 1, version 2 by 2, version 3 by 3 and wants two features."""

    gateway: Gateway
    url: str

    def ask(self, value: float = 4.0, *, session: str = "", version: str = "", **headers: str) -> httpx.Response:
        path = f"/v2/models/line{f'/versions/{version}' if version else ''}/infer"
        body = {"inputs": [{"name": "input", "shape": [1, 1], "datatype": "FP64", "data": [value]}]}
        given = {"x-sihe-session": session, **headers} if session else headers
        return httpx.post(self.url + path, json=body, headers=given, timeout=30)

    def answer(self, value: float = 4.0, **more: str) -> tuple[str, str, float]:
        """The arm, the version and the factor of one request."""
        response = self.ask(value, **more)
        assert response.status_code == 200, response.text
        said = response.json()
        return response.headers["x-sihe-arm"], said["model_version"], round(said["outputs"][0]["data"][0] / value, 6)

    def until(self, holds: Callable[[], bool]) -> None:
        """Lets the gateway look at the world until something holds."""
        for _ in range(1000):
            self.gateway.notify()
            if holds():
                self.gateway.notify()
                return
            threading.Event().wait(0.01)
        raise AssertionError("it did not come to hold")

    def has_arm(self, arm: str) -> Callable[[], bool]:
        return lambda: any(one.name == arm and one.version is not None for one in self.gateway.status("line").arms)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Requests and errors of each arm in this period."""
        return {one.arm: (one.requests, one.errors) for one in self.gateway.traffic.experiment("line").arms}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("home")
    with Workspace(settings.load({"home": str(root)}, environ={}, directory=root)) as workspace:
        for factor, features in ((1, 1), (2, 1), (3, 2)):
            folder = root / f"line-{factor}"
            save_sklearn(line(factor, features), folder, example=np.ones((2, features)))
            register(workspace.tracking, "line", folder)
        workspace.tracking.set_alias("line", "live", 1)
        with Gateway(workspace, poll_interval_s=0.05, registry=CollectorRegistry()) as gateway:
            app = FastAPI()
            app.include_router(router(gateway))
            install_errors(app)
            with serving(app) as url:
                yield House(gateway, url)


@pytest.fixture
def house(home: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    gateway = home.gateway
    gateway.move_alias("line", "live", 1)
    gateway.deploy("line", "line@live")
    gateway.wait_ready("line", timeout_s=60)
    yield home
    monkeypatch.undo()
    if any(rollout.is_active for rollout in gateway.rollouts.history("line")):
        gateway.rollouts.roll_back("line")
    gateway.remove("line")


@pytest.fixture
def broken(house: House, monkeypatch: pytest.MonkeyPatch) -> int:
    """Version 2 loads and warms, and fails on the poison."""
    run = SklearnBackend.run

    def failing(self: SklearnBackend, inputs: Any, outputs: frozenset[str]) -> Any:
        made = run(self, inputs, outputs)
        rows = inputs["input"]
        if (rows == POISON).any() and np.allclose(made["prediction"], 2 * rows[:, 0]):
            raise ArithmeticError("poisoned")
        return made

    monkeypatch.setattr(SklearnBackend, "run", failing)
    return 2


def test_senders_are_split_by_weight_and_stay_on_their_arm(house: House) -> None:
    house.gateway.traffic.set_arm("line", "b", "line@2", 0.5)
    house.until(house.has_arm("b"))
    first = {f"s{number}": house.answer(session=f"s{number}") for number in range(30)}
    again = {f"s{number}": house.answer(session=f"s{number}") for number in range(30)}
    assert first == again
    assert set(first.values()) == {("stable", "1", 1.0), ("b", "2", 2.0)}
    counts = house.counts()
    assert sum(requests for requests, _ in counts.values()) == 60
    assert counts["b"] == (2 * sum(arm == "b" for arm, _, _ in first.values()), 0)
    latencies = {one.arm: one.latency_p50_s for one in house.gateway.traffic.experiment("line").arms}
    assert all(latency is not None for latency in latencies.values())


def test_a_version_that_is_named_comes_from_its_arm_and_counts_for_none(house: House) -> None:
    house.gateway.traffic.set_arm("line", "b", "line@2", 0.01)
    house.until(house.has_arm("b"))
    assert house.answer(version="2") == ("b", "2", 2.0)
    assert house.answer(version="1") == ("stable", "1", 1.0)
    assert house.ask(version="7").status_code == 404
    assert house.ask(version="²").status_code == 404
    assert set(house.counts().values()) == {(0, 0)}


def test_a_version_that_is_named_is_found_while_arms_go(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.gateway.traffic.set_arm("line", "b", "line@2", 0.01)
    house.until(house.has_arm("b"))
    status, here = Route.status, threading.get_ident()
    routes = dict(house.gateway._live["line"].routes)

    def going(self: Route) -> Any:
        if threading.get_ident() == here:  # as the gateway's own thread would do it
            live = house.gateway._live["line"]
            live._routes = {"stable": live.stable}
        return status(self)

    monkeypatch.setattr(Route, "status", going)
    assert house.gateway.turn("line", version=2).arm == "b"
    monkeypatch.undo()
    house.gateway._live["line"]._routes = routes  # to be freed with the others


def test_what_a_canary_gives_and_json_cannot_carry_is_its_failure(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SklearnBackend.run

    def nothing(self: SklearnBackend, inputs: Any, outputs: frozenset[str]) -> Any:
        made = run(self, inputs, outputs)
        is_second = np.allclose(made["prediction"], 2 * inputs["input"][:, 0])
        return {name: array * np.nan for name, array in made.items()} if is_second else made

    house.gateway.traffic.set_arm("line", "b", "line@2", 0.5)
    house.until(house.has_arm("b"))
    monkeypatch.setattr(SklearnBackend, "run", nothing)
    assert {house.answer(session=f"s{number}") for number in range(20)} == {("stable", "1", 1.0)}
    requests, errors = house.counts()["b"]
    assert requests == errors > 0


def test_what_a_rollout_waited_for_is_said_no_more_when_it_has_ended(house: House) -> None:
    house.gateway.rollouts.start("line", "line@2", Plan(steps=(Step(0.5, 1000, 0),), gates=QUICK))
    house.until(lambda: bool(house.gateway.status("line").rollout_note))
    house.gateway.rollouts.roll_back("line")
    assert house.gateway.status("line").rollout_note == ""


def test_feedback_reaches_the_arm_that_answered(house: House) -> None:
    response = house.ask(**{"x-request-id": "judged"})
    assert response.headers["x-request-id"] == "judged"
    judged = httpx.post(
        f"{house.url}/api/deployments/line/feedback", json={"request_id": "judged", "values": {"right": 1.0}}
    )
    assert judged.status_code == 200, judged.text
    assert judged.json()["arm"] == response.headers["x-sihe-arm"]


def test_a_failing_canary_harms_nobody_and_goes_back(house: House, broken: int) -> None:
    house.gateway.rollouts.start("line", f"line@{broken}", Plan(steps=(Step(0.5, 1000, 0),), gates=QUICK))
    house.until(house.has_arm("canary"))
    for number in range(80):
        arm, version, factor = house.answer(POISON, session=f"s{number}")
        assert (arm, version, factor) == ("stable", "1", 1.0), "the stable version answers for the one that fails"
        house.gateway.notify()
        if not house.gateway.rollouts.active():
            break
    (rollout, *_) = house.gateway.rollouts.history("line")
    assert rollout.state is RolloutState.ROLLED_BACK
    assert "requests failed" in rollout.reason
    assert [arm.name for arm in house.gateway.status("line").arms] == []
    assert house.answer() == ("stable", "1", 1.0)


def test_a_good_canary_becomes_the_stable_version(house: House) -> None:
    house.gateway.rollouts.start("line", "line@2", Plan(steps=(Step(0.5, 10, 0),), gates=QUICK))
    house.until(house.has_arm("canary"))
    for number in range(300):
        assert house.answer(session=f"s{number}")[1:] in {("1", 1.0), ("2", 2.0)}
        house.gateway.notify()
        if not house.gateway.rollouts.active():
            break
    (rollout, *_) = house.gateway.rollouts.history("line")
    assert rollout.state is RolloutState.PROMOTED
    house.gateway.wait_ready("line", timeout_s=60)
    assert house.answer() == ("stable", "2", 2.0)


def test_a_slow_canary_is_rolled_back_by_its_latency(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SklearnBackend.run

    def slow(self: SklearnBackend, inputs: Any, outputs: frozenset[str]) -> Any:
        made = run(self, inputs, outputs)
        if np.allclose(made["prediction"], 2 * inputs["input"][:, 0]):
            threading.Event().wait(0.15)
        return made

    monkeypatch.setattr(SklearnBackend, "run", slow)
    gates = Gates(max_latency_ratio=3.0, max_ttft_ratio=None)
    house.gateway.rollouts.start("line", "line@2", Plan(steps=(Step(0.4, 1000, 0),), gates=gates))
    house.until(house.has_arm("canary"))
    for number in range(400):
        house.answer(session=f"s{number}")
        house.gateway.notify()
        if not house.gateway.rollouts.active():
            break
    (rollout, *_) = house.gateway.rollouts.history("line")
    assert rollout.state is RolloutState.ROLLED_BACK
    assert "latency_s" in rollout.reason


def test_a_canary_that_refuses_what_the_stable_version_takes_is_charged_with_it(house: House) -> None:
    house.gateway.traffic.set_arm("line", "wide", "line@3", 0.5)
    house.until(house.has_arm("wide"))
    answers = [house.answer(session=f"s{number}") for number in range(20)]
    assert set(answers) == {("stable", "1", 1.0)}, "it wants two features; the callers send one"
    requests, errors = house.counts()["wide"]
    assert requests == errors > 0
    assert house.counts()["stable"] == (20 - requests, 0), "answers for another arm count for none"
    for number in range(20):  # what both refuse is the caller's own mistake
        assert house.ask(session=f"t{number}", **{"x-sihe-timeout-ms": "never"}).status_code == 400
    assert house.counts()["wide"] == (requests, errors)


def test_a_version_is_described_by_the_arm_that_serves_it_and_that_is_no_request(house: House) -> None:
    house.gateway.traffic.set_arm("line", "wide", "line@3", 0.5)
    house.until(house.has_arm("wide"))
    for version, features in ((1, 1), (3, 2)):
        said = httpx.get(f"{house.url}/v2/models/line/versions/{version}", timeout=30).json()
        assert (said["versions"], said["inputs"][0]["shape"]) == ([str(version)], [-1, features])
    for absent in ("2", "9" * 5000):
        assert httpx.get(f"{house.url}/v2/models/line/versions/{absent}", timeout=30).status_code == 404
        assert house.ask(version=absent).status_code == 404
    assert set(house.counts().values()) == {(0, 0)}


def test_replicas_that_are_lost_are_asked_no_more(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, lost = Predictor.submit, []

    def once(self: Predictor, request: Any) -> Any:
        if not lost:
            lost.append(self)
            raise EngineClosed("gone")
        return submit(self, request)

    house.gateway.deploy("line", "line@live", replicas=_two())
    house.until(lambda: len(house.gateway.status("line").replicas) == 2)
    house.gateway.wait_ready("line", timeout_s=60)
    house.until(lambda: all(one.state == "READY" for one in house.gateway.status("line").replicas))
    monkeypatch.setattr(Predictor, "submit", once)
    assert house.answer() == ("stable", "1", 1.0)
    assert len(lost) == 1
    assert house.counts()["stable"] == (1, 0)
    assert [replica.in_flight for replica in house.gateway.route("line").replicas()] == [0, 0]


def _two() -> Any:
    from sihe.serving.gateway.replicas.config import ReplicaConfig

    return ReplicaConfig(min_replicas=2, max_replicas=2)
