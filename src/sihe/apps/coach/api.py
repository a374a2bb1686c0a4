"""The coach's HTTP routes, under `/api/coach`. Errors are mapped where the application is put together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict

from sihe.apps.coach.drawing import draw_map
from sihe.apps.coach.labs.types import Lab, LabResult
from sihe.apps.coach.map import questions_of
from sihe.apps.coach.schema import Question
from sihe.apps.coach.service import CoachService
from sihe.apps.coach.types import Map, TopicState

Learner = Annotated[str, Query(description="whose history")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PredictionBody(_Body):
    """A prediction for one claim of a lab."""

    claim: str
    value: float
    learner: str = "me"
    parameters: dict[str, float] | None = None
    attempt: int | None = None


class RunBody(_Body):
    """A request to run a lab."""

    parameters: dict[str, float] | None = None
    learner: str = "me"


class ReviewBody(_Body):
    """How well a question was recalled, 1 to 4."""

    rating: int
    learner: str = "me"


def router(coach: CoachService) -> APIRouter:
    """The routes over one coach."""
    routes = APIRouter(prefix="/api/coach", tags=["coach"])
    _content_routes(routes, coach)
    _lab_routes(routes, coach)
    return routes


def _content_routes(routes: APIRouter, coach: CoachService) -> None:
    @routes.get("/map")
    def the_map() -> Map:
        return coach.map()

    @routes.get("/map.svg")
    def the_drawing(language: Literal["zh", "en"] = "en", learner: Learner = "me") -> Response:
        drawn = draw_map(coach.map(), language=language, states=coach.states(learner))
        return Response(drawn, media_type="image/svg+xml")

    @routes.get("/topics/{name}")
    def topic(name: str, learner: Learner = "me") -> dict[str, Any]:
        found = coach.topic(name)
        field = coach.map()
        group = field.group_of(name)
        return {
            "topic": found.model_dump(mode="json"),
            "area": field.area_of(group.id).id,
            "group": group.id,
            "questions": list(questions_of(name)),
            "path": [step.id for step in field.path_to(name)],
            "state": coach.states(learner)[name],
        }

    @routes.get("/states")
    def states(learner: Learner = "me") -> dict[str, TopicState]:
        return coach.states(learner)

    @routes.get("/questions")
    def questions() -> list[Question]:
        return [item.question for item in coach.questions()]

    @routes.get("/questions/{name}")
    def question(name: str, language: Literal["zh", "en"] = "en") -> dict[str, Any]:
        found = coach.question(name)
        return {"question": found.question.model_dump(mode="json"), "text": found.body(language)}

    @routes.post("/questions/{name}/reviews", status_code=201)
    def review(name: str, body: ReviewBody) -> dict[str, str]:
        coach.review(name, body.rating, body.learner)
        return {"question": name}


def _lab_routes(routes: APIRouter, coach: CoachService) -> None:
    @routes.get("/labs")
    def labs() -> list[Lab]:
        return list(coach.labs())

    @routes.get("/labs/{name}")
    def lab(name: str) -> Lab:
        return coach.lab(name)

    @routes.post("/labs/{name}/predictions", status_code=201)
    def predict(name: str, body: PredictionBody) -> dict[str, Any]:
        made = coach.predict(
            name, body.claim, body.value, body.learner, parameters=body.parameters, attempt=body.attempt
        )
        return {"attempt": made.attempt, "claim": made.claim, "value": made.value, "unit": made.unit}

    @routes.get("/labs/{name}/predictions")
    def predictions(name: str, learner: Learner = "me") -> list[dict[str, Any]]:
        return [vars(item) for item in coach.predictions(name, learner)]

    @routes.post("/labs/{name}/runs", status_code=201)
    def run(name: str, body: RunBody) -> LabResult:
        return coach.run_lab(name, body.parameters, learner=body.learner)

    @routes.get("/runs/{run_id}")
    def result(run_id: str) -> LabResult:
        return coach.result(run_id)
