"""LoRA adapters of a deployment over HTTP: loaded and unloaded while it serves, named by clients behind a colon.

What is loaded here lasts as long as the replicas that hold it: a deployment's settings (`adapters`) say what every new
replica begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from sihe.serving.engine.adapters import EngineAdapters
from sihe.serving.errors import UnsupportedParameter
from sihe.serving.gateway.gateway import Gateway


class AdapterBody(BaseModel):
    """POST /api/deployments/{name}/adapters."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="what clients add to the deployment's name, behind a colon")
    folder: str = Field(description="a PEFT folder on the server: adapter_config.json, adapter_model.safetensors")


def add_adapters(routes: APIRouter, gateway: Gateway) -> None:
    """Adds the routes."""

    @routes.get("/api/deployments/{name}/adapters", tags=["deployments"])
    def list_adapters(name: str) -> dict[str, Any]:
        """Adapters that every replica has."""
        held = [set(adapters.names) for adapters in _of_replicas(gateway, name)]
        return {"deployment": name, "adapters": sorted(set.intersection(*held)) if held else []}

    @routes.post("/api/deployments/{name}/adapters", status_code=201, tags=["deployments"])
    def load_adapter(name: str, body: AdapterBody) -> dict[str, Any]:
        """Loads an adapter into every replica, or into none."""
        loaded: list[EngineAdapters] = []
        try:
            for adapters in _of_replicas(gateway, name):
                adapters.load(body.name, Path(body.folder))
                loaded.append(adapters)
        except BaseException:
            _each(loaded, lambda adapters: adapters.unload(body.name))
            raise
        return list_adapters(name)

    @routes.delete("/api/deployments/{name}/adapters/{adapter}", status_code=204, tags=["deployments"])
    def unload_adapter(name: str, adapter: str) -> None:
        """Lets no new request use an adapter, waits for those that do, and frees its place."""
        _each(_of_replicas(gateway, name), lambda adapters: adapters.unload(adapter))


def _of_replicas(gateway: Gateway, name: str) -> list[EngineAdapters]:
    """The adapters of each replica. Raises `NotFound`, `NotReady`, `UnsupportedParameter` where one has none."""
    found: list[EngineAdapters] = []
    for replica in gateway.route(name).replicas():
        if replica.is_serving:
            adapters = getattr(replica.held(), "adapters", None)
            if not isinstance(adapters, EngineAdapters):
                raise UnsupportedParameter("adapter", name, hint="its replicas take no adapters at run time")
            found.append(adapters)
    return found


def _each(all_adapters: list[EngineAdapters], work: Callable[[EngineAdapters], None]) -> None:
    """Does the work for each, and raises the first failure when all have been tried."""
    failures: list[Exception] = []
    for adapters in all_adapters:
        try:
            work(adapters)
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)
    if failures:
        raise failures[0]
