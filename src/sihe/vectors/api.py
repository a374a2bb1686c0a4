"""The routes under /api/collections. Errors are left to the application, which maps them in one place."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from sihe.vectors.database import Database
from sihe.vectors.types import CollectionInfo, Hit, Metric, Point, PointId


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewCollection(_Body):
    """The form of a collection."""

    dim: int
    metric: Metric = "cosine"


class Points(_Body):
    """Points to write."""

    ids: list[PointId]
    vectors: list[list[float]]
    payloads: list[dict[str, Any] | None] | None = None


class Ids(_Body):
    """Names of points."""

    ids: list[PointId]


class SearchRequest(_Body):
    """A vector to search for."""

    vector: list[float]
    k: int = Field(10, ge=1, le=10_000)
    filter: dict[str, Any] | None = None


class ScrollRequest(_Body):
    """Which part of a collection to list."""

    limit: int = Field(100, ge=1, le=10_000)
    after: PointId | None = None
    filter: dict[str, Any] | None = None
    with_vectors: bool = False


def router(database: Database) -> APIRouter:
    """The routes over `database`."""
    routes = APIRouter(prefix="/api/collections", tags=["vectors"])

    @routes.get("")
    def list_collections() -> dict[str, list[CollectionInfo]]:
        return {"collections": [database.collection(name).info() for name in database.names()]}

    @routes.put("/{name}", status_code=201)
    def create(name: str, body: NewCollection) -> CollectionInfo:
        return database.create(name, body.dim, body.metric).info()

    @routes.get("/{name}")
    def describe(name: str) -> CollectionInfo:
        return database.collection(name).info()

    @routes.delete("/{name}")
    def drop(name: str) -> dict[str, bool]:
        database.drop(name)
        return {"dropped": True}

    @routes.post("/{name}/points")
    def upsert(name: str, body: Points) -> dict[str, int]:
        inserted = database.collection(name).upsert(body.ids, body.vectors, body.payloads)
        return {"written": len(body.ids), "inserted": inserted}

    @routes.post("/{name}/points/get")
    def get(name: str, body: Ids) -> dict[str, list[dict[str, Any]]]:
        return {"points": [_point(point, with_vector=True) for point in database.collection(name).get(body.ids)]}

    @routes.post("/{name}/points/delete")
    def delete(name: str, body: Ids) -> dict[str, int]:
        return {"deleted": database.collection(name).delete(body.ids)}

    @routes.post("/{name}/search")
    def search(name: str, body: SearchRequest) -> dict[str, list[Hit]]:
        return {"hits": database.collection(name).search(np.asarray(body.vector), body.k, body.filter)}

    @routes.post("/{name}/scroll")
    def scroll(name: str, body: ScrollRequest) -> dict[str, Any]:
        page = database.collection(name).scroll(body.limit, body.after, body.filter)
        return {"points": [_point(point, with_vector=body.with_vectors) for point in page.points], "next": page.next}

    return routes


def _point(point: Point, *, with_vector: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"id": point.id, "payload": point.payload}
    return {**plain, "vector": point.vector.tolist()} if with_vector else plain
