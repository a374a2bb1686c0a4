"""LoRA adapters of a deployment over HTTP: loaded and unloaded while it serves, named by clients behind a colon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from sihe.serving.gateway.gateway import Gateway


class AdapterBody(BaseModel):
    """POST /api/deployments/{name}/adapters."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="what clients add to the deployment's name, behind a colon")
    folder: str = Field(description="a PEFT folder on the server: adapter_config.json, adapter_model.safetensors")


def add_adapters(routes: APIRouter, gateway: Gateway) -> None:
    """Adds the routes."""
    adapters = gateway.adapters

    @routes.get("/api/deployments/{name}/adapters", tags=["deployments"])
    def list_adapters(name: str) -> dict[str, Any]:
        """Adapters that every replica has."""
        return {"deployment": name, "adapters": adapters.names(name)}

    @routes.post("/api/deployments/{name}/adapters", status_code=201, tags=["deployments"])
    def load_adapter(name: str, body: AdapterBody) -> dict[str, Any]:
        """Loads an adapter into every replica, or into none. It stays, also after a swap or a restart."""
        adapters.load(name, body.name, Path(body.folder))
        return list_adapters(name)

    @routes.delete("/api/deployments/{name}/adapters/{adapter}", status_code=204, tags=["deployments"])
    def unload_adapter(name: str, adapter: str) -> None:
        """Lets no new request use an adapter, waits for those that do, and frees its place."""
        adapters.unload(name, adapter)
