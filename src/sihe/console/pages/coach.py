"""`/coach`: the questions with filters; `/coach/{question}`: one, with hints, its answer by sections, and its mark."""

from __future__ import annotations

import re
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from sihe.apps.coach.schema import SECTIONS
from sihe.console.context import Console
from sihe.console.language import Language

Difficulty = Literal["", "easy", "medium", "hard"]


def router(console: Console) -> APIRouter:
    """The routes of the coach's pages."""
    routes = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    return routes


def sections(text: str, language: Language) -> dict[str, str]:
    """The Markdown of a question by section key, without the level-2 headings."""
    headings = {(zh if language == "zh" else en): key for key, zh, en in SECTIONS}
    parts = re.split(r"^## +(.+?) *$", text, flags=re.MULTILINE)
    return {
        headings[title]: body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True) if title in headings
    }
