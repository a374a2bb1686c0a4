"""`/about`: what this workspace is made of, with every setting resolved and secrets masked."""

from __future__ import annotations

import os
import platform
import sys

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from sihe.console.context import Console
from sihe.core.settings import environment_name, known_keys


def router(console: Console) -> APIRouter:
    """The route of the about page."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)

    @routes.get("/about")
    def about(request: Request) -> HTMLResponse:
        public = console.workspace.settings.public()
        rows = []
        for key in known_keys():
            section, _, inner = key.rpartition(".")
            value = (public[section] if section else public)[inner]
            rows.append((key, environment_name(key), value))
        machine = {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "home": str(console.workspace.home),
        }
        return console.views.page(request, "about.html", settings=rows, machine=machine)

    return routes
