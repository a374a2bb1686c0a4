"""Predict, run, explain: in that order, graded, tracked, and each learner for himself."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from sihe.apps.coach import commands
from sihe.apps.coach.api import router
from sihe.apps.coach.errors import AttemptClosed, LabFailed, LabParameterInvalid
from sihe.apps.coach.labs import registry
from sihe.apps.coach.labs.types import Measurement
from sihe.apps.coach.service import CoachService
from sihe.core import settings, terminal
from sihe.core.errors import InvalidInput, NotFound
from sihe.core.workspace import Workspace

LAB = "kv.cache"
VALUES = {claim.key: float(place) for place, claim in enumerate(registry.lab(LAB).claims, start=1)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """One for the whole file, because a new database takes seconds: every test has learners of its own."""
    folder = tmp_path_factory.mktemp("coach")
    with Workspace(settings.load({"home": str(folder / "home")}, environ={}, directory=folder)) as opened:
        yield opened


@pytest.fixture
def learner(request: pytest.FixtureRequest) -> str:
    """A learner whom no other test knows."""
    return re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:100]


@pytest.fixture
def coach(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> CoachService:
    """A coach whose `kv.cache` measures 1, 2, 3, … at once; the real measurements have their own tests."""

    def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
        return Measurement(values=VALUES)

    monkeypatch.setitem(registry.MEASURES, LAB, measure)
    return CoachService(workspace)


def failing(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    raise LabFailed("rank 0 stopped")


def test_a_prediction_is_graded_by_the_run_that_follows(
    coach: CoachService, workspace: Workspace, learner: str
) -> None:
    assert VALUES["bytes-measured"] == 1.0
    made = coach.predict(LAB, "bytes-measured", 1.05, learner)
    assert (made.attempt, made.unit, made.verdict) == (1, "MiB", None)
    coach.predict(LAB, "speedup", 500.0, learner)
    result = coach.run_lab(LAB, learner=learner)
    assert {grade.claim: grade.verdict for grade in result.grades} == {"bytes-measured": "close", "speedup": "off"}
    stored = {item.claim: item for item in coach.predictions(LAB, learner)}
    assert (stored["bytes-measured"].actual, stored["bytes-measured"].ratio) == (1.0, 1.05)
    assert stored["speedup"].verdict == "off"
    assert result.run_id is not None
    run = workspace.tracking.run(result.run_id)
    assert (run.experiment, run.name, run.status) == ("labs", LAB, "FINISHED")
    assert run.metrics == VALUES
    assert run.params["longest"] == "512"
    assert coach.result(result.run_id) == result
    assert "1.00 MiB" in result.explanation.en
    assert "1.00 MiB" in result.explanation.zh


def test_a_prediction_may_change_until_the_run_and_not_after_it(coach: CoachService, learner: str) -> None:
    coach.predict(LAB, "bytes-measured", 7.0, learner)
    coach.predict(LAB, "bytes-measured", 1.0, learner, attempt=1)
    (grade,) = coach.run_lab(LAB, learner=learner).grades
    assert grade.predicted == 1.0
    with pytest.raises(AttemptClosed, match=r"attempt 1 at lab kv\.cache does not take predictions"):
        coach.predict(LAB, "bytes-measured", 1.0, learner, attempt=1)
    assert coach.predict(LAB, "bytes-measured", 2.0, learner).attempt == 2
    assert [(item.attempt, item.value) for item in coach.predictions(LAB, learner)] == [(2, 2.0), (1, 1.0)]


def test_a_prediction_during_the_run_does_not_reach_it(
    coach: CoachService, learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the lab measures, its attempt is closed: what is said now belongs to the next one."""
    started, go_on = threading.Event(), threading.Event()

    def slow(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
        started.set()
        assert go_on.wait(30)
        return Measurement(values=VALUES)

    monkeypatch.setitem(registry.MEASURES, LAB, slow)
    coach.predict(LAB, "bytes-measured", 9.0, learner)
    results = []
    thread = threading.Thread(target=lambda: results.append(coach.run_lab(LAB, learner=learner)))
    thread.start()
    assert started.wait(30)
    with pytest.raises(AttemptClosed):
        coach.predict(LAB, "bytes-measured", 1.0, learner, attempt=1)
    assert coach.predict(LAB, "bytes-measured", 1.0, learner).attempt == 2
    go_on.set()
    thread.join()
    assert [grade.predicted for grade in results[0].grades] == [9.0]


def test_two_learners_do_not_see_each_other(coach: CoachService) -> None:
    coach.predict(LAB, "bytes-measured", 1.0, "two-ada")
    coach.predict(LAB, "bytes-measured", 5.0, "two-bo")
    ada = coach.run_lab(LAB, learner="two-ada")
    assert [grade.verdict for grade in ada.grades] == ["close"]
    assert coach.predictions(LAB, "two-bo")[0].verdict is None
    assert coach.attempts("two-bo")[0].state == "open"
    assert coach.attempts("me") == []
    assert (coach.states("two-ada")["serving-latency"], coach.states("two-bo")["serving-latency"]) == ("seen", "new")
    coach.review("serving-latency", 3, "two-ada")
    coach.review("serving-latency", 1, "two-bo")
    assert (coach.states("two-ada")["serving-latency"], coach.states("two-bo")["serving-latency"]) == ("solid", "seen")
    coach.review("serving-latency", 2, "two-ada")
    assert coach.states("two-ada")["serving-latency"] == "seen"


def test_a_run_that_fails_is_recorded_and_keeps_the_predictions(
    coach: CoachService, workspace: Workspace, learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coach.predict(LAB, "bytes-measured", 1.0, learner)
    good = registry.MEASURES[LAB]
    monkeypatch.setitem(registry.MEASURES, LAB, failing)
    with pytest.raises(LabFailed):
        coach.run_lab(LAB, learner=learner)
    mine = [run for run in workspace.tracking.runs("labs") if run.tags["sihe.learner"] == learner]
    assert [run.status for run in mine] == ["FAILED"]
    assert [(attempt.number, attempt.state) for attempt in coach.attempts(learner)] == [(2, "open"), (1, "failed")]
    monkeypatch.setitem(registry.MEASURES, LAB, good)
    assert [grade.predicted for grade in coach.run_lab(LAB, learner=learner).grades] == [1.0]


def test_the_lab_runs_with_what_was_predicted_for(coach: CoachService, learner: str) -> None:
    coach.predict(LAB, "bytes-measured", 8.0, learner, parameters={"longest": "1024"})
    assert coach.run_lab(LAB, learner=learner).parameters == {"longest": 1024, "kv-heads": 2}
    assert coach.run_lab(LAB, learner=learner).parameters == {"longest": 512, "kv-heads": 2}
    assert coach.run_lab(LAB, {"longest": 256}, learner=learner).parameters == {"longest": 256, "kv-heads": 2}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda coach: coach.lab("phlogiston"), NotFound),
        (lambda coach: coach.question("phlogiston"), NotFound),
        (lambda coach: coach.topic("phlogiston"), NotFound),
        (lambda coach: coach.run_lab(LAB, {"longest": 3}), LabParameterInvalid),
        (lambda coach: coach.predict(LAB, "phlogiston", 1.0), LabParameterInvalid),
        (lambda coach: coach.predict(LAB, "bytes-modelled", 1.0), LabParameterInvalid),
        (lambda coach: coach.predict(LAB, "speedup", float("inf")), LabParameterInvalid),
        (lambda coach: coach.predict(LAB, "speedup", 1.0, "../etc"), InvalidInput),
        (lambda coach: coach.review("zero", 5), InvalidInput),
    ],
)
def test_bad_input_is_refused_before_anything_is_stored(
    coach: CoachService, call: Callable[[CoachService], object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(coach)
    assert coach.attempts() == []


def test_grading_stores_nothing(coach: CoachService) -> None:
    assert coach.grade(LAB, "speedup", 10.0, 11.0).verdict == "close"
    assert coach.attempts() == []


def test_a_real_lab_goes_the_whole_way(workspace: Workspace, learner: str) -> None:
    coach = CoachService(workspace)
    coach.predict("attention.cost", "naive-memory-exponent", 2.0, learner)
    result = coach.run_lab("attention.cost", {"longest": 512, "heads": 1, "head-dim": 32}, learner=learner)
    (grade,) = result.grades
    assert grade.verdict == "close"
    assert result.value("difference") < 1e-5
    assert {series.chart for series in result.series} == {"memory", "time"}
    assert result.machine["cores"]


def test_the_routes(coach: CoachService) -> None:
    app = FastAPI()
    app.include_router(router(coach))
    client = TestClient(app)
    assert len(client.get("/api/coach/map").json()["areas"]) == 3
    assert client.get("/api/coach/map.svg?language=zh").headers["content-type"].startswith("image/svg+xml")
    assert client.get("/api/coach/topics/zero").json()["group"] == "distributed-training"
    assert "zero" in [item["id"] for item in client.get("/api/coach/questions").json()]
    assert client.get("/api/coach/questions/zero?language=zh").json()["text"].startswith("## 题目")
    assert len(client.get("/api/coach/labs").json()) == len(registry.LAB_IDS)
    body = {"claim": "bytes-measured", "value": 1.0, "learner": "routes-ada"}
    assert client.post(f"/api/coach/labs/{LAB}/predictions", json=body).json()["attempt"] == 1
    ran = client.post(f"/api/coach/labs/{LAB}/runs", json={"learner": "routes-ada"}).json()
    assert ran["grades"][0]["verdict"] == "close"
    assert client.get(f"/api/coach/runs/{ran['run_id']}").json() == ran
    assert client.get(f"/api/coach/labs/{LAB}/predictions?learner=routes-ada").json()[0]["verdict"] == "close"
    assert (
        client.post(
            "/api/coach/questions/serving-latency/reviews", json={"rating": 4, "learner": "routes-ada"}
        ).status_code
        == 201
    )
    assert client.get("/api/coach/states?learner=routes-ada").json()["serving-latency"] == "solid"
    assert client.post(f"/api/coach/labs/{LAB}/runs", json={"phlogiston": 1}).status_code == 422


def test_the_commands(coach: CoachService, workspace: Workspace, tmp_path: Path) -> None:
    terminal.set_flags({"home": str(workspace.home)})
    try:
        runner = CliRunner()

        def said(app: object, *arguments: str) -> str:
            result = runner.invoke(app, list(arguments), catch_exceptions=False)  # type: ignore[arg-type] # a Typer
            assert result.exit_code == 0, result.output
            return result.output

        assert "zero.memory" in said(commands.lab_app, "list")
        assert "2 · L · H_kv · D · T · b" in said(commands.lab_app, "show", LAB)
        assert "attempt 1" in said(commands.lab_app, "predict", LAB, "bytes-measured", "1", "--learner", "ada")
        ran = json.loads(said(commands.lab_app, "run", LAB, "--learner", "ada", "--set", "kv-heads=1", "--json"))
        assert ran["grades"][0]["verdict"] == "close"
        assert ran["parameters"]["kv-heads"] == 1
        assert "close" not in said(commands.lab_app, "run", LAB, "--learner", "bo")
        assert "zero" in said(commands.coach_app, "list")
        assert said(commands.coach_app, "show", "zero", "--hint", "1").count("\n") < said(
            commands.coach_app, "show", "zero"
        ).count("\n")
        said(commands.coach_app, "review", "serving-latency", "4", "--learner", "ada")
        progress = json.loads(said(commands.coach_app, "progress", "--learner", "ada", "--json"))
        # Solid is serving-latency, which has this lab alone; seen is kv-cache, which has another one too.
        assert progress == {"new": 53, "seen": 1, "solid": 1}
        assert "Distributed training" in said(commands.map_app)
        assert len(json.loads(said(commands.map_app, "--json"))["bank"]) == 30
        said(commands.map_app, "--svg", str(tmp_path / "map.svg"))
        assert (tmp_path / "map.svg").read_text(encoding="utf-8").startswith("<svg")
        refused = runner.invoke(commands.lab_app, ["run", LAB, "--set", "kv-heads"])
        assert refused.exit_code == 2
    finally:
        terminal.set_flags({})
