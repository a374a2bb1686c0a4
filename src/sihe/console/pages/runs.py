"""`/runs`: every run with its loss; `/runs/{id}`: its live curves, parameters, lineage and artifacts."""

from __future__ import annotations

import asyncio
import mimetypes
import time
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from sihe.console.context import Console
from sihe.console.curves import RunCurves, in_order, thin
from sihe.console.drawing import draw_lineage, draw_sparkline
from sihe.console.formats import number
from sihe.console.recoveries import Recoveries, status_of
from sihe.console.stream import Event, event_stream, pause
from sihe.console.views import translator
from sihe.core.tracking import Run

_SPARK_POINTS = 60
_MOST_TILES = 6
_SLOWEST_S, _FASTEST_S = 5.0, 0.5
_BUSY_SHARE = 0.1  # of one thread, at most, goes to following one run
# An artifact may be a page that somebody wrote: it is shown with no rights at all.
_ARTIFACT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
_SHOWN_TYPES = ("text/", "image/", "application/json", "application/pdf")


def router(console: Console) -> APIRouter:
    """The routes of the runs pages."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    tracking = console.workspace.tracking

    @lru_cache(maxsize=512)
    def finished_losses(run_id: str, _ended_at: object) -> tuple[float, ...]:
        return tuple(point.value for point in thin(tracking.history(run_id, "loss"), _SPARK_POINTS))

    def losses(run: Run) -> tuple[float, ...]:
        if "loss" not in run.metrics:
            return ()
        if run.ended_at is not None:
            return finished_losses(run.id, run.ended_at)
        return tuple(point.value for point in thin(tracking.history(run.id, "loss"), _SPARK_POINTS))

    @routes.get("/runs")
    def runs(request: Request, experiment: str = "", limit: Annotated[int, Query(ge=1, le=500)] = 50) -> HTMLResponse:
        t = translator(console.views.language(request))
        found = tracking.runs(experiment or None, limit=limit)
        sparks = {}
        for run in found:
            values = losses(run)
            label = t("runs.spark", first=number(values[0]), last=number(values[-1])) if values else ""
            sparks[run.id] = draw_sparkline(values, label)
        names = sorted({run.experiment for run in (found if not experiment else tracking.runs(limit=500))})
        return console.views.page(
            request,
            "runs.html",
            runs=found,
            states={run.id: status_of(console.workspace, run) for run in found},
            sparks=sparks,
            experiment=experiment,
            experiments=names,
            limit=limit,
        )

    @routes.get("/runs/{run_id}")
    def run_page(request: Request, run_id: str) -> HTMLResponse:
        t = translator(console.views.language(request))
        run = tracking.run(run_id)
        key = f"run:{run.id}"
        edges = tracking.ancestors(key) + tracking.descendants(key)
        lineage = (
            draw_lineage(edges, key, lambda kind: _kind(t, kind), t("run.lineage"), names={key: run.name})
            if edges
            else ""
        )
        curves = [name for name in in_order(run.metrics) if _is_curve(tracking.history(run_id, name))]
        return console.views.page(
            request,
            "run.html",
            run=run,
            curves=curves,
            restarts=Recoveries(console.workspace, run_id).steps(),
            state=status_of(console.workspace, run),
            metrics=run.metrics,
            tiles=_tiles(run),
            others={name: run.metrics[name] for name in in_order(run.metrics)[_MOST_TILES:]},
            lineage=lineage,
            artifacts=tracking.artifacts(run_id),
        )

    @routes.get("/runs/{run_id}/stream")
    async def stream(request: Request, run_id: str) -> StreamingResponse:
        await asyncio.to_thread(tracking.run, run_id)  # an unknown run is a 404, not a broken stream
        return event_stream(_follow(console, request, run_id))

    @routes.get("/runs/{run_id}/artifacts/{name:path}")
    def artifact(run_id: str, name: str) -> Response:
        data = tracking.artifact(run_id, name)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"Content-Security-Policy": _ARTIFACT_POLICY}
        if not kind.startswith(_SHOWN_TYPES):
            headers["Content-Disposition"] = "attachment"
        return Response(data, media_type=kind, headers=headers)

    return routes


async def _follow(console: Console, request: Request, run_id: str) -> AsyncIterator[Event]:
    """Curves and status of a run until it ends; it looks less often where looking is slow."""
    curves = RunCurves(console.workspace.tracking, run_id)
    recoveries = Recoveries(console.workspace, run_id)
    whole, shown = True, None
    while True:
        began = time.monotonic()
        run = await asyncio.to_thread(console.workspace.tracking.run, run_id)
        series = await asyncio.to_thread(curves.changes, run)
        if series or whole:
            yield Event(
                "curves", {"whole": whole, "series": series, "restarts": await asyncio.to_thread(recoveries.steps)}
            )
            whole = False
        status = await asyncio.to_thread(status_of, console.workspace, run)
        state: Mapping[str, Any] = {
            "run-status": console.views.render(request, "run_status.html", run=run, state=status),
            "run-tiles": console.views.render(request, "run_tiles.html", tiles=_tiles(run)),
        }
        if state != shown:
            yield Event("status", state)
            shown = state
        if run.status not in ("RUNNING", "SCHEDULED"):
            yield Event("end", {})
            return
        spent = time.monotonic() - began
        if await pause(console.stopping, min(_SLOWEST_S, max(_FASTEST_S, spent / _BUSY_SHARE))):
            return


def _tiles(run: Run) -> dict[str, float]:
    return {name: run.metrics[name] for name in in_order(run.metrics)[:_MOST_TILES]}


def _is_curve(points: list[Any]) -> bool:
    return len(points) > 1


def _kind(t: Any, kind: str) -> str:
    known = {"run", "model", "dataset", "table", "files", "index", "checkpoint"}
    return t(f"lineage.{kind}") if kind in known else kind
