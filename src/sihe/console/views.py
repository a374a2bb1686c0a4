"""Pages out of templates: Jinja with autoescape, in the reader's language and theme, with nothing inline to execute."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sihe.console import formats, prose
from sihe.console.language import TAGS, Language, catalogue, choose, is_language, translate
from sihe.core.clock import Clock
from sihe.version import __version__

STATIC = Path(__file__).parent / "static"
_TEMPLATES = Path(__file__).parent / "templates"
_YEAR_S = 365 * 24 * 3600
THEMES = ("auto", "light", "dark")

NAVIGATION: tuple[tuple[str, str, str], ...] = (  # (key of its name, path, key to press after g)
    ("map", "/", "h"),
    ("runs", "/runs", "r"),
    ("models", "/models", "m"),
    ("playground", "/playground", "p"),
    ("search", "/search", "s"),
    ("coach", "/coach", "c"),
    ("labs", "/labs", "l"),
    ("access", "/access", "k"),
    ("about", "/about", "a"),
)


class Views:
    """Renders templates for requests. `default` is the language of readers who state none."""

    def __init__(self, clock: Clock, default: Language) -> None:
        self._clock = clock
        self._default = default
        self._environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals.update(static=static_url, version=__version__, navigation=NAVIGATION)
        self._environment.filters.update(
            number=formats.number, size=formats.size, markdown=prose.render, inline_markdown=prose.inline
        )

    def language(self, request: Request) -> Language:
        """The language in which this request is answered."""
        return choose(
            query=request.query_params.get("lang"),
            cookie=request.cookies.get("lang"),
            accept=request.headers.get("accept-language"),
            default=self._default,
        )

    def page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """`template` as a response. A `?lang=` or `?theme=` choice is remembered in a cookie."""
        response = HTMLResponse(self.render(request, template, **values), status_code=status)
        response.headers["Cache-Control"] = "no-store"
        response.headers["Vary"] = "Accept-Language, Cookie, HX-Request"
        asked = request.query_params.get("lang")
        if is_language(asked):
            response.set_cookie("lang", asked, max_age=_YEAR_S, samesite="lax", path="/")
        theme = request.query_params.get("theme")
        if theme in THEMES:
            response.set_cookie("theme", theme, max_age=_YEAR_S, samesite="lax", path="/")
        return response

    def render(self, request: Request, template: str, **values: Any) -> str:
        """`template` as HTML, with what every template may use: `t`, `lang`, `theme`, `ago`, `duration`, `metric`."""
        language = self.language(request)
        theme = request.query_params.get("theme") or request.cookies.get("theme")
        now = self._clock.now()
        return self._environment.get_template(template).render(
            t=translator(language),
            lang=language,
            language_tag=TAGS[language],
            theme=theme if theme in THEMES else "auto",
            path=request.url.path,
            partial=is_partial(request),
            ago=lambda moment: formats.ago(moment, now, language),
            duration=lambda span: formats.duration(span, language),
            metric=lambda name: metric_name(name, language),
            now=now,
            **values,
        )


def translator(language: Language) -> Callable[..., str]:
    """`t("runs.title", …)` in `language`."""
    return partial(translate, language)


def metric_name(name: str, language: Language) -> str:
    """A metric in words where the catalogue has them, else the name that the run logged."""
    return catalogue(language).get(f"metric.{name}", name)


def is_partial(request: Request) -> bool:
    """Whether htmx asked for a fragment of the page (not for a whole page that it restores from history)."""
    return "hx-request" in request.headers and "hx-history-restore-request" not in request.headers


@cache
def static_url(name: str) -> str:
    """The address of a static file; it changes with the content, so that browsers may keep the file for good."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"
