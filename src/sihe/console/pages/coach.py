"""`/coach`: the questions with filters; `/coach/{question}`: one, with hints, its answer by sections, and its mark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from sihe.apps.coach.map import QuestionText
from sihe.apps.coach.schema import SECTIONS, Question, RubricItem
from sihe.apps.coach.types import Map
from sihe.console.context import Console
from sihe.console.language import Language

Difficulty = Literal["", "easy", "medium", "hard"]
_SHARES = {"0": 0.0, "0.5": 0.5, "1": 1.0}  # missed, partly, said it


@dataclass(frozen=True)
class Filters:
    """What the list shows; empty and 0 mean any."""

    area: str
    stars: int
    difficulty: Difficulty
    level: int

    def admit(self, question: Question, field: Map) -> bool:
        """Whether the question fits them all."""
        return (
            self.area in ("", field.area_of(field.group_of(question.topic).id).id)
            and question.stars >= self.stars
            and self.difficulty in ("", question.difficulty)
            and self.level in (0, question.level)
        )


def router(console: Console) -> APIRouter:
    """The routes of the coach's pages."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    field = console.coach.map()

    @routes.get("/coach")
    def questions(
        request: Request,
        area: str = "",
        stars: Annotated[int, Query(ge=0, le=5)] = 0,
        difficulty: Difficulty = "",
        level: Annotated[int, Query(ge=0, le=3)] = 0,
    ) -> HTMLResponse:
        chosen = Filters(area, stars, difficulty, level)
        found = console.coach.questions()
        return console.views.page(
            request,
            "coach.html",
            map=field,
            areas=field.areas,
            chosen=chosen,
            questions=[item for item in found if chosen.admit(item.question, field)],
            total=len(found),
            states=console.coach.states(),
        )

    def show(request: Request, item: QuestionText, given: Mapping[str, str]) -> HTMLResponse:
        language = console.views.language(request)
        return console.views.page(
            request,
            "question.html",
            map=field,
            item=item,
            sections=sections(item.body(language), language),
            references={source.key: f"#source-{source.key}" for source in item.question.sources},
            labs={lab.id: lab for lab in console.coach.labs()},
            given=given,
            mark=mark(item.question, given) if given else None,
            missing=missing(item.question, given),
        )

    @routes.get("/coach/{name}")
    def question(request: Request, name: str) -> HTMLResponse:
        return show(request, console.coach.question(name), {})

    @routes.post("/coach/{name}/mark")
    async def self_mark(request: Request, name: str) -> HTMLResponse:
        item = console.coach.question(name)
        form = await request.form()
        given = {rubric.key: str(form.get(rubric.key, "0")) for rubric in item.question.rubric}
        if "hx-request" in request.headers:
            found, left = mark(item.question, given), missing(item.question, given)
            return console.views.page(request, "mark.html", mark=found, missing=left)
        return show(request, item, given)

    @routes.post("/coach/{name}/review")
    def review(name: str, rating: Annotated[int, Form()]) -> Response:
        console.coach.review(name, rating)
        return RedirectResponse("/coach", status_code=303)

    return routes


def mark(question: Question, given: Mapping[str, str]) -> int:
    """The mark from 0 to 100 for what the reader says to have said of each rubric item."""
    return round(sum(item.weight * _SHARES.get(given.get(item.key, "0"), 0.0) for item in question.rubric))


def missing(question: Question, given: Mapping[str, str]) -> list[RubricItem]:
    """The items that were not said in full, the heaviest first."""
    return sorted((item for item in question.rubric if given.get(item.key) != "1"), key=lambda item: -item.weight)


def sections(text: str, language: Language) -> dict[str, str]:
    """The Markdown of a question by section key, without the level-2 headings."""
    titles = {(zh if language == "zh" else en): key for key, zh, en in SECTIONS}
    heading = "|".join(re.escape(title) for title in titles)
    parts = re.split(rf"^## +({heading}) *$", text, flags=re.MULTILINE)
    return {titles[title]: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}
