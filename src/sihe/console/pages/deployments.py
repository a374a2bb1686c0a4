"""`/models/deployments/<name>`: a deployment's arms live and beside each other, its rollout, and what steers both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from sihe.console.context import Console
from sihe.console.stream import Event, event_stream, pause
from sihe.core.errors import InvalidInput, NotFound, UserError
from sihe.serving.gateway.traffic.experiment import ExperimentReport
from sihe.serving.gateway.traffic.pulse import Sample
from sihe.serving.gateway.traffic.rollout import Gates, Plan, Step
from sihe.serving.gateway.traffic.types import SHADOW
from sihe.serving.gateway.types import DeploymentStatus

MEASURES = ("requests_per_s", "ttft_s", "tpot_s", "in_hand", "kv_used")
_LOOK_EVERY_S = 1.0
_ROWS = 20

Text = Annotated[str, Form()]
Number = Annotated[float, Form()]


def router(console: Console) -> APIRouter:
    """The routes of the page and its forms."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False, prefix="/models/deployments")
    gateway = console.gateway

    @routes.get("/{name}")
    def deployment(request: Request, name: str) -> HTMLResponse:
        status = gateway.status(name)
        model = status.target.partition("@")[0]
        versions = console.workspace.tracking.model_versions(model)
        references = [version.key.removeprefix("model:") for version in versions]
        try:
            found = {
                "policy": gateway.traffic.policy(name),
                "history": [rollout for rollout in gateway.rollouts.history(name) if not rollout.is_active][:5],
                "logs": gateway.traffic.logs(name, limit=_ROWS),
                **_live(console, name),
            }
        except NotFound:
            raise
        except UserError as error:
            return _unreadable(console, request, status, references, error)
        return console.views.page(
            request, "deployment.html", deployment=status, measures=MEASURES, references=references, **found
        )

    @routes.get("/{name}/stream")
    async def stream(request: Request, name: str) -> StreamingResponse:
        await asyncio.to_thread(gateway.status, name)
        return event_stream(_follow(console, request, name))

    @routes.post("/{name}/rollout")
    def start(
        name: str, target: Text, steps: Text, min_requests: Annotated[int, Form()], min_s: Number, max_error: Number
    ) -> Response:
        plan = Plan(
            steps=tuple(Step(share, min_requests, min_s) for share in _shares(steps)), gates=Gates(max_error / 100)
        )
        gateway.rollouts.start(name, target, plan)
        return _back(name, "rollout")

    @routes.post("/{name}/rollout/{action}")
    def steer(name: str, action: Literal["promote", "rollback", "pause", "resume"]) -> Response:
        if action == "promote":
            gateway.rollouts.promote(name)
        elif action == "rollback":
            gateway.rollouts.roll_back(name)
        else:
            gateway.rollouts.pause(name, paused=action == "pause")
        return _back(name, "rollout")

    @routes.post("/{name}/arms")
    def set_arm(name: str, arm: Text, target: Text, share: Number) -> Response:
        gateway.traffic.set_arm(name, arm.strip(), target, share / 100)
        return _back(name, "arms")

    @routes.post("/{name}/arms/{arm}/remove")
    def remove_arm(name: str, arm: str) -> Response:
        gateway.traffic.remove_arm(name, arm)
        return _back(name, "arms")

    @routes.post("/{name}/shadow")
    def set_shadow(name: str, target: Text, share: Number) -> Response:
        gateway.traffic.set_shadow(name, target, share=share / 100)
        return _back(name, "arms")

    @routes.post("/{name}/logs")
    def set_logs(
        name: str,
        share: Number,
        text: Annotated[bool, Form()] = False,
        keep_days: Annotated[int | None, Form()] = None,
    ) -> Response:
        gateway.traffic.set_logs(name, share / 100, text=text, keep_days=keep_days)
        return _back(name, "logs")

    return routes


def _unreadable(
    console: Console, request: Request, status: DeploymentStatus, references: list[str], error: UserError
) -> HTMLResponse:
    """What can be done where the records hold what this version of the house does not understand."""
    faults: dict[str, Exception] = {}
    active = console.gateway.rollouts.active(faults.__setitem__)
    return console.views.page(
        request,
        "deployment_unreadable.html",
        deployment=status,
        fault=str(error),
        references=references,
        has_rollout=status.name in active or status.name in faults,
    )


def _live(console: Console, name: str) -> dict[str, Any]:
    """What changes while one looks on."""
    traffic = console.gateway.traffic
    report: ExperimentReport | None
    try:
        report = traffic.experiment(name)
    except NotFound:
        report = None
    return {
        "report": report,
        "rollout": console.gateway.rollouts.find(name),
        "note": console.gateway.status(name).rollout_note,
        "shadow": traffic.shadow(name),
    }


async def _follow(console: Console, request: Request, name: str) -> AsyncIterator[Event]:
    """The page's parts as they change, and the curves of the last minutes."""
    shown: dict[str, str] = {}
    while True:
        began = time.monotonic()
        try:
            parts, curves = await asyncio.to_thread(_look, console, request, name)
        except UserError:  # it was removed, or cannot be read any more
            yield Event("end", None)
            return
        changed = {part: html for part, html in parts.items() if shown.get(part) != html}
        if changed:
            yield Event("status", changed)
            shown |= changed
        if curves["seconds"]:
            yield Event("samples", curves)
        if await pause(console.stopping, max(_LOOK_EVERY_S, 10 * (time.monotonic() - began))):
            return


def _look(console: Console, request: Request, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    status, live = console.gateway.status(name), _live(console, name)
    parts = {
        "state": console.views.render(request, "deployment_state.html", deployment=status),
        "arms-table": console.views.render(request, "arms_table.html", deployment=status, **live),
        "arms-differences": console.views.render(request, "arms_differences.html", **live),
        "rollout-state": console.views.render(request, "rollout_state.html", **live),
        "rollout-buttons": console.views.render(request, "rollout_buttons.html", deployment=status, **live),
    }
    return parts, curves_of(console.gateway.traffic.pulse(name))


def curves_of(samples: list[Sample]) -> dict[str, Any]:
    """Seconds before now, and for each measure a series an arm; None where an arm has no value."""
    arms = list(samples[-1].arms) if samples else []
    arms.sort(key=lambda arm: arm == SHADOW)
    return {
        "arms": arms,
        "seconds": [round(sample.at_s - samples[-1].at_s, 1) for sample in samples],
        "series": {
            measure: {
                arm: [getattr(sample.arms[arm], measure) if arm in sample.arms else None for sample in samples]
                for arm in arms
            }
            for measure in MEASURES
        },
    }


def _shares(steps: str) -> list[float]:
    """`5, 25, 50` (per cent) as shares. Raises `InvalidInput`."""
    try:
        return [float(part) / 100 for part in steps.replace("，", ",").split(",")]
    except ValueError as error:
        raise InvalidInput(f"steps are numbers with commas between them, got {steps!r}") from error


def _back(name: str, anchor: str) -> Response:
    return RedirectResponse(f"/models/deployments/{name}#{anchor}", status_code=303)
