"""`/labs/{lab}`: predict, run, explain. The prediction is stored before anything is measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from markupsafe import Markup

from sihe.apps.coach.gantt import draw_timeline
from sihe.apps.coach.labs.types import LabResult, Series, quantity
from sihe.console.context import Console
from sihe.console.jobs import Job, Jobs
from sihe.console.language import Language
from sihe.console.stream import Event, event_stream, pause
from sihe.core.errors import InvalidInput, NotFound

_LOOK_EVERY_S = 0.25


def router(console: Console) -> APIRouter:
    """The routes of the labs' pages."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    jobs: Jobs[LabResult] = Jobs(console.workspace.clock)

    @routes.get("/labs")
    def labs(request: Request) -> HTMLResponse:
        return console.views.page(request, "labs.html", labs=console.coach.labs(), map=console.coach.map())

    @routes.get("/labs/{name}")
    def lab_page(request: Request, name: str, job: str = "", run: str = "") -> Response:
        lab = console.coach.lab(name)
        current = _of(jobs, job, name) if job else None
        if current is not None and current.result is not None:  # what a run showed has an address that lasts
            return RedirectResponse(f"/labs/{name}?run={current.result.run_id}", status_code=303)
        result = console.coach.result(run) if run else None
        if result is not None and result.lab != name:
            raise NotFound("result", run, hint=f"it belongs to the lab {result.lab}")
        language = console.views.language(request)
        return console.views.page(
            request,
            "lab.html",
            lab=lab,
            quantity=quantity,
            job=current,
            result=result,
            charts=charts(result.series, language) if result else [],
            timelines=[(item, Markup(draw_timeline(item, language=language))) for item in result.timelines]
            if result
            else [],
            elapsed_s=jobs.elapsed_s(current) if current else 0.0,
            questions=[item for item in console.coach.questions() if name in item.question.labs],
            attempts=[item for item in console.coach.attempts(lab=name) if item.state == "done" and item.run_id != run],
        )

    @routes.post("/labs/{name}")
    async def run(request: Request, name: str) -> Response:
        form = {key: str(value) for key, value in (await request.form()).items()}
        job = await asyncio.to_thread(_begin, console, jobs, name, form)
        return RedirectResponse(f"/labs/{name}?job={job.id}", status_code=303)

    @routes.get("/labs/{name}/stream")
    async def stream(request: Request, name: str, job: str) -> StreamingResponse:
        return event_stream(_follow(console, request, jobs, _of(jobs, job, name)))

    return routes


def _begin(console: Console, jobs: Jobs[LabResult], name: str, form: Mapping[str, str]) -> Job[LabResult]:
    """Stores the predictions, then starts the lab. A value that the lab does not take is refused before it runs."""
    lab = console.coach.lab(name)
    parameters = {key.removeprefix("parameter."): value for key, value in form.items() if key.startswith("parameter.")}
    chosen = lab.resolve(parameters)
    for claim in lab.asks:
        said = form.get(f"claim.{claim.key}", "").strip()
        if said and "skip" not in form:
            console.coach.predict(name, claim.key, _number(said), parameters=chosen)
    return jobs.start(name, lambda _report: console.coach.run_lab(name, chosen))


def _of(jobs: Jobs[LabResult], job_id: str, lab: str) -> Job[LabResult]:
    job = jobs.get(job_id)
    if job.what != lab:
        raise NotFound("job", job_id, hint=f"it belongs to the lab {job.what}")
    return job


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidInput(f"a prediction is a number, got {text!r}") from error


async def _follow(
    console: Console, request: Request, jobs: Jobs[LabResult], job: Job[LabResult]
) -> AsyncIterator[Event]:
    """How long a lab has been running, until it has ended."""
    lab = console.coach.lab(job.what)
    while not job.finished.is_set():
        shown = console.views.render(request, "lab_progress.html", job=job, lab=lab, elapsed_s=jobs.elapsed_s(job))
        yield Event("status", {"lab-progress": shown})
        if await pause(console.stopping, _LOOK_EVERY_S):
            return
    yield Event("end", {})


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
