"""The routes /api/indexes, /api/search and /api/ask. The application maps errors, in one place."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from sihe.apps.rag.service import MAX_K, RagService
from sihe.apps.rag.types import Answer, IndexInfo, Passage


class Question(BaseModel):
    """What to ask of which index."""

    model_config = ConfigDict(extra="forbid")

    index: str
    question: str
    k: int = Field(8, ge=1, le=MAX_K)


def router(service: RagService) -> APIRouter:
    """The routes over `service`."""
    routes = APIRouter(prefix="/api", tags=["rag"])

    @routes.get("/indexes")
    def indexes() -> dict[str, list[IndexInfo]]:
        return {"indexes": service.indexes()}

    @routes.get("/search")
    def search(index: str, q: str, k: Annotated[int, Query(ge=1, le=MAX_K)] = 8) -> dict[str, list[Passage]]:
        return {"passages": service.search(index, q, k)}

    @routes.post("/ask")
    def ask(body: Question) -> Answer:
        return service.ask(body.index, body.question, k=body.k)

    return routes
