"""`/`: the map; `/topics/{topic}`: one node of it; `/handbook/{group}`: the chapter that explains its group."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from sihe.apps.coach.drawing import draw_map
from sihe.apps.coach.map import CONTENT
from sihe.console.context import Console
from sihe.core.errors import NotFound

_COLUMNS = (3, 2, 1)  # one drawing for each width of screen; the style sheet shows the one that fits


def router(console: Console) -> APIRouter:
    """The routes of the map."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    field = console.coach.map()

    @routes.get("/")
    def the_map(request: Request) -> HTMLResponse:
        language = console.views.language(request)
        states = console.coach.states()
        drawings = {
            columns: Markup(draw_map(field, language=language, states=states, columns=columns, standalone=False))
            for columns in _COLUMNS
        }
        running = sum(topic.capability.runs for topic in field.topics.values())
        return console.views.page(request, "map.html", map=field, drawings=drawings, running=running)

    @routes.get("/topics/{name}")
    def topic(request: Request, name: str) -> HTMLResponse:
        if name not in field.topics:
            raise NotFound("topic", name, hint="the map shows them all")
        group = field.group_of(name)
        return console.views.page(
            request,
            "topic.html",
            map=field,
            topic=field.topics[name],
            group=group,
            area=field.area_of(group.id),
            path_there=field.path_to(name)[:-1],
            leads_to=[other for other in field.topics.values() if name in other.prerequisites],
            questions=[item for item in console.coach.questions() if item.question.topic == name],
            labs={lab.id: lab for lab in console.coach.labs()},
        )

    @routes.get("/handbook/{group}")
    def chapter(request: Request, group: str) -> HTMLResponse:
        order = [item.id for item in field.groups]
        if group not in order:
            raise NotFound("chapter", group, hint=f"there are {', '.join(order)}")
        language = console.views.language(request)
        file = CONTENT / "handbook" / language / f"{order.index(group) + 1:02d}-{group}.md"
        title, _, body = file.read_text(encoding="utf-8").partition("\n")
        place = order.index(group)
        return console.views.page(
            request,
            "chapter.html",
            title=title.lstrip("# ").strip(),
            body=body,
            area=field.area_of(group),
            topics=field.groups[place].topics,
            before=field.groups[place - 1] if place else None,
            after=field.groups[place + 1] if place + 1 < len(order) else None,
        )

    return routes
