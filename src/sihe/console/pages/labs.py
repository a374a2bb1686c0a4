"""`/labs/{lab}`: predict, run, explain. The prediction is stored before anything is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from sihe.apps.coach.labs.types import LabResult, Series
from sihe.console.context import Console
from sihe.console.jobs import Jobs
from sihe.console.language import Language
from sihe.console.stream import event_stream
from sihe.core.errors import NotFound

_LOOK_EVERY_S = 0.25


def router(console: Console) -> APIRouter:
    """The routes of the labs' pages."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    jobs: Jobs[LabResult] = Jobs(console.workspace.clock)

    @routes.get("/labs")
    def labs(request: Request) -> HTMLResponse:
        return console.views.page(request, "labs.html", labs=console.coach.labs(), map=console.coach.map())

    @routes.get("/labs/{name}")
    def lab_page(request: Request, name: str, job: str = "") -> HTMLResponse:
        found = console.coach.lab(name)
        current = jobs.get(job) if job else None
        if current is not None and current.what != name:
            raise NotFound("job", job, hint=f"it belongs to the lab {current.what}")
        language = console.views.language(request)
        result = current.result if current else None
        return console.views.page(
            request,
            "lab.html",
            lab=found,
            job=current,
            result=result,
            charts=charts(result.series, language) if result else [],
            explanation=_explanation(console, found, result, language) if result else "",
            elapsed_s=jobs.elapsed_s(current) if current else 0.0,
            values=current.parameters if current else {},
        )

    @routes.post("/labs/{name}")
    async def run(request: Request, name: str) -> Response:
        form = {key: str(value) for key, value in (await request.form()).items()}
        job = await asyncio.to_thread(_begin, console, jobs, name, form)
        return RedirectResponse(f"/labs/{name}?job={job.id}", status_code=303)

    @routes.get("/labs/{name}/stream")
    async def stream(request: Request, name: str, job: str) -> StreamingResponse:
        return event_stream(_follow(console, request, jobs, jobs.get(job), name))

    return routes


def charts(series: Sequence[Series], language: Language) -> list[dict[str, Any]]:
    """The series of a result grouped into charts, with what the browser draws them from.

    Series of one chart may have different x: they are laid on the union, with gaps.
    """
    drawn = []
    for chart in dict.fromkeys(item.chart for item in series):
        members = [item for item in series if item.chart == chart]
        x = sorted({point[0] for item in members for point in item.points})
        columns = [dict(item.points) for item in members]
        first = members[0]
        drawn.append(
            {
                "key": chart,
                "title": first.y.label.of(language),
                "x": first.x,
                "y": first.y,
                "members": members,
                "x_values": x,
                "rows": [(value, [column.get(value) for column in columns]) for value in x],
                "options": {
                    "labels": [item.label.of(language) for item in members],
                    "xLabel": first.x.label.of(language),
                    "log": first.y.log,
                    "logX": first.x.log,
                    "data": [x, *([column.get(value) for value in x] for column in columns)],
                },
            }
        )
    return drawn
