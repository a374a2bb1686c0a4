"""`/search`: a question, its answer with numbered citations, and every citation in the document that it comes from."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from markupsafe import Markup, escape

from sihe.apps.coach.map import CONTENT
from sihe.apps.rag.types import Answer, IndexReport
from sihe.console.context import Console
from sihe.console.jobs import Job, Jobs
from sihe.console.prose import render_marked
from sihe.console.stream import Event, event_stream, pause
from sihe.core.errors import InvalidInput

_NUMBER = re.compile(r"\[(\d+)\]")
_LOOK_EVERY_S = 0.25
_BEST = "handbook"  # the index that the pages offer first


def router(console: Console) -> APIRouter:
    """The routes of the search pages."""
    jobs: Jobs[IndexReport] = Jobs(console.workspace.clock)
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)

    @routes.get("/search")
    def search(
        request: Request, q: Annotated[str, Query(max_length=2000)] = "", index: str = "", job: str = ""
    ) -> HTMLResponse:
        indexes = sorted(console.rag.indexes(), key=lambda item: (item.name != _BEST, item.name))
        index = index or (indexes[0].name if indexes else "")
        answer, took_s = None, 0.0
        if q.strip() and index:
            began = time.monotonic()
            answer = console.rag.ask(index, q.strip())
            took_s = time.monotonic() - began
        return console.views.page(
            request,
            "search.html",
            indexes=indexes,
            index=index,
            q=q.strip(),
            job=jobs.get(job) if job else None,
            answer=answer,
            answer_html=linked(answer) if answer else "",
            took_s=took_s,
        )

    @routes.post("/search/handbook")
    def index_handbook() -> Response:
        job = jobs.start(_BEST, lambda report: console.rag.index(_BEST, [CONTENT / "handbook"], on_progress=report))
        return RedirectResponse(f"/search?job={job.id}", status_code=303)

    @routes.get("/search/stream")
    async def stream(request: Request, job: str) -> StreamingResponse:
        return event_stream(_follow(console, request, jobs.get(job)))

    @routes.get("/search/{index}/document")
    def document(
        request: Request,
        index: str,
        name: str,
        start: Annotated[int, Query(ge=0)] = 0,
        end: Annotated[int, Query(ge=0)] = 0,
    ) -> HTMLResponse:
        found = console.rag.document(index, name)
        if not start <= end <= len(found.text):
            raise InvalidInput(f"{name} has {len(found.text)} characters, and {start} to {end} is no part of them")
        return console.views.page(
            request,
            "document.html",
            index=index,
            document=found,
            start=start,
            end=end,
            rendered=render_marked(found.text, start, end) if found.name.endswith(".md") else None,
            before=found.text[:start],
            cited=found.text[start:end],
            after=found.text[end:],
        )

    return routes


async def _follow(console: Console, request: Request, job: Job[IndexReport]) -> AsyncIterator[Event]:
    """How far the indexing is, until it has ended."""
    while not job.finished.is_set():
        yield Event("status", {"index-progress": console.views.render(request, "index_progress.html", job=job)})
        if await pause(console.stopping, _LOOK_EVERY_S):
            return
    yield Event("end", {})


def linked(answer: Answer) -> Markup:
    """The answer's text with each `[n]` a link to its citation; a number that no citation has stays text."""
    numbers = {citation.number for citation in answer.citations}

    def link(match: re.Match[str]) -> str:
        number = int(match[1])
        return f'<sup class="cite"><a href="#cite-{number}">[{number}]</a></sup>' if number in numbers else match[0]

    return Markup(_NUMBER.sub(link, str(escape(answer.text))))
